# mypy: disable-error-code="no-untyped-def"
"""Kernels of the backward pass for each chunk by itself, when the states before it and their gradients are known.

With R the gradient of the state after the chunk, X that of what it writes and Z = Tᵀ X,

    ∂V = diag(β) Z,    ∂scores = ∂y Uᵀ,    ∂(K K) = −diag(β) Z Uᵀ below the diagonal,

and each of these squares, and of the products of steps with states, gives its part to queries, keys and decays.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_chunks import place
from ._triton_parts import half, halves, load, of_channels, of_head, pairs, product, same_sequence, store


@triton.jit
def squares(
    v, g, beta, start, grad, written, source, solved, grad_v, of_scores, of_keys, of_beta, v_b, v_t, v_h, g_b,
    g_t, g_h, beta_b, beta_t, beta_h, grad_b, grad_t, grad_h, length, chunks, heads,
    P: tl.constexpr, C: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store ∂v, Z in the place of X (``source``), ∂y Uᵀ and Z Uᵀ with the decays of a head (``of_scores``,
    ``of_keys``), and Σ_p Z V (``of_beta``, ``[b n c h]``)."""
    batch, n, head, at = place(heads, chunks)
    row, rows = tl.arange(0, C), length - n * C
    KIND: tl.constexpr = source.dtype.element_ty
    v += batch * v_b + n * C * v_t + head * v_h
    grad += batch * grad_b + n * C * grad_t + head * grad_h
    grad_v += ((batch * length + n * C) * heads + head) * P
    strength = tl.load(beta + batch * beta_b + (n * C + row) * beta_t + head * beta_h, mask=row < rows, other=0)
    T = tl.trans(load(solved + at * C * C, row, C, C, row, C))
    of_q, of_k = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    sides = tl.zeros([C], tl.float32)
    for first in range(0, P, PB):
        column = first + tl.arange(0, PB)
        side = product(T, load(source + at * C * P, row, P, C, column, P), PRECISION)
        value = load(v, row, v_t, rows, column, P).to(tl.float32)
        sides += tl.sum(side * value, 1)
        store(grad_v, row, heads * P, rows, column, P, strength.to(tl.float32)[:, None] * side)
        side = side.to(KIND)
        store(source + at * C * P, row, P, C, column, P, side)
        put = tl.trans(load(written + at * C * P, row, P, C, column, P))
        of_q += product(load(grad, row, grad_t, rows, column, P).to(KIND), put, PRECISION)
        of_k += product(side, put, PRECISION)
    if start is not None:
        start += batch * length + n * C
    if CHANNELS:
        same, _first, _last = same_sequence(start, row, rows, C)
        between = same.to(tl.float32)
    else:
        if g is not None:
            g += batch * g_b + n * C * g_t + head * g_h
        _into, _out, _through, between = of_head(g, g_t, start, row, rows, C)
    below = tl.where(row[:, None] > row[None, :], between, 0.0)
    store(of_scores + at * C * C, row, C, C, row, C, of_q * between)
    store(of_keys + at * C * C, row, C, C, row, C, of_k * below)
    tl.store(of_beta + ((batch * chunks + n) * C + row) * heads + head, sides)


@triton.jit
def of_states(
    grad, grad_t, side, written, states, laters, rows, column,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return ∂y Sᵀ, Z Sᵀ and U Rᵀ, ``[c k]``, and what S and R are together in each channel."""
    row = tl.arange(0, C)
    KIND: tl.constexpr = side.dtype.element_ty
    read, erased, wrote = (
        tl.zeros([C, KB], tl.float32),
        tl.zeros([C, KB], tl.float32),
        tl.zeros([C, KB], tl.float32),
    )
    together = tl.zeros([KB], tl.float32)
    for first in range(0, P, PB):
        value = first + tl.arange(0, PB)
        state, later = load(states, column, P, K, value, P), load(laters, column, P, K, value, P)
        read += product(load(grad, row, grad_t, rows, value, P).to(KIND), tl.trans(state), PRECISION)
        erased += product(load(side, row, P, C, value, P), tl.trans(state), PRECISION)
        wrote += product(load(written, row, P, C, value, P), tl.trans(later), PRECISION)
        together += tl.sum(state.to(tl.float32) * later.to(tl.float32), 1)
    return read, erased, wrote, together


@triton.jit
def of_squares_by_channel(
    q, k, of_scores, of_keys, strength, G, column,
    K: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, LEVELS: tl.constexpr, INNER: tl.constexpr,
    KB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what the squares give to queries, to keys as readers (but for −β) and to keys as sources.

    Every pair of steps meets in the middle of one block: see ``_triton_parts.between_by_channel``. The squares are read
    again at each level, for only the pairs that meet there: there are no registers for all of them.
    """
    N: tl.constexpr = C // SUB
    row, i, block = tl.arange(0, C), tl.arange(0, SUB), tl.arange(0, N)[:, None, None]
    KIND: tl.constexpr = of_scores.dtype.element_ty
    own = tl.load(of_scores + row * (C + 1)).to(tl.float32)[:, None]
    asked, read, gave = own * k, tl.zeros([C, KB], tl.float32), own * q
    sums = load(G, row, K, C, column, K)
    at, to = i[None, :, None], i[None, None, :]
    there, strengths = block * SUB * (C + 1) + at * C + to, tl.reshape(strength, (N, SUB))[:, :, None]
    for L in range(INNER):
        source, reader, asker = halves(q, k, G, sums, row, column, KIND, K, C, L)
        met, source = pairs(at, to, L), tl.reshape(source, (N, SUB, KB))
        a, b = tl.load(of_scores + there, mask=met, other=0), tl.load(of_keys + there, mask=met, other=0)
        c = tl.permute((b * strengths).to(KIND), (0, 2, 1))
        back = product(tl.permute(a, (0, 2, 1)), tl.reshape(asker, (N, SUB, KB)), PRECISION)
        back -= product(c, tl.reshape(reader, (N, SUB, KB)), PRECISION)
        factor, second = half(G, sums, row, column, K, C, L)
        asked += tl.where(second, factor * tl.reshape(product(a, source, PRECISION), (C, KB)), 0.0)
        read += tl.where(second, factor * tl.reshape(product(b, source, PRECISION), (C, KB)), 0.0)
        gave += tl.where(second, 0.0, factor * tl.reshape(back, (C, KB)))
    at, to = row[:, None], row[None, :]
    for L in range(INNER, LEVELS):
        source, reader, asker = halves(q, k, G, sums, row, column, KIND, K, C, L)
        met = pairs(at, to, L)
        a = tl.load(of_scores + at * C + to, mask=met, other=0)
        b = tl.load(of_keys + at * C + to, mask=met, other=0)
        c = tl.trans((b * strength[:, None]).to(KIND))
        back = product(tl.trans(a), asker, PRECISION) - product(c, reader, PRECISION)
        factor, second = half(G, sums, row, column, K, C, L)
        asked += tl.where(second, factor * product(a, source, PRECISION), 0.0)
        read += tl.where(second, factor * product(b, source, PRECISION), 0.0)
        gave += tl.where(second, 0.0, factor * back)
    return asked, read, gave


@triton.jit
def rows_of(
    q, k, g, beta, start, grad, side, written, states, laters, of_scores, of_keys, of_beta, grad_q, grad_k,
    grad_g, grad_beta, q_b, q_t, q_g, k_b, k_t, k_g, g_b, g_t, g_h, beta_b, beta_t, beta_h, grad_b, grad_t,
    grad_h, length, batches, chunks, groups, repeats,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, LEVELS: tl.constexpr,
    INNER: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store ∂q and ∂k of some columns, summed over the heads of a group; the columns' parts of ∂β, and of the log
    decays of heads (``[columns b t h]``), or the gradients of those of channels."""
    batch, n, group, _place = place(groups, chunks)
    row, rows = tl.arange(0, C), length - n * C
    KIND: tl.constexpr = side.dtype.element_ty
    part, heads = tl.program_id(1), groups * repeats
    column = part * KB + tl.arange(0, KB)
    query = load(q + batch * q_b + n * C * q_t + group * q_g, row, q_t, rows, column, K)
    key = load(k + batch * k_b + n * C * k_t + group * k_g, row, k_t, rows, column, K)
    if start is not None:
        start += batch * length + n * C
    d_query, d_key = tl.zeros([C, KB], tl.float32), tl.zeros([C, KB], tl.float32)
    for r in range(repeats):
        head = group * repeats + r
        at = (batch * heads + head) * chunks + n
        strength = tl.load(beta + batch * beta_b + (n * C + row) * beta_t + head * beta_h, mask=row < rows, other=0)
        strength = strength.to(tl.float32)
        if CHANNELS:
            G = g + at * C * K
            asked, reader, source = of_squares_by_channel(
                query.to(tl.float32), key.to(tl.float32), of_scores + at * C * C, of_keys + at * C * C, strength, G,
                column, K, C, SUB, LEVELS, INNER, KB, PRECISION,
            )  # fmt: skip
        else:
            of_q, of_k = load(of_scores + at * C * C, row, C, C, row, C), load(of_keys + at * C * C, row, C, C, row, C)
            of_b = (of_k * strength[:, None]).to(KIND)
            asked, reader = product(of_q, key.to(KIND), PRECISION), product(of_k, key.to(KIND), PRECISION)
            source = product(tl.trans(of_q), query.to(KIND), PRECISION)
            source -= product(tl.trans(of_b), key.to(KIND), PRECISION)
        here = grad + batch * grad_b + n * C * grad_t + head * grad_h
        read, erased, wrote, together = of_states(
            here, grad_t, side + at * C * P, written + at * C * P, states + at * K * P, laters + at * K * P,
            rows, column, K, P, C, KB, PB, PRECISION,
        )  # fmt: skip
        if CHANNELS:
            into, out, through = of_channels(G, start, row, rows, column, K, C)
        else:
            rate = g
            if g is not None:
                rate = g + batch * g_b + n * C * g_t + head * g_h
            into, out, through, _between = of_head(rate, g_t, start, row, rows, C)
            into, out = into[:, None], out[:, None]
        asked += tl.where(into == 0, 0.0, into * read)
        reader += tl.where(into == 0, 0.0, into * erased)
        wrote *= out
        source += wrote
        of_key = key.to(tl.float32) * reader
        offset = (batch * length + n * C + row) * heads + head
        more = -tl.sum(of_key, 1)
        if part == 0:
            more += tl.load(of_beta + ((batch * chunks + n) * C + row) * heads + head)
        tl.store(grad_beta + tl.cast(part, tl.int64) * batches * length * heads + offset, more, mask=row < rows)
        if grad_g is not None:
            change = query.to(tl.float32) * asked - strength[:, None] * of_key - key.to(tl.float32) * source
            end = tl.sum(key.to(tl.float32) * wrote, 0) + tl.where(through == 0, 0.0, through * together)
            if CHANNELS:
                change += tl.where((row == C - 1)[:, None], end[None, :], 0.0)
                decay = tl.cumsum(change, 0, reverse=True)
                store(grad_g + ((batch * length + n * C) * heads + head) * K, row, heads * K, rows, column, K, decay)
            else:
                decay = tl.sum(change, 1) + tl.where(row == C - 1, tl.sum(end, 0), 0.0)
                decay = tl.cumsum(decay, 0, reverse=True)
                tl.store(grad_g + tl.cast(part, tl.int64) * batches * length * heads + offset, decay, mask=row < rows)
        d_query += asked
        d_key += source - strength[:, None] * reader
    at = ((batch * length + n * C) * groups + group) * K
    store(grad_q + at, row, groups * K, rows, column, K, d_query)
    store(grad_k + at, row, groups * K, rows, column, K, d_key)
