# mypy: disable-error-code="no-untyped-def, assignment"
"""The gradient of the selective scan: tile after tile back in time, each from the state that was kept before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import native
from ..._shapes import Tensor
from .. import _triton
from .._triton_parts import LOG2E, sigmoid, softplus
from ._triton_lanes import of_channels, of_states, over_channels, over_states, settle
from ._triton_steps import carry_on, read_rates, read_rows, store_end

# A thread has ``numbers`` of the states and channels of a step (or more, of very many states) and ``steps`` steps; in a
# warp, ``across`` lanes share out the states. ``programs`` is how many of them run at a time on a large device.
TILES = _triton.Tiles(
    "selective_scan_backward",
    default={"across": 8, "numbers": 4, "steps": 8, "warps": 4, "programs": 264},
    interpreter={"across": 2, "numbers": 4, "steps": 4, "warps": 1, "programs": 6},
    space={"across": [4, 8, 16], "numbers": [2, 4, 8], "steps": [4, 8, 16], "warps": [2, 4, 8]},
)
LANES = 4 if _triton.interpreted else 32
LEAST = 512  # steps of a segment


@triton.jit
def _places(width, states, row, R: tl.constexpr, S: tl.constexpr, W: tl.constexpr, M: tl.constexpr, L: tl.constexpr):
    """Return where the states [R, S, W, M, L] of this program are in [d n] with rows so far apart, and which there
    are."""
    r, s = tl.arange(0, R)[:, None, None, None, None], tl.arange(0, S)[None, :, None, None, None]
    w, m = tl.arange(0, W)[None, None, :, None, None], tl.arange(0, M)[None, None, None, :, None]
    channel = ((tl.program_id(1) * W + w) * L + tl.arange(0, L)[None, None, None, None, :]) * R + r
    n = m * S + s
    return channel * row + n, (channel < width) & (n < states)


@triton.jit
def _read_delta(dt, bias, elapsed, b, by_batch, by_row, length, first, row, c, mask, SOFTPLUS: tl.constexpr):
    """Return Δ [T, D], what it is per elapsed time, and its slope by what the softplus takes."""
    raw = read_rows(dt, b, by_batch, first, by_row, row[:, None], c[None], mask)
    if bias is not None:
        raw += tl.load(bias + c[None], mask, 0.0).to(tl.float32)
    step, slope = raw, tl.full(mask.shape, 1.0, tl.float32)
    if SOFTPLUS:
        step, slope = softplus(raw), sigmoid(raw)
    delta = step
    if elapsed is not None:
        e = tl.load(elapsed + b * length + first + row, first + row < length, 0.0)[:, None]
        delta *= e
        slope *= e
    return tl.where(mask, delta, 0.0), step, slope


@triton.jit
def _starts(start, first, row, length):
    """Return which steps of a tile sequences begin at, as bits of one number."""
    if start is None:
        return first * 0
    else:
        begins = tl.load(start + first + row, first + row < length, 0).to(tl.int32) != 0
        return tl.sum(begins.to(tl.int32) << row, 0)


@triton.jit
def _left(starts, i: tl.constexpr, decayed):
    """Return what is left of a state at a step, which has decayed: nothing where a sequence begins."""
    return tl.where((starts >> i) & 1 != 0, 0.0, decayed)


@triton.jit
def _onwards(h, delta, x, B, C, g, rate, starts):
    """Run through a tile: h ← e^(Δ A) h + x B.

    Return the state after it, and of each step e^(Δ A), what is left of the state before it, and Σ h g over a thread's
    channels and Σ h C over its states.
    """
    decays, lefts, by_C, outs = (), (), (), ()
    for i in tl.static_range(len(x)):
        a = tl.exp2(delta[i] * rate)
        left = _left(starts, i, a * h)
        h = left + x[i] * B[i]
        decays, lefts = decays + (a,), lefts + (left,)
        if g is not None:
            by_C = by_C + (tl.sum(h * g[i], 0),)
        if C is not None:
            outs = outs + (tl.sum(h * C[i], 1),)
    return h, decays, lefts, by_C, outs


@triton.jit
def _backwards(mu, delta, x, B, C, g, rate, decays, lefts, sum_A, starts):
    """Run back through a tile: λ = C g + μ, μ ← e^(Δ A) λ.

    Return μ before it, the gradient of A so far, and of each step Σ λ x over a thread's channels and Σ λ B and
    Σ ∂z A over its states, the last by LOG2E.
    """
    by_B, by_x, by_rate = (), (), ()
    for i in tl.static_range(len(x) - 1, -1, -1):
        lam = mu + C[i] * g[i]
        mu = _left(starts, i, decays[i] * lam)
        change = lefts[i] * lam
        sum_A += change * delta[i]
        by_B = (tl.sum(lam * x[i], 0),) + by_B
        by_x = (tl.sum(lam * B[i], 1),) + by_x
        by_rate = (tl.sum(change * rate, 1),) + by_rate
    return mu, sum_A, by_B, by_x, by_rate


@triton.jit
def _read_grad(grad, gate, b, by_batch, by_row, gate_batch, gate_row, first, row, c, mask):
    """Return the gradient of what the gate multiplies [T, D], and what the gate's is of that."""
    g = read_rows(grad, b, by_batch, first, by_row, row[:, None], c[None], mask)
    by_gate = g
    if gate is not None:
        z = read_rows(gate, b, gate_batch, first, gate_row, row[:, None], c[None], mask)
        opening = sigmoid(z)
        by_gate = g * opening * (1 + z * (1 - opening))
        g *= z * opening
    return g, by_gate


@triton.jit
def _after(grad_final, ends, decays, b, segment, sizes, at, there):
    """Return μ after a segment, from the gradient of the final state and what is stored of later segments."""
    mu = tl.zeros(at.shape, tl.float32)
    if grad_final is not None:
        mu = tl.load(grad_final + b * sizes + at, there, 0.0)
    if ends is not None:
        for i in range(tl.num_programs(2) - 1, segment, -1):
            mu = carry_on(mu, ends + b * sizes, decays + b * sizes, i, sizes * tl.num_programs(0), at, there)
    return settle(mu)


@triton.jit
def _ends(
    grad, dt, A, C, gate, bias, elapsed, start, ends, decays,
    grad_batch, grad_row, dt_batch, dt_row, C_batch, C_row, gate_batch, gate_row, A_row, length, width, states, span,
    SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, W: tl.constexpr, M: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Store e^z λ before each segment of ``span`` steps from zero after it, and the segment's decay."""
    b, segment = tl.program_id(0).to(tl.int64), tl.program_id(2)
    c = tl.program_id(1) * (W * L * R) + tl.arange(0, W * L * R)
    at, there = _places(width, states, A_row, R, S, W, M, L)
    rate = settle(read_rates(A, at, there, LOG_A) * LOG2E)
    n, row = tl.arange(0, M * S)[None, :], tl.arange(0, T)
    mu, power, any_start = tl.zeros(at.shape, tl.float32), tl.zeros(at.shape, tl.float32), 0
    if start is not None:
        start += b * length
    begin = segment * span
    tiles = tl.cdiv(tl.minimum(length, begin + span) - begin, T)
    for back in range(tiles):
        first = begin + (tiles - 1 - back) * T
        now = (first + row < length)[:, None]
        mask = now & (c < width)[None]
        delta, _, _ = _read_delta(dt, bias, elapsed, b, dt_batch, dt_row, length, first, row, c, mask, SOFTPLUS)
        g, _ = _read_grad(grad, gate, b, grad_batch, grad_row, gate_batch, gate_row, first, row, c, mask)
        C_t = read_rows(C, b, C_batch, first, C_row, row[:, None], n, now & (n < states))
        delta, g = of_channels(delta, R, S, W, M, L), of_channels(g, R, S, W, M, L)
        C_t = of_states(C_t, R, S, W, M, L)
        starts = _starts(start, first, row, length)
        any_start |= starts
        for i in tl.static_range(T - 1, -1, -1):
            mu = _left(starts, i, tl.exp2(delta[i] * rate) * (mu + C_t[i] * g[i]))
            power += delta[i] * rate
    at, there = _places(width, states, states, R, S, W, M, L)
    part = (tl.cast(segment, tl.int64) * tl.num_programs(0) + b) * width * states
    store_end(mu, ends, decays, power, any_start, part, at, there)


@triton.jit
def _goes_on(
    h, u, dt, B, bias, elapsed, start, rate, b, u_batch, u_row, dt_batch, dt_row, B_batch, B_row, begin, end,
    length, row, c, known, n, known_n,
    SOFTPLUS: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, W: tl.constexpr, M: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Return the state after the tiles from ``begin`` to ``end``, of that before them."""
    mask, now_n = (row >= 0)[:, None] & known[None], (row >= 0)[:, None] & known_n
    for first in range(begin, end, T):
        delta, _, _ = _read_delta(dt, bias, elapsed, b, dt_batch, dt_row, length, first, row, c, mask, SOFTPLUS)
        x = delta * read_rows(u, b, u_batch, first, u_row, row[:, None], c[None], mask)
        B_t = of_states(read_rows(B, b, B_batch, first, B_row, row[:, None], n, now_n), R, S, W, M, L)
        delta, x = of_channels(delta, R, S, W, M, L), of_channels(x, R, S, W, M, L)
        h, _, _, _, _ = _onwards(h, delta, x, B_t, None, None, rate, _starts(start, first, row, length))
    return h


@triton.jit
def _store_sums(
    sum_A, sum_D, sum_bias, mu, rate, grad_A, grad_D, grad_bias, grad_initial, width, states, c, known, at, there,
    LOG_A: tl.constexpr,
):  # fmt: skip
    """Store a segment's sums over time, and the first segment's gradient of the initial state."""
    b, segment, sizes = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.cast(width, tl.int64) * states
    part = tl.cast(segment, tl.int64) * tl.num_programs(0) + b
    if LOG_A:
        sum_A *= rate * (1 / LOG2E)
    tl.store(grad_A + part * sizes + at, sum_A, there)
    if grad_D is not None:
        tl.store(grad_D + part * width + c, sum_D, known)
    if grad_bias is not None:
        tl.store(grad_bias + part * width + c, sum_bias, known)
    if segment == 0:
        tl.store(grad_initial + b * sizes + at, mu, there)


@triton.jit
def _backward(
    u, dt, A, B, C, D, gate, bias, elapsed, start, kept, grad, grad_final, ends, decays,
    grad_u, grad_dt, grad_gate, grad_A, grad_B, grad_C, grad_D, grad_bias, grad_elapsed, grad_initial,
    u_batch, u_row, dt_batch, dt_row, B_batch, B_row, C_batch, C_row, gate_batch, gate_row, grad_batch, grad_row, A_row,
    length, width, states, span,
    KEEP: tl.constexpr, SOFTPLUS: tl.constexpr, LOG_A: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, W: tl.constexpr, M: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one segment of ``span`` steps.

    With g = grad ∘ SiLU(gate), x = Δ u and z = Δ A:

    λ_t = C_t g_t + e^z_{t+1} λ_{t+1},    ∂B_t = Σ λ_t x_t,    ∂C_t = Σ h_t g_t    (over channels)
    ∂x_t = Σ B_t λ_t,    ∂z_t = λ_t e^z_t h_{t−1},    ∂Δ_t = u_t ∂x_t + Σ A ∂z_t    (over states)
    """
    b, segment, batches = tl.program_id(0).to(tl.int64), tl.program_id(2), tl.num_programs(0)
    c = tl.program_id(1) * (W * L * R) + tl.arange(0, W * L * R)
    known, column, sizes = c < width, c[None], tl.cast(width, tl.int64) * states
    at, there = _places(width, states, A_row, R, S, W, M, L)
    rate = settle(read_rates(A, at, there, LOG_A) * LOG2E)
    at, there = _places(width, states, states, R, S, W, M, L)
    mu, sum_A = _after(grad_final, ends, decays, b, segment, sizes, at, there), tl.zeros(at.shape, tl.float32)
    if start is not None:
        start += b * length
    sum_D, sum_bias = tl.zeros([W * L * R], tl.float32), tl.zeros([W * L * R], tl.float32)
    n, row, begin = tl.arange(0, M * S)[None, :], tl.arange(0, T), segment * span
    piece = tl.program_id(1).to(tl.int64) * batches + b
    tiles = tl.cdiv(tl.minimum(length, begin + span) - begin, T)
    for back in range(tiles):
        first = begin + (tiles - 1 - back) * T
        now = (first + row < length)[:, None]
        mask, now_n = now & known[None], now & (n < states)
        h = settle(tl.load(kept + (first // KEEP * batches + b) * sizes + at, there, 0.0))
        if KEEP > T:
            h = _goes_on(
                h, u, dt, B, bias, elapsed, start, rate, b, u_batch, u_row, dt_batch, dt_row, B_batch, B_row,
                first // KEEP * KEEP, first, length, row, c, known, n, n < states, SOFTPLUS, T, R, S, W, M, L,
            )  # fmt: skip
        delta, step, slope = _read_delta(dt, bias, elapsed, b, dt_batch, dt_row, length, first, row, c, mask, SOFTPLUS)
        g, by_gate = _read_grad(grad, gate, b, grad_batch, grad_row, gate_batch, gate_row, first, row, c, mask)
        u_t = read_rows(u, b, u_batch, first, u_row, row[:, None], column, mask)
        B_t = of_states(read_rows(B, b, B_batch, first, B_row, row[:, None], n, now_n), R, S, W, M, L)
        C_t = of_states(read_rows(C, b, C_batch, first, C_row, row[:, None], n, now_n), R, S, W, M, L)
        delta_n, x = of_channels(delta, R, S, W, M, L), of_channels(delta * u_t, R, S, W, M, L)
        g_n = of_channels(g, R, S, W, M, L)
        starts = _starts(start, first, row, length)
        place = (b * length + first) * width + row[:, None] * width + column
        place_n = (piece * length + first) * states + row[:, None] * states + n
        h, decays_t, lefts, by_C, outs = _onwards(h, delta_n, x, B_t, None if gate is None else C_t, g_n, rate, starts)
        tl.store(grad_C + place_n, over_channels(by_C, L), now_n)
        skip = 0.0 if D is None else tl.load(D + c, known, 0.0).to(tl.float32)[None]
        if gate is not None:
            out = over_states(outs, M) + skip * u_t
            tl.store(grad_gate + place, (by_gate * out).to(grad_gate.dtype.element_ty), mask)
        # Read again: on the way there are no registers for them.
        C_t = of_states(read_rows(C, b, C_batch, first, C_row, row[:, None], n, now_n), R, S, W, M, L)
        B_t = of_states(read_rows(B, b, B_batch, first, B_row, row[:, None], n, now_n), R, S, W, M, L)
        mu, sum_A, by_B, by_x, by_rate = _backwards(mu, delta_n, x, B_t, C_t, g_n, rate, decays_t, lefts, sum_A, starts)
        tl.store(grad_B + place_n, over_channels(by_B, L), now_n)
        by_x = over_states(by_x, M)
        by_delta = u_t * by_x + over_states(by_rate, M) * (1 / LOG2E)
        sum_D += tl.sum(u_t * g, 0)
        tl.store(grad_u + place, (delta * by_x + skip * g).to(grad_u.dtype.element_ty), mask)
        tl.store(grad_dt + place, (by_delta * slope).to(grad_dt.dtype.element_ty), mask)
        if bias is not None:
            sum_bias += tl.sum(tl.where(mask, by_delta * slope, 0.0), 0)
        if elapsed is not None:
            by_step = tl.sum(tl.where(mask, by_delta * step, 0.0), 1)
            tl.store(grad_elapsed + piece * length + first + row, by_step, first + row < length)
    _store_sums(
        sum_A, sum_D, sum_bias, mu, rate, grad_A, grad_D, grad_bias, grad_initial, width, states, c, known, at, there,
        LOG_A,
    )  # fmt: skip


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
    use, tile, grid, span = _split(u, N, keep)
    _, pieces, segments = grid

    def new(like: Tensor | None, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return None if like is None else u.new_empty(shape, dtype=dtype)

    rows = [_triton.rows(x.float() if x is B or x is C else x) for x in (u, dt, B, C)]
    rows += [grad if gate is None else _triton.rows(gate), _triton.rows(grad)]
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
    flags = (dt_softplus, log_A, *tile)
    ends = decays = None
    if segments > 1:
        ends, decays = u.new_empty((2, segments, batch, width, n), dtype=torch.float32)
        some = (rows[1], A, rows[3], gate, dt_bias, elapsed, start, ends, decays)
        few = (*strides[10:], *strides[2:4], *strides[6:10], A.stride(0), length, width, n, span)
        _triton.launch(_ends, grid, rows[5], *some, *few, *flags, num_warps=use["warps"])
    outputs = (grad_u, grad_dt, grad_gate, *sums, grad_initial)
    _triton.launch(
        _backward, grid, rows[0], *given, ends, decays, *outputs, *sizes, keep, *flags, num_warps=use["warps"]
    )

    def total(name: str) -> Tensor:
        like, x = totals[name]
        return u.new_empty(0) if like is None or x is None else x.sum(0).to(like.dtype)

    none = u.new_empty(0) if grad_gate is None else grad_gate
    return (
        *(grad_u, grad_dt, total("A"), total("B"), total("C"), total("D")),
        *(grad_initial, none, total("bias"), total("elapsed")),
    )


def _split(u: Tensor, N: int, keep: int) -> tuple[dict[str, int], tuple[int, ...], tuple[int, int, int], int]:
    """Return how to run, the tile (T, R, S, W, M, L), the grid (sequences, pieces of the channels, segments of time)
    and the steps of a segment."""
    batch, length, width = u.shape
    use = TILES(u, batch=batch, length=length, width=width, states=N)
    M = min(N, use["across"], LANES)
    S, L = N // M, LANES // M
    R = max(1, min(use["numbers"] // S, 8 // L))  # what is held of channels only is more where states are few
    T = min(keep, use["steps"], max(1, use["steps"] * use["numbers"] // (R * S)))
    tile = (T, R, S, use["warps"], M, L)
    pieces = _triton.cdiv(width, R * use["warps"] * L)
    # The first pass over segments costs a third of the second: three at least.
    least = keep if _triton.interpreted else LEAST
    segments = min(2 * use["programs"] // max(1, batch * pieces), _triton.cdiv(length, least))
    span = _triton.cdiv(length, segments) if segments > 2 else length
    span = max(_triton.cdiv(span, keep) * keep, keep)
    return use, tile, (batch, pieces, max(1, _triton.cdiv(length, span))), span
