"""The selective scan's Triton kernels, in Triton's interpreter, beside the reference in float64; and what the compiler
makes of them.

Tiles are so small here that all calls but the shortest cross several, in several segments where there is one sequence.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from longstate import ops
from longstate.ops import _triton
from longstate.ops.selective_scan import _fused, _triton_backward
from longstate.ops.selective_scan import triton as kernels
from ops.test_against_reference import flags, largest_error, run
from ops.test_cpu_fuzz import layout
from ops.test_cpu_selective_scan import arguments, exactly
from poison import poisoned_memory


def interpreted(test: Any) -> Any:
    return pytest.mark.interpreted(pytest.mark.skipif(not _triton.interpreted, reason="runs in the interpreter")(test))


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_memory():
        yield


def check(given: dict[str, Any], options: dict[str, Any], bound: float = 3e-6) -> None:
    """Float32: every sum is of a hundred terms of order 1 at most, each rounded a few times."""
    wanted = run(ops.selective_scan, exactly(given), backend="reference", **options)
    got = run(ops.selective_scan, given, backend="triton", **options)
    assert largest_error([x.double() for x in got], [x.double() for x in wanted]) < bound


@interpreted
@pytest.mark.parametrize(
    ("shape", "marks", "around"),
    [
        *(((2, 0, 3, 2), "start", "around"), ((1, 1, 1, 1), "", ""), ((0, 3, 2, 2), "", "")),
        *(((2, 11, 3, 3), "valid", ""), ((2, 9, 5, 3), "start valid", "around")),
        *(((1, 35, 3, 2), "start", ""), ((1, 35, 3, 2), "", "around")),
    ],
    ids=str,
)
def test_selective_scan(shape: tuple[int, ...], marks: str, around: str) -> None:
    """No step, one, less than a tile; several tiles and segments; states that fill no tile."""
    check(arguments(*shape, around), flags(marks, *shape[:2]))


def test_what_the_shapes_above_are_cut_into() -> None:
    if _triton.interpreted:
        for length, segments in ((17, 1), (35, 3)):
            u = torch.empty(3 - segments // 3 * 2, length, 5)
            assert kernels._split(u, 4, _fused.KEEP["triton"])[1][2] == segments
            assert _triton_backward._split(u, 4, _fused.KEEP["triton"])[2][2] == segments


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers(dtype: torch.dtype) -> None:
    """From the same narrow numbers: outputs and gradients are rounded once, by 2^-9 of themselves at most; and so is
    the gradient that comes in, which in the largest of a sum's entries is no more than as much again."""
    check(arguments(1, 10, 5, 3, "around", dtype=dtype), {}, 2**-7)


@interpreted
@pytest.mark.parametrize("seed", range(2))
def test_memory_layouts_do_not_matter(seed: int) -> None:
    r = random.Random(seed)
    given, options = arguments(2, 9, 3, 3, "around"), flags("start", 2, 9)
    wanted = run(ops.selective_scan, given, backend="triton", **options)

    def call(**leaves: Any) -> Any:
        placed = {name: layout(r, x) if isinstance(x, torch.Tensor) else x for name, x in leaves.items()}
        return ops.selective_scan(**placed, **options, backend="triton")

    got = run(call, given)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@interpreted
@pytest.mark.parametrize("n", [1, 70])
def test_one_state_and_many(n: int) -> None:
    """Of many, a tile holds fewer steps and channels: backwards fewer steps than lanes share out states, and of one
    state fewer than lanes share out channels, in two warps. Where no channel is left, the softplus of nothing is no
    step."""
    given = arguments(1, 9, 5, n, "around")
    del given["elapsed"]
    back = dict(across=2, numbers=4, steps=2, warps=2, programs=1)
    with kernels.TILES.force(dict(lanes=4, steps=4, programs=1)), _triton_backward.TILES.force(back):
        check(given, flags("start", 1, 9))


@interpreted
@pytest.mark.parametrize("length", [1, 5])
def test_without_gradients_and_in_pieces(length: int) -> None:
    given = arguments(2, 9, 5, 3, "around")
    start = torch.rand(2, 9) < 0.3
    wanted = ops.selective_scan(**exactly(given), start=start, backend="reference")
    state, outputs = given.pop("initial"), []
    with torch.no_grad():
        for at in (slice(i, i + length) for i in range(0, 9, length)):
            timed = {name: given[name][:, at] for name in ("u", "dt", "B", "C", "gate", "elapsed")}
            piece = ops.selective_scan(**given | timed, initial=state, start=start[:, at], backend="triton")
            outputs.append(piece[0])
            state = piece[1]
    assert largest_error([torch.cat(outputs, 1).double(), state.double()], list(wanted)) < 3e-6


@interpreted
def test_strong_decays_and_nothing_that_passes_a_start() -> None:
    """Not even infinity or what is no number passes, from a step or segment to the next; decays of 0 lose it."""
    given = arguments(1, 35, 3, 2)
    start = torch.zeros(1, 35, dtype=torch.bool)
    start[:, 14] = True
    given["u"][:, :14] = torch.nan
    y, final = ops.selective_scan(**given, start=start, backend="triton")
    assert y[:, :14].isnan().all() and y[:, 14:].isfinite().all() and final.isfinite().all()
    given = arguments(1, 12, 3, 2)
    for dt in (0.0, 50.0, 1e30):
        given["dt"] = torch.full_like(given["dt"], dt)
        check(given, {})


@interpreted
def test_softplus_is_exact_where_it_is_small() -> None:
    """Δ = softplus(x): relative to itself from e^−80 on; here y = Δ of one step with B = C = u = 1."""
    x = torch.tensor([-80.0, -20.0, -8.0, -3.0, -0.7, 0.0, 0.3, 2.0, 15.0, 40.0, 100.0])
    ones = torch.ones(1, 1, 11)
    y, _ = ops.selective_scan(
        ones, x.view(1, 1, -1), -torch.ones(11, 1), ones[..., :1], ones[..., :1], dt_softplus=True, backend="triton"
    )
    wanted = torch.nn.functional.softplus(x.double(), threshold=1e9)
    torch.testing.assert_close(y[0, 0].double(), wanted, rtol=5e-7, atol=0)


@pytest.mark.compiled
@pytest.mark.skipif(_triton.interpreted, reason="compiles nothing")
@pytest.mark.parametrize("batch", [1, 8])
def test_they_compile_for_hopper_without_spilling(batch: int) -> None:
    """Whatever is given. And the exponentials of a tile are computed once: 64 in a thread, and two more for each step
    and channel; and backwards a lane gives others two numbers for each state, step and channel, where sums of its own
    over the lanes would be five for the gradients of B and C each."""
    from targets import compiling, resources

    length, width, n = 4096, 768, 16
    u = torch.empty(1, 1, width, dtype=torch.bfloat16).expand(batch, length, width)
    B = torch.empty(1, 1, n, dtype=torch.bfloat16).expand(batch, length, n)
    A, D, start = torch.empty(width, n), torch.empty(width), torch.empty(batch, length, dtype=torch.bool)
    elapsed = torch.empty(batch, length)
    with compiling() as found:
        _, final, kept = kernels.selective_scan(u, u, A, B, B, D, None, u, D, None, start, True, True, 16)
        flags = (True, True, 16)
        kernels.selective_scan_backward(u, final, u, u, A, B, B, D, u, D, elapsed, start, kept, *flags)
        kernels.selective_scan_backward(u, final, u, u, A, B, B, None, None, None, None, None, kept, *flags)
    ends = batch == 1  # of segments are found first, where one sequence leaves the device empty
    names = ["_forward", "_backward", "_backward"]
    before = {"_forward": "_forward", "_backward": "_ends"}
    assert [x.name for x in found] == [y for x in names for y in ([before[x]] if ends else []) + [x]]
    for x in found:
        assert "STACK:0 " in resources(x), (x.name, resources(x))
    assert found[0].compiled.asm["ptx"].count("ex2.approx") <= 64 + 2 * 4 + 1 * 16
    assert found[-1].compiled.asm["ptx"].count("shfl.sync") <= 2 * 4 * 8
