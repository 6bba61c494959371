"""The compiled short convolution against the reference in float64, both ways, by bounds that follow from roundings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstate import native, ops
from ops.test_against_reference import flags

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

# Batch, steps, channels, taps: no step, one, two, fewer than the window, several runs, jobs and pieces of channels.
SHAPES = [(2, 0, 3, 4), (1, 1, 1, 1), (2, 1, 5, 4), (2, 2, 17, 3), (2, 3, 7, 9), (3, 70, 33, 4), (1, 150, 530, 2)]
SHAPES += [(2, 130, 16, 4), (2, 37, 20, 3), (1, 40, 17, 64)]
UNIT, NARROW = 2.0**-24, 2.0**-8


def arguments(b: int, t: int, d: int, k: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(b + t + d + k)
    given = dict(
        u=torch.randn(b, t, d), weight=torch.randn(d, k), bias=torch.randn(d), initial=torch.randn(b, k - 1, d)
    )
    return {name: x.to(dtype) for name, x in given.items()}


def both_ways(given: dict[str, Any], grads: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Return outputs, final window and the gradients of all tensors given."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    y, final = ops.convolution.short(**leaves, **options)
    grads = [g.to(x.dtype) for g, x in zip(grads, (y, final), strict=True)]
    found = torch.autograd.grad([y, final], list(leaves.values()), grads, materialize_grads=True, allow_unused=True)
    return {"y": y.detach(), "final": final.detach()} | dict(zip(leaves, found, strict=True))


def check(given: dict[str, Any], backend: str = "cpu", **options: Any) -> None:
    """Compare with the reference.

    A sum of k products and a bias, in any order, errs by at most (k + 2) u M, M the sum of magnitudes. SiLU has a slope
    of at most 1.1 and errs by 3 units, 6u, itself. Its slope has one of at most 0.5 and errs by at most 8u, so that the
    gradient of a pre-activation errs by (0.5 (k + 2) M + 8) u of the output's; the other gradients are sums of it over
    steps or taps, which add (b t + k) u of 1.1 times that, all relative to sums of magnitudes. Narrow results are
    rounded once more.
    """
    (b, t, d), k = given["u"].shape, given["weight"].shape[1]
    options = {"activation": "silu"} | options
    grads = [torch.randn(b, t, d).to(given["u"].dtype), torch.randn(b, k - 1, d).to(given["u"].dtype)]
    exact = {name: x.double() for name, x in given.items()}
    wanted = both_ways(exact, grads, **options, backend="reference")
    magnitudes = {name: x.abs() for name, x in exact.items()}
    linear = options | {"activation": None}
    most = both_ways(magnitudes, [g.abs() for g in grads], **linear, backend="reference")
    largest = most["y"].max().item() if t else 0.0
    for name, x in both_ways(given, grads, **options, backend=backend).items():
        factor = 0.5 * (k + 2) * largest + 8 + 1.1 * (b * t + k)
        bound = factor * UNIT * most[name]
        if name == "y":
            bound = 1.1 * (k + 2) * UNIT * most["y"] + 6 * UNIT * wanted["y"].abs()
        if x.dtype == torch.bfloat16:
            bound = bound + NARROW * (wanted[name].abs() + bound)
        assert x.dtype == given[name if name in given else "u"].dtype and x.shape == wanted[name].shape
        if name == "final":
            assert torch.equal(x.double(), wanted[name])
        assert ((x.double() - wanted[name]).abs() <= bound + 1e-37).all(), name
        assert not x.numel() or bound.max() < 0.02 * wanted[name].abs().max() + 0.05, "a bound that anything would pass"


@pytest.mark.parametrize("marks", ["", "start", "valid", "start valid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32(shape: tuple[int, ...], marks: str, instructions: str) -> None:
    given, options = arguments(*shape), flags(marks, *shape[:2])
    check(given, **options)
    check({"u": given["u"], "weight": given["weight"]}, activation=None, **options)


@pytest.mark.parametrize("marks", ["", "start valid"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16(shape: tuple[int, ...], marks: str, instructions: str) -> None:
    given, options = arguments(*shape, torch.bfloat16), flags(marks, *shape[:2])
    check(given, **options)
    wide = {name: given[name].float() for name in ("weight", "bias")}
    check(given | wide, **options)  # as under autocast


def test_float32_with_narrow_taps() -> None:
    given = arguments(2, 30, 20, 4)
    check(given | {name: given[name].bfloat16() for name in ("weight", "bias")})


def test_starts_everywhere_and_nothing_that_counts() -> None:
    given = arguments(3, 70, 20, 4)
    always, never = torch.ones(3, 70, dtype=torch.bool), torch.zeros(3, 70, dtype=torch.bool)
    check(given, start=always)
    check(given, valid=never)
    check(given, start=always, valid=never)
    check(given, start=never, valid=always)
    some = torch.tensor([[True], [False], [True]]).expand(3, 70)
    check(given, start=some, valid=some)


def test_strides_do_not_matter() -> None:
    given = arguments(2, 70, 40, 4)
    given["bias"] = given["bias"].repeat_interleave(2)[::2]
    for name, make in {
        "half of a projection": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "another first axis": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
        "apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }.items():
        strided = {n: make(x) if x.ndim > 1 else x for n, x in given.items()}
        assert not strided["u"].is_contiguous(), name
        got, wanted = (ops.convolution.short(**x, activation="silu", backend="cpu") for x in (strided, given))
        assert all(torch.equal(x, y) and x.is_contiguous() for x, y in zip(got, wanted, strict=True)), name
        check(strided)


@pytest.mark.parametrize("marks", ["", "start valid"])
def test_poisoned_memory_and_threads(marks: str) -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    given, options = arguments(3, 170, 530, 4), flags(marks, 3, 170)
    grads = [torch.randn(3, 170, 530), torch.randn(3, 3, 530)]
    before, found = torch.get_num_threads(), []
    deterministic = torch.utils.deterministic
    kept = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(both_ways(given, grads, activation="silu", backend="cpu", **options))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(kept[0])
        deterministic.fill_uninitialized_memory = kept[1]
    assert all(x.isfinite().all() for x in found[0].values())
    for others in found[1:]:
        assert all(torch.equal(x, others[name]) for name, x in found[0].items())


def test_what_is_no_number_reaches_only_who_sees_it(instructions: str) -> None:
    for taps in (4, 5):
        given = arguments(1, 20, 17, taps)
        given["u"][0, 6, 3] = float("nan")
        y, final = ops.convolution.short(**given, activation="silu", backend="cpu")
        seen = torch.zeros(20, 17, dtype=torch.bool)
        seen[6 : 6 + taps, 3] = True
        assert torch.equal(y[0].isnan(), seen) and final.isfinite().all()
        valid = torch.ones(1, 20, dtype=torch.bool)
        valid[0, 6] = False
        found = both_ways(given, [torch.ones(1, 20, 17), final], activation="silu", valid=valid, backend="cpu")
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("marks", ["", "start valid"])
def test_gradients_of_gradients_are_those_of_the_reference(marks: str) -> None:
    given, options = arguments(2, 7, 3, 3), flags(marks, 2, 7)
    found = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaves = [x.to(dtype).requires_grad_() for x in given.values()]
        y, final = ops.convolution.short(*leaves, activation="silu", backend=backend, **options)
        once = torch.autograd.grad((y * y).sum() + final.sin().sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum((x * x).sum() for x in once), leaves))
    for x, wanted in zip(*found, strict=True):
        assert (x - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_large_pre_activations(instructions: str) -> None:
    """SiLU's slope is 0 and 1 there, and their product with the gradient no accident of inf · 0."""
    x = torch.tensor([-1e30, -1e4, -90.0, 90.0, 1e4, 1e30, float("inf")])[None, :, None].requires_grad_()
    y, _ = ops.convolution.short(x, torch.ones(1, 1), activation="silu", backend="cpu")
    wanted = torch.where(x > 0, x, 0)
    torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-30)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad, (x > 0).float(), rtol=1e-6, atol=1e-30)


def test_what_the_kernel_does_not_take() -> None:
    given = arguments(1, 70, 3, 4)
    for change, reason in (
        (dict(u=given["u"].double(), initial=given["initial"].double()), "float32 and bfloat16"),
        (dict(weight=given["weight"].half()), "float32 and bfloat16"),
        (dict(bias=given["bias"].double()), "float32 and bfloat16"),
        (arguments(1, 70, 3, 65), "at most 64 taps"),
    ):
        with pytest.raises(ValueError, match=rf"{reason}.*Use 'chunked'"):
            ops.convolution.short(**given | change, backend="cpu")
        ops.convolution.short(**given | change)  # another backend takes it
    ops.convolution.short(**given | dict(initial=given["initial"].double()), backend="cpu")


@pytest.mark.compiled
@pytest.mark.parametrize("marks", ["", "start valid"])
def test_as_a_node_of_a_graph(marks: str) -> None:
    given, options = arguments(2, 40, 5, 4), flags(marks, 2, 40)
    tensors = [x.requires_grad_() for x in given.values()]
    op = torch.ops.longstate.activated_short_convolution.default
    for some in (tensors, [*tensors[:2], None, None]):
        torch.library.opcheck(op, (*some, options.get("start"), options.get("valid"), True, "cpu"))

    def function(*tensors: torch.Tensor) -> Any:
        return ops.convolution.short(*tensors, activation="silu", **options)

    torch._dynamo.reset()
    got, wanted = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors), function(*tensors)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
