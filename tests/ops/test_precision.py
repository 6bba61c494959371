"""Ops in narrow types against float64, by bounds that follow from the unit roundoff; extreme decays; gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longstate import ops
from ops.test_against_reference import CASES, IDS, flags, largest_error, linear_case, run, scan_case, selective_case

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
LENGTH = 150


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Round the numbers of an argument to a type, complex ones to its complex partner."""
    if not isinstance(x, torch.Tensor) or not (x.dtype.is_floating_point or x.dtype.is_complex):
        return x
    return x.to(dtype.to_complex() if x.is_complex() else dtype)


def magnitudes(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for which the op sums the magnitudes of its terms: nothing cancels."""
    result = {}
    for name, x in arguments.items():
        if name == "A" and x.ndim == 2:  # only its real part decays
            x = x.real if x.is_complex() else x
        elif isinstance(x, torch.Tensor) and name != "log_decay":
            x = x.abs()
        result[name] = x
    return result | ({"activation": None} if "activation" in arguments else {})


@pytest.mark.parametrize("marks", ["", "start valid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("make", "kind"), CASES, ids=IDS)
def test_narrow_types_err_by_their_roundings(
    make: Callable[..., Any], kind: str, dtype: torch.dtype, marks: str
) -> None:
    # Inputs are rounded first, so that both sides mean the same numbers. Then, with u₃₂ = 2⁻²⁴: an output is a sum of
    # at most T terms, each a product of at most T decays and five other factors; any order of summing errs by at most
    # (2T + 8) u₃₂ of the sum of the terms' magnitudes M. Arguments of exponentials are rounded too: an error of |z|u in
    # z is one of |z|e^{−|z|} u ≤ u in each decay, another T u₃₂. In bfloat16, the output is rounded once more: u₁₆|y|.
    # SiLU has a slope of at most 1.1. Complex products cost at most √8 of a real one.
    if dtype == torch.bfloat16 and "complex" in kind:
        pytest.skip("there is no complex type of that width")
    if "poles" in make(kind, 1, 1, torch.float64)[1]:
        pytest.skip("magnitudes say nothing of a solution of equations: tests/ops/test_dplr_scan.py has its bound")
    function, arguments = make(kind, 2, LENGTH, torch.float64)
    arguments = {name: cast(x, dtype) for name, x in arguments.items()}
    exact = {name: cast(x, torch.float64) for name, x in arguments.items()}
    options = flags(marks, 2, LENGTH)
    y, final = function(**arguments, **options)
    y_exact, final_exact = function(**exact, **options, backend="reference")
    rule = {"discretization": "zoh-euler"} if "discretization" in exact and "bilinear" in kind else {}
    m, m_final = function(**(magnitudes(exact) | rule), **options, backend="reference")
    scale = 1.1 * 2.83 * (3 * LENGTH + 8) * 2.0**-24
    wide = torch.complex128 if y.is_complex() else torch.float64
    rounding = UNIT[torch.bfloat16] * y_exact.abs() if dtype == torch.bfloat16 else 0
    error, bound = (y.to(wide) - y_exact).abs(), rounding + scale * m.abs().amax(1, keepdim=True) * 2
    assert y.dtype == (arguments.get("v") if "v" in arguments else arguments.get("b", arguments.get("u"))).dtype
    assert (error <= bound + 1e-30).all(), (error / bound).max().item()
    assert bound.max() < 0.05 * y_exact.abs().max() + 0.05, "a bound that anything would pass"
    wide = torch.complex128 if final.is_complex() else torch.float64
    assert not final.numel() or ((final.to(wide) - final_exact).abs() <= 2 * scale * m_final.abs().max() + 1e-30).all()
    if "short" not in function.__name__ and "long" not in function.__name__:
        assert final.dtype in (torch.float32, torch.complex64), "states are float32 at least"


@pytest.mark.parametrize("marks", ["", "start valid"])
@pytest.mark.parametrize(("make", "kind"), CASES, ids=IDS)
def test_gradients_are_those_measured(make: Callable[..., Any], kind: str, marks: str) -> None:
    function, arguments = make(kind, 1, 3, torch.float64)
    options = flags(marks, 1, 3)
    if isinstance(arguments.get("log_decay"), torch.Tensor):
        arguments["log_decay"] = arguments["log_decay"] - 1e-3  # a measurement must stay below 0
    names = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]

    def of_tensors(*values: torch.Tensor) -> Any:
        return function(**(arguments | dict(zip(names, values, strict=True))), **options)

    assert torch.autograd.gradcheck(of_tensors, [arguments[n].requires_grad_() for n in names], fast_mode=True)


@pytest.mark.parametrize("marks", ["", "start valid"])
@pytest.mark.parametrize("kind", ["fixed", "step", "fixed complex", "step complex"])
def test_scan_is_differentiable_twice(kind: str, marks: str) -> None:
    _, arguments = scan_case(kind, 1, 4, torch.float64)
    values, options = [x.requires_grad_() for x in arguments.values()], flags(marks, 1, 4)
    assert torch.autograd.gradgradcheck(lambda a, b, initial: ops.scan(a, b, initial, **options), values)


@pytest.mark.parametrize("per_channel", [False, True], ids=["head", "channel"])
@pytest.mark.parametrize("length", [16, 65, 600, 1300])
@pytest.mark.parametrize("marks", ["", "start"])
def test_linear_attention_with_extreme_decays(per_channel: bool, length: int, marks: str) -> None:
    _, arguments = linear_case("channel" if per_channel else "step", 1, length, torch.float64)
    choices = torch.tensor([0.0, -1e-9, -1e-3, -50.0, -3000.0], dtype=torch.float64)
    decay = choices[torch.randint(5, arguments["log_decay"].shape)]
    options = flags(marks, 1, length)
    wanted = run(ops.linear_attention, arguments | {"log_decay": decay}, backend="reference", **options)
    got = run(ops.linear_attention, arguments | {"log_decay": decay}, **options)
    assert all(x.isfinite().all() for x in got)
    assert largest_error(got, wanted) < 1e-10
    # In float32, sums of thousands must not swallow the small decays beside them.
    narrow = {name: x.float() for name, x in (arguments | {"log_decay": decay}).items()}
    y, _ = ops.linear_attention(**narrow, **options)
    assert (y - wanted[0]).abs().max() < 1e-5 * wanted[0].abs().max()


def test_long_sequences_without_decay_and_with_tiny_decay() -> None:
    for decay in (0.0, -1e-6):
        _, arguments = linear_case("step", 1, 5000, torch.float64)
        arguments["log_decay"] = torch.full_like(arguments["log_decay"], decay)
        wanted, _ = ops.linear_attention(**arguments, backend="reference")
        got, _ = ops.linear_attention(**{name: x.float() for name, x in arguments.items()})
        assert (got - wanted).abs().max() < 1e-5 * wanted.abs().max()


def factor(function: Callable[..., Any], arguments: dict[str, Any], **options: Any) -> torch.Tensor:
    """Return the change of the final state for each unit of the initial one, by differentiation."""
    initial = arguments["initial"].detach().requires_grad_()
    final = function(**(arguments | {"initial": initial}), **options)[1]
    (gradient,) = torch.autograd.grad(final.sum() if not final.is_complex() else final.real.sum(), initial)
    return gradient.conj()


@pytest.mark.parametrize("marks", ["", "start", "valid", "start valid"])
@pytest.mark.parametrize("length", [1, 40])
def test_decays_are_the_factor_of_the_initial_state(marks: str, length: int) -> None:
    torch.manual_seed(3)
    options = flags(marks, 3, length)
    if "start" in marks and length > 1:
        options["start"][0] = False
    for kind in ("step", "step complex"):
        _, arguments = scan_case(kind, 3, length, torch.float64)
        got = ops.scan_decay(arguments["a"], **options)
        torch.testing.assert_close(got, factor(ops.scan, arguments, **options), rtol=1e-12, atol=1e-30)
    for kind in ("zoh-euler", "zoh complex fixed", "bilinear", "bilinear complex fixed"):
        _, arguments = selective_case(kind, 3, length, torch.float64)
        got = ops.selective_scan_decay(
            arguments["dt"], arguments["A"], discretization=arguments["discretization"], **options
        )
        torch.testing.assert_close(got, factor(ops.selective_scan, arguments, **options), rtol=1e-9, atol=1e-30)
    for kind in ("step", "channel", "groups channel strong"):
        _, arguments = linear_case(kind, 3, length, torch.float64)
        got = ops.linear_attention_decay(arguments["log_decay"], **options)
        got = got[..., None, None] if got.ndim == 2 else got[..., None]
        wanted = factor(ops.linear_attention, arguments, **options)
        torch.testing.assert_close(got.expand_as(wanted), wanted, rtol=1e-9, atol=1e-30)


def test_decays_of_fixed_coefficients() -> None:
    _, arguments = scan_case("fixed", 2, 7, torch.float64)
    torch.testing.assert_close(ops.scan_decay(arguments["a"], 7).expand(2, 5), factor(ops.scan, arguments))
    _, arguments = linear_case("head", 2, 7, torch.float64)
    got = ops.linear_attention_decay(arguments["log_decay"], 7)[None, :, None, None]
    wanted = factor(ops.linear_attention, arguments)
    torch.testing.assert_close(got.expand_as(wanted), wanted)
    with pytest.raises(ValueError, match="start and valid"):
        ops.scan_decay(torch.rand(3), 4, start=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="start and valid"):
        ops.linear_attention_decay(-torch.rand(3), 4, valid=torch.zeros(1, 4, dtype=torch.bool))


def test_what_stands_at_steps_that_do_not_count_reaches_nothing() -> None:
    """Not even as not-a-number, in outputs, states or gradients."""
    valid = torch.rand(2, 70) < 0.7
    for make, kind in CASES:
        function, arguments = make(kind, 2, 70, torch.float64)
        dirty = {
            name: x.masked_fill(~valid.view(2, 70, *[1] * (x.ndim - 2)), torch.nan)
            if isinstance(x, torch.Tensor) and x.shape[:2] == (2, 70)
            else x
            for name, x in arguments.items()
        }
        wanted, got = (run(function, a, valid=valid) for a in (arguments, dirty))
        assert all(x.isfinite().all() for x in got), (function.__name__, kind)
        assert largest_error(got, wanted) < 1e-12, (function.__name__, kind)


def test_expm1_where_the_textbook_divides() -> None:
    """The held input's gain keeps its digits where Δ|A| is small, and has its limit at 0."""
    for size in (1e-3, 1e-6, 1e-12, 0.0):
        A = torch.tensor([[-size]])
        dt = torch.full((1, 1, 1), 0.5)
        one = torch.ones(1, 1)
        _, h = ops.selective_scan(torch.ones(1, 1, 1), dt, A, one, one, discretization="zoh")
        z = -0.5 * size
        wanted = 0.5 * (1 + z / 2 + z * z / 6)
        assert abs(h.item() - wanted) < 2e-7 * wanted
