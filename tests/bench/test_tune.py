"""Choosing tiles: what is tried, what is kept, and the table that comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longstate.bench import tune
from longstate.ops import _triton

CPU = torch.device("cpu")


def tiles(**space: tuple[int, ...]) -> _triton.Tiles:
    """Return tiles that no kernel has."""
    made = _triton.Tiles("none", {name: values[0] for name, values in space.items()}, {}, space)
    del _triton.Tiles.known["none"]
    return made


def test_the_best_of_all_is_found_one_size_after_the_other() -> None:
    """Of a time that each size enlarges by its distance from its best value, whatever the others are."""
    found = tiles(A=(1, 2, 4, 8), B=(16, 32), num_warps=(1, 2, 4))

    def measure() -> float:
        use = found(torch.empty(0))
        return 1 + abs(use["A"] - 4) + abs(use["B"] - 32) + abs(use["num_warps"] - 2)

    assert tune.best(found, {"A": 1, "B": 16, "num_warps": 1}, measure) == ({"A": 4, "B": 32, "num_warps": 2}, 1)


def test_what_finds_no_room_is_passed_over_and_other_errors_are_not() -> None:
    from triton.runtime.errors import OutOfResources

    found = tiles(A=(1, 2, 4))

    def measure() -> float:
        if found(torch.empty(0))["A"] == 4:
            raise OutOfResources(1, 0, "shared memory")
        return 1 / found(torch.empty(0))["A"]

    assert tune.best(found, {"A": 1}, measure) == ({"A": 2}, 0.5)

    def broken() -> float:
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        tune.best(found, {"A": 1}, broken)


def test_noise_replaces_nothing() -> None:
    found = tiles(A=(1, 2))
    assert tune.best(found, {"A": 1}, lambda: 1 - 0.01 * found(torch.empty(0))["A"])[0] == {"A": 1}


def row(use: int, **sizes: int) -> dict[str, dict[str, int]]:
    return {"sizes": sizes, "use": {"A": use}}


def test_tables_are_joined_written_and_read(tmp_path: Path) -> None:
    old = {"sm_80": {"x": [row(1, d=8)]}, "sm_90": {"x": [row(1, d=8), row(2, d=64)], "y": [row(3, d=8)]}}
    new = {"sm_90": {"x": [row(4, d=8)]}}
    table = tune.merged(old, new)
    assert table == {"sm_80": old["sm_80"], "sm_90": {"x": [row(2, d=64), row(4, d=8)], "y": [row(3, d=8)]}}
    tune.write(table, tmp_path / "table.json")
    assert _triton.read_table(tmp_path / "table.json") == table
    tune.write({}, tmp_path / "table.json")
    assert _triton.read_table(tmp_path / "table.json") == {}


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"sm_90": 3}', '{"sm_90": {"x": [{"use": {}}]}}', '{"a": {"x": [{"sizes": {}, "use": {"A": "4"}}]}}'],
)
def test_what_is_no_table(text: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(ValueError, match=r"table\.json is no table of tiles"):
        _triton.read_table(tmp_path / "table.json")


def test_where_nothing_can_be_tuned() -> None:
    if _triton.interpreted:
        pytest.skip("it can, here")
    with pytest.raises(ValueError, match="Give a GPU"):
        next(tune.tune(CPU))


@pytest.mark.interpreted
def test_every_kernel_is_asked_for_and_its_row_is_one_of_its_space() -> None:
    """All kernels are declared by the workloads, with their gradients; one of them is tuned through and through."""
    asked: set[str] = set()
    for _, call in tune.workloads(CPU, small=True):
        with _triton.asked() as found:
            call()
        asked |= {x.kernel for x, _ in found}
    segments = {"linear_attention.combine", "delta_rule.combine"}  # only longer sequences are cut into them
    assert asked | segments == set(_triton.Tiles.known)
    table: dict[str, list[dict[str, dict[str, int]]]] = {}
    for row in tune.tune(CPU, "rms_norm 1 × 11", small=True, say=lambda line: None):
        table |= row["interpreter"]
    assert table
    for kernel, rows in table.items():
        space = _triton.Tiles.known[kernel].space
        assert all(x["use"].keys() == space.keys() for x in rows)
        assert all(x["use"][name] in values for x in rows for name, values in space.items())
