# mypy: disable-error-code="no-untyped-def"
"""What kernels over chunks share: decays between the steps of a chunk, and tiles of its arguments.

Log decays are to the base 2 here. Exponents are never positive, and none is the difference of two long sums: such a
difference would lose the small decays that stand after large ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _triton
from .._triton_parts import LOG2E

INTERPRETED = tl.constexpr(_triton.interpreted)  # there, bfloat16 is not multiplied
NOWHERE = tl.constexpr(1 << 30)  # a step that is beyond the end of every chunk


@triton.jit
def product(a, b, PRECISION: tl.constexpr, to=None):
    """Return a matrix product, summed in float32, added ``to`` what is given.

    Two of bfloat16 are multiplied as they are. Others are first written as float32, and multiplied as exactly as
    ``PRECISION`` says: "tf32" holds every float16, and cuts off other numbers after ten bits.
    """
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16 and not INTERPRETED:
        return tl.dot(a, b, to)
    return tl.dot(a.to(tl.float32), b.to(tl.float32), to, input_precision=PRECISION)


@triton.jit
def operand(x, like):
    """Return x as what multiplies a tile: in bfloat16 if that is, whose range is that of float32, else in float32."""
    return x.to(tl.bfloat16) if like.dtype == tl.bfloat16 else x.to(tl.float32)


@triton.jit
def tile(x, rows, columns, step, height, width):
    """Load rows of numbers that lie side by side; 0 beyond the ``height`` and the ``width``."""
    there = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(x + rows[:, None] * step + columns[None, :], mask=there, other=0.0)


@triton.jit
def store_tile(x, rows, columns, step, height, width, numbers):
    """Store what ``tile`` would load."""
    there = (rows < height)[:, None] & (columns < width)[None, :]
    tl.store(x + rows[:, None] * step + columns[None, :], numbers.to(x.dtype.element_ty), mask=there)


@triton.jit
def steps_of(x, rows, step, height):
    """Load one number of each step, in float32; 0 beyond the end."""
    return tl.load(x + rows * step, mask=rows < height, other=0.0).to(tl.float32)


@triton.jit
def log2_decays(g, rows, columns, step, height, width):
    """Load log decays of some channels of one head; 0 (no decay) beyond the end, none below the least normal number."""
    return tl.maximum(tile(g, rows, columns, step, height, width).to(tl.float32) * LOG2E, -126.0)


@triton.jit
def position(T, CHUNK: tl.constexpr):
    """Return the line (of sequences and heads) and the chunk of a program of a grid of lines × chunks, and how many
    there are of each. Only the first side of a grid may be long."""
    chunks = tl.cdiv(T, CHUNK)
    lines = tl.num_programs(0) // chunks
    return tl.program_id(0) % lines, tl.program_id(0) // lines, lines, chunks


@triton.jit
def running_sums(g, high, low, g_batch, g_step, g_head, T, H, CHUNK: tl.constexpr):
    """Write the running sums in each chunk of log decays ``[b t h]``, padded to whole chunks: ``[b h j c]``.

    They come in two parts, whose differences are exact to 2⁻²⁴: the first is of multiples of 2⁻⁸ and has no roundings,
    |G| ≤ 126 · 256; the second rises, to 1 at most. Without ``low``, the whole is rounded as usual.
    """
    pair, i, _, chunks = position(T, CHUNK)
    pair, rows = pair.to(tl.int64), tl.arange(0, CHUNK)
    first = i.to(tl.int64) * CHUNK
    log2 = steps_of(g + pair // H * g_batch + pair % H * g_head + first * g_step, rows, g_step, T - i * CHUNK)
    log2 = tl.maximum(log2 * LOG2E, -126.0)
    at = (pair * chunks + i) * CHUNK + rows
    if low is not None:
        coarse = tl.floor(log2 * 256.0) * (1.0 / 256.0)
        tl.store(low + at, tl.cumsum(log2 - coarse, 0))
        log2 = coarse
    tl.store(high + at, tl.cumsum(log2, 0))


@triton.jit
def sum_between(high, low, later, earlier):
    """Return a difference of running sums, of the steps ``later`` and ``earlier``; at most 0."""
    difference = tl.load(high + later) - tl.load(high + earlier)
    if low is not None:
        difference += tl.load(low + later) - tl.load(low + earlier)
    return tl.minimum(difference, 0.0)


@triton.jit
def chunk_factors(high, low, document, first, height, CHUNK: tl.constexpr):
    """Return what links the steps of a chunk of one head to the states at its ends.

    Args:
        high: The running sums of the decays in the chunk, if there are any; ``low`` their second part.
        document: The number of starts up to each step, if there are any.
        first: The first step of the chunk.
        height: The number of steps from there to the end of the sequence.

    Returns:
        What is left of the state before the chunk at each step, of each step at the chunk's end, and of the state
        before it there.
    """
    rows = tl.arange(0, CHUNK)
    into = tl.full([CHUNK], 1.0, tl.float32)
    out, through = into, 1.0
    if high is not None:
        total, end = tl.load(high + rows), tl.load(high + CHUNK - 1)
        if low is not None:
            total, end = total + tl.load(low + rows), end + tl.load(low + CHUNK - 1)
        into, out, through = tl.exp2(total), tl.exp2(sum_between(high, low, rows * 0 + (CHUNK - 1), rows)), tl.exp2(end)
    if document is not None:
        here = tl.load(document + rows, mask=rows < height, other=0)
        before = tl.load(document - 1, mask=first > 0, other=0)
        last = tl.load(document + tl.minimum(CHUNK, height) - 1)
        into, out = tl.where(here == before, into, 0.0), tl.where(here == last, out, 0.0)
        through = tl.where(before == last, through, 0.0)
    return into, out, through


@triton.jit
def chunk_weights(weights, high, low, document, height, CHUNK: tl.constexpr, REVERSE: tl.constexpr = False):
    """Return ``[t s]`` (in ``REVERSE`` ``[s t]``) times e^{G_t − G_s}, for s ≤ t of one document and 0 elsewhere."""
    rows = tl.arange(0, CHUNK)
    t, s = rows[None, :] if REVERSE else rows[:, None], rows[:, None] if REVERSE else rows[None, :]
    pairs = t >= s
    if document is not None:
        here = tl.load(document + t, mask=t < height, other=0)
        pairs = pairs & (here == tl.load(document + s, mask=s < height, other=0))
    if high is not None:
        weights = weights * tl.exp2(sum_between(high, low, t, s))
    return tl.where(pairs, weights, 0.0)


@triton.jit
def first_steps(document, first, rows, height):
    """Return which steps of a chunk are the first of a document: what was before does not change with their decays."""
    here = tl.load(document + rows, mask=rows < height, other=0)
    return here != tl.load(document + rows - 1, mask=(rows < height) & (first + rows > 0), other=0)


@triton.jit
def decayed(x, factor):
    """Return x times a factor, 0 where that is 0: a start forgets what is no number."""
    return tl.where(factor > 0.0, x * factor, 0.0)


@triton.jit
def moved(state, x, z, factor, kept, PRECISION: tl.constexpr):
    """Return a state moved over a chunk, in float32: what is kept of it, and Σ_t x_t (factor_t z_t)ᵀ."""
    written = operand(z.to(tl.float32) * factor[:, None], z)
    return product(tl.trans(x), written, PRECISION, decayed(state.to(tl.float32), kept))


@triton.jit
def block_sum(log2, block, i):
    """Return the sums of log decays ``[c k]`` over the sub-block ``i``, ``[1 k]``; ``block`` numbers those of steps."""
    return tl.sum(tl.where(block == i, log2, 0.0), 0)[None, :]
