"""The public names of the package: a change here is a change for every user, so it is made on purpose."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import longstate

ROOT = Path(__file__).parents[1]

NAMES = {
    "Attention",
    "Classifier",
    "H3",
    "Hyena",
    "LRU",
    "LSSL",
    "LanguageModel",
    "LiquidS4",
    "LongConv",
    "Mamba",
    "Mamba2",
    "Mega",
    "Megalodon",
    "Mixer",
    "RGLRU",
    "S4",
    "S4D",
    "S5",
    "SGConv",
    "STU",
    "ShortConv",
    "SpaceTime",
    "Stack",
    "TNN",
    "Timeline",
    "__version__",
    "generate",
    "load",
    "load_pretrained",
    "ops",
    "save",
    "state",
    "systems",
}


def bound_names(source: str) -> set[str]:
    """Return the names that a module binds by imports and assignments, as its text says."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    return names - {"annotations", "__all__"}


def test_the_list_of_public_names() -> None:
    assert bound_names((ROOT / "src/longstate/__init__.py").read_text(encoding="utf-8")) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(longstate, name)
    assert name == "__version__" or (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_the_front_page_only_passes_names_on() -> None:
    for node in ast.parse((ROOT / "src/longstate/__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module != "__future__":
            assert all(alias.asname == alias.name for alias in node.names), ast.unparse(node)


def test_generate_is_the_function_and_not_its_module() -> None:
    assert callable(longstate.generate)
    assert not isinstance(longstate.generate, ModuleType)


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert longstate.__version__ == project["version"]
