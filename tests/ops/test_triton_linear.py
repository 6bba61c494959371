"""The product of a few rows on GPUs, with what stands before and after it, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstate.ops import _triton, convolution, linear, rms_norm
from longstate.ops.linear import triton as kernel
from poison import poisoned_memory

pytestmark = pytest.mark.interpreted
if not _triton.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

FLOAT, NARROW, BYTE = torch.float32, torch.bfloat16, torch.int8


def case(batch: int, inputs: int, outputs: int, kind: torch.dtype, groups: int = 1) -> dict[str, Any]:
    """Return rows and weights; int8 ones with scales."""
    torch.manual_seed(batch + inputs)
    x, weight = torch.randn(batch, inputs), torch.randn(outputs, inputs)
    if kind == BYTE:
        scale = (torch.rand(outputs, groups) + 0.5) / 64
        return dict(x=x, weight=torch.randint(-127, 128, (outputs, inputs), dtype=BYTE), bias=None, scale=scale)
    return dict(x=x.to(kind), weight=weight.to(kind), bias=torch.randn(outputs).to(kind), scale=None)


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def magnitudes(given: dict[str, Any]) -> torch.Tensor:
    """Return Σ |W_oi x_i| + |b_o|, which rounding of sums is relative to."""
    return linear(**{name: wide(x.abs() if isinstance(x, torch.Tensor) else x) for name, x in given.items()})


def close(got: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor, rounded: float = 0.0) -> None:
    """Check sums of float32 numbers, of which each term is rounded once and each partial sum, and that of the result's
    own rounding."""
    assert got.shape == wanted.shape and not got.isnan().any()
    worst = (got.double() - wanted).abs() - rounded * wanted.abs()
    assert (worst <= 40 * 2**-24 * size.double() + 1e-30).all()


@pytest.mark.parametrize("kind", [FLOAT, NARROW, BYTE])
@pytest.mark.parametrize(("batch", "inputs", "outputs"), [(1, 8, 1), (3, 70, 37), (8, 33, 5), (2, 64, 32)])
def test_products(batch: int, inputs: int, outputs: int, kind: torch.dtype) -> None:
    given = case(batch, inputs, outputs, kind)
    if kind != BYTE:  # what lies behind the weights is nobody's
        memory = torch.full((inputs * outputs + 64,), torch.nan, dtype=kind)
        memory[: inputs * outputs] = given["weight"].flatten()
        given["weight"] = memory[: inputs * outputs].view(outputs, inputs)
    with poisoned_memory():
        y = kernel.product(*given.values(), FLOAT)
    close(y, linear(**{name: wide(x) for name, x in given.items()}), magnitudes(given))


def test_scales_of_groups_of_inputs() -> None:
    given = case(2, 96, 37, BYTE, groups=6)
    y = kernel.product(*given.values(), FLOAT)
    close(y, linear(**{name: wide(x) for name, x in given.items()}), magnitudes(given))


def test_rows_apart_and_results_rounded() -> None:
    given = case(3, 40, 20, NARROW)
    rows = torch.full((3, 90), torch.nan, dtype=NARROW)
    rows[:, 8:48] = given["x"]
    wanted = linear(**{name: wide(x) for name, x in given.items()})
    y = kernel.product(**given | {"x": rows[:, 8:48]}, dtype=NARROW)
    assert y.dtype == NARROW
    close(y, wanted, magnitudes(given), 2**-8)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("gate", [None, "first", "after"])
@pytest.mark.parametrize("weight", [True, False])
def test_norms_before(groups: int, gate: str | None, weight: bool) -> None:
    """By the size of what is multiplied, since nothing is rounded between the two."""
    given = case(2, 120, 9, FLOAT)
    x, opening = given["x"] * 3 + 1, torch.randn(2, 150)[:, 10:130] if gate else None
    norm = kernel.Norm(torch.randn(120) if weight else None, opening, 1e-3, groups, 0.5 * weight, gate == "after")
    y = kernel.product(**given | {"x": x}, dtype=FLOAT, norm=norm)
    options = dict(zip(norm._fields, map(wide, norm), strict=True))
    normed = given | {"x": rms_norm(wide(x)[:, None], **options_of(options))[:, 0]}
    close(y, linear(**{name: wide(z) for name, z in normed.items()}), 2 * magnitudes(normed))


def options_of(norm: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``ops.rms_norm``."""
    gate = norm.pop("gate")
    return norm | {"gate": None if gate is None else gate[:, None]}


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("kind", [FLOAT, NARROW])
def test_convolutions_after(taps: int, kind: torch.dtype) -> None:
    """Of the product as it is rounded; its window is written, and the other outputs are as without it."""
    given = case(2, 40, 50, kind)
    first, width = 7, 35
    weight, bias = torch.randn(width, taps).to(kind), torch.randn(width).to(kind)
    before = torch.randn(2, taps - 1, width).to(kind)
    window = before.clone()
    plain = kernel.product(**given, dtype=kind)
    u = plain[:, None, first : first + width]
    wanted, after = convolution.short(*map(wide, (u, weight, bias, before)), activation="silu")
    with poisoned_memory():
        y = kernel.product(**given, dtype=kind, taps=kernel.Taps(weight, bias, window, first))
    # No slope of SiLU is above 1.1.
    size, _ = convolution.short(*(wide(x).abs() for x in (u, weight, bias, before)))
    close(y[:, first : first + width], wanted[:, 0], size[:, 0], 2**-8 if kind == NARROW else 0.0)
    assert torch.equal(window, after.to(kind))
    for columns in (slice(0, first), slice(first + width, None)):
        assert torch.equal(y[:, columns], plain[:, columns])


@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_residuals_after(factor: float) -> None:
    """Of the product as it is rounded to its own type, in that of the residual stream."""
    given = case(3, 40, 21, NARROW)
    residual = torch.randn(3, 42)[:, 7:28]
    plain = kernel.product(**given, dtype=NARROW)
    y = kernel.product(**given, dtype=NARROW, residual=residual, factor=factor)
    assert y.dtype == FLOAT
    assert torch.allclose(y, residual + factor * plain.float(), rtol=1e-6, atol=1e-6)
