"""The reference has every public module."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Backends of an op are reached through its public function, commands through `longstate --help`.
INSIDE = re.compile(r"longstate\.(ops\.\w+\.\w+|cli\.\w+)$")


def documented(text: str) -> set[str]:
    """Return the names that pages ask mkdocstrings for."""
    return set(re.findall(r"^::: (\S+)", text, re.MULTILINE))


def public_modules() -> set[str]:
    """Return the modules without a leading underscore, and the packages that define something themselves."""
    names = set()
    for path in (ROOT / "src/longstate").rglob("*.py"):
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
            body = ast.parse(path.read_text(encoding="utf-8")).body
            if not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in body):
                continue
        name = ".".join(parts)
        if not any(part.startswith("_") for part in parts) and not INSIDE.match(name):
            names.add(name)
    return names


def test_every_public_module_is_in_the_reference() -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/reference").glob("*.md"))
    missing = {m for m in public_modules() if not any(d == m or d.startswith(f"{m}.") for d in documented(pages))}
    assert missing == set()
    assert {"longstate.state", "longstate.ops.scan", "longstate.mixers.s4d"} <= public_modules()
