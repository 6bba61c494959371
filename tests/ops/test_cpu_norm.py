"""The compiled norm against the reference in float64, both ways, by bounds that follow from roundings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from longstate import native, ops

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

# Shapes of inputs, and groups: a vector, no row, one, more rows than a job takes, four axes, odd widths.
SHAPES = [
    ((5,), 1),
    ((2, 0, 6), 2),
    ((1, 1, 1), 1),
    ((3, 70, 33), 3),
    ((7, 48), 1),
    ((2, 5, 3, 64), 2),
    ((1, 2, 771), 1),
]
KINDS = {
    "plain": {},
    "weight": dict(weight=True),
    "offset": dict(weight=True, offset=1.0),
    "gate first": dict(weight=True, gate=True),
    "gate first, offset": dict(weight=True, gate=True, offset=-0.5),
    "norm first": dict(weight=True, gate=True, norm_before_gate=True),
    "gate first, plain": dict(gate=True),
    "norm first, plain": dict(gate=True, norm_before_gate=True),
}
UNIT, NARROW = 2.0**-24, 2.0**-8


def case(kind: str, shape: tuple[int, ...], groups: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    torch.manual_seed(sum(shape))
    options = dict(KINDS[kind])
    given = {"x": torch.randn(shape)}
    given |= {"weight": torch.randn(shape[-1])} if options.pop("weight", False) else {}
    given |= {"gate": 2 * torch.randn(shape)} if options.pop("gate", False) else {}
    return given, options | {"groups": groups, "eps": 0.1}


def both_ways(given: dict[str, torch.Tensor], grad: torch.Tensor, **options: Any) -> dict[str, torch.Tensor]:
    """Return outputs and the gradients of all tensors given."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items()}
    y = ops.rms_norm(**leaves, **options)
    found = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y.detach()} | dict(zip(leaves, found, strict=True))


def magnitudes(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    offset: float = 0.0,
    norm_before_gate: bool = False,
    *,
    groups: int,
    eps: float,
) -> dict[str, torch.Tensor]:
    """Return the gradients' formulas with a sum of magnitudes wherever they add, and with 1.1 for SiLU's slope."""
    s = torch.ones_like(x) if gate is None else torch.nn.functional.silu(gate).abs()
    before, after = (torch.ones_like(x), s) if norm_before_gate else (s, torch.ones_like(x))

    def mean(v: torch.Tensor) -> torch.Tensor:
        return v.unflatten(-1, (groups, -1)).mean(-1).repeat_interleave(x.shape[-1] // groups, -1)

    z = (x * before).abs()
    r = (mean(z.square()) + eps).rsqrt()
    factor = torch.ones_like(x) if weight is None else (abs(offset) + weight.abs()).expand_as(x)
    d = grad.abs() * factor * after
    into = r * (d + z * r * mean(d * z * r))
    through = 1.1 * (grad.abs() * factor * z * r if norm_before_gate else into * x.abs())
    of_weight = (grad.abs() * after * z * r).reshape(-1, x.shape[-1]).sum(0)
    return {"x": into * before, "weight": of_weight, "gate": through}


def check(given: dict[str, torch.Tensor], backend: str = "cpu", **options: Any) -> None:
    """Compare with the reference.

    A mean of n squares errs by at most (n + 2) u of itself, its inverse root by half of that; SiLU and its slope by 8u,
    and all other factors by a few more: (n + 48) u covers outputs, relative to themselves, and the gradients' terms,
    relative to their magnitudes; sums over rows add their number. Narrow results are rounded once, or twice where the
    weight of a narrow type multiplies what was rounded to it.
    """
    x = given["x"]
    size, rows = x.shape[-1] // options["groups"], x.numel() // x.shape[-1]
    grad = torch.randn(x.shape).to(given.get("weight", x).dtype)
    exact = {name: v.double() for name, v in given.items()}
    wanted = both_ways(exact, grad.double(), **options, backend="reference")
    most = magnitudes(grad.double(), **exact, **options) | {"y": wanted["y"].abs()}
    for name, got in both_ways(given, grad, **options, backend=backend).items():
        bound = (size + 48 + (rows if name == "weight" else 0)) * UNIT * most[name]
        if got.dtype == torch.bfloat16:
            bound = bound + (2 if name == "y" else 1) * NARROW * (1 + NARROW) * (wanted[name].abs() + bound)
        assert got.shape == wanted[name].shape and got.dtype == given.get("weight" if name == "y" else name, x).dtype
        assert ((got.double() - wanted[name]).abs() <= bound + 1e-37).all(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "groups"), SHAPES, ids=str)
def test_float32(kind: str, shape: tuple[int, ...], groups: int, instructions: str) -> None:
    given, options = case(kind, shape, groups)
    check(given, **options)


@pytest.mark.parametrize("narrow", ["x", "weight", "x weight", "x weight gate", "gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16(kind: str, narrow: str, instructions: str) -> None:
    """Each in a type of its own: float32 residuals meet the weights of a bfloat16 model."""
    for shape, groups in SHAPES:
        given, options = case(kind, shape, groups)
        check({name: x.bfloat16() if name in narrow.split() else x for name, x in given.items()}, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_narrow_results_are_those_of_the_reference(kind: str) -> None:
    """A result is another number of bfloat16 only where the two in float32 lie at both sides of a boundary: a few in
    2⁻⁸ / (a few u) numbers, and for a weight after a rounding that is the neighbouring number times the weight."""
    given, options = case(kind, (2, 64, 128), 2)
    given = {name: x.bfloat16() for name, x in given.items()}
    got, wanted = (ops.rms_norm(**given, **options, backend=backend).float() for backend in ("cpu", "reference"))
    assert (got != wanted).float().mean() < 0.005
    torch.testing.assert_close(got, wanted, rtol=2.1 * 2.0**-7, atol=0.0)


def test_strides_do_not_matter() -> None:
    given, options = case("gate first", (2, 9, 3, 40), 2)
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "part of a projection": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        "another first axis": lambda x: x.transpose(0, -2).contiguous().transpose(0, -2),
        "apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
        "the same for all": lambda x: x[:1, :1].expand_as(x),
    }
    for name, change in changes.items():
        strided = {n: change(x) if x.ndim > 1 else x for n, x in given.items()}
        assert not strided["x"].is_contiguous(), name
        got = ops.rms_norm(**strided, **options, backend="cpu")
        assert got.is_contiguous(), name
        plain = {n: x.contiguous() for n, x in strided.items()}
        assert torch.equal(got, ops.rms_norm(**plain, **options, backend="cpu")), name
        check(strided, **options)


@pytest.mark.parametrize("kind", ["gate first", "norm first"])
def test_poisoned_memory_and_threads(kind: str) -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    given, options = case(kind, (3, 170, 530), 2)
    grad = torch.randn(3, 170, 530)
    before, found = torch.get_num_threads(), []
    deterministic = torch.utils.deterministic
    kept = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(both_ways(given, grad, backend="cpu", **options))
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(kept[0])
        deterministic.fill_uninitialized_memory = kept[1]
    assert all(x.isfinite().all() for x in found[0].values())
    for others in found[1:]:
        assert all(torch.equal(x, others[name]) for name, x in found[0].items())


@pytest.mark.parametrize("kind", ["weight", "gate first, offset", "norm first"])
def test_gradients_of_gradients_are_those_of_the_reference(kind: str) -> None:
    given, options = case(kind, (2, 7, 12), 2)
    found = []
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "reference")):
        leaves = {name: x.to(dtype).requires_grad_() for name, x in given.items()}
        y = ops.rms_norm(**leaves, **options, backend=backend)
        once = torch.autograd.grad((y * y).sum(), list(leaves.values()), create_graph=True)
        found.append(torch.autograd.grad(sum((x * x).sum() for x in once), list(leaves.values())))
    for x, wanted in zip(*found, strict=True):
        assert (x - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_what_is_no_number_stays_in_its_group(instructions: str) -> None:
    x = torch.randn(2, 4, 34)
    x[0, 1, 3], x[1, 2, 20] = float("nan"), float("inf")
    y = ops.rms_norm(x, groups=2, backend="cpu")
    assert torch.equal(y.isnan(), ops.rms_norm(x, groups=2, backend="reference").isnan())
    assert y[0, 1, :17].isnan().all() and y[0, 1, 17:].isfinite().all()
    zero = ops.rms_norm(torch.zeros(1, 2, 5), eps=1e-30, backend="cpu")
    assert torch.equal(zero, torch.zeros(1, 2, 5))


def test_what_the_kernel_does_not_take() -> None:
    given, options = case("gate first", (2, 5, 6), 1)
    for change in (dict(x=given["x"].double()), dict(weight=given["weight"].half()), dict(gate=given["gate"].double())):
        with pytest.raises(ValueError, match=r"float32 and bfloat16.*Use 'reference'"):
            ops.rms_norm(**given | change, **options, backend="cpu")
        ops.rms_norm(**given | change, **options)  # the reference takes it


@pytest.mark.compiled  # apart from the run-time checks, which see a wrong shape first
def test_shapes_that_do_not_go_together() -> None:
    x = torch.randn(2, 5, 6)
    with pytest.raises(ValueError, match=r"groups=4.*not a multiple"):
        ops.rms_norm(x, groups=4)
    with pytest.raises(ValueError, match=r"weight has shape \[5\], wanted \[6\]"):
        ops.rms_norm(x, torch.ones(5))
    with pytest.raises(ValueError, match="gate has shape"):
        ops.rms_norm(x, gate=x[:1])


@pytest.mark.compiled
@pytest.mark.parametrize("kind", ["plain", "weight", "gate first, offset"])
def test_as_a_node_of_a_graph(kind: str) -> None:
    given, options = case(kind, (2, 5, 6), 2)
    tensors = {name: x.requires_grad_() for name, x in given.items()}
    values = [tensors.get(name) for name in ("x", "weight", "gate")]
    settings = (options["eps"], options["groups"], options.get("offset", 0.0), options.get("norm_before_gate", False))
    torch.library.opcheck(torch.ops.longstate.rms_norm.default, (*values, *settings, "cpu"))

    def function(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return ops.rms_norm(**tensors, **options)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(tensors), function(tensors))
