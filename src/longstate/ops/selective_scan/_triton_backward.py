# mypy: disable-error-code="no-untyped-def"
"""The gradient of the selective scan: tile after tile back in time, each from the state that was kept before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import native
from ..._shapes import Tensor
from .. import _triton
from ._triton_steps import (
    LOG2E,
    backwards,
    carry_on,
    channels,
    marks,
    onwards,
    pick,
    pin,
    places,
    read_rates,
    read_rows,
    sigmoid,
    softplus,
    store_end,
)

# Sums over channels, for the gradients of B and C, are what costs most: a warp adds up ``rows`` channels in a lane
# before it adds up its lanes. ``programs`` is how many of them run at a time on a large device.
TILES = _triton.Tiles(
    "selective_scan_backward",
    default={"rows": 1, "lanes": 32, "warps": 8, "programs": 132},
    interpreter={"rows": 2, "lanes": 2, "programs": 6},
    space={"rows": [1, 2, 4], "lanes": [32], "warps": [4, 8, 16]},
)
HELD = 32  # numbers of a tile that a thread may hold, several such tiles at a time
LEAST = 512  # steps of a segment


@triton.jit
def _backward(
    u,
    dt,
    A,
    B,
    C,
    D,
    gate,
    bias,
    elapsed,
    start,
    kept,
    grad,
    grad_final,
    grad_u,
    grad_dt,
    grad_gate,
    grad_A,
    grad_B,
    grad_C,
    grad_D,
    grad_bias,
    grad_elapsed,
    grad_initial,
    ends,
    decays,
    u_batch,
    u_row,
    dt_batch,
    dt_row,
    B_batch,
    B_row,
    C_batch,
    C_row,
    gate_batch,
    gate_row,
    grad_batch,
    grad_row,
    A_row,
    length,
    width,
    states,
    span,
    SOFTPLUS: tl.constexpr,
    LOG_A: tl.constexpr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    L: tl.constexpr,
):
    """Compute the gradients of one segment of ``span`` steps.

    With g = grad ∘ SiLU(gate), x = Δ u and z = Δ A:

    λ_t = C_t g_t + e^z_{t+1} λ_{t+1},    ∂B_t = Σ λ_t x_t,    ∂C_t = Σ h_t g_t    (over channels)
    ∂x_t = Σ B_t λ_t,    ∂z_t = λ_t e^z_t h_{t−1},    ∂Δ_t = u_t ∂x_t + Σ A ∂z_t    (over states)

    Without grad_u, only e^z λ before the segment from zero after it, and the segment's decay.
    """
    batch, segment = tl.program_id(1).to(tl.int64), tl.program_id(2)
    batches, segments = tl.num_programs(1), tl.num_programs(2)
    channel, known = channels(width, R, L)
    at, there = places(channel, width, states, N)
    column, mine = channel[:, None], known[:, None]
    sizes = tl.cast(width, tl.int64) * states
    A_n = read_rates(A, places(channel, width, A_row, N)[0], there, LOG_A)
    rate = A_n * LOG2E
    n, row = tl.arange(0, N)[None, :], tl.arange(0, STEPS)
    sum_A = tl.zeros([R, N, L], tl.float32)
    sum_D, sum_bias, time = (tl.zeros([R, L], tl.float32),) * 3
    mu, starts = tl.zeros([R, N, L], tl.float32), 0
    if grad_u is not None:
        if grad_final is not None:
            mu = tl.load(grad_final + batch * sizes + at, there, 0.0)
        if ends is not None:
            for i in range(segments - 1 - segment):
                mu = carry_on(
                    mu, ends + batch * sizes, decays + batch * sizes, segments - 1 - i, sizes * batches, at, there
                )
    begin = segment * span
    tiles = tl.cdiv(tl.minimum(length, begin + span) - begin, STEPS)
    for i in range(tiles):
        first = begin + (tiles - 1 - i) * STEPS
        now = first + row < length
        mask = now[None, :, None] & mine
        now_n = now[:, None] & (n < states)
        raw = read_rows(dt, batch, dt_batch, first, dt_row, row[None, :, None], column, mask)
        g = read_rows(grad, batch, grad_batch, first, grad_row, row[None, :, None], column, mask)
        C_t = read_rows(C, batch, C_batch, first, C_row, row[:, None], n, now_n)
        C_t = pin(C_t)[None, :, :, None]
        if bias is not None:
            raw += tl.load(bias + channel, known, 0.0).to(tl.float32)[:, None]
        slope = tl.full([R, STEPS, L], 1.0, tl.float32)  # of the step by what it is the softplus of
        step = raw
        if SOFTPLUS:
            step = softplus(raw)
            slope = sigmoid(raw)
        delta = step
        if elapsed is not None:
            e = tl.load(elapsed + batch * length + first + row, now, 0.0)[None, :, None]
            delta *= e
            slope *= e
        delta = tl.where(mask, delta, 0.0)
        delta_n = pin(delta)[:, :, None]
        a = tl.exp2(delta_n * rate[:, None])
        if gate is not None:
            z = read_rows(gate, batch, gate_batch, first, gate_row, row[None, :, None], column, mask)
            opening = sigmoid(z)
            by_gate = g * opening * (1 + z * (1 - opening))
            g *= z * opening
        g_n = pin(g)[:, :, None]
        q = C_t * g_n
        # Back in time is forwards in a tile turned round. Scans have a flag for that, but would move each number.
        into, a_back = tl.flip(q, 1), tl.flip(a, 1)
        into = tl.where(row[None, :, None, None] == 0, into + mu[:, None], into)
        back = first + STEPS - 1 - row
        s = marks(start, batch * length + back, back < length, a)
        v = tl.where(s != 0, 0.0, a_back * into)
        one = tl.full([R, STEPS, N, L], 1.0, tl.float32)
        _, _, _, v, lam = tl.associative_scan((s, a_back, one, v, into), 1, backwards)
        mu = pick(v, STEPS - 1, STEPS)
        if grad_u is None:
            time += tl.sum(delta, 1)
            if start is not None:
                starts += tl.max(tl.max(tl.max(tl.max(s, 3), 2), 1), 0)
        else:
            u_t = read_rows(u, batch, u_batch, first, u_row, row[None, :, None], column, mask)
            B_t = read_rows(B, batch, B_batch, first, B_row, row[:, None], n, now_n)
            B_t = pin(B_t)[None, :, :, None]
            h = tl.load(kept + ((first // STEPS) * batches + batch) * sizes + at, there, 0.0)
            x = pin(delta * u_t)[:, :, None]
            lam = tl.flip(lam, 1)
            s = marks(start, batch * length + first + row, now, a)
            w = tl.where((row[None, :, None, None] == 0) & (s == 0), a * h[:, None], -0.0)  # and −0 + w is w
            _, _, h_t, w = tl.associative_scan((s, a, x * B_t + w, w), 1, onwards)
            place = (batch * length + first) * width + row[None, :, None] * width + column
            if gate is not None:
                out = tl.sum(h_t * C_t, 2)
                if D is not None:
                    out += tl.load(D + channel, known, 0.0).to(tl.float32)[:, None] * u_t
                tl.store(grad_gate + place, (by_gate * out).to(grad_gate.dtype.element_ty), mask)
            piece = tl.program_id(0).to(tl.int64) * batches + batch
            place_n = (piece * length + first) * states + row[:, None] * states + n
            tl.store(grad_C + place_n, tl.sum(tl.sum(h_t * g_n, 0), 2), now_n)
            tl.store(grad_B + place_n, tl.sum(tl.sum(lam * x, 0), 2), now_n)
            by_x = tl.sum(lam * B_t, 2)
            w *= lam
            sum_A += tl.sum(w * delta_n, 1)
            by_delta = u_t * by_x + tl.sum(w * A_n[:, None], 2)
            by_u = delta * by_x
            if D is not None:
                by_u += tl.load(D + channel, known, 0.0).to(tl.float32)[:, None] * g
                sum_D += tl.sum(u_t * g, 1)
            tl.store(grad_u + place, by_u.to(grad_u.dtype.element_ty), mask)
            tl.store(grad_dt + place, (by_delta * slope).to(grad_dt.dtype.element_ty), mask)
            if bias is not None:
                sum_bias += tl.sum(tl.where(mask, by_delta * slope, 0.0), 1)
            if elapsed is not None:
                by_step = tl.sum(tl.sum(tl.where(mask, by_delta * step, 0.0), 2), 0)
                tl.store(grad_elapsed + piece * length + first + row, by_step, now)
    part = tl.cast(segment, tl.int64) * batches + batch
    if grad_u is None:
        store_end(mu, ends, decays, rate, time, starts, part * sizes, at, there)
    else:
        if LOG_A:
            sum_A *= A_n
        tl.store(grad_A + part * sizes + at, sum_A, there)
        if D is not None:
            tl.store(grad_D + part * width + channel, sum_D, known)
        if bias is not None:
            tl.store(grad_bias + part * width + channel, sum_bias, known)
        if segment == 0:
            tl.store(grad_initial + batch * sizes + at, mu, there)


def selective_scan_backward(
    grad: Tensor,
    grad_final: Tensor | None,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    dt_bias: Tensor | None,
    elapsed: Tensor | None,
    start: Tensor | None,
    kept: Tensor,
    dt_softplus: bool,
    log_A: bool,
    keep: int,
) -> tuple[Tensor, ...]:
    """Return the gradients of u, dt, A, B, C, D, the initial state, gate, dt_bias and elapsed; empty ones where there
    is none."""
    (batch, length, width), n = u.shape, A.shape[1]
    N = _triton.power_of_2(n)
    use, grid, span = _split(u, N, keep)
    pieces, _, segments = grid

    def new(like: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if like is None else u.new_empty(shape, dtype=dtype)

    rows = [native.in_rows(x.float() if x is B or x is C else x) for x in (u, dt, B, C)]
    rows += [grad if gate is None else native.in_rows(gate), native.in_rows(grad)]
    strides = [size for x in rows for size in x.stride()[:2]]
    grad_u, grad_dt = u.new_empty(u.shape), dt.new_empty(dt.shape)
    grad_gate = None if gate is None else gate.new_empty(gate.shape)
    grad_initial, parts = u.new_empty((batch, width, n), dtype=torch.float32), segments * batch
    totals = {
        "A": (A, new(A, parts, width, n)),
        "B": (B, new(B, pieces, batch, length, n)),
        "C": (C, new(C, pieces, batch, length, n)),
        "D": (D, new(D, parts, width)),
        "bias": (dt_bias, new(dt_bias, parts, width)),
        "elapsed": (elapsed, new(elapsed, pieces, batch, length)),
    }
    D, dt_bias, start, grad_final = (native.side_by_side(x) for x in (D, dt_bias, start, grad_final))
    A, elapsed, gate = native.in_rows(A), native.single(elapsed), None if gate is None else rows[4]
    given = (rows[1], A, rows[2], rows[3], D, gate, dt_bias, elapsed, start, kept.contiguous(), rows[5], grad_final)
    sums = [totals[name][1] for name in ("A", "B", "C", "D", "bias", "elapsed")]
    sizes = (*strides, A.stride(0), length, width, n, span)
    flags = (dt_softplus, log_A, keep, N, use["rows"], use["lanes"])
    ends = decays = None
    if segments > 1:
        ends, decays = u.new_empty((2, segments, batch, width, n), dtype=torch.float32)
        nothing = (None,) * 10
        _triton.launch(_backward, grid, rows[0], *given, *nothing, ends, decays, *sizes, *flags, num_warps=use["warps"])
    outputs = (grad_u, grad_dt, grad_gate, *sums, grad_initial)
    _triton.launch(_backward, grid, rows[0], *given, *outputs, ends, decays, *sizes, *flags, num_warps=use["warps"])

    def total(name: str) -> Tensor:
        like, x = totals[name]
        return u.new_empty(0) if like is None or x is None else x.sum(0).to(like.dtype)

    none = u.new_empty(0) if grad_gate is None else grad_gate
    return (
        *(grad_u, grad_dt, total("A"), total("B"), total("C"), total("D")),
        *(grad_initial, none, total("bias"), total("elapsed")),
    )


def _split(u: Tensor, N: int, keep: int) -> tuple[dict[str, int], tuple[int, int, int], int]:
    """Return the tile, the grid (pieces of the channels, sequences, segments of time) and the steps of a segment."""
    batch, length, width = u.shape
    use = TILES(u, batch=batch, length=length, width=width, states=N)
    while keep * N * use["rows"] * use["lanes"] > HELD * 32 * use["warps"] and use["rows"] * use["lanes"] > 1:
        use["rows" if use["rows"] > 1 else "lanes"] //= 2
    pieces = _triton.cdiv(width, use["rows"] * use["lanes"])
    # The first pass over segments costs a fifth of the second: three at least.
    least = keep if _triton.interpreted else LEAST
    segments = min(2 * use["programs"] // max(1, batch * pieces), _triton.cdiv(length, least))
    span = _triton.cdiv(length, segments) if segments > 2 else length
    span = max(_triton.cdiv(span, keep) * keep, keep)
    return use, (pieces, batch, max(1, _triton.cdiv(length, span))), span
