"""The compiled scan against the reference in float64: any shape, any instruction set, any number of threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longstate import native, ops
from ops.test_against_reference import flags, largest_error
from ops.threads import check_threads

if native.kernels is None:
    pytest.skip(native.reason, allow_module_level=True)

# Batch, steps, channels: none, one, less than a vector, odd, more than one strip.
SHAPES = [(2, 0, 3), (1, 1, 1), (2, 2, 5), (2, 33, 16), (1, 97, 37), (1, 3, 4100), (2, 600, 3)]
KINDS = ["fixed", "step", "fixed complex", "step complex"]
MARKS = ["", "start", "valid", "start valid"]


def arguments(kind: str, b: int, t: int, *shape: int, narrow: bool = False) -> dict[str, torch.Tensor]:
    """Return a, b, the initial state, and the gradients of the outputs and the final state."""
    torch.manual_seed(b + t + sum(shape))
    dtype = torch.complex64 if "complex" in kind else torch.float32
    a = torch.rand(shape if "fixed" in kind else (b, t, *shape))
    if dtype.is_complex:
        a = torch.polar(a, 7 * torch.rand_like(a))
    outer = torch.bfloat16 if narrow else dtype
    b_t, g = (torch.randn(b, t, *shape, dtype=dtype).to(outer) for _ in range(2))
    return dict(
        a=a, b=b_t, initial=torch.randn(b, *shape, dtype=dtype), g=g, g_final=torch.randn(b, *shape, dtype=dtype)
    )


def run(given: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Return outputs, the final state and the gradients of a, b and the initial state."""
    leaves = [given[name].detach().clone().requires_grad_() for name in ("a", "b", "initial")]
    h, final = ops.scan(*leaves, **options)
    total = sum((x * g.conj()).real.sum() for x, g in ((h, given["g"]), (final, given["g_final"])))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [h.detach(), final.detach(), *gradients]


def wide(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x.to(torch.complex128 if x.is_complex() else torch.float64) for name, x in given.items()}


def check(given: dict[str, torch.Tensor], options: dict[str, Any], unit: float = 0.0) -> None:
    """Compare with the reference, by a bound for each number.

    Each is a sum of products of inputs: at most T coefficients before a step and T after it, rounded twice each, of
    complex numbers with at most √8 of the error. The gradient of a fixed a is the sum over all steps of a sequence in
    runs of 256, and over sequences: 256 + T/256 + B more. All that by the sum of the products' magnitudes, which is
    what the reference computes of the magnitudes. Narrow numbers are rounded on the way out, and h again on its way
    into a's gradient: two of their units more.
    """
    batch, length = given["b"].shape[:2]
    exact = run(wide(given), backend="reference", **options)
    sizes = run({name: x.abs() for name, x in wide(given).items()}, backend="reference", **options)
    got = run(given, backend="cpu", **options)
    terms = 4 * length + 256 + length / 256 + batch + 4
    for name, x, wanted, size in zip(("h", "final", "a", "b", "initial"), got, exact, sizes, strict=True):
        assert x.shape == wanted.shape, name
        error = (x.to(wanted.dtype) - wanted).abs()
        assert (error <= (8**0.5 * terms * 2**-24 + 2 * unit) * size).all(), name


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scan(shape: tuple[int, ...], kind: str, marks: str, instructions: str) -> None:
    check(arguments(kind, *shape), flags(marks, *shape[:2]))


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_bfloat16_inputs_and_outputs(kind: str, marks: str, instructions: str) -> None:
    given = arguments(kind, 2, 40, 37, narrow=True)
    check(given, flags(marks, 2, 40), 2**-8)
    h, final = ops.scan(given["a"], given["b"])
    assert h.dtype == torch.bfloat16 and final.dtype == torch.float32
    narrow = given["a"].bfloat16()  # coefficients too, if they must
    assert (
        largest_error([ops.scan(narrow, given["b"], backend="cpu")[1]], [ops.scan(narrow.float(), given["b"])[1]]) == 0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_on_typical_numbers_the_error_is_a_few_roundings(kind: str, instructions: str) -> None:
    """Not the worst case: roundings are as often up as down, and what is forgotten takes its errors along."""
    given = arguments(kind, 2, 300, 37)
    exact = run(wide(given), backend="reference")
    got = [x.to(y.dtype) for x, y in zip(run(given, backend="cpu"), exact, strict=True)]
    assert largest_error(got, exact) < 1e-6


def test_long_sums_keep_their_digits() -> None:
    """The gradient of a fixed a over 100,000 equal steps: 256 roundings in each run, and one for each of 391 runs."""
    length = 100_000
    a, b, g = torch.full((3,), 0.3), torch.full((1, length, 3), 0.7), torch.full((1, length, 3), 0.6)
    (got,) = torch.autograd.grad(ops.scan(a.requires_grad_(), b, backend="cpu")[0], a, g)
    a, b, g = a.detach().double(), b.double(), g.double()
    (wanted,) = torch.autograd.grad(ops.scan(a.requires_grad_(), b)[0], a, g)
    assert largest_error([got.double()], [wanted]) < (256 + 391) * 2**-24


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 5)], ids=str)
def test_any_shape_of_a_state(shape: tuple[int, ...], kind: str) -> None:
    given = arguments(kind, 2, 9, *shape)
    flat = {name: x.reshape(*x.shape[: x.ndim - len(shape)], -1) for name, x in given.items()}
    for x, y in zip(run(given, backend="cpu"), run(flat, backend="cpu"), strict=True):
        assert torch.equal(x.flatten(), y.flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_strides_and_lazy_conjugates_do_not_matter(kind: str) -> None:
    given, options = arguments(kind, 3, 11, 4, 5), flags("start valid", 3, 11)
    wanted = run(given, backend="cpu", **options)
    strided = {name: x.mT.contiguous().mT for name, x in given.items()}
    strided["b"] = given["b"].transpose(0, 1).contiguous().transpose(0, 1)
    strided["g"] = given["g"].repeat_interleave(2, -1)[..., ::2]
    assert not any(x.is_contiguous() for x in strided.values())
    masks = {name: x.mT.contiguous().mT for name, x in options.items()}
    if "complex" in kind:
        strided |= {name: x.conj().clone().conj() for name, x in given.items()}
        assert all(x.is_conj() for x in strided.values())
    leaves = [strided[name].detach().requires_grad_() for name in ("a", "b", "initial")]
    h, final = ops.scan(*leaves, backend="cpu", **masks)
    got = [h, final, *torch.autograd.grad((h, final), leaves, (strided["g"], strided["g_final"]))]
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


def test_broadcast_coefficients_are_not_copied_into_another_meaning() -> None:
    given = arguments("step", 2, 7, 5)
    a = given["a"][:1, :1].expand(2, 7, 5)
    assert a.stride()[:2] == (0, 0)
    wanted = ops.scan(a.contiguous(), given["b"], backend="cpu")[0]
    assert torch.equal(ops.scan(a, given["b"], backend="cpu")[0], wanted)
    assert torch.equal(ops.scan(a[0, 0], given["b"], backend="cpu")[0], wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 70, 530), (3, 300, 37)], ids=str)
def test_poisoned_memory_and_threads(shape: tuple[int, ...], kind: str) -> None:
    """Nothing is read that was not written, and the number of threads changes no bit."""
    given, options = arguments(kind, *shape), flags("start valid", *shape[:2])
    check_threads(lambda: run(given, backend="cpu", **options))


@pytest.mark.parametrize("kind", KINDS)
def test_without_an_initial_state_it_is_zero(kind: str) -> None:
    given = arguments(kind, 2, 5, 3)
    given["initial"] = torch.zeros_like(given["initial"])
    leaves = [given[name].clone().requires_grad_() for name in "ab"]
    h, final = ops.scan(*leaves, backend="cpu")
    got = [h, final, *torch.autograd.grad((h, final), leaves, (given["g"], given["g_final"]))]
    assert all(torch.equal(x, y) for x, y in zip(got, run(given, backend="cpu")[:4], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_passes_a_start_or_comes_from_a_step_that_does_not_count(kind: str) -> None:
    """Not even what is no number: neither forwards nor backwards."""
    given, options = arguments(kind, 2, 40, 19), flags("start valid", 2, 40)
    wanted = run(given, backend="cpu", **options)
    skipped = ~options["valid"][..., None]
    names = ("b", "g") if "fixed" in kind else ("a", "b", "g")
    dirty = given | {name: given[name].masked_fill(skipped, torch.nan) for name in names}
    got = run(dirty, backend="cpu", **options)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    start = torch.zeros(2, 40, dtype=torch.bool)
    start[:, 20] = True
    given["b"][:, :20] = torch.nan
    h, final = ops.scan(given["a"], given["b"], given["initial"], start=start, backend="cpu")
    assert h[:, :20].isnan().all() and h[:, 20:].isfinite().all() and final.isfinite().all()


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives(kind: str, marks: str) -> None:
    """Gradients that are to be differentiated again take another way, on this backend too."""
    given, options = arguments(kind, 2, 9, 4), flags(marks, 2, 9)

    def second(given: dict[str, torch.Tensor], backend: str | None) -> list[torch.Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in given.values()]
        h, final = ops.scan(*leaves[:3], backend=backend, **options)
        first = torch.autograd.grad((h, final), leaves[:3], leaves[3:], create_graph=True)
        return [*first, *torch.autograd.grad(sum((x * x.conj()).real.sum() for x in first), leaves)]

    exact = second(wide(given), "reference")
    got = [x.to(y.dtype) for x, y in zip(second(given, None), exact, strict=True)]
    assert largest_error(got, exact) < 3e-6  # some hundred terms, each rounded a few times


def test_what_the_kernel_does_not_take() -> None:
    given = arguments("step", 1, 4, 3)
    for dtype, reason in ((torch.float64, "float32 or complex64"), (torch.float16, "takes float32 and bfloat16")):
        with pytest.raises(ValueError, match=reason):
            ops.scan(given["a"].to(dtype), given["b"].to(dtype), backend="cpu")
        ops.scan(given["a"].to(dtype), given["b"].to(dtype))  # another backend takes it


def test_real_coefficients_of_complex_states() -> None:
    given = arguments("step complex", 2, 9, 5)
    given["a"] = given["a"].abs()
    exact = run(wide(given), backend="reference")
    got = run(given, backend="cpu")
    assert got[2].dtype == torch.float32
    assert largest_error([x.to(y.dtype) for x, y in zip(got, exact, strict=True)], exact) < 1e-6
