"""The short convolution's GPU kernels in Triton's interpreter, both ways, by the bounds of the CPU's."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from longstate import ops
from longstate.ops import _triton
from ops.test_against_reference import flags, largest_error, run
from ops.test_cpu_convolution import arguments, both_ways, check
from ops.test_cpu_fuzz import layout, short_convolution, wide
from poison import poisoned_memory

pytestmark = pytest.mark.interpreted
if not _triton.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


# No step, one step, fewer than the window, several programs along steps and channels, steps that fill them.
SHAPES = [(2, 0, 3, 4), (1, 1, 1, 1), (2, 1, 5, 4), (2, 3, 7, 9), (2, 19, 18, 4), (2, 16, 3, 2)]


@pytest.mark.parametrize("marks", ["", "start", "valid", "start valid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape: tuple[int, ...], marks: str) -> None:
    given, options = arguments(*shape), flags(marks, *shape[:2])
    check(given, "triton", **options)


@pytest.mark.parametrize("marks", ["", "start valid"])
def test_what_may_be_absent(marks: str) -> None:
    given, options = arguments(2, 19, 5, 4), flags(marks, 2, 19)
    check({"u": given["u"], "weight": given["weight"]}, "triton", activation=None, **options)
    check({name: given[name] for name in ("u", "weight", "initial")}, "triton", **options)


def test_narrow_types() -> None:
    given, options = arguments(2, 19, 5, 4, torch.bfloat16), flags("start valid", 2, 19)
    check(given, "triton", **options)
    check(given | {name: given[name].float() for name in ("weight", "bias")}, "triton")
    half = {name: x.half() for name, x in given.items()}
    grads = [torch.ones(2, 19, 5), torch.ones(2, 3, 5)]
    got, wanted = (both_ways(half, grads, backend=backend) for backend in ("triton", "reference"))
    for name, x in got.items():  # both are rounded from float32, and a sum on the way as well in the reference
        assert x.dtype == torch.float16
        torch.testing.assert_close(x, wanted[name], rtol=2**-9, atol=2**-9 * wanted[name].abs().max().item())


def test_no_sequence() -> None:
    y, final = ops.convolution.short(torch.ones(0, 3, 2), torch.ones(2, 4), backend="triton")
    assert y.shape == (0, 3, 2) and final.shape == (0, 3, 2)


def test_starts_everywhere_and_nothing_that_counts() -> None:
    given = arguments(3, 9, 3, 4)
    always, never = torch.ones(3, 9, dtype=torch.bool), torch.zeros(3, 9, dtype=torch.bool)
    check(given, "triton", start=always)
    check(given, "triton", start=always, valid=never)
    some = torch.tensor([[True], [False], [True]]).expand(3, 9)
    check(given, "triton", start=some, valid=some)


@pytest.mark.parametrize("seed", range(6))
def test_random_calls_in_odd_layouts(seed: int) -> None:
    r = random.Random(seed)
    torch.manual_seed(seed)
    batch, length = r.randint(1, 2), r.choice([2, 5, 17, 24])
    function, given, options = short_convolution(r, batch, length)
    options |= flags(r.choice(["", "start", "valid", "start valid"]), batch, length)
    wanted = run(function, {name: wide(x) for name, x in given.items()}, **options, backend="reference")
    narrow = any(x.dtype == torch.bfloat16 for x in given.values())

    def call(**arguments: Any) -> Any:
        return function(**{name: layout(r, x) for name, x in arguments.items()}, **options, backend="triton")

    with poisoned_memory():
        got = run(call, given)
    many = (batch * length) ** 0.5
    assert largest_error([wide(x) for x in got[:2]], wanted[:2]) < (2**-8 if narrow else 1e-5)
    assert largest_error([wide(x) for x in got[2:]], wanted[2:]) < (2**-7 * many if narrow else 2e-5)


@pytest.mark.parametrize("marks", ["", "start valid"])
def test_poisoned_memory_and_the_same_numbers_twice(marks: str) -> None:
    given, options = arguments(1, 21, 18, 4), flags(marks, 1, 21)
    grads = [torch.randn(1, 21, 18), torch.randn(1, 3, 18)]
    with poisoned_memory():
        once, again = (both_ways(given, grads, activation="silu", backend="triton", **options) for _ in range(2))
    assert all(x.isfinite().all() and torch.equal(x, again[name]) for name, x in once.items())


def test_pieces_equal_the_whole_bit_by_bit() -> None:
    given, options = arguments(2, 21, 3, 4), flags("start valid", 2, 21)
    options["start"][0, 8] = True  # the window at the cut holds two sequences
    whole, final = ops.convolution.short(**given, **options, backend="triton")
    state, outputs = given["initial"], []
    for at in (slice(0, 10), slice(10, 11), slice(11, 21)):
        piece = given | {"u": given["u"][:, at], "initial": state}
        y, state = ops.convolution.short(**piece, **{n: x[:, at] for n, x in options.items()}, backend="triton")
        outputs.append(y)
    assert torch.equal(torch.cat(outputs, 1), whole) and torch.equal(state, final)


@pytest.mark.parametrize("dtype", _triton.TYPES, ids=str)
@pytest.mark.parametrize("marks", ["", "start valid"])
def test_a_single_step_may_leave_its_window_where_the_last_one_was(dtype: torch.dtype, marks: str) -> None:
    """The same numbers, in several programs of each sequence; and not of several steps, or in another type."""
    given = {name: x.to(dtype) for name, x in arguments(3, 1, 18, 4).items()}
    options: dict[str, torch.Tensor] = {}
    if marks:
        options = {"start": torch.tensor([[True], [False], [True]]), "valid": torch.tensor([[True], [False], [False]])}
    wanted = ops.convolution.short(**given, **options, backend="triton")
    assert wanted[1].data_ptr() != given["initial"].data_ptr()
    window = given["initial"].clone()
    with _triton.in_place():
        y, final = ops.convolution.short(**given | {"initial": window}, **options, backend="triton")
        assert final.data_ptr() == window.data_ptr()
        assert torch.equal(y, wanted[0]) and torch.equal(final, wanted[1])
        longer = given | {"u": given["u"].expand(3, 2, 18)}
        _, final = ops.convolution.short(**longer, backend="triton")
        assert final.data_ptr() != given["initial"].data_ptr()


def test_what_is_no_number_reaches_only_who_sees_it() -> None:
    given = arguments(1, 20, 3, 4)
    given["u"][0, 6, 2] = float("nan")
    y, final = ops.convolution.short(**given, activation="silu", backend="triton")
    seen = torch.zeros(20, 3, dtype=torch.bool)
    seen[6:10, 2] = True
    assert torch.equal(y[0].isnan(), seen) and final.isfinite().all()
    valid = torch.ones(1, 20, dtype=torch.bool)
    valid[0, 6] = False
    found = both_ways(given, [torch.ones(1, 20, 3), final], activation="silu", valid=valid, backend="triton")
    assert all(x.isfinite().all() for x in found.values())
    # Nor does the last of what counts reach what is behind it.
    given["u"][0, 6, 2], given["u"][0, 17, 2] = 0.0, float("nan")
    valid = torch.arange(20)[None] < 18
    found = both_ways(given, [torch.ones(1, 20, 3), final], activation="silu", valid=valid, backend="triton")
    assert found["u"][0, :14].isfinite().all() and not found["u"][0, 18:].any()


def test_large_pre_activations() -> None:
    x = torch.tensor([-1e30, -1e4, -90.0, 90.0, 1e4, 1e30, float("inf")])[None, :, None].requires_grad_()
    y, _ = ops.convolution.short(x, torch.ones(1, 1), activation="silu", backend="triton")
    torch.testing.assert_close(y, torch.where(x > 0, x, 0), rtol=1e-6, atol=1e-30)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (x > 0).float(), rtol=1e-6, atol=1e-30)
