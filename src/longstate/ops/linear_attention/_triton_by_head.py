# mypy: disable-error-code="no-untyped-def"
"""The kernels of the gradients where all key channels of a head decay alike.

With the state S before a chunk, the adjoint L of the state after it, and M_ts = e^{G_t − G_s} (∂y_t · v_s) for s ≤ t of
one document, ∂q_t = Σ_s M_ts Δ_s k_s + e^{G_t} S ∂y_t, ∂k_s = Δ_s (Σ_t M_ts q_t + e^{G_c − G_s} L v_s) and ∂(Δ_s v_s) =
Σ_t e^{G_t − G_s} (q_t · k_s) ∂y_t + e^{G_c − G_s} Lᵀ k_s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_chunks import chunk_factors, chunk_weights, decayed, operand, product, steps_of, store_tile, tile


@triton.jit
def value_gradients(
    dy, q, k, v, high, low, dt, D, document, states, later, dv, dg, ddt, dD, dy_batch, dy_step: tl.constexpr,
    dy_head, q_batch, q_step: tl.constexpr, q_group, k_batch, k_step: tl.constexpr, k_group, v_batch,
    v_step: tl.constexpr, v_head, dt_batch, dt_step: tl.constexpr, dt_head, D_head, D_value: tl.constexpr, T,
    H: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, FIXED: tl.constexpr,
    CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of v, the log decays, Δ and D, of a chunk and head.

    With W = M ∘ (q kᵀ), ∂G_t is what y_t is sensitive to less what v_t is,
    Σ_s W_ts Δ_s + e^{G_t} q_t S ∂y_t − Δ_t v_t ·
    ∂(Δ_t v_t); and at the chunk's end, what L is. A log decay is in all later sums of its chunk.

    Args:
        states: S for every chunk ``[j b h k p]``.
        later: L for every chunk.
        dg: ``[b t h]``; if decays are ``FIXED``, its sums over chunks ``[b j h]``.
        dD: Sums of ∂y v over chunks ``[b j h p]``.
    """
    pair, pairs, i, chunks = tl.program_id(0).to(tl.int64), tl.num_programs(0), tl.program_id(1), tl.num_programs(1)
    batch, head, group = pair // H, pair % H, pair % H // SHARED
    first, height, rows, keys = i.to(tl.int64) * CHUNK, T - i * CHUNK, tl.arange(0, CHUNK), tl.arange(0, KEYS)
    dy, v = (
        dy + batch * dy_batch + head * dy_head + first * dy_step,
        v + batch * v_batch + head * v_head + first * v_step,
    )
    q_here = tile(q + batch * q_batch + group * q_group + first * q_step, rows, keys, q_step, height, K)
    k_here = tile(k + batch * k_batch + group * k_group + first * k_step, rows, keys, k_step, height, K)
    high_here = None if high is None else high + (pair * chunks + i) * CHUNK
    low_here = None if low is None else low + (pair * chunks + i) * CHUNK
    starts = None if document is None else document + batch * T + first
    into, out, through = chunk_factors(high_here, low_here, starts, i, height, CHUNK)
    step = tl.full([CHUNK], 1.0, tl.float32)
    if dt is not None:
        step = steps_of(dt + batch * dt_batch + head * dt_head + first * dt_step, rows, dt_step, height)
    scores = chunk_weights(
        product(q_here, tl.trans(k_here), PRECISION), high_here, low_here, starts, height, CHUNK
    )  # fmt: skip
    M, carried = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([KEYS], tl.float32)
    read, put = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for value in range(0, P, VALUES):
        values = value + tl.arange(0, VALUES)
        dy_tile, v_tile = tile(dy, rows, values, dy_step, height, P), tile(v, rows, values, v_step, height, P)
        L = tile(later + (i * pairs + pair) * K * P, keys, values, P, K, P)
        if high is not None:
            S = tile(states + (i * pairs + pair) * K * P, keys, values, P, K, P)
            read += tl.sum(decayed(product(q_here, S, PRECISION) * dy_tile.to(tl.float32), into[:, None]), 1)
            carried += tl.sum(S.to(tl.float32) * L.to(tl.float32), 1)
        dv_tile = product(k_here, L, PRECISION) * out[:, None]
        put += tl.sum(dv_tile * v_tile.to(tl.float32), 1)
        dv_tile = product(operand(tl.trans(scores), dy_tile), dy_tile, PRECISION, dv_tile) * step[:, None]
        if D is not None:
            skip = tl.load(D + head * D_head + values * D_value, mask=values < P, other=0.0).to(tl.float32)
            dv_tile += skip[None, :] * dy_tile.to(tl.float32)
            total = tl.sum(dy_tile.to(tl.float32) * v_tile.to(tl.float32), 0)
            tl.store(dD + ((batch * chunks + i) * H + head) * P + values, total, mask=values < P)
        store_tile(dv + ((batch * T + first) * H + head) * P, rows, values, H * P, height, P, dv_tile)
        M = product(dy_tile, tl.trans(v_tile), PRECISION, M)
    W = M * scores
    written, at = tl.sum(W, 0) + put, (batch * T + first + rows) * H + head
    if ddt is not None:
        tl.store(ddt + at, written.to(ddt.dtype.element_ty), mask=rows < height)
    if high is not None:
        change = tl.sum(W * step[None, :], 1) + read - written * step
        end = tl.sum(put * step, 0) + decayed(tl.sum(carried, 0), through)
        change = tl.cumsum(change, 0, reverse=True) + end
        if FIXED:
            tl.store(dg + (batch * chunks + i) * H + head, tl.sum(tl.where(rows < height, change, 0.0), 0))
        else:
            tl.store(dg + at, change.to(dg.dtype.element_ty), mask=rows < height)


@triton.jit
def key_gradients(
    dy, q, k, v, high, low, dt, document, states, later, dq, dk, dy_batch, dy_step: tl.constexpr, dy_head,
    q_batch, q_step: tl.constexpr, q_group, k_batch, k_step: tl.constexpr, k_group, v_batch,
    v_step: tl.constexpr, v_head, dt_batch, dt_step: tl.constexpr, dt_head, T, H: tl.constexpr,
    GROUPS: tl.constexpr, K: tl.constexpr, P: tl.constexpr, PIECES: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of some channels of q and k in a chunk: sums over the heads of a piece of a group.

    Args:
        dq: ``[i b t g k]``; ``dk`` likewise.
        PIECES: Into how many pieces the heads of a group are cut.
    """
    i, chunks, blocks = tl.program_id(1), tl.num_programs(1), tl.cdiv(K, KEYS)
    keys, piece = tl.program_id(0) % blocks * KEYS + tl.arange(0, KEYS), tl.program_id(0) // blocks % PIECES
    shared = (tl.program_id(0) // (blocks * PIECES)).to(tl.int64)  # sequence and group
    batch, group, batches = shared // GROUPS, shared % GROUPS, tl.num_programs(0) // (blocks * PIECES * GROUPS)
    first, height, rows = i.to(tl.int64) * CHUNK, T - i * CHUNK, tl.arange(0, CHUNK)
    q_here = tile(q + batch * q_batch + group * q_group + first * q_step, rows, keys, q_step, height, K)
    k_here = tile(k + batch * k_batch + group * k_group + first * k_step, rows, keys, k_step, height, K)
    starts = None if document is None else document + batch * T + first
    dq_here, dk_here = tl.zeros([CHUNK, KEYS], tl.float32), tl.zeros([CHUNK, KEYS], tl.float32)
    for n in range(H // GROUPS // PIECES):
        head = (group * PIECES + piece) * (H // GROUPS // PIECES) + n
        at = ((batch * H + head) * chunks + i) * CHUNK
        high_here, low_here = None if high is None else high + at, None if low is None else low + at
        into, out, _ = chunk_factors(high_here, low_here, starts, i, height, CHUNK)
        step = tl.full([CHUNK], 1.0, tl.float32)
        if dt is not None:
            step = steps_of(dt + batch * dt_batch + head * dt_head + first * dt_step, rows, dt_step, height)
        M, at = tl.zeros([CHUNK, CHUNK], tl.float32), ((i * batches + batch) * H + head) * K * P
        for value in range(0, P, VALUES):
            values = value + tl.arange(0, VALUES)
            dy_tile = tile(
                dy + batch * dy_batch + head * dy_head + first * dy_step, rows, values, dy_step, height, P
            )  # fmt: skip
            v_tile = tile(v + batch * v_batch + head * v_head + first * v_step, rows, values, v_step, height, P)
            M = product(dy_tile, tl.trans(v_tile), PRECISION, M)
            dy_tile = operand(decayed(dy_tile.to(tl.float32), into[:, None]), dy_tile)
            v_tile = operand(v_tile.to(tl.float32) * (out * step)[:, None], v_tile)
            S, L = tile(states + at, keys, values, P, K, P), tile(later + at, keys, values, P, K, P)
            dq_here = product(dy_tile, tl.trans(S), PRECISION, dq_here)
            dk_here = product(v_tile, tl.trans(L), PRECISION, dk_here)
        M = chunk_weights(M, high_here, low_here, starts, height, CHUNK) * step[None, :]
        dq_here = product(operand(M, k_here), k_here, PRECISION, dq_here)
        dk_here = product(operand(tl.trans(M), q_here), q_here, PRECISION, dk_here)
    at = (((piece * batches + batch) * T + first) * GROUPS + group) * K
    store_tile(dq + at, rows, keys, GROUPS * K, height, K, dq_here)
    store_tile(dk + at, rows, keys, GROUPS * K, height, K, dk_here)
