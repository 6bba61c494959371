# mypy: disable-error-code="no-untyped-def"
"""Kernels for each chunk of each head by itself: before the walk from chunk to chunk, and outputs after it."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_parts import LOG2E
from ._triton_parts import between_by_channel, inverse, load, of_channels, of_head, product, same_sequence, store


@triton.jit
def place(heads, chunks):
    """Return batch, chunk and head of this program, heads side by side, and where its chunk is among all of them."""
    program = tl.program_id(0)
    head, n, batch = program % heads, program // heads % chunks, (program // heads // chunks).to(tl.int64)
    return batch, n.to(tl.int64), head.to(tl.int64), (batch * heads + head) * chunks + n


@triton.jit
def sums(g, G, g_b, g_t, g_h, length, heads, chunks, K: tl.constexpr, C: tl.constexpr, KB: tl.constexpr):
    """Store the running sums of the log decays of a chunk's channels, to base 2, ``[b h n c k]``."""
    batch, n, head, at = place(heads, chunks)
    row, column = tl.arange(0, C), tl.program_id(1) * KB + tl.arange(0, KB)
    rate = load(g + batch * g_b + n * C * g_t + head * g_h, row, g_t, length - n * C, column, K)
    store(G + at * C * K, row, K, C, column, K, tl.cumsum(rate.to(tl.float32) * LOG2E, 0))


@triton.jit
def prepare(
    q, k, v, beta, g, start, grad, erase, written, scores, solved, source, into, out, through, q_into, k_out,
    q_b, q_t, q_g, k_b, k_t, k_g, v_b, v_t, v_h, beta_b, beta_t, beta_h, g_b, g_t, g_h, grad_b, grad_t, grad_h,
    length, chunks, heads, repeats,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, LEVELS: tl.constexpr,
    INNER: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):  # fmt: skip
    """Store what the walk needs of a chunk, with T = (I + B)⁻¹.

    That is ``erase`` −T diag(β) K_into, ``written`` T diag(β) V, ``scores`` of queries and keys; for the backward pass
    T itself (``solved``) and ``source`` scoresᵀ ∂y; decays of the head (``into``, ``out``, ``through``), or of its
    channels, which queries and keys are multiplied with here (``q_into``, ``k_out``); the former are then 1 or 0.
    """
    batch, n, head, at = place(heads, chunks)
    row, rows = tl.arange(0, C), length - n * C
    KIND: tl.constexpr = erase.dtype.element_ty
    q += batch * q_b + n * C * q_t + (head // repeats) * q_g
    k += batch * k_b + n * C * k_t + (head // repeats) * k_g
    v += batch * v_b + n * C * v_t + head * v_h
    beta += batch * beta_b + n * C * beta_t + head * beta_h
    strength = tl.load(beta + row * beta_t, mask=row < rows, other=0).to(tl.float32)
    if start is not None:
        start += batch * length + n * C
    if CHANNELS:
        G = g + at * C * K
        of_q, of_k = between_by_channel(q, q_t, k, k_t, G, rows, KIND, K, C, SUB, LEVELS, INNER, KB, PRECISION)
        same, opening, closing = same_sequence(start, row, rows, C)
        of_q, of_k = tl.where(same, of_q, 0.0), tl.where(same, of_k, 0.0)
        left = strength
        if into is not None:
            tl.store(into + at * C + row, opening.to(tl.float32))
            tl.store(out + at * C + row, closing.to(tl.float32))
    else:
        if g is not None:
            g += batch * g_b + n * C * g_t + head * g_h
        left, kept, passed, between = of_head(g, g_t, start, row, rows, C)
        of_q, of_k = products(q, q_t, k, k_t, rows, KIND, K, C, KB, PRECISION)
        of_q, of_k = of_q * between, tl.where(row[:, None] > row[None, :], of_k * between, 0.0)
        if into is not None:
            tl.store(into + at * C + row, left)
            tl.store(out + at * C + row, kept)
            tl.store(through + at, passed)
        left *= strength
    store(scores + at * C * C, row, C, C, row, C, of_q)
    T = inverse(strength[:, None] * of_k, C, SUB, LEVELS, INNER, SOLVE)
    if solved is not None:
        store(solved + at * C * C, row, C, C, row, C, T)
    erasing, writing = (-T * left[None, :]).to(KIND), (T * strength[None, :]).to(KIND)
    for first in range(0, K, KB):
        column = first + tl.arange(0, KB)
        key = load(k, row, k_t, rows, column, K)
        if CHANNELS:
            enter, leave, pass_by = of_channels(G, start, row, rows, column, K, C)
            query = load(q, row, q_t, rows, column, K).to(tl.float32)
            store(q_into + at * C * K, row, K, C, column, K, query * enter)
            store(k_out + at * C * K, row, K, C, column, K, key.to(tl.float32) * leave)
            tl.store(through + at * K + column, pass_by, mask=column < K)
            key = key.to(tl.float32) * enter
        store(erase + at * C * K, row, K, C, column, K, product(erasing, key.to(KIND), PRECISION))
    for first in range(0, P, PB):
        column = first + tl.arange(0, PB)
        value = load(v, row, v_t, rows, column, P).to(KIND)
        store(written + at * C * P, row, P, C, column, P, product(writing, value, PRECISION))
        if source is not None:
            here = load(grad + batch * grad_b + n * C * grad_t + head * grad_h, row, grad_t, rows, column, P).to(KIND)
            store(source + at * C * P, row, P, C, column, P, product(tl.trans(of_q.to(KIND)), here, PRECISION))


@triton.jit
def products(
    q, q_t, k, k_t, rows,
    KIND: tl.constexpr, K: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the products of each query and each key with all keys, ``[t s]`` twice."""
    row = tl.arange(0, C)
    of_q, of_k = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for first in range(0, K, KB):
        column = first + tl.arange(0, KB)
        query, key = load(q, row, q_t, rows, column, K).to(KIND), load(k, row, k_t, rows, column, K).to(KIND)
        of_q += product(query, tl.trans(key), PRECISION)
        of_k += product(key, tl.trans(key), PRECISION)
    return of_q, of_k


@triton.jit
def outputs(
    q, y, written, scores, into, start, states, q_b, q_t, q_g, length, chunks, heads, repeats,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store y = scores U + Q_into S of a chunk; where channels have decays, ``q`` has them already."""
    batch, n, head, at = place(heads, chunks)
    row, rows = tl.arange(0, C), length - n * C
    KIND: tl.constexpr = written.dtype.element_ty
    column = tl.program_id(1) * PB + tl.arange(0, PB)
    q += batch * q_b + n * C * q_t + (head // repeats) * q_g
    read = tl.zeros([C, PB], tl.float32)
    for first in range(0, K, KB):
        channel = first + tl.arange(0, KB)
        query = load(q, row, q_t, rows, channel, K).to(KIND)
        read += product(query, load(states + at * K * P, channel, P, K, column, P), PRECISION)
    if into is not None:
        left = tl.load(into + at * C + row)[:, None]
        read = tl.where(left == 0, 0.0, left * read)
    square, put = load(scores + at * C * C, row, C, C, row, C), load(written + at * C * P, row, P, C, column, P)
    if start is not None:
        # What the first sequence wrote may be no number, if its state was: a product would bring it to all steps.
        _same, opening, _last = same_sequence(start + batch * length + n * C, row, rows, C)
        opened = opening[:, None]
        read += tl.where(opened, product(square, tl.where(opened, put, 0.0).to(KIND), PRECISION), 0.0)
        put = tl.where(opened, 0.0, put).to(KIND)
    read += product(square, put, PRECISION)
    store(y + (batch * length + n * C) * heads * P + head * P, row, heads * P, rows, column, P, read)
