"""The GPU kernels of the delta rule, interpreted, against the reference in float64."""

from __future__ import annotations

import random
from typing import Any
from unittest import mock

import pytest
import torch

from longstate import ops
from longstate.ops import _triton
from ops.test_against_reference import flags, run
from ops.test_cpu_fuzz import layout
from poison import poisoned_memory

pytestmark = pytest.mark.interpreted

if not _triton.interpreted:
    pytest.skip("these run in Triton's interpreter", allow_module_level=True)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
UNIT = {F32: 2.0**-24, BF16: 2.0**-8, F16: 2.0**-11}
KINDS = ("none", "step", "channel")


def arguments(kind: str, shape: tuple[int, ...], dtype: torch.dtype = F32) -> dict[str, Any]:
    """Keys of length 1 (or a little less), write strengths up to 2, some decays strong, a state."""
    b, t, g, h, k, p = shape
    q, v, beta = torch.randn(b, t, g, k), torch.randn(b, t, h, p), 2 * torch.rand(b, t, h)
    key = 0.99 * torch.nn.functional.normalize(torch.randn(b, t, g, k), dim=-1)
    given = dict(q=q.to(dtype), k=key.to(dtype), v=v.to(dtype), beta=beta.to(dtype), initial=torch.randn(b, h, k, p))
    if kind != "none":
        given["log_decay"] = -0.05 - 3 * torch.rand((b, t, h) if kind == "step" else (b, t, h, k)) ** 4
    return given


def exact(given: dict[str, Any]) -> dict[str, Any]:
    return {name: x.double() for name, x in given.items()}


def largest(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """Return the largest error of a tensor by its norm, or no number if one is none."""
    errors = [0.0]
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        errors.append(((x.double() - y).norm() / y.norm().clamp(min=1e-6)).item())
    return torch.tensor(errors).max().item()


def apart(r: random.Random, x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers elsewhere, no number all around them: rows as they are, other axes in another order."""
    order = [*r.sample(range(x.ndim - 1), x.ndim - 1), x.ndim - 1]
    room = x.new_full([x.shape[i] + 2 for i in order], float("nan"))
    inside = room[tuple(slice(1, 1 + x.shape[i]) for i in order)]
    return inside.copy_(x.permute(order)).permute([order.index(i) for i in range(x.ndim)])


def placed(given: dict[str, Any]) -> dict[str, Any]:
    r = random.Random(0)
    return {name: r.choice([layout, apart, apart])(r, x) for name, x in given.items()}


def bound(dtype: torch.dtype) -> float:
    """Float32: sums of up to a hundred products, and exponents of up to a hundred that are rounded, all of one size.

    Of the narrow types each number that enters a product of matrices is rounded: the inverse, what is
    multiplied with it, what is written, the state and scores on the way to an output; and on the way back the state's
    gradient, that of what is written, and the result itself. Each is half a unit on average, of a
    number that no step makes larger: four units for the eight of them, were they all to add up.

    Where time is cut into segments, the map Φ of a segment is rounded in its walk, forward and backward. That is an
    error of Φ S by the sizes of the numbers of Φ and S, instead of those of their sums: as Φ lengthens nothing,
    Σ_k |Φ_k|² |S_k|² ≤ |S|², and it is no more than half a unit of the state before the segment: one unit for both.
    """
    return 3e-6 if dtype == F32 else 5 * UNIT[dtype]


CASES = [
    # Several chunks, tiles of the backward pass and blocks of both widths, an end within a chunk; groups of heads;
    # segments of time, equal and not.
    ("none", (1, 19, 1, 2, 5, 6), F32, "", True, 1),
    ("step", (1, 35, 1, 1, 3, 4), F32, "start valid", True, 2),
    ("channel", (1, 14, 1, 2, 6, 3), F32, "start valid", True, 1),
    ("channel", (1, 17, 1, 1, 2, 5), F32, "", False, 3),
    ("step", (1, 21, 2, 2, 5, 3), F16, "", True, 3),
    ("channel", (1, 12, 1, 1, 5, 2), BF16, "start", True, 1),
    ("none", (1, 29, 1, 1, 3, 2), BF16, "", True, 2),
]


@pytest.mark.parametrize(("kind", "shape", "dtype", "marks", "initial", "segments"), CASES, ids=str)
def test_equals_the_reference(
    kind: str, shape: tuple[int, ...], dtype: Any, marks: str, initial: bool, segments: int
) -> None:
    given, options = arguments(kind, shape, dtype), flags(marks, *shape[:2])
    if not initial:
        del given["initial"]
    wanted = run(ops.delta_rule, exact(given), backend="reference", **options)

    def call(**tensors: Any) -> Any:
        return ops.delta_rule(**placed(tensors), **options, backend="triton")

    with poisoned_memory(), cut_into(segments):
        found = run(call, given)
    assert [x.dtype for x in found] == [dtype, F32, *(x.dtype for x in given.values())]
    assert largest(found, wanted) < bound(dtype)


def cut_into(segments: int) -> Any:
    """Cut walks into so many segments of time, whatever GPU there is."""
    return mock.patch("longstate.ops.delta_rule._triton_tiles.segments", return_value=segments)


def test_how_many_segments() -> None:
    from longstate.ops.delta_rule._triton_tiles import segments

    # Nothing to cut; no room; room for two or three, which does not pay; for more, but not for ever smaller ones.
    wanted = {(0, 0, 99): 1, (999, 9, 0): 1, (999, 64, 128): 1, (999, 64, 199): 1, (999, 64, 260): 4, (999, 1, 999): 38}
    wanted |= {(16, 1, 999): 1, (32, 1, 999): 1, (64, 1, 999): 9, (999, 300, 264): 1}
    assert {sizes: segments(*sizes) for sizes in wanted} == wanted


def test_types_may_be_mixed() -> None:
    """Products are then of float32: only what comes out is rounded."""
    given = arguments("step", (1, 10, 1, 1, 3, 2))
    given |= dict(v=given["v"].to(BF16), k=given["k"].to(F16), beta=given["beta"].to(F16))
    given["initial"] = given["initial"].to(BF16)
    wanted = run(ops.delta_rule, exact(given), backend="reference")
    found = run(ops.delta_rule, given, backend="triton")
    assert [x.dtype for x in found[2:]] == [x.dtype for x in given.values()]
    assert largest(found, wanted) < 2 * UNIT[BF16]


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_and_one(kind: str) -> None:
    for length in (0, 1):
        given, options = arguments(kind, (2, length, 1, 1, 3, 5)), flags("start", 2, length)
        wanted = run(ops.delta_rule, exact(given), backend="reference", **options)
        with poisoned_memory():
            assert largest(run(ops.delta_rule, given, backend="triton", **options), wanted) < 3e-6
            with torch.no_grad():
                alone = ops.delta_rule(**given, backend="triton", **options)
        assert largest(list(alone), wanted[:2]) < 3e-6
        del given["initial"]
        wanted = ops.delta_rule(**exact(given), backend="reference", **options)
        with torch.no_grad(), poisoned_memory():
            assert largest(list(ops.delta_rule(**given, backend="triton", **options)), list(wanted)) < 3e-6


def test_one_step_in_any_layout_and_type() -> None:
    for kind, dtype in (("channel", BF16), ("step", F16), ("none", F32)):
        given = arguments(kind, (2, 1, 2, 4, 5, 6), dtype)
        wanted = ops.delta_rule(**exact(given), backend="reference")
        with torch.no_grad():
            found = ops.delta_rule(**placed(given), backend="triton")
        # Nothing is rounded but the output.
        assert found[0].dtype == dtype and largest([found[0]], [wanted[0]]) < UNIT[dtype] + 1e-6
        assert largest([found[1]], [wanted[1]]) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_are_the_whole(kind: str) -> None:
    given, options = arguments(kind, (1, 20, 1, 1, 3, 4)), flags("start valid", 1, 20)
    wanted = ops.delta_rule(**exact(given), **options, backend="reference")
    outputs, state = [], given["initial"]
    for at in (slice(0, 13), slice(13, 14), slice(14, 20)):
        piece = {name: x[:, at] for name, x in (given | options).items() if name != "initial"}
        with torch.no_grad():
            y, state = ops.delta_rule(**piece, initial=state, backend="triton")
        outputs.append(y)
    assert largest([torch.cat(outputs, 1), state], list(wanted)) < 3e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_forgets_what_is_no_number(kind: str) -> None:
    for length, at, segments in ((1, 0, 1), (18, 0, 1), (18, 10, 1), (18, 10, 3)):
        given = arguments(kind, (1, length, 1, 1, 3, 2))
        given["initial"] = torch.full_like(given["initial"], float("nan"))
        start = torch.zeros(1, length, dtype=torch.bool)
        start[:, at] = True
        with torch.no_grad(), cut_into(segments):
            y, final = ops.delta_rule(**given, start=start, backend="triton")
        assert final.isfinite().all() and y[:, :at].isnan().all() and y[:, at:].isfinite().all()


def test_decays_that_leave_nothing() -> None:
    """An exponent that were the difference of two others' powers would overflow. One channel is left nothing in each
    segment of time, the others something."""
    for kind, many in (("step", 1), ("channel", 2)):
        given = arguments(kind, (1, 17, 1, 1, 5 if kind == "channel" else 3, 2))
        given["log_decay"] = torch.where(torch.rand_like(given["log_decay"]) < 0.3, -150.0, -0.1)
        if kind == "channel":
            given["log_decay"][..., :-1] = -0.1
            given["log_decay"][:, ::8, :, -1] = -150.0
        wanted = run(ops.delta_rule, exact(given), backend="reference")
        with cut_into(many):
            found = run(ops.delta_rule, given, backend="triton")
        # The sums of log decays reach 1200: each is rounded by 2^-25 of itself.
        assert largest(found, wanted) < 1800 * 2**-23
