# mypy: disable-error-code="no-untyped-def"
"""What the kernels of the delta rule share: tiles of memory, decays of a chunk, products of steps, inverses.

Running sums of log decays are taken to base 2. Between two steps the exponent is never positive. Where each key channel
has its own decay, a chunk is halved again and again: a step t of the second half of a block meets a step s of its first
half through the block's middle m,

    Σ_k q_tk e^{G_tk − G_sk} k_sk = Σ_k (q_tk e^{G_tk − G_mk}) (k_sk e^{G_mk − G_sk}),

one product of matrices for all blocks of a level, and one factor e^{−|G_r − G_m|} for each step r.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_parts import LOG2E


@triton.jit
def load(x, row, stride, rows, column, columns):
    """Return a tile of a matrix; zero outside it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row[:, None] * stride + column[None, :], mask=inside, other=0)


@triton.jit
def store(x, row, stride, rows, column, columns, value):
    """Store a tile of a matrix, rounded to its type."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(x + row[:, None] * stride + column[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a b of matrices, or stacks of them; "wide": of numbers that are multiplied in float32."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def sequences(start, row, rows):
    """Return how many sequences began in the chunk up to each step."""
    return tl.cumsum(tl.load(start + row, mask=row < rows, other=0).to(tl.int32), 0)


@triton.jit
def same_sequence(start, row, rows, C: tl.constexpr):
    """Return which steps s ≤ t are of the sequence of t, ``[t s]``, which of the first sequence and the last."""
    same = row[:, None] >= row[None, :]
    first, last = row >= 0, row >= 0
    if start is not None:
        segment = sequences(start, row, rows)
        same &= segment[:, None] == segment[None, :]
        first, last = segment == 0, segment == tl.max(segment, 0)
    return same, first, last


@triton.jit
def of_head(g, stride, start, row, rows, C: tl.constexpr):
    """Return the decays of a head: of the state before at each step, of each step at the end, of the state before at
    the end, and between steps ``[t s]``.

    Sums are taken in float64: what is left of them between two steps may be small.
    """
    between = tl.full([C, C], 1.0, tl.float32)
    into, out = tl.full([C], 1.0, tl.float32), tl.full([C], 1.0, tl.float32)
    through = 1.0
    if g is not None:
        rate = tl.load(g + row * stride, mask=row < rows, other=0).to(tl.float64) * LOG2E
        G = tl.cumsum(rate, 0)
        end = tl.sum(rate, 0)
        between = tl.exp2(tl.minimum(G[:, None] - G[None, :], 0.0).to(tl.float32))
        into, out = tl.exp2(G.to(tl.float32)), tl.exp2(tl.minimum(end - G, 0.0).to(tl.float32))
        through = tl.exp2(end.to(tl.float32))
    same, first, last = same_sequence(start, row, rows, C)
    if start is not None:
        into, out = tl.where(first, into, 0.0), tl.where(last, out, 0.0)
        through = tl.where(tl.max((first & last).to(tl.int32), 0) == 1, through, 0.0)
    return into, out, through, tl.where(same, between, 0.0)


@triton.jit
def of_channels(G, start, row, rows, column, K: tl.constexpr, C: tl.constexpr):
    """Return the same three of each channel (``[c k]`` twice, ``[k]``), from the chunk's sums."""
    sums = load(G, row, K, C, column, K)
    end = tl.load(G + (C - 1) * K + column, mask=column < K, other=0)
    into, out, through = tl.exp2(sums), tl.exp2(tl.minimum(end[None, :] - sums, 0.0)), tl.exp2(end)
    if start is not None:
        segment = sequences(start, row, rows)
        last = tl.max(segment, 0)
        into = tl.where((segment == 0)[:, None], into, 0.0)
        out = tl.where((segment == last)[:, None], out, 0.0)
        through = tl.where(last == 0, through, 0.0)
    return into, out, through


@triton.jit
def blocks(x, C: tl.constexpr, SUB: tl.constexpr):
    """Return the blocks on the diagonal of ``[c c]`` as ``[c/s s s]``."""
    N: tl.constexpr = C // SUB
    i = tl.arange(0, N)
    on = (i[:, None] == i[None, :])[:, None, :, None]
    return tl.sum(tl.where(on, tl.reshape(x, (N, SUB, N, SUB)), 0.0), 2)


@triton.jit
def unblocks(x, C: tl.constexpr, SUB: tl.constexpr):
    """Return ``[c c]`` that has blocks ``[c/s s s]`` on its diagonal and zeros elsewhere."""
    N: tl.constexpr = C // SUB
    i = tl.arange(0, N)
    on = (i[:, None] == i[None, :])[:, None, :, None]
    return tl.reshape(tl.where(on, x[:, :, None, :], 0.0), (C, C))


@triton.jit
def pairs(i, j, L):
    """Return which (i, j) lie in the second and the first half of the same block of 2^{L+1}."""
    return ((i >> (L + 1)) == (j >> (L + 1))) & (((i >> L) & 1) == 1) & (((j >> L) & 1) == 0)


@triton.jit
def inverse(B, C: tl.constexpr, SUB: tl.constexpr, LEVELS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr):
    """Return (I + B)⁻¹ for a B ``[c c]`` that is zero on and above its diagonal.

    The inverse T of the blocks on the diagonal becomes that of blocks twice as large, T − T B' T, where B' is what
    stands beside them. All of it are entries of inverses, which do not grow, as powers of B may.
    """
    i = tl.arange(0, SUB)
    at, to = i[None, :, None], i[None, None, :]
    D = blocks(B, C, SUB)
    T = tl.where(at == to, 1.0, tl.where(pairs(at, to, 0), -D, 0.0))
    for L in range(1, INNER):
        beside = tl.where(pairs(at, to, L), D, 0.0)
        T -= tl.dot(T, tl.dot(beside, T, input_precision="ieee"), input_precision="ieee")
    i = tl.arange(0, C)
    whole = unblocks(T, C, SUB)
    for L in range(INNER, LEVELS):
        beside = tl.where(pairs(i[:, None], i[None, :], L), B, 0.0)
        whole -= tl.dot(whole, tl.dot(beside, whole, input_precision=PRECISION), input_precision=PRECISION)
    return whole


@triton.jit
def half(G, sums, row, column, K: tl.constexpr, C: tl.constexpr, L):
    """Return e^{−|G_r − G_m|} of each step and channel, m the middle of its block of 2^{L+1}, and the second halves."""
    middle = ((row >> (L + 1)) << (L + 1)) + (1 << L) - 1
    return tl.exp2(-tl.abs(sums - load(G, middle, K, C, column, K))), ((row >> L) & 1)[:, None] == 1


@triton.jit
def halves(q, k, G, sums, row, column, KIND: tl.constexpr, K: tl.constexpr, C: tl.constexpr, L):
    """Return the keys of first halves, and keys and queries of second halves, with the factors of their middle."""
    factor, second = half(G, sums, row, column, K, C, L)
    k *= factor
    source, reader = tl.where(second, 0.0, k).to(KIND), tl.where(second, k, 0.0).to(KIND)
    return source, reader, tl.where(second, q * factor, 0.0).to(KIND)


@triton.jit
def between_by_channel(
    q, q_t, k, k_t, G, rows,
    KIND: tl.constexpr, K: tl.constexpr, C: tl.constexpr, SUB: tl.constexpr, LEVELS: tl.constexpr,
    INNER: tl.constexpr, KB: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what each step's query and key read of the keys up to it, ``[t s]`` twice; the key not of itself."""
    N: tl.constexpr = C // SUB
    row, i = tl.arange(0, C), tl.arange(0, SUB)
    at, to = i[None, :, None], i[None, None, :]
    of_q, of_k = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    near_q, near_k = tl.zeros([N, SUB, SUB], tl.float32), tl.zeros([N, SUB, SUB], tl.float32)
    own = row[:, None] == row[None, :]
    for first in range(0, K, KB):
        column = first + tl.arange(0, KB)
        query, key = (
            load(q, row, q_t, rows, column, K).to(tl.float32),
            load(k, row, k_t, rows, column, K).to(tl.float32),
        )
        sums = load(G, row, K, C, column, K)
        of_q += tl.where(own, tl.sum(query * key, 1)[:, None], 0.0)
        for L in range(INNER):
            source, reader, asker = halves(query, key, G, sums, row, column, KIND, K, C, L)
            source = tl.permute(tl.reshape(source, (N, SUB, KB)), (0, 2, 1))
            met = pairs(at, to, L)
            near_k += tl.where(met, product(tl.reshape(reader, (N, SUB, KB)), source, PRECISION), 0.0)
            near_q += tl.where(met, product(tl.reshape(asker, (N, SUB, KB)), source, PRECISION), 0.0)
        for L in range(INNER, LEVELS):
            source, reader, asker = halves(query, key, G, sums, row, column, KIND, K, C, L)
            met = pairs(row[:, None], row[None, :], L)
            of_k += tl.where(met, product(reader, tl.trans(source), PRECISION), 0.0)
            of_q += tl.where(met, product(asker, tl.trans(source), PRECISION), 0.0)
    return of_q + unblocks(near_q, C, SUB), of_k + unblocks(near_k, C, SUB)
