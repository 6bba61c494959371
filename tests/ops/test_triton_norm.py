"""The norm's GPU kernels in Triton's interpreter, both ways, by the bounds of the CPU's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from longstate import ops
from longstate.ops import _triton
from ops.test_against_reference import largest_error, run
from ops.test_cpu_fuzz import layout, rms_norm, wide
from ops.test_cpu_norm import KINDS, both_ways, case, check
from poison import poisoned_memory

pytestmark = pytest.mark.interpreted
if not _triton.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


# A vector, one number, several tiles for each of several programs, four axes, and rows wider than a tile.
SHAPES = [((5,), 1), ((1, 1, 1), 1), ((3, 11, 33), 3), ((2, 5, 3, 16), 2), ((1, 4, 77), 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str) -> None:
    for shape, groups in SHAPES:
        given, options = case(kind, shape, groups)
        check(given, "triton", **options)


@pytest.mark.parametrize("narrow", ["x", "x weight gate", "weight"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str, narrow: str) -> None:
    """Each in a type of its own: float32 residuals meet the weights of a bfloat16 model."""
    given, options = case(kind, (3, 5, 33), 3)
    check({name: x.bfloat16() if name in narrow.split() else x for name, x in given.items()}, "triton", **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["weight", "offset", "gate first", "norm first", "plain"])
def test_narrow_results_are_those_of_the_reference(kind: str, dtype: torch.dtype) -> None:
    """A result is another number only where the two in float32 lie at both sides of a boundary, as few do; and where
    what was normed is rounded before the weight multiplies it, that is the neighbouring number times the weight."""
    given, options = case(kind, (2, 32, 64), 2)
    given = {name: x.to(dtype) for name, x in given.items()}
    got, wanted = (ops.rms_norm(**given, **options, backend=backend) for backend in ("triton", "reference"))
    assert got.dtype == wanted.dtype == dtype
    assert (got != wanted).float().mean() < (0.005 if dtype == torch.bfloat16 else 0.04)
    torch.testing.assert_close(got, wanted, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("shape", [(2, 0, 6), (0, 6), (3, 0)])
def test_nothing(shape: tuple[int, ...]) -> None:
    found = both_ways({"x": torch.ones(shape), "weight": torch.ones(shape[-1])}, torch.ones(shape), backend="triton")
    assert found["y"].shape == shape and not found["weight"].any()


@pytest.mark.parametrize("seed", range(8))
def test_random_calls_in_odd_layouts(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    batch, length = r.randint(1, 3), r.choice([1, 2, 5, 31])
    function, given, options = rms_norm(r, batch, length)
    wanted = run(function, {name: wide(x) for name, x in given.items()}, **options, backend="reference")
    narrow = any(x.dtype == torch.bfloat16 for x in given.values())

    def call(**arguments: Any) -> Any:
        return function(**{name: layout(r, x) for name, x in arguments.items()}, **options, backend="triton")

    with poisoned_memory():
        got = run(call, given)
    many = (batch * length) ** 0.5
    assert largest_error([wide(x) for x in got[:2]], wanted[:2]) < (2**-8 if narrow else 1e-5)
    assert largest_error([wide(x) for x in got[2:]], wanted[2:]) < (2**-7 * many if narrow else 2e-5)


def test_the_same_numbers_twice() -> None:
    given, options = case("gate first", (3, 11, 33), 3)
    grad = torch.randn(3, 11, 33)
    with poisoned_memory():
        once, again = (both_ways(given, grad, backend="triton", **options) for _ in range(2))
    assert all(x.isfinite().all() and torch.equal(x, again[name]) for name, x in once.items())


def test_what_is_no_number_stays_in_its_group() -> None:
    x = torch.randn(2, 4, 34)
    x[0, 1, 3], x[1, 2, 20] = float("nan"), float("inf")
    y = ops.rms_norm(x, groups=2, backend="triton")
    assert torch.equal(y.isnan(), ops.rms_norm(x, groups=2, backend="reference").isnan())
    assert y[0, 1, :17].isnan().all() and y[0, 1, 17:].isfinite().all()
    zero = ops.rms_norm(torch.zeros(1, 2, 5), eps=1e-30, backend="triton")
    assert torch.equal(zero, torch.zeros(1, 2, 5))
