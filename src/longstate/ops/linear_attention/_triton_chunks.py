# mypy: disable-error-code="no-untyped-def"
"""What kernels over chunks share: decays between the steps of a chunk, and tiles of its arguments.

Log decays are to the base 2 here. Exponents are never positive, and none is the difference of two long sums: such a
difference would lose the small decays that stand after large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):
    """Return a matrix product, summed in float32.

    Two of one narrow type are multiplied as they are. Others are first written as float32, and multiplied as exactly as
    ``PRECISION`` says: "tf32" holds every float16.
    """
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        return tl.dot(a, b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def operand(x, like):
    """Return x as what multiplies a tile: in bfloat16 if that is, whose range is that of float32, else in float32."""
    return x.to(tl.bfloat16) if like.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def tile(x, rows, columns, step, height, width):
    """Load rows of numbers that lie side by side; 0 beyond the ``height`` and the ``width``."""
    there = ((rows >= 0) & (rows < height))[:, None] & (columns < width)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * step + columns[None, :], mask=there, other=0.0)


@triton.jit
def log2_decay(g, rows, step, height):
    """Load log decays of one head; 0 (no decay) beyond the end, and nothing below the least normal number."""
    found = tl.load(g + rows.to(tl.int64) * step, mask=(rows >= 0) & (rows < height), other=0.0).to(tl.float32)
    return tl.maximum(found * 1.4426950408889634, -126.0)


@triton.jit
def log2_decays(g, rows, columns, step, height, width):
    """Load log decays of some channels of one head, likewise."""
    return tl.maximum(tile(g, rows, columns, step, height, width).to(tl.float32) * 1.4426950408889634, -126.0)


@triton.jit
def running_sums(log2):
    """Return the running sums of log decays ``[c]`` in two parts, whose differences are exact to 2⁻²⁴.

    The first is of multiples of 2⁻⁸ and has no roundings: |G| ≤ 126 · 256. The second rises, to 1 at most.
    """
    coarse = tl.floor(log2 * 256.0) * (1.0 / 256.0)
    return tl.cumsum(coarse, 0), tl.cumsum(log2 - coarse, 0)


@triton.jit
def chunk_factors(g, document, rows, first, step, height, CHUNK: tl.constexpr):
    """Return what a chunk of one head needs of its decays, and of the documents that its steps are of.

    Args:
        g: The log decays of the head, if any.
        document: The number of starts up to each step, if there are any.
        rows: The steps of the chunk.
        first: The first of them.
        step: The distance of two log decays.
        height: The number of steps.

    Returns:
        The running sums of the decays in two parts, the documents, what is left of the state before the chunk at each
        step, of each step at the chunk's end, and of the state before it there.
    """
    high, low = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    into, out, through = high + 1.0, high + 1.0, tl.sum(high, 0) + 1.0
    documents = tl.zeros([CHUNK], tl.int32)
    if g is not None:
        high, low = running_sums(log2_decay(g, rows, step, height))
        high_end, low_end = tl.min(high, 0), tl.max(low, 0)
        into, through = tl.exp2(high + low), tl.exp2(high_end + low_end)
        out = tl.exp2(tl.minimum((high_end - high) + (low_end - low), 0.0))
    if document is not None:
        documents = tl.load(document + rows, mask=rows < height, other=0)
        before = tl.load(document + first - 1, mask=first > 0, other=0)
        last = tl.load(document + tl.minimum(first + CHUNK, height) - 1)
        into = tl.where(documents == before, into, 0.0)
        out = tl.where(documents == last, out, 0.0)
        through = tl.where(before == last, through, 0.0)
    return high, low, documents, into, out, through


@triton.jit
def chunk_weights(weights, g, document, high, low, documents, CHUNK: tl.constexpr):
    """Return ``[t s]`` times e^{G_t − G_s}, for s ≤ t of one document and 0 elsewhere."""
    steps = tl.arange(0, CHUNK)
    pairs = steps[:, None] >= steps[None, :]
    if document is not None:
        pairs = pairs & (documents[:, None] == documents[None, :])
    if g is not None:
        between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        weights = weights * tl.exp2(tl.minimum(between, 0.0))
    return tl.where(pairs, weights, 0.0)


@triton.jit
def decayed(x, factor):
    """Return x times a factor, 0 where that is 0: a start forgets what is no number."""
    return tl.where(factor > 0.0, x * factor, 0.0)


@triton.jit
def steps_of(x, rows, step, height):
    """Load one number of each step, in float32; 0 beyond the end."""
    return tl.load(x + rows.to(tl.int64) * step, mask=rows < height, other=0.0).to(tl.float32)


@triton.jit
def block_sum(log2, block, i):
    """Return the sums of log decays ``[c k]`` over the sub-block ``i``, ``[1 k]``; ``block`` numbers those of steps."""
    return tl.sum(tl.where(block == i, log2, 0.0), 0)[None, :]
