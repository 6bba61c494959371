"""The scan's Triton kernel, in Triton's interpreter, beside the reference in float64, and as the compiler makes it.

Tiles are so small here that all calls but the shortest cross several, in several segments.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longstate import ops
from longstate.ops import _triton
from longstate.ops.scan import triton as kernels
from ops.test_against_reference import flags, largest_error
from ops.test_cpu_fuzz import layout
from ops.test_cpu_scan import arguments, run, wide
from poison import poisoned_memory


def interpreted(test: Any) -> Any:
    return pytest.mark.interpreted(pytest.mark.skipif(not _triton.interpreted, reason="runs in the interpreter")(test))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def check(given: dict[str, torch.Tensor], options: dict[str, Any], unit: float = 0.0) -> None:
    """Compare with the reference, by a bound for each number.

    Each is a sum of products of inputs: at most T coefficients before a step and T after it, rounded twice each, and as
    often once more where segments are joined; of complex numbers with at most √8 of the error. The gradient of a fixed
    a is a sum over T steps of B sequences. All that by the sum of the products' magnitudes, which is what the reference
    computes of the magnitudes. Narrow numbers are rounded on the way out, and h again on its way into a's gradient: two
    of their units more.
    """
    batch, length = given["b"].shape[:2]
    exact = run(wide(given), backend="reference", **options)
    sizes = run({name: x.abs() for name, x in wide(given).items()}, backend="reference", **options)
    got = run(given, backend="triton", **options)
    for name, x, wanted, size in zip(("h", "final", "a", "b", "initial"), got, exact, sizes, strict=True):
        assert x.shape == wanted.shape, name
        error = (x.to(wanted.dtype) - wanted).abs()
        assert (error <= (8**0.5 * (9 * length + batch + 4) * 2**-24 + 2 * unit) * size).all(), name


@interpreted
@pytest.mark.parametrize(
    ("kind", "marks"),
    [
        *(("fixed", "start valid"), ("step", ""), ("step", "valid"), ("step", "start valid")),
        *(("fixed complex", "valid"), ("fixed complex", "start"), ("step complex", "start valid")),
    ],
)
def test_scan(kind: str, marks: str) -> None:
    check(arguments(kind, 2, 19, 9), flags(marks, 2, 19))


@interpreted
@pytest.mark.parametrize("shape", [(2, 0, 3), (1, 1, 1), (1, 2, 3, 2), (0, 3, 2), (2, 3, 0), (2, 9)], ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    """No steps, sequences or channels, one of each, and states of any number of axes."""
    for kind in ("fixed", "step complex"):
        check(arguments(kind, *shape), flags("start" if shape[0] else "", *shape[:2]))


@interpreted
@pytest.mark.parametrize("kind", ["fixed", "step"])
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_narrow_numbers(kind: str, narrow: torch.dtype) -> None:
    """Coefficients too: their gradient is rounded as they are."""
    given = {n: x.to(narrow) if n in ("a", "b", "g") else x for n, x in arguments(kind, 1, 10, 5).items()}
    check(given, flags("start", 1, 10), torch.finfo(narrow).eps / 2)
    h, final = ops.scan(given["a"], given["b"], backend="triton")
    assert h.dtype == narrow and final.dtype == torch.float32


@interpreted
def test_segments_give_what_one_run_gives() -> None:
    """And none at all is what other tests of few steps cover."""
    given, options = arguments("step complex", 1, 33, 5), flags("start valid", 1, 33)
    launches = []
    for programs in (1, 4):
        with kernels.TILES.force(dict(width=8, steps=8, programs=programs)):
            check(given, options)
            launches.append(kernels._split(given["b"], 1, 33, 5, True)[1])
    assert launches == [(1, 1), (1, 3)]


@interpreted
@pytest.mark.parametrize("kind", ["step", "fixed complex"])
def test_memory_layouts_and_lazy_conjugates_do_not_matter(kind: str) -> None:
    given, options = arguments(kind, 2, 11, 4, 3), flags("start valid", 2, 11)
    wanted = run(given, backend="triton", **options)
    placed = {name: layout(random.Random(1), x) for name, x in given.items()}
    placed["b"] = given["b"].transpose(0, 1).contiguous().transpose(0, 1)
    if "complex" in kind:
        placed |= {name: x.conj().clone().conj() for name, x in given.items()}
    leaves = [placed[name].detach().requires_grad_() for name in ("a", "b", "initial")]
    h, final = ops.scan(*leaves, backend="triton", **{name: x.mT.contiguous().mT for name, x in options.items()})
    got = [h, final, *torch.autograd.grad((h, final), leaves, (placed["g"], placed["g_final"]))]
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@interpreted
def test_broadcast_coefficients_without_an_initial_state() -> None:
    given = arguments("step", 2, 7, 5)
    a = given["a"][:1, :1].expand(2, 7, 5)
    exact = ops.scan(a.double(), given["b"].double(), backend="reference")
    for x in (a, a[0, 0]):
        got = ops.scan(x, given["b"], backend="triton")
        assert largest_error([y.double() for y in got], list(exact)) < 1e-6
    leaf = given["a"].clone().requires_grad_()
    wanted, got = (torch.autograd.grad(ops.scan(leaf, given["b"], backend=b)[0].sum(), leaf) for b in ("cpu", "triton"))
    assert largest_error(list(got), list(wanted)) < 1e-6


@interpreted
@pytest.mark.parametrize("kind", ["fixed", "step complex"])
def test_nothing_passes_a_start_or_comes_from_a_step_that_does_not_count(kind: str) -> None:
    """Not even what is no number: neither forwards nor backwards, nor from one segment to the next."""
    given, options = arguments(kind, 1, 20, 3), flags("start valid", 1, 20)
    wanted = run(given, backend="triton", **options)
    skipped = ~options["valid"][..., None]
    names = ("b", "g") if "fixed" in kind else ("a", "b", "g")
    dirty = given | {name: given[name].masked_fill(skipped, torch.nan) for name in names}
    got = run(dirty, backend="triton", **options)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    start = torch.zeros(1, 20, dtype=torch.bool)
    start[:, 9] = True
    given["b"][:, :9] = torch.nan
    h, final = ops.scan(given["a"], given["b"], given["initial"], start=start, backend="triton")
    assert h[:, :9].isnan().all() and h[:, 9:].isfinite().all() and final.isfinite().all()
    given["g"][:, 9:], given["b"][:, :9] = torch.nan, 0.0
    grad_b, grad_initial = run(given, backend="triton", start=start)[3:]
    assert grad_b[:, 9:].isnan().all() and grad_b[:, :9].isfinite().all() and grad_initial.isfinite().all()


@interpreted
@pytest.mark.parametrize("kind", ["fixed", "step complex"])
def test_a_single_step_may_leave_its_state_where_the_last_one_was(kind: str) -> None:
    """The same numbers, in several programs, with a start and with a step that does not count; and only then: a lazy
    conjugate is not what lies in its memory."""
    given = arguments(kind, 3, 1, 19)
    options = {"start": torch.tensor([[True], [False], [False]]), "valid": torch.tensor([[True], [False], [True]])}
    a, b, state = (given[name] for name in ("a", "b", "initial"))
    h, wanted = ops.scan(a, b, state, **options, backend="triton")
    assert wanted.data_ptr() != state.data_ptr()
    for kept in (state.clone(), state.conj().clone().conj()):
        with _triton.in_place():
            found, final = ops.scan(a, b, kept, **options, backend="triton")
        assert torch.equal(found, h) and torch.equal(final, wanted)
        assert (final.data_ptr() == kept.data_ptr()) == (not kept.is_conj())
    with _triton.in_place():
        _, final = ops.scan(a.expand(3, 2, 19), b.expand(3, 2, 19), state, backend="triton")
    assert final.data_ptr() != state.data_ptr()


@interpreted
def test_long_sums_keep_their_digits() -> None:
    """The gradient of a fixed a over equal steps: what a tile's sum loses in being added is added to the next."""
    length = 2000
    a, b, g = torch.full((1,), 0.3), torch.full((1, length, 1), 0.7), torch.full((1, length, 1), 0.6)
    with kernels.TILES.force(dict(width=1, steps=64, programs=1)):
        (got,) = torch.autograd.grad(ops.scan(a.requires_grad_(), b, backend="triton")[0], a, g)
    (wanted,) = torch.autograd.grad(ops.scan(a, b.double(), backend="reference")[0], a, g.double())
    assert abs(got - wanted) <= (6 + 5 + 2) * 2**-24 * wanted  # numbers of sums, sums of 32 of them, and of sums


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_nothing_stays_nothing_however_much_it_would_grow(dtype: torch.dtype) -> None:
    """A segment's product of coefficients is beyond every float; a state of zero before it does not become NaN."""
    a, b = torch.full((1, 700, 8), 2.0, dtype=dtype), torch.zeros(1, 700, 8, dtype=dtype)
    b[:, 690] = 1
    with kernels.TILES.force(dict(width=8, steps=8, programs=4)):
        assert kernels._split(b, 1, 700, 8, b.is_complex())[1][1] > 1
        h, final = ops.scan(a, b, backend="triton")
    assert torch.equal(h[:, 690:, 0].real, 2.0 ** torch.arange(10)[None]) and not h[:, :690].any()
    assert torch.equal(final, h[:, -1])


@pytest.mark.compiled
@pytest.mark.skipif(_triton.interpreted, reason="compiles nothing")
@pytest.mark.parametrize("kind", ["step", "fixed complex"])
def test_it_compiles_for_hopper_without_spilling(kind: str) -> None:
    """The coefficient of a step is used once in the forward pass: one multiplication and addition a number."""
    from targets import compiling, resources

    given, options = arguments(kind, 1, 1, 64), flags("start valid", 1, 1)
    a, b = (given[name].expand(1, 4096, 64) if given[name].ndim == 3 else given[name] for name in ("a", "b"))
    marks = [options[name].expand(1, 4096).contiguous() for name in ("start", "valid")]
    with compiling() as found:
        kernels.scan(a, b, given["initial"], None, None)
        kernels.scan_backward(b, given["g_final"], a, given["initial"], *marks, b.contiguous())
    assert [x.grid[1] > 1 for x in found] == [True] * 4  # the ends of segments, and the states, each way
    for x in found:
        assert "STACK:0 " in resources(x), x
    if kind == "step":
        assert found[1].compiled.asm["ptx"].count("fma.rn.f32") + found[1].compiled.asm["ptx"].count("mul.f32") < 80
        assert "shfl" not in found[1].compiled.asm["ptx"]
