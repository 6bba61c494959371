# mypy: disable-error-code="no-untyped-def"
"""The kernels of what differs where each key channel has a decay of its own: scores, and gradients of q, k and decays.

Between the sub-blocks of a chunk the exponent is split at the later one's beginning, so that both factors are at most
1 and meet in a matrix product; within a sub-block it is formed for each pair and channel, distance by distance.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_chunks import (
    NOWHERE,
    block_sum,
    chunk_factors,
    chunk_weights,
    decayed,
    first_steps,
    log2_decays,
    operand,
    position,
    product,
    steps_of,
    store_tile,
    tile,
)


@triton.jit
def prepare(
    q, k, g, document, scores, q_into, k_out, through, q_batch, q_step: tl.constexpr, q_group, k_batch,
    k_step: tl.constexpr, k_group, g_batch, g_step: tl.constexpr, g_head, T, H: tl.constexpr,
    SHARED: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write what lies between the steps of each chunk, and queries and keys with what links them to its ends.

    Args:
        scores: Σ_k q_tk e^{G_tk − G_sk} k_sk for s ≤ t of one document, else 0: ``[b h t c]``.
        q_into: q_tk e^{G_tk}, 0 where the state before the chunk is forgotten: ``[b t h k]``.
        k_out: k_sk e^{G_ck − G_sk}, 0 where the chunk's end is of another document: ``[b t h k]``.
        through: e^{G_ck}, likewise: ``[b h j k]``.
    """
    pair, i, _, chunks = position(T, CHUNK)
    pair = pair.to(tl.int64)
    batch, head, group = pair // H, pair % H, pair % H // SHARED
    first, height, rows = i.to(tl.int64) * CHUNK, T - i * CHUNK, tl.arange(0, CHUNK)
    q, k = (
        q + batch * q_batch + group * q_group + first * q_step,
        k + batch * k_batch + group * k_group + first * k_step,
    )
    g += batch * g_batch + head * g_head + first * g_step
    local, block = rows % SUB, (rows // SUB)[:, None]
    starts = None if document is None else document + batch * T + first
    alive, kept, kept_on = chunk_factors(None, None, starts, i, height, CHUNK)
    weights = tl.zeros([CHUNK, CHUNK], tl.float32)
    for channel in range(0, K, KEYS):
        keys = channel + tl.arange(0, KEYS)
        q_here, k_here = tile(q, rows, keys, q_step, height, K), tile(k, rows, keys, k_step, height, K)
        log2 = log2_decays(g, rows, keys, g_step, height, K)
        to, since = tl.zeros([CHUNK, KEYS], tl.float32), tl.zeros([CHUNK, KEYS], tl.float32)
        for j in range(SUB):
            earlier, after = (
                tl.where(local >= j, rows - j, NOWHERE),
                tl.where(local + j + 1 < SUB, rows + j + 1, NOWHERE),
            )
            other = tile(k, earlier, keys, k_step, height, K).to(tl.float32)
            found = tl.sum(q_here.to(tl.float32) * other * tl.exp2(to), 1)
            weights += tl.where(rows[None, :] == rows[:, None] - j, found[:, None], 0.0)
            to += log2_decays(g, earlier, keys, g_step, height, K)
            since += log2_decays(g, after, keys, g_step, height, K)
        into, q_to = to, q_here.to(tl.float32) * tl.exp2(to)
        for n in range(1, CHUNK // SUB):
            added = block_sum(log2, block, n - 1)
            since, into = tl.where(block < n - 1, since + added, since), tl.where(block >= n, into + added, into)
            k_since = operand(tl.where(block < n, k_here.to(tl.float32) * tl.exp2(since), 0.0), k_here)
            here = operand(tl.where(block == n, q_to, 0.0), q_here)
            weights = product(here, tl.trans(k_since), PRECISION, weights)
        since = tl.where(block < CHUNK // SUB - 1, since + block_sum(log2, block, CHUNK // SUB - 1), since)
        at, wide = ((batch * T + first) * H + head) * K, H * K
        store_tile(q_into + at, rows, keys, wide, height, K, q_here.to(tl.float32) * tl.exp2(into) * alive[:, None])
        store_tile(k_out + at, rows, keys, wide, height, K, k_here.to(tl.float32) * tl.exp2(since) * kept[:, None])
        tl.store(through + (pair * chunks + i) * K + keys, tl.exp2(tl.sum(log2, 0)) * kept_on, mask=keys < K)
    weights = chunk_weights(weights, None, None, starts, height, CHUNK)
    store_tile(scores + (pair * T + first) * CHUNK, rows, rows, CHUNK, height, CHUNK, weights)


@triton.jit
def value_gradients(
    dy, v, dt, D, document, scores, k_out, later, d_scores, dv, ddt, dD, dy_batch, dy_step: tl.constexpr,
    dy_head, v_batch, v_step: tl.constexpr, v_head, dt_batch, dt_step: tl.constexpr, dt_head, D_head,
    D_value: tl.constexpr, T, H: tl.constexpr, K: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of v, Δ and D, and that of the scores (times Δ), from what ``prepare`` writes.

    ∂(Δ_s v_s) = Σ_t scores_ts ∂y_t + Lᵀ k_s e^{G_c − G_s} with the adjoint L of the state after the chunk, and ∂scores
    = Δ_s ∂y_t · v_s for s ≤ t of one document.
    """
    pair, i, pairs, chunks = position(T, CHUNK)
    pair = pair.to(tl.int64)
    batch, head = pair // H, pair % H
    first, height, rows, keys = i.to(tl.int64) * CHUNK, T - i * CHUNK, tl.arange(0, CHUNK), tl.arange(0, KEYS)
    dy, v = (
        dy + batch * dy_batch + head * dy_head + first * dy_step,
        v + batch * v_batch + head * v_head + first * v_step,
    )
    starts = None if document is None else document + batch * T + first
    step = tl.full([CHUNK], 1.0, tl.float32)
    if dt is not None:
        step = steps_of(dt + batch * dt_batch + head * dt_head + first * dt_step, rows, dt_step, height)
    weights = tile(scores + (pair * T + first) * CHUNK, rows, rows, CHUNK, height, CHUNK)
    k_here = tile(k_out + ((batch * T + first) * H + head) * K, rows, keys, H * K, height, K)
    M, changed = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for value in range(0, P, VALUES):
        values = value + tl.arange(0, VALUES)
        dy_tile, v_tile = tile(dy, rows, values, dy_step, height, P), tile(v, rows, values, v_step, height, P)
        L = tile(later + (i * pairs + pair) * K * P, keys, values, P, K, P)
        M = product(dy_tile, tl.trans(v_tile), PRECISION, M)
        dv_tile = product(k_here, L, PRECISION)
        dv_tile = product(tl.trans(weights), dy_tile, PRECISION, dv_tile)
        changed += tl.sum(dv_tile * v_tile.to(tl.float32), 1)
        dv_tile *= step[:, None]
        if D is not None:
            skip = tl.load(D + head * D_head + values * D_value, mask=values < P, other=0.0).to(tl.float32)
            dv_tile += skip[None, :] * dy_tile.to(tl.float32)
            total = tl.sum(dy_tile.to(tl.float32) * v_tile.to(tl.float32), 0)
            tl.store(dD + ((batch * chunks + i) * H + head) * P + values, total, mask=values < P)
        store_tile(dv + ((batch * T + first) * H + head) * P, rows, values, H * P, height, P, dv_tile)
    M = chunk_weights(M, None, None, starts, height, CHUNK) * step[None, :]
    store_tile(d_scores + (pair * T + first) * CHUNK, rows, rows, CHUNK, height, CHUNK, M)
    if ddt is not None:
        tl.store(ddt + (batch * T + first + rows) * H + head, changed.to(ddt.dtype.element_ty), mask=rows < height)


@triton.jit
def through_states(
    dy, v, states, later, step, rows, keys, dy_step: tl.constexpr, v_step: tl.constexpr, height, K: tl.constexpr,
    P: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return S ∂y_t and Δ_s L v_s, ``[c k]``, and the sums of S ∘ L over values, ``[k]``."""
    from_S, from_L = tl.zeros([CHUNK, KEYS], tl.float32), tl.zeros([CHUNK, KEYS], tl.float32)
    carried = tl.zeros([KEYS], tl.float32)
    for value in range(0, P, VALUES):
        values = value + tl.arange(0, VALUES)
        S, L = tile(states, keys, values, P, K, P), tile(later, keys, values, P, K, P)
        dy_tile, v_tile = tile(dy, rows, values, dy_step, height, P), tile(v, rows, values, v_step, height, P)
        from_S = product(dy_tile, tl.trans(S), PRECISION, from_S)
        from_L = product(v_tile, tl.trans(L), PRECISION, from_L)
        carried += tl.sum(S.to(tl.float32) * L.to(tl.float32), 1)
    return from_S, from_L * step[:, None], carried


@triton.jit
def through_near_scores(
    q, k, g, d_scores, rows, keys, q_step: tl.constexpr, k_step: tl.constexpr, g_step: tl.constexpr, height,
    K: tl.constexpr, CHUNK: tl.constexpr, SUB: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Return what q and k change through the scores within sub-blocks, and the log decays from the beginning of each
    step's sub-block to it and from it to the end."""
    local = rows % SUB
    to, since = tl.zeros([CHUNK, KEYS], tl.float32), tl.zeros([CHUNK, KEYS], tl.float32)
    dq, dk = tl.zeros([CHUNK, KEYS], tl.float32), tl.zeros([CHUNK, KEYS], tl.float32)
    at = d_scores + rows * (CHUNK + 1)
    for j in range(SUB):
        earlier, after = tl.where(local >= j, rows - j, NOWHERE), tl.where(local + j < SUB, rows + j, NOWHERE)
        M = tl.load(at - j, mask=(local >= j) & (rows < height), other=0.0).to(tl.float32)
        dq += M[:, None] * tl.exp2(to) * tile(k, earlier, keys, k_step, height, K).to(tl.float32)
        M = tl.load(at + j * CHUNK, mask=after < height, other=0.0).to(tl.float32)
        dk += M[:, None] * tl.exp2(since) * tile(q, after, keys, q_step, height, K).to(tl.float32)
        to += log2_decays(g, earlier, keys, g_step, height, K)
        since += log2_decays(g, tl.where(local + j + 1 < SUB, rows + j + 1, NOWHERE), keys, g_step, height, K)
    return dq, dk, to, since


@triton.jit
def key_gradients(
    dy, q, k, v, g, dt, document, d_scores, states, later, dq, dk, dg, dy_batch, dy_step: tl.constexpr,
    dy_head, q_batch, q_step: tl.constexpr, q_group, k_batch, k_step: tl.constexpr, k_group, v_batch,
    v_step: tl.constexpr, v_head, g_batch, g_step: tl.constexpr, g_head, dt_batch, dt_step: tl.constexpr,
    dt_head, T, H: tl.constexpr, SHARED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    SUB: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of q, k and the log decays for some key channels of a chunk, each ``[b t h k]``.

    With N = ∂scores, ∂q_t = Σ_s N_ts e^{G_t − G_s} k_s + e^{G_t} S ∂y_t and ∂k_s = Σ_t N_ts e^{G_t − G_s} q_t + e^{G_c
    − G_s} Δ_s L v_s; ∂G = q ∘ ∂q − k ∘ ∂k, and at the chunk's end what is sensitive to L.
    """
    line, i, lines, _ = position(T, CHUNK)
    blocks = tl.cdiv(K, KEYS)
    pair, pairs = (line // blocks).to(tl.int64), lines // blocks
    batch, head = pair // H, pair % H
    keys = (line % blocks) * KEYS + tl.arange(0, KEYS)
    first, height, rows, group = i.to(tl.int64) * CHUNK, T - i * CHUNK, tl.arange(0, CHUNK), head // SHARED
    block, at = (rows // SUB)[:, None], (i * pairs + pair) * K * P
    q, k = (
        q + batch * q_batch + group * q_group + first * q_step,
        k + batch * k_batch + group * k_group + first * k_step,
    )
    g, d_scores = g + batch * g_batch + head * g_head + first * g_step, d_scores + (pair * T + first) * CHUNK
    dy, v = (
        dy + batch * dy_batch + head * dy_head + first * dy_step,
        v + batch * v_batch + head * v_head + first * v_step,
    )
    step = tl.full([CHUNK], 1.0, tl.float32)
    if dt is not None:
        step = steps_of(dt + batch * dt_batch + head * dt_head + first * dt_step, rows, dt_step, height)
    starts = None if document is None else document + batch * T + first
    alive, kept, kept_on = chunk_factors(None, None, starts, i, height, CHUNK)
    dq_here, dk_here, to, since = through_near_scores(
        q, k, g, d_scores, rows, keys, q_step, k_step, g_step, height, K, CHUNK, SUB, KEYS
    )
    M = tile(d_scores, rows, rows, CHUNK, height, CHUNK)
    q_here, k_here = tile(q, rows, keys, q_step, height, K), tile(k, rows, keys, k_step, height, K)
    log2 = log2_decays(g, rows, keys, g_step, height, K)
    into = to
    for n in range(1, CHUNK // SUB):
        added = block_sum(log2, block, n - 1)
        since, into = tl.where(block < n - 1, since + added, since), tl.where(block >= n, into + added, into)
        since_n, to_n = tl.where(block < n, tl.exp2(since), 0.0), tl.where(block == n, tl.exp2(to), 0.0)
        dq_here += to_n * product(M, operand(k_here.to(tl.float32) * since_n, k_here), PRECISION)
        dk_here += since_n * product(tl.trans(M), operand(q_here.to(tl.float32) * to_n, q_here), PRECISION)
    since = tl.where(block < CHUNK // SUB - 1, since + block_sum(log2, block, CHUNK // SUB - 1), since)
    from_S, from_L, carried = through_states(
        dy, v, states + at, later + at, step, rows, keys, dy_step, v_step, height, K, P, CHUNK, KEYS, VALUES, PRECISION
    )
    dq_here += decayed(from_S, tl.exp2(into) * alive[:, None])
    from_L = decayed(from_L, tl.exp2(since) * kept[:, None])
    dk_here += from_L
    q_here, k_here = q_here.to(tl.float32), k_here.to(tl.float32)
    end = tl.sum(k_here * from_L, 0) + decayed(carried, tl.exp2(tl.sum(log2, 0)) * kept_on)
    change = tl.cumsum(q_here * dq_here - k_here * dk_here, 0, reverse=True) + end[None, :]
    if document is not None:
        change = tl.where(first_steps(starts, first, rows, height)[:, None], 0.0, change)
    at, wide = ((batch * T + first) * H + head) * K, H * K
    store_tile(dq + at, rows, keys, wide, height, K, dq_here)
    store_tile(dk + at, rows, keys, wide, height, K, dk_here)
    store_tile(dg + at, rows, keys, wide, height, K, change)
