"""Who may import whom, read from the source: imports inside functions count, and those for type checkers too."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "longstate"

FOR_ALL = {"_shapes", "_errors", "_files", "timeline", "state"}
SEQUENCES = {"ops", "mixers", "routes", "models"}
# All that stands below the programs, and sampling, which several programs share.
BELOW = {"systems", "native", *SEQUENCES, "filters", "checkpoints", "distributed", "compression", "data", "analysis"}
PROGRAMS = {"train", "generate", "bench", "estimators", "hf", "serve"}

# The table of the architecture: a folder or module, and what of ours it may import beside itself and FOR_ALL.
MAY_IMPORT: dict[str, set[str]] = {
    **{part: set() for part in FOR_ALL},
    "systems": set(),
    "native": set(),
    "ops": {"native"},
    "data": set(),
    "mixers": {"systems", "ops"},
    "filters": {"systems", "ops"},
    "routes": {"mixers"},
    "models": {"mixers", "routes", "ops"},
    "checkpoints": SEQUENCES,
    "distributed": SEQUENCES,
    "compression": SEQUENCES | {"systems"},
    "analysis": {"systems", "ops", "mixers", "models", "filters"},
    "generate": BELOW,
    **{part: BELOW | {"generate"} for part in PROGRAMS - {"generate"}},
    "cli": BELOW | PROGRAMS | {""},
    "__main__": {"cli"},
    # The package's own front page (written "" where it is imported).
    "__init__": BELOW | PROGRAMS,
}

# Libraries that only these may import; every other folder works without them.
ONLY_IN: dict[str, set[str]] = {
    "matplotlib": {"analysis"},
    "lightning": {"train"},
    "pytorch_lightning": {"train"},
    "tensorboard": {"train"},
    "transformers": {"hf", "checkpoints"},
    "peft": {"hf"},
    "sklearn": {"estimators"},
    "typer": {"cli"},
    "jaxtyping": {"_shapes"},
    "beartype": set(),
    "control": {"systems"},
    "torchdiffeq": {"mixers"},
    "pickle": set(),
}

# A reference is the specification: it must be readable with torch alone in mind.
REFERENCE_MAY_IMPORT = {"torch", "__future__", "typing", "collections", "math", "longstate._shapes"}


def imported(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of all that a module imports, relative names resolved.

    `module` is the module's own dotted name, ending in `.__init__` for a package.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += (node.module or "").split(".") if node.module else []
            yield from ((node.lineno, ".".join([*base, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}:
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, "longstate" + name.value if name.value.startswith(".") else name.value


def part_of(name: str, parts: set[str]) -> str:
    """Return the folder or module of ours that a dotted name lies in; "" is the package's front page."""
    first = [*name.split("."), ""][1]
    return first if first in parts else ""


def violations(source: str, module: str, parts: set[str]) -> list[str]:
    """Return what a module imports against the table, one line each."""
    own = module.split(".")[1]
    found = []
    for line, name in imported(ast.parse(source), module):
        where = f"{module}:{line}"
        root = name.split(".")[0]
        if root == "longstate":
            part = part_of(name, parts)
            if own not in MAY_IMPORT:
                found.append(f"{where}: {own} is not in the table; add it to the architecture first")
            elif part != own and part not in FOR_ALL | MAY_IMPORT[own]:
                found.append(f"{where}: {own} may not import {part or 'the package itself'} ({name})")
        elif own not in ONLY_IN.get(root, {own}):
            found.append(f"{where}: only {sorted(ONLY_IN[root])} may import {root}")
        if module.endswith(".reference") and not any(f"{name}.".startswith(f"{x}.") for x in REFERENCE_MAY_IMPORT):
            found.append(f"{where}: a reference imports torch and nothing else ({name})")
    return found


def modules() -> dict[str, Path]:
    """Return the package's modules by dotted name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(["longstate", *p.relative_to(PACKAGE).with_suffix("").parts]): p for p in paths}


PARTS = {name.split(".")[1] for name in modules()} - {"__init__"}


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_table(module: str) -> None:
    assert violations(modules()[module].read_text(encoding="utf-8"), module, PARTS) == []


def test_every_folder_is_in_the_table() -> None:
    assert PARTS <= set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longstate.ops.scan.__init__", "from ... import mixers"),
        ("longstate.ops.scan.__init__", "from ...mixers import S4D"),
        ("longstate.ops.scan.chunked", "from ...mixers._base import Mixer"),
        ("longstate.mixers.mamba", "from .. import native"),
        ("longstate.systems.hippo", "from longstate.ops import scan"),
        ("longstate.systems.hippo", "import longstate.ops.scan"),
        ("longstate.mixers.s4d", "def f():\n    from ..models import Stack"),
        ("longstate.mixers.s4d", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..models import Stack"),
        ("longstate.mixers.s4d", "from importlib import import_module\nimport_module('longstate.models')"),
        ("longstate.mixers.s4d", "import longstate"),
        ("longstate.models.stack", "from .. import save"),
        ("longstate.train.loop", "from ..cli import main"),
        ("longstate.generate", "from .train import loop"),
        ("longstate.state", "from .ops import scan"),
        ("longstate.train.plot", "import matplotlib.pyplot as plt"),
        ("longstate.models.stack", "import pickle"),
        ("longstate.ops.scan.reference", "import numpy"),
        ("longstate.ops.scan.reference", "from ...timeline import Timeline"),
        ("longstate.novelty", "from . import ops"),
    ],
)
def test_a_forbidden_import_is_caught(module: str, source: str) -> None:
    assert (
        len(violations(source, module, PARTS | {"ops", "native", "mixers", "models", "systems", "train", "cli"})) == 1
    )


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("longstate.ops.scan.__init__", "from ..._shapes import Float\nfrom . import chunked\nfrom .. import _x"),
        ("longstate.ops.scan.reference", "import torch\nfrom torch import Tensor\nfrom ..._shapes import Float"),
        ("longstate.mixers.s4d", "import torch\nfrom .. import ops\nfrom ..ops import scan\nfrom ._base import Mixer"),
        ("longstate.cli.train", "from .. import __version__\nfrom ..train import Settings\nimport typer"),
        ("longstate.analysis.plots", "import matplotlib.pyplot as plt"),
    ],
)
def test_an_allowed_import_passes(module: str, source: str) -> None:
    assert violations(source, module, PARTS | {"ops", "mixers", "train"}) == []


def test_the_package_imports_without_the_extras() -> None:
    optional = [
        "beartype",
        "control",
        "lightning",
        "matplotlib",
        "sklearn",
        "tensorboard",
        "tokenizers",
        "transformers",
        "typer",
    ]
    code = f"import sys, longstate; print(*sorted(set({optional}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout.strip(), run.stderr) == (0, "", "")


def test_the_package_imports_no_more_than_it_needs() -> None:
    """What an import costs is how much of Python it reads: no tables of families, no development dependency though it
    be installed, and nothing of torch that `import torch` leaves out."""
    code = """
import sys, torch
before = set(sys.modules)
import longstate
found = set(sys.modules) - before
print(*sorted(x for x in found if x.split(".")[0] not in {"longstate", "numpy", "safetensors", "sysconfig"}))
print(*sorted(x for x in found if x.startswith("longstate.checkpoints.families.") and not x.endswith("._family")))
from longstate.checkpoints.families import FAMILIES
print(len(FAMILIES), longstate.checkpoints.families.FAMILIES is FAMILIES)
"""
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "\n\n11 True\n", "")
