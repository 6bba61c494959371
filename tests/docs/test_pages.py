"""The Python of every page runs, block after block in one namespace, and ends in assertions."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```python\b[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> list[tuple[int, str]]:
    """Return the fenced Python blocks of a page, each with the number of its first line."""
    return [
        (text.count("\n", 0, found.start("code")) + 1, textwrap.dedent(found["code"])) for found in FENCE.finditer(text)
    ]


def run(page: str, text: str) -> dict[str, object]:
    """Run a page from top to bottom and return what its names stand for."""
    names: dict[str, object] = {"__name__": "__page__"}
    for line, code in blocks(text):
        # Shifted, so that a traceback points into the page.
        exec(compile("\n" * (line - 1) + code, page, "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")  # PEFT, of transformers
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p.read_text(encoding="utf-8"))], ids=lambda p: p.stem)
def test_a_page_runs_and_ends_in_assertions(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text(encoding="utf-8")
    last = ast.unparse(ast.parse(blocks(text)[-1][1]).body[-1])
    assert last.startswith(("assert ", "torch.testing.assert_close(")), "a page ends in what it has shown"
    monkeypatch.chdir(tmp_path)
    try:
        run(str(page), text)
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_pages_that_must_run_are_found() -> None:
    found = {p.relative_to(ROOT).as_posix() for p in PAGES if blocks(p.read_text(encoding="utf-8"))}
    assert {"README.md", "docs/derivations/five-ways.md"} < found
    assert {f"docs/tutorials/{name}.md" for name in ("first-steps", "published-models")} < found


PAGE = """
```python
x = 1
```

1. Inside a list:

    ```python
    y = x + 1
    ```

```text
not = python
```

```python
assert y == {expected}
```
"""


def test_blocks_share_their_names_and_other_fences_are_left_alone() -> None:
    assert [code for _, code in blocks(PAGE)] == ["x = 1\n", "y = x + 1\n", "assert y == {expected}\n"]
    assert run("page.md", PAGE.format(expected=2))["y"] == 2


def test_a_false_page_fails_at_its_line() -> None:
    with pytest.raises(AssertionError) as caught:
        run("page.md", PAGE.format(expected=3))
    assert caught.traceback[-1].lineno + 1 == PAGE.split("\n").index("assert y == {expected}") + 1
