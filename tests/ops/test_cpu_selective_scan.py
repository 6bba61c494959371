"""Compiled kernels against the reference in float64: any shape, any instruction set, any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstate import native, ops
from ops.test_against_reference import flags, largest_error, run
from ops.threads import check_threads

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

# Batch, steps, channels, states: none, one, less than a vector, odd, several pieces and tiles.
SHAPES = [(2, 0, 3, 2), (1, 1, 1, 1), (2, 33, 5, 16), (1, 70, 17, 3), (2, 64, 16, 16), (1, 40, 300, 16), (3, 97, 33, 5)]
ACTIVATIONS = ("u", "dt", "gate", "B", "C", "elapsed")


def arguments(b: int, t: int, d: int, n: int, around: str = "", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the op takes; with `around`, all that stands before and after the recurrence too."""
    torch.manual_seed(b + t + d + n)
    given = dict(u=torch.randn(b, t, d), dt=torch.rand(b, t, d), A=-3 * torch.rand(d, n), B=torch.randn(b, t, n))
    given |= dict(C=torch.randn(b, t, n), D=torch.randn(d), initial=torch.randn(b, d, n))
    if around:
        given |= dict(dt=torch.randn(b, t, d), A=torch.randn(d, n), gate=torch.randn(b, t, d), dt_bias=torch.randn(d))
        given |= dict(elapsed=torch.rand(b, t))
    given = {name: x.to(dtype) if name in ACTIVATIONS else x for name, x in given.items()}
    return given | {"discretization": "zoh-euler"} | (dict(dt_softplus=True, log_A=True) if around else {})


def exactly(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("around", ["", "around"])
@pytest.mark.parametrize("marks", ["", "start", "valid", "start valid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selective_scan(shape: tuple[int, ...], marks: str, around: str, instructions: str) -> None:
    """In float32: every sum is of at most a few hundred terms of order 1, each rounded a few times."""
    given, options = arguments(*shape, around), flags(marks, *shape[:2])
    wanted = run(ops.selective_scan, exactly(given), backend="reference", **options)
    got = run(ops.selective_scan, given, backend="cpu", **options)
    assert largest_error([x.double() for x in got], [x.double() for x in wanted]) < 3e-6


@pytest.mark.parametrize("around", ["", "around"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(shape: tuple[int, ...], around: str, instructions: str) -> None:
    """From the same bfloat16 numbers: outputs and gradients are rounded once, by 2^-9 of themselves at most; and so is
    the gradient that comes in, which in the largest of a sum's entries is no more than as much again."""
    given = arguments(*shape, around, dtype=torch.bfloat16)
    wanted = run(ops.selective_scan, exactly(given), backend="reference")
    got = run(ops.selective_scan, given, backend="cpu")
    assert {x.dtype for x in got} == {torch.bfloat16, torch.float32}
    assert largest_error([x.double() for x in got], [x.double() for x in wanted]) < 2**-7


@pytest.mark.parametrize("length", [1, 2, 4, 5])
def test_few_steps_without_gradients(length: int, instructions: str) -> None:
    """A layout of its own: steps that decoding takes."""
    for width, states in ((1, 1), (33, 16), (300, 5), (17, 40)):
        given = arguments(2, length, width, states, "around")
        start = {"start": torch.rand(2, length) < 0.3}
        with torch.no_grad():
            wanted = ops.selective_scan(**exactly(given), **start, backend="reference")
            got = ops.selective_scan(**given, **start, backend="cpu")
        assert largest_error([x.double() for x in got], list(wanted)) < 3e-6


def test_poisoned_memory_and_threads() -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    given, options = arguments(3, 70, 530, 16, "around"), flags("start", 3, 70)
    check_threads(lambda: run(ops.selective_scan, given, backend="cpu", **options))


def test_strides_do_not_matter() -> None:
    given = arguments(2, 40, 20, 16, "around")
    strided = {
        name: x.repeat_interleave(2, -1)[..., ::2] if isinstance(x, torch.Tensor) else x for name, x in given.items()
    }
    strided["u"] = given["u"].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided["u"].is_contiguous() and not strided["B"].is_contiguous()
    got, wanted = (run(ops.selective_scan, x, backend="cpu") for x in (strided, given))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_what_the_kernel_does_not_take() -> None:
    given = arguments(1, 4, 3, 2)
    for change, reason in (
        (dict(discretization="zoh"), "has the rule"),
        (dict(B=given["B"][0, :3]), "B and C for each step"),
        (exactly(given), "bfloat16 on the CPU"),
    ):
        with pytest.raises(ValueError, match=reason):
            ops.selective_scan(**given | change, backend="cpu")
        ops.selective_scan(**given | change)  # another backend takes it


def test_strong_decays_and_steps_of_nothing() -> None:
    given = arguments(1, 64, 16, 16)
    for dt in (0.0, 1e-30, 50.0, 1e30):
        given["dt"] = torch.full_like(given["dt"], dt)
        y, final = ops.selective_scan(**given, backend="cpu")
        wanted, wanted_final = ops.selective_scan(**exactly(given), backend="reference")
        assert largest_error([y.double(), final.double()], [wanted, wanted_final]) < 3e-6, dt


@pytest.mark.parametrize("length", [4, 6])
def test_growth_up_to_infinity(length: int, instructions: str) -> None:
    given = arguments(1, length, 5, 4)
    given |= dict(dt=torch.ones_like(given["dt"]), initial=torch.ones_like(given["initial"]))
    for A in (0.5, 14.0, 88.5, 89.0, 1e4):
        given["A"] = torch.full_like(given["A"], A)
        got = ops.selective_scan(**given | {"B": 0 * given["B"]}, backend="cpu")[1]
        wanted = ops.selective_scan(**given | {"B": 0 * given["B"]}, backend="reference")[1]
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=0.0)  # of an exponent of 88, rounded, at each step


@pytest.mark.parametrize("length", [2, 6])
@pytest.mark.parametrize("name", ["u", "dt", "A", "B", "C", "initial"])
def test_what_is_no_number_stays_none(name: str, length: int, instructions: str) -> None:
    given = arguments(1, length, 17, 16)
    given[name] = torch.full_like(given[name], float("nan"))
    y, final = ops.selective_scan(**given, backend="cpu")
    assert y.isnan().all() and (name == "C" or final.isnan().all())
