# mypy: disable-error-code="no-untyped-def"
"""The kernels for GPUs, from Δ's softplus to the gate: states stay in registers but for those between tiles of steps,
which the backward pass starts from."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import native
from ..._shapes import Tensor
from .. import _triton
from .._triton_parts import LOG2E, sigmoid, softplus
from ._triton_backward import selective_scan_backward
from ._triton_steps import carry_on, read_rates, read_rows, store_end

__all__ = ["selective_scan", "selective_scan_backward"]

# The exponentials are the floor: 16 of them each clock of a processor, beside which there is time for 8 instructions
# of a warp. One warp with a channel on each lane and 64 exponentials in its registers needs 10. With few channels their
# states are shared out over 2 or 4 lanes instead. ``programs`` is how many there must be to fill the device.
TILES = _triton.Tiles(
    "selective_scan",
    default={"lanes": 32, "steps": 4, "warps": 1, "stages": 4, "programs": 528},
    interpreter={"lanes": 4, "steps": 4, "programs": 6},
    space={"lanes": [16, 32, 64], "steps": [2, 4, 8], "warps": [1, 2, 4], "stages": [1, 3, 4, 5]},
)
HELD = 64  # numbers of a tile that a thread may hold
LEAST = 256  # steps of a segment


@triton.jit
def _pin(x):
    """Return x, a number for each step and channel, or step and state. The sum over an axis of one keeps the compiler
    from computing x anew in each of the threads that want it: they have it from one, through shared memory."""
    return tl.sum(x[None], 0)


@triton.jit
def _onwards(s1, a1, b1, s2, a2, b2):
    """Join two runs of steps h ← a h + b, the second of which begins anew if s2: b is the state after a run."""
    return s1 | s2, a1 * a2, tl.where(s2 != 0, 0.0, a2 * b1) + b2


@triton.jit
def _pick(x, i: tl.constexpr, row):
    """Return step i of x [STEPS, N, L], exactly: the others' bits are replaced by zeros, which costs nothing where one
    thread holds all steps."""
    bits = tl.where(row[:, None, None] == i, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _marks(start, at, there, a):
    """Return where sequences begin anew, as whole numbers of the shape of ``a`` [STEPS, N, L]."""
    if start is None:
        s = tl.zeros(a.shape, tl.int32)
    else:
        s = tl.load(start + at, there, 0).to(tl.int32)[:, None, None].broadcast_to(a.shape)
    return s


@triton.jit
def _forward(
    u, dt, A, B, C, D, initial, gate, bias, elapsed, start, y, final, kept, ends, decays, u_batch, u_row, dt_batch,
    dt_row, B_batch, B_row, C_batch, C_row, gate_batch, gate_row, A_row, length, width, states, span, keep,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, STEPS: tl.constexpr, N: tl.constexpr, L: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Run h_t = e^(Δ_t A) ∘ h_{t−1} + B_t Δ_t u_t, y_t = (C_tᵀ h_t + D ∘ u_t) ∘ SiLU(gate_t) in one segment of ``span``
    steps. Without y, the segment's end from a zero state and its decay.

    A program takes L channels of one sequence through time in tiles of steps [STEPS, N, L]. Triton lays out the last
    axis over the lanes of a warp and the next over the warps, so that a thread holds all steps of a tile: a scan over
    them is then the plain recurrence in registers.
    """
    batch, segment = tl.program_id(0).to(tl.int64), tl.program_id(2)
    channel, n, row = tl.program_id(1) * L + tl.arange(0, L), tl.arange(0, N), tl.arange(0, STEPS)
    known = channel < width
    at, there = channel[None, :] * states + n[:, None], known[None, :] & (n < states)[:, None]
    sizes = tl.cast(width, tl.int64) * states
    rate = read_rates(A, channel[None, :] * A_row + n[:, None], there, LOG_A) * LOG2E
    h, time, starts = tl.zeros([N, L], tl.float32), tl.zeros([L], tl.float32), 0
    if y is not None:
        if initial is not None:
            h = tl.load(initial + batch * sizes + at, there, 0.0)
        if ends is not None:
            for before in range(segment):
                stride = sizes * tl.num_programs(0)
                h = carry_on(h, ends + batch * sizes, decays + batch * sizes, before, stride, at, there)
    end = tl.minimum(length, (segment + 1) * span)
    for first in tl.range(segment * span, end, STEPS, num_stages=STAGES):
        now = first + row < end
        mask, now_n = now[:, None] & known[None, :], now[:, None] & (n < states)[None, :]
        u_t = read_rows(u, batch, u_batch, first, u_row, row[:, None], channel[None, :], mask)
        step = read_rows(dt, batch, dt_batch, first, dt_row, row[:, None], channel[None, :], mask)
        B_t = read_rows(B, batch, B_batch, first, B_row, row[:, None], n[None, :], now_n)
        if bias is not None:
            step += tl.load(bias + channel, known, 0.0).to(tl.float32)[None, :]
        if SOFTPLUS:
            step = softplus(step)
        if elapsed is not None:
            step *= tl.load(elapsed + batch * length + first + row, now, 0.0)[:, None]
        step = tl.where(mask, step, 0.0)
        if kept is not None:
            if first % keep == 0:
                tl.store(kept + ((first // keep) * tl.num_programs(0) + batch) * sizes + at, h, there)
        a = tl.exp2(_pin(step)[:, None, :] * rate[None])
        x = _pin(step * u_t)[:, None, :] * _pin(B_t)[:, :, None]
        s = _marks(start, batch * length + first + row, now, a)
        x = tl.where((row[:, None, None] == 0) & (s == 0), a * h[None] + x, x)
        _, _, h_t = tl.associative_scan((s, a, x), 0, _onwards)
        h = _pick(h_t, STEPS - 1, row)
        if y is None:
            time += tl.sum(step, 0)
            if start is not None:
                starts += tl.max(tl.max(tl.max(s, 2), 1), 0)
        else:
            C_t = read_rows(C, batch, C_batch, first, C_row, row[:, None], n[None, :], now_n)
            out = tl.sum(h_t * _pin(C_t)[:, :, None], 1)
            if D is not None:
                out += tl.load(D + channel, known, 0.0).to(tl.float32)[None, :] * u_t
            if gate is not None:
                z = read_rows(gate, batch, gate_batch, first, gate_row, row[:, None], channel[None, :], mask)
                out *= z * sigmoid(z)
            place = (batch * length + first) * width + row[:, None] * width + channel[None, :]
            tl.store(y + place, out.to(y.dtype.element_ty), mask)
    if y is None:
        store_end(
            h, ends, decays, rate * time[None, :], starts, (segment * tl.num_programs(0) + batch) * sizes, at, there
        )
    else:
        if segment == tl.num_programs(2) - 1:
            tl.debug_barrier()  # it may lie where the initial state does, which all warps have read then
            tl.store(final + batch * sizes + at, h, there)
            if kept is not None:  # after the last tile too, where nothing reads it: all of it is written
                tl.store(kept + (tl.cdiv(length, keep) * tl.num_programs(0) + batch) * sizes + at, h, there)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    elapsed: Tensor | None,
    start: Tensor | None,
    dt_softplus: bool,
    log_A: bool,
    keep: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return outputs ``[b t d]``, the final state ``[b d n]`` and the states before tiles of steps ``[j+1 b d n]``.

    The last are for the backward pass, one every ``keep`` steps; none where it is 0.
    """
    (batch, length, width), n = u.shape, A.shape[1]
    state = (batch, width, n)
    y = u.new_empty(u.shape)
    final = _triton.final_state(initial, state, u, length == 1 and not keep)
    kept = u.new_empty((_triton.cdiv(length, keep) + 1, *state) if keep else 0, dtype=torch.float32)
    if length > 16:  # their rows are read by each program: the conversion is better done once
        B, C = B.float(), C.float()
    rows = [None if x is None else _triton.rows(x) for x in (u, dt, B, C, gate)]
    A, initial, elapsed = native.in_rows(A), native.single(initial), native.single(elapsed)
    D, dt_bias, start = (native.side_by_side(x) for x in (D, dt_bias, start))
    N = _triton.power_of_2(n)
    use, grid, span = _split(u, N, keep)
    strides = [size for x in rows for size in ((0, 0) if x is None else x.stride()[:2])]
    options = dict(num_warps=use["warps"], num_stages=1)

    def launch(y: Tensor | None, kept: Tensor | None, ends: Tensor | None, decays: Tensor | None) -> None:
        outputs = (y, final, kept, ends, decays)
        given = (dt, A, B, C, D, initial, gate, dt_bias, elapsed, start)
        sizes = (*strides, A.stride(0), length, width, n, span, keep)
        flags = (dt_softplus, log_A, use["steps"], N, use["lanes"], use["stages"])
        _triton.launch(_forward, grid, u, *given, *outputs, *sizes, *flags, **options)

    u, dt, B, C, gate = rows  # type: ignore[assignment]
    ends = decays = None
    if grid[2] > 1:
        ends, decays = u.new_empty((2, grid[2], *state), dtype=torch.float32)
        launch(None, None, ends, decays)
    launch(y, kept if keep else None, ends, decays)
    return y, final, kept


def _split(u: Tensor, N: int, keep: int) -> tuple[dict[str, int], tuple[int, int, int], int]:
    """Return the tile, the grid (sequences, pieces of the channels, segments of time) and the steps of a segment."""
    batch, length, width = u.shape
    use = TILES(u, batch=batch, length=length, width=width, states=N)
    least = min(8, use["lanes"])
    while use["lanes"] > least and 2 * batch * _triton.cdiv(width, use["lanes"]) <= use["programs"]:
        use["lanes"] //= 2
        use["steps"] *= 2
    while use["steps"] > 1 and use["steps"] * N * use["lanes"] > HELD * 32 * use["warps"]:
        use["steps"] //= 2
    use["steps"] = min(use["steps"], _triton.power_of_2(length), keep or use["steps"])
    programs = max(1, batch * _triton.cdiv(width, use["lanes"]))
    # The first pass over segments computes the exponentials once more: two segments would gain nothing.
    segments = min(use["programs"] // programs, _triton.cdiv(length, use["steps"] if _triton.interpreted else LEAST))
    span = _triton.cdiv(length, segments) if segments > 2 else length
    step = max(keep, use["steps"])
    span = max(_triton.cdiv(span, step) * step, step)
    return use, (batch, _triton.cdiv(width, use["lanes"]), max(1, _triton.cdiv(length, span))), span
