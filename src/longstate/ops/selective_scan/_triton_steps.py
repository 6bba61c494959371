# mypy: disable-error-code="no-untyped-def"
"""What the forward and the backward kernel of the selective scan share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_rates(A, at, there, LOG_A: tl.constexpr):
    """Return A of some states and channels, from itself or from log(−A)."""
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
def carry_on(state, ends, decays, segment, stride, at, there):
    """Return the state after a segment: its end from zero, and what is left of the state before. A negative
    decay stands for a start, which not even infinity passes; nor does an infinite decay turn nothing into no number."""
    begin = tl.cast(segment, tl.int64) * stride
    decay = tl.load(decays + begin + at, there, 0.0)
    return tl.where((decay < 0) | (state == 0), 0.0, decay * state) + tl.load(ends + begin + at, there, 0.0)


@triton.jit
def store_end(state, ends, decays, power, starts, begin, at, there):
    """Store a segment's end and its decay 2^power, or that there were starts in it."""
    tl.store(ends + begin + at, state, there)
    tl.store(decays + begin + at, tl.where(starts > 0, -1.0, tl.exp2(power)), there)
