# mypy: disable-error-code="no-untyped-def"
"""The kernel of the gradients where all key channels of a head decay alike."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_chunks import chunk_factors, chunk_weights, decayed, operand, product, steps_of, store_tile, tile


@triton.jit
def value_block(
    dy, q, k, v, D, S, L, dv, dD, weights, into, out, step, rows, keys, values, dq, dk, M, read, put, carried,
    dy_step, v_step, dv_step, D_value, height, K, P, DECAYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to ∂q, ∂k, M, q_t S ∂y_t, k_s L v_s and ΣS ∘ L what some channels of a head's values give to them, and write
    their gradients and the sum of ∂y v."""
    dy_tile, v_tile = tile(dy, rows, values, dy_step, height, P), tile(v, rows, values, v_step, height, P)
    dy_wide, v_wide = dy_tile.to(tl.float32), v_tile.to(tl.float32)
    S, L = tile(S, keys, values, P, K, P), tile(L, keys, values, P, K, P)
    M = product(dy_tile, tl.trans(v_tile), PRECISION, M)
    dq = product(operand(decayed(dy_wide, into[:, None]), dy_tile), tl.trans(S), PRECISION, dq)
    dk = product(operand(v_wide * (out * step)[:, None], v_tile), tl.trans(L), PRECISION, dk)
    if DECAYS:
        read += tl.sum(decayed(product(q, S, PRECISION) * dy_wide, into[:, None]), 1)
        carried += tl.sum(S.to(tl.float32) * L.to(tl.float32), 1)
    dv_tile = product(k, L, PRECISION) * out[:, None]
    put += tl.sum(dv_tile * v_wide, 1)
    dv_tile = product(operand(tl.trans(weights), dy_tile), dy_tile, PRECISION, dv_tile) * step[:, None]
    if D is not None:
        dv_tile += tl.load(D + values * D_value, mask=values < P, other=0.0).to(tl.float32)[None, :] * dy_wide
        tl.store(dD + values, tl.sum(dy_wide * v_wide, 0), mask=values < P)
    store_tile(dv, rows, values, dv_step, height, P, dv_tile)
    return dq, dk, M, read, put, carried


@triton.jit
def gradients(
    dy, q, k, v, high, low, dt, D, document, states, later, dq, dk, dv, dg, ddt, dD,
    dy_batch, dy_step, dy_head, q_batch, q_step, q_group, k_batch, k_step, k_group, v_batch, v_step, v_head,
    dt_batch, dt_step, dt_head, D_head, D_value, T, H, GROUPS, K, P, PIECES,
    FIXED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a chunk, for some heads of a group one after the other.

    With the state S before the chunk, the adjoint L of the state after it, M_ts = e^{G_t − G_s} (∂y_t · v_s) and
    W = M ∘ (q kᵀ): ∂q_t = Σ_s M_ts Δ_s k_s + e^{G_t} S ∂y_t, ∂k_s = Δ_s (Σ_t M_ts q_t + e^{G_c − G_s} L v_s), ∂(Δ_s
    v_s) = Σ_t e^{G_t − G_s} (q_t · k_s) ∂y_t + e^{G_c − G_s} Lᵀ k_s. ∂G_t is what y_t is sensitive to less what v_t is,
    and at the chunk's end what is sensitive to L: Σ_s W_ts Δ_s + e^{G_t} q_t S ∂y_t − Δ_t v_t · ∂(Δ_t v_t).

    Args:
        states: S for every chunk ``[j b h k p]``.
        later: L for every chunk.
        dq: Sums over the heads of each piece of a group ``[i b t g k]``; ``dk`` likewise.
        dg: ``[b t h]``; if decays are ``FIXED``, its sums over chunks ``[b j h]``.
        dD: Sums of ∂y v over chunks ``[b j h p]``.
        PIECES: Into how many pieces the heads of a group are cut.
    """
    i, chunks, piece = tl.program_id(1), tl.num_programs(1), tl.program_id(0) % PIECES
    shared = (tl.program_id(0) // PIECES).to(tl.int64)  # sequence and group
    batch, group, batches = shared // GROUPS, shared % GROUPS, tl.num_programs(0) // PIECES // GROUPS
    first, height, rows, keys = i.to(tl.int64) * CHUNK, T - i * CHUNK, tl.arange(0, CHUNK), tl.arange(0, KEYS)
    q_here = tile(q + batch * q_batch + group * q_group + first * q_step, rows, keys, q_step, height, K)
    k_here = tile(k + batch * k_batch + group * k_group + first * k_step, rows, keys, k_step, height, K)
    dq_here, dk_here = tl.zeros([CHUNK, KEYS], tl.float32), tl.zeros([CHUNK, KEYS], tl.float32)
    starts = None if document is None else document + batch * T + first
    heads = H // GROUPS // PIECES
    for n in range(0, heads):
        head = (group * PIECES + piece) * heads + n
        at = ((batch * H + head) * chunks + i) * CHUNK
        high_here, low_here = None if high is None else high + at, None if low is None else low + at
        into, out, through = chunk_factors(high_here, low_here, starts, i, height, CHUNK)
        step = tl.full([CHUNK], 1.0, tl.float32)
        if dt is not None:
            step = steps_of(dt + batch * dt_batch + head * dt_head + first * dt_step, rows, dt_step, height)
        scores = product(q_here, tl.trans(k_here), PRECISION)  # the same for all heads, but registers are few
        weights = chunk_weights(scores, high_here, low_here, starts, height, CHUNK)
        M, at = tl.zeros([CHUNK, CHUNK], tl.float32), ((i * batches + batch) * H + head) * K * P
        read, put, carried = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32), tl.zeros([KEYS], tl.float32)
        for value in range(0, P, VALUES):
            dq_here, dk_here, M, read, put, carried = value_block(
                dy + batch * dy_batch + head * dy_head + first * dy_step, q_here, k_here,
                v + batch * v_batch + head * v_head + first * v_step, None if D is None else D + head * D_head,
                states + at, later + at, dv + ((batch * T + first) * H + head) * P,
                None if D is None else dD + ((batch * chunks + i) * H + head) * P,
                weights, into, out, step, rows, keys, value + tl.arange(0, VALUES), dq_here, dk_here, M, read, put,
                carried, dy_step, v_step, H * P, D_value, height, K, P, high is not None, PRECISION,
            )  # fmt: skip
        M = chunk_weights(M, high_here, low_here, starts, height, CHUNK)
        W = M * scores
        M *= step[None, :]
        dq_here = product(operand(M, k_here), k_here, PRECISION, dq_here)
        dk_here = product(operand(tl.trans(M), q_here), q_here, PRECISION, dk_here)
        written, at = tl.sum(W, 0) + put, (batch * T + first + rows) * H + head
        if ddt is not None:
            tl.store(ddt + at, written.to(ddt.dtype.element_ty), mask=rows < height)
        if high is not None:
            change = tl.sum(W * step[None, :], 1) + read - written * step
            end = tl.sum(put * step, 0) + decayed(tl.sum(carried, 0), through)
            change = tl.cumsum(change, 0, reverse=True) + end
            if FIXED:
                total = tl.sum(tl.where(rows < height, change, 0.0), 0)
                tl.store(dg + (batch * chunks + i) * H + head, total)
            else:
                tl.store(dg + at, change.to(dg.dtype.element_ty), mask=rows < height)
    at = (((piece * batches + batch) * T + first) * GROUPS + group) * K
    store_tile(dq + at, rows, keys, GROUPS * K, height, K, dq_here)
    store_tile(dk + at, rows, keys, GROUPS * K, height, K, dk_here)
