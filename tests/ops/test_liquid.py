"""Liquid neurons: gradients by recomputation are those of autograd through the loop; pieces, gaps and starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longstate import ops

NAMES = ("u", "recurrent", "rate", "target", "dt", "initial")


def arguments(batch: int, length: int) -> dict[str, Tensor]:
    shapes = ((batch, length, 4), (4, 4), (4,), (4,), (batch, length), (batch, 4))
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in zip(NAMES, shapes, strict=True)}
    return given | {"rate": given["rate"].abs(), "dt": 0.1 + 2 * torch.rand(batch, length, dtype=torch.float64)}


def flags(marks: str, batch: int, length: int) -> dict[str, Tensor]:
    chance = {"start": 0.2, "valid": 0.7}
    return {name: torch.rand(batch, length) < chance[name] for name in marks.split()}


@pytest.mark.parametrize("length", [0, 1, 30])
@pytest.mark.parametrize("marks", ["", "start", "valid", "start valid"])
def test_gradients_are_those_of_the_loop(marks: str, length: int) -> None:
    given, options = arguments(3, length), flags(marks, 3, length)
    if "valid" in options:
        given["u"][~options["valid"]] = given["dt"][~options["valid"]] = torch.nan
    found = []
    for backend in ("reference", "chunked"):
        leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
        h, final = ops.liquid(**leaves, **options, steps=3, backend=backend)
        loss = (h * torch.linspace(-1, 1, 4)).sum() + final.sin().sum()
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        found.append((h, final, *gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-11, atol=1e-12)
    assert all(x.isfinite().all() for x in found[0])


def test_pieces_equal_the_whole_and_sequences_are_apart() -> None:
    given, valid = arguments(2, 25), torch.rand(2, 25) < 0.7
    start = torch.arange(25).expand(2, 25) == 11
    whole, final = ops.liquid(**given, start=start, valid=valid)
    state, outputs = given["initial"], []
    for at in (slice(0, 9), slice(9, 11), slice(11, 25)):
        part = given | {name: given[name][:, at] for name in ("u", "dt")}
        y, state = ops.liquid(**part | {"initial": state if at.start != 11 else 0 * state}, valid=valid[:, at])
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=0, atol=0)
    torch.testing.assert_close(state, final, rtol=0, atol=0)
    assert not whole[~valid].any()


def test_one_neuron_in_closed_form() -> None:
    """Without a state inside σ, one step of many small ones comes to f A/(rate + f) (1 − e^{−(rate + f) Δ})."""
    one = torch.ones(1, 1, dtype=torch.float64)
    h, _ = ops.liquid(0.3 * one[None], 0 * one, 0.5 * one[0], 2 * one[0], 1.7 * one, steps=20000)
    f = 1 / (1 + torch.exp(torch.tensor(-0.3, dtype=torch.float64)))
    assert h.item() == pytest.approx((2 * f / (0.5 + f) * (1 - torch.exp(-1.7 * (0.5 + f)))).item(), rel=1e-4)


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong shape first
def test_what_does_not_fit() -> None:
    given = arguments(2, 3)
    for name in NAMES[1:]:
        with pytest.raises(ValueError, match=f"liquid: {name} has shape"):
            ops.liquid(**given | {name: torch.cat([given[name], given[name][:1]])})
    with pytest.raises(ValueError, match="at least one small step"):
        ops.liquid(**given, steps=0)
