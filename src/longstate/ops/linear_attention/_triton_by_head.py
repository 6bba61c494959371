# mypy: disable-error-code="no-untyped-def"
"""The kernel of the gradients where all key channels of a head decay alike."""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_chunks import chunk_factors, chunk_weights, operand, product, steps_of, tile


@triton.jit
def gradients(
    dy, q, k, v, g, dt, D, document, states, later, dq, dk, dv, dg, ddt, dD,
    dy_batch, dy_step, dy_head, q_batch, q_step, q_group, k_batch, k_step, k_group, v_batch, v_step, v_head,
    g_batch, g_step, g_head, dt_batch, dt_step, dt_head, D_head, D_value, T, H, GROUPS, K, P, PIECES,
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
    rows, keys = i * CHUNK + tl.arange(0, CHUNK), tl.arange(0, KEYS)
    q_here = tile(q + batch * q_batch + group * q_group, rows, keys, q_step, T, K)
    k_here = tile(k + batch * k_batch + group * k_group, rows, keys, k_step, T, K)
    scores = product(q_here, tl.trans(k_here), PRECISION)
    summed = tl.zeros([CHUNK, CHUNK], tl.float32)
    dq_here, dk_here = tl.zeros([CHUNK, KEYS], tl.float32), tl.zeros([CHUNK, KEYS], tl.float32)
    heads = H // GROUPS // PIECES
    for n in range(0, heads):
        head = (group * PIECES + piece) * heads + n
        g_here = None if g is None else g + batch * g_batch + head * g_head
        starts = None if document is None else document + batch * T
        high, low, documents, into, out, through = chunk_factors(g_here, starts, rows, i * CHUNK, g_step, T, CHUNK)
        step = tl.full([CHUNK], 1.0, tl.float32)
        if dt is not None:
            step = steps_of(dt + batch * dt_batch + head * dt_head, rows, dt_step, T)
        weights = chunk_weights(scores, g, document, high, low, documents, CHUNK)
        M = tl.zeros([CHUNK, CHUNK], tl.float32)
        read, put, carried = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32), tl.sum(step * 0.0, 0)
        for first in range(0, P, VALUES):
            values = first + tl.arange(0, VALUES)
            dy_tile = tile(dy + batch * dy_batch + head * dy_head, rows, values, dy_step, T, P)
            v_tile = tile(v + batch * v_batch + head * v_head, rows, values, v_step, T, P)
            at = ((i * batches + batch) * H + head) * K * P
            S, L = tile(states + at, keys, values, P, K, P), tile(later + at, keys, values, P, K, P)
            M += product(dy_tile, tl.trans(v_tile), PRECISION)
            from_S = product(dy_tile, tl.trans(S), PRECISION) * into[:, None]
            from_L = product(v_tile, tl.trans(L), PRECISION) * out[:, None]
            dq_here += from_S
            dk_here += from_L * step[:, None]
            if g is not None:
                read += tl.sum(from_S * q_here.to(tl.float32), 1)
                carried += tl.sum(tl.sum(S.to(tl.float32) * L.to(tl.float32), 1), 0)
            put += tl.sum(from_L * k_here.to(tl.float32), 1)
            dv_tile = product(operand(tl.trans(weights), dy_tile), dy_tile, PRECISION)
            dv_tile += product(k_here, L, PRECISION) * out[:, None]
            dv_tile *= step[:, None]
            if D is not None:
                skip = tl.load(D + head * D_head + values * D_value, mask=values < P, other=0.0).to(tl.float32)
                dv_tile += skip[None, :] * dy_tile.to(tl.float32)
                total = tl.sum(dy_tile.to(tl.float32) * v_tile.to(tl.float32), 0)
                tl.store(dD + ((batch * chunks + i) * H + head) * P + values, total, mask=values < P)
            at = dv + ((batch * T + rows)[:, None] * H + head) * P + values[None, :]
            tl.store(at, dv_tile.to(dv.dtype.element_ty), mask=(rows < T)[:, None] & (values < P)[None, :])
        M = chunk_weights(M, g, document, high, low, documents, CHUNK)
        summed += M * step[None, :]
        W = M * scores
        written = tl.sum(W, 0) + put
        if ddt is not None:
            tl.store(ddt + (batch * T + rows) * H + head, written.to(ddt.dtype.element_ty), mask=rows < T)
        if g is not None:
            change = tl.sum(W * step[None, :], 1) + read - written * step
            change = tl.cumsum(change, 0, reverse=True) + (tl.sum(put * step, 0) + through * carried)
            if FIXED:
                total = tl.sum(tl.where(rows < T, change, 0.0), 0)
                tl.store(dg + (batch * chunks + i) * H + head, total)
            else:
                tl.store(dg + (batch * T + rows) * H + head, change.to(dg.dtype.element_ty), mask=rows < T)
    dq_here += product(operand(summed, k_here), k_here, PRECISION)
    dk_here += product(operand(tl.trans(summed), q_here), q_here, PRECISION)
    at = ((((piece * batches + batch) * T + rows)[:, None] * GROUPS + group) * K) + keys[None, :]
    inside = (rows < T)[:, None] & (keys < K)[None, :]
    tl.store(dq + at, dq_here.to(dq.dtype.element_ty), mask=inside)
    tl.store(dk + at, dk_here.to(dk.dtype.element_ty), mask=inside)
