"""Files of at most 400 lines and functions of at most 80, unless a reason stands here."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
FILE_LINES, FUNCTION_LINES = 400, 80

# "longstate/…/file.py" or "longstate/…/file.py:function": the reason, such as a reader would accept.
REASONS: dict[str, str] = {
    "longstate/ops/linear_attention/_triton_by_head.py:half": "one loop over heads, whose values live in registers",
}


def oversized(name: str, text: str) -> dict[str, int]:
    """Return what is too long in a file: itself, or its functions, with their lengths."""
    length = len(text.splitlines())
    found = {name: length} if length > FILE_LINES else {}
    for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found[f"{name}:{node.name}"] = length
    return found


def test_nothing_is_over_its_size_without_a_reason() -> None:
    found: dict[str, int] = {}
    for path in sorted(SOURCE.rglob("*")):
        if path.suffix in {".py", ".pyi", ".cpp", ".cc", ".h", ".hpp", ".cu"}:
            found |= oversized(path.relative_to(SOURCE).as_posix(), path.read_text(encoding="utf-8"))
    assert {name: lines for name, lines in found.items() if name not in REASONS} == {}
    assert set(REASONS) <= set(found), "a reason for something that is no longer too long"
    assert all(reason.strip() for reason in REASONS.values())


def test_what_is_too_long_is_seen() -> None:
    body = "\n    pass" * FUNCTION_LINES
    assert oversized("a.py", f"def f():{body}") == {"a.py:f": 81}
    assert oversized("a.py", f"class A:\n  async def f():{body}") == {"a.py:f": 81}
    assert oversized("a.py", "x = 1\n" * 401) == {"a.py": 401}
    assert oversized("a.cpp", "int x;\n" * 400) == {}
