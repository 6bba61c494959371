"""Every mixer keeps the contract: each check of ``contract.py`` on each of its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import contract
from contract import COMBINATIONS, CUTS, ROWS, STEPS, WHOLE, Row
from longstate.mixers import MIXERS
from longstate.routes import ROUTES

EVERYTHING = "dt start valid"
STATEFUL = [row for row in ROWS if row.state != "none"]  # the others have nothing to hand on from piece to piece
CAUSAL = [row for row in ROWS if row.make().causal]
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
stateful = pytest.mark.parametrize("row", STATEFUL, ids=lambda row: row.name)
timed = pytest.mark.parametrize("row", [row for row in ROWS if row.slow_down], ids=lambda row: row.name)


def kinds_for(row: Row, kinds: str) -> str:
    """Leave out elapsed time where the mixer counts steps."""
    return kinds if row.slow_down else kinds.replace("dt", "").strip()


def pairs(combinations: list[str] = COMBINATIONS, chosen: list[Row] = ROWS) -> pytest.MarkDecorator:
    """Every row with every combination of timeline entries that it knows."""
    cases = [(row, kinds) for row in chosen for kinds in combinations if kinds == kinds_for(row, kinds)]
    cases += [
        (row, kinds_for(row, EVERYTHING)) for row in chosen if not row.slow_down and "start valid" not in combinations
    ]
    return pytest.mark.parametrize(
        ("row", "kinds"), cases, ids=[f"{row.name}-{kinds or 'plain'}" for row, kinds in cases]
    )


def test_every_mixer_has_a_row() -> None:
    assert {type(row.make()) for row in ROWS} == {*MIXERS.values(), *ROUTES.values()}
    assert len({row.name for row in ROWS}) == len(ROWS)


@pairs(chosen=STATEFUL)
def test_pieces_float64(row: Row, kinds: str) -> None:
    contract.check_pieces(row.make, torch.float64, kinds, CUTS)


@pairs(["", EVERYTHING], chosen=STATEFUL)  # what each entry of the timeline does is seen in float64 pieces
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pieces_narrow(row: Row, kinds: str, dtype: torch.dtype) -> None:
    contract.check_pieces(row.make, dtype, kinds, CUTS)


@pairs(["", EVERYTHING], chosen=STATEFUL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_steps(row: Row, kinds: str, dtype: torch.dtype) -> None:
    contract.check_pieces(row.make, dtype, kinds, STEPS)


@pairs(["", EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_precision(row: Row, kinds: str, dtype: torch.dtype) -> None:
    contract.check_precision(row.make, dtype, kinds)


@pairs(["", EVERYTHING])
def test_gradients(row: Row, kinds: str) -> None:
    contract.check_gradients(row.make, kinds)


@pairs(["", "dt", EVERYTHING])
def test_chunked_gradients(row: Row, kinds: str) -> None:
    contract.check_chunked_gradients(row.make, kinds, CUTS if row.state != "none" else WHOLE)


@pairs(["", "dt"], CAUSAL)
def test_causality(row: Row, kinds: str) -> None:
    contract.check_causality(row.make, kinds if kinds in ("", "dt") else "")


@pairs(["", "dt", "valid", "dt valid"])
def test_packing(row: Row, kinds: str) -> None:
    contract.check_packing(row.make, kinds.replace("start", "").strip())


@rows
def test_start_at_first_step(row: Row) -> None:
    contract.check_start_at_first_step(row.make)


@pairs(["", EVERYTHING])
@pytest.mark.parametrize("where", ["left", "right", "inside"])
def test_padding(row: Row, kinds: str, where: str) -> None:
    contract.check_padding(row.make, where, kinds)


@timed
@pytest.mark.parametrize("kinds", ["", "start", "valid"])
def test_nominal_steps(row: Row, kinds: str) -> None:
    contract.check_nominal_steps(row.make, kinds)


@timed
def test_scaled_steps(row: Row) -> None:
    contract.check_scaled_steps(row.make, row.slow_down)


@pytest.mark.parametrize("row", [row for row in ROWS if not row.slow_down], ids=lambda row: row.name)
def test_no_elapsed_time(row: Row) -> None:
    contract.check_no_elapsed_time(row.make)


@pairs(["", EVERYTHING])
@pytest.mark.parametrize("name", contract.other_backends())
def test_backends(row: Row, kinds: str, name: str) -> None:
    for length in (contract.LENGTH, 1):
        contract.check_backend(row.make, name, kinds, length)


@pairs(["", EVERYTHING])
def test_batches_of_states(row: Row, kinds: str) -> None:
    contract.check_batches_of_states(row.make, kinds)


@pairs(["", EVERYTHING])
def test_values(row: Row, kinds: str) -> None:
    contract.check_values(row.make, kinds)


@pytest.mark.parametrize("row", [row for row in ROWS if row.state == "none"], ids=lambda row: row.name)
def test_no_state(row: Row) -> None:
    contract.check_no_state(row.make)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in CAUSAL], ids=lambda row: row.name)
def test_both_directions(row: Row) -> None:
    contract.check_both_directions(row.make)


@stateful
def test_state_size(row: Row) -> None:
    contract.check_state_size(row.make, row.state)


@stateful
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_initial_state(row: Row, dtype: torch.dtype) -> None:
    contract.check_initial_state(row.make, dtype)


@rows
def test_empty(row: Row) -> None:
    contract.check_empty(row.make)


@rows
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["float64", "float32", "bfloat16"]
)
def test_saving(row: Row, tmp_path: Path, dtype: torch.dtype) -> None:
    contract.check_saving(row.make, tmp_path, dtype)


@rows
def test_reset(row: Row) -> None:
    contract.check_reset(row.make)


@rows
def test_meta(row: Row) -> None:
    contract.check_meta(row.make)


def traced(plain: tuple[str, ...]) -> pytest.MarkDecorator:
    """Every row with all that a timeline has, and the rows named also without."""
    cases = [(row, kinds_for(row, EVERYTHING)) for row in ROWS] + [(row, "") for row in ROWS if row.name in plain]
    ids = [f"{row.name}-{kinds or 'plain'}" for row, kinds in cases]
    return pytest.mark.parametrize(("row", "kinds"), cases, ids=ids)


@pytest.mark.compiled
@traced(("s4d", "mamba", "mamba2", "attention", "attention window"))
def test_compile(row: Row, kinds: str) -> None:
    contract.check_compile(row.make, kinds)


@pytest.mark.compiled
def test_compile_again_at_another_length() -> None:
    contract.check_compile(ROWS[0].make, "start", lengths=(contract.LENGTH, 9, 1, 40))


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")  # the compiler's own, while it is imported
def test_compile_with_inductor() -> None:
    contract.check_compile(ROWS[0].make, "", "inductor")


@pytest.mark.compiled
@traced(("s4", "s4d", "s5", "mamba", "mamba2", "attention", "attention window"))
def test_export(row: Row, kinds: str) -> None:
    contract.check_export(row.make, kinds, with_state=bool(kinds) and row.state != "none")
