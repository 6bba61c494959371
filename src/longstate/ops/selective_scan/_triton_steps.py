# mypy: disable-error-code="no-untyped-def"
"""What the forward and the backward kernel of the selective scan share.

A program takes R × L channels of one sequence through time in tiles of steps. A tile has the axes
[R, STEPS, N, L]: N states, and L channels on the lanes of a warp. Triton lays out the last axis over the lanes and the
next over the warps, so that a thread holds all steps of a tile and sums over R without another thread; a scan over the
steps is then the plain recurrence in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def channels(width, R: tl.constexpr, L: tl.constexpr):
    """Return the channels [R, L] of this program, and which there are."""
    channel = tl.program_id(0) * (R * L) + tl.arange(0, R)[:, None] * L + tl.arange(0, L)[None, :]
    return channel, channel < width


@triton.jit
def places(channel, width, states, N: tl.constexpr):
    """Return where the states [R, N, L] of channels are in [d n], and which there are."""
    n = tl.arange(0, N)[None, :, None]
    return channel[:, None, :] * states + n, (channel < width)[:, None, :] & (n < states)


@triton.jit
def read_rates(A, at, there, LOG_A: tl.constexpr):
    """Return A [R, N, L], from itself or from log(−A)."""
    rate = tl.load(A + at, there, 0.0).to(tl.float32)
    if LOG_A:
        rate = -tl.exp(rate)
    return rate


@triton.jit
def read_rows(x, batch, by_batch, first, by_row, row, column, there):
    """Return the steps ``first + row`` of x [b t …] in float32; zero where there are none."""
    begin = x + batch * by_batch + tl.cast(first, tl.int64) * by_row
    return tl.load(begin + row * by_row + column, there, 0.0).to(tl.float32)


@triton.jit
def pin(x):
    """Return x, a number for each step and channel, or step and state. The sum over an axis of one keeps the compiler
    from computing x anew in each of the threads that want it: they have it from one, through shared memory."""
    return tl.sum(x[None], 0)


@triton.jit
def softplus(x):
    """Return log(1 + eˣ) = max(x, 0) + 2 artanh(e/(2 + e)) for e = e^−|x|, to the last digits also where it is small:
    the series ends where (1/3)¹⁶/17 is nothing beside one."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    s = e / (2 + e)
    q = s * s
    p = q * (1 / 15) + 1 / 13
    p = p * q + 1 / 11
    p = p * q + 1 / 9
    p = p * q + 1 / 7
    p = p * q + 1 / 5
    p = p * q + 1 / 3
    return tl.maximum(x, 0.0) + 2 * (s + s * q * p)


@triton.jit
def sigmoid(x):
    """Return 1/(1 + e^−x)."""
    return 1 / (1 + tl.exp2(-x * LOG2E))


@triton.jit
def onwards(s1, a1, b1, s2, a2, b2):
    """Join two runs of steps h ← a h + b, the second of which begins anew if s2: b is the state after a run."""
    return s1 | s2, a1 * a2, tl.where(s2 != 0, 0.0, a2 * b1) + b2


@triton.jit
def pick(x, i: tl.constexpr, STEPS: tl.constexpr):
    """Return step i of [R, STEPS, N, L], exactly: the others' bits are replaced by zeros, which costs nothing where one
    thread holds all steps."""
    step = tl.arange(0, STEPS)[None, :, None, None]
    return tl.sum(tl.where(step == i, x.to(tl.int32, bitcast=True), 0), 1).to(tl.float32, bitcast=True)


@triton.jit
def marks(start, at, there, a):
    """Return where sequences begin anew, as whole numbers of the shape of ``a`` [R, STEPS, N, L]."""
    if start is None:
        s = tl.zeros(a.shape, tl.int32)
    else:
        s = tl.load(start + at, there, 0).to(tl.int32)[None, :, None, None].broadcast_to(a.shape)
    return s


@triton.jit
def carry_on(state, ends, decays, segment, stride, at, there):
    """Return the state after a segment: its end from zero, and what is left of the state before. A negative
    decay stands for a start, which not even infinity passes."""
    begin = tl.cast(segment, tl.int64) * stride
    decay = tl.load(decays + begin + at, there, 0.0)
    return tl.where(decay < 0, 0.0, decay * state) + tl.load(ends + begin + at, there, 0.0)


@triton.jit
def store_end(state, ends, decays, power, starts, begin, at, there):
    """Store a segment's end and its decay 2^power, or that there were starts in it."""
    tl.store(ends + begin + at, state, there)
    tl.store(decays + begin + at, tl.where(starts > 0, -1.0, tl.exp2(power)), there)
