"""What kernels over chunks share: decays between the steps of a chunk, and tiles of its arguments.

Log decays are to the base 2 here. Exponents are never positive, and none is the difference of two long sums: such a
difference would lose the small decays that stand after large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return a matrix product, summed in float32.

    Two of one narrow type are multiplied as they are. Others are first written as float32, and multiplied as exactly as
    ``PRECISION`` says: "tf32" holds every float16.
    """
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        return tl.dot(a, b)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def tile(x, rows, columns, step, height, width):  # type: ignore[no-untyped-def]
    """Load rows of numbers that lie side by side; 0 beyond the ``height`` and the ``width``."""
    there = ((rows >= 0) & (rows < height))[:, None] & (columns < width)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * step + columns[None, :], mask=there, other=0.0)


@triton.jit
def log2_decay(g, rows, step, height):  # type: ignore[no-untyped-def]
    """Load log decays of one head; 0 (no decay) beyond the end, and nothing below the least normal number."""
    found = tl.load(g + rows.to(tl.int64) * step, mask=(rows >= 0) & (rows < height), other=0.0).to(tl.float32)
    return tl.maximum(found * 1.4426950408889634, -126.0)


@triton.jit
def log2_decays(g, rows, columns, step, height, width):  # type: ignore[no-untyped-def]
    """Load log decays of some channels of one head, likewise."""
    return tl.maximum(tile(g, rows, columns, step, height, width).to(tl.float32) * 1.4426950408889634, -126.0)


@triton.jit
def running_sums(log2):  # type: ignore[no-untyped-def]
    """Return the running sums of log decays ``[c]`` in two parts, whose differences are exact to 2⁻²⁴.

    The first is of multiples of 2⁻⁸ and has no roundings: |G| ≤ 126 · 256. The second is at most 1.
    """
    coarse = tl.floor(log2 * 256.0) * (1.0 / 256.0)
    return tl.cumsum(coarse, 0), tl.cumsum(log2 - coarse, 0)


@triton.jit
def decay_between(high, low, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return e^{G_t − G_s}, ``[t s]``; 1 for later s, which do not count."""
    return tl.exp2(tl.minimum((high[:, None] - high[None, :]) + (low[:, None] - low[None, :]), 0.0))


@triton.jit
def related(documents, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the pairs (t, s) with s ≤ t and of one document, if there are several."""
    steps = tl.arange(0, STEPS)
    pairs = steps[:, None] >= steps[None, :]
    if documents is not None:
        pairs = pairs & (documents[:, None] == documents[None, :])
    return pairs


@triton.jit
def documents_of(document, rows, first, height):  # type: ignore[no-untyped-def]
    """Return which document each step is of, the last before them (0 where there is none), and the last of them.

    Args:
        document: The number of starts up to each step.
        rows: The steps of the chunk.
        first: The first of them.
        height: The number of steps.
    """
    here = tl.load(document + rows, mask=rows < height, other=0)
    before = tl.load(document + first - 1, mask=first > 0, other=0)
    last = tl.load(document + tl.minimum(first + rows.shape[0], height) - 1)
    return here, before, last


@triton.jit
def sums_since(g, rows, columns, step, height, width, SUB: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the sums of the log decays after each step to the end of its sub-block, ``[c k]``."""
    local = rows % SUB
    total = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for j in range(1, SUB):
        later = tl.where(local + j < SUB, rows + j, -1)
        total += log2_decays(g, later, columns, step, height, width)
    return total


@triton.jit
def block_sum(log2, block, i):  # type: ignore[no-untyped-def]
    """Return the sums over sub-block ``i`` of log decays ``[c k]``, ``[1 k]``."""
    return tl.sum(tl.where((block == i)[:, None], log2, 0.0), 0)[None, :]
