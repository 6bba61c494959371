# mypy: ignore-errors
"""The kernel of a product of a few rows with weights."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_parts import sigmoid


@triton.jit
def _tile(weight, scale, o, i, inside, inputs, PARTS: tl.constexpr):
    """Return a tile of weights, with their scales if there are several for an output."""
    w = tl.load(weight + o[:, None] * inputs + i[None, :], mask=inside, other=0, eviction_policy="evict_first")
    if PARTS > 1:
        part = o[:, None] * PARTS + (i // (inputs // PARTS))[None, :]
        return w.to(tl.float32) * tl.load(scale + part, mask=inside, other=0).to(tl.float32)
    return w


@triton.jit
def _convolved(x, taps, tap_bias, window, o, FIRST, WIDTH, TAPS: tl.constexpr):
    """Return SiLU of the convolution at the outputs that have one, and move their window on."""
    c = o - FIRST
    known = (c >= 0) & (c < WIDTH)
    y = tl.load(taps + c * TAPS + TAPS - 1, mask=known, other=0).to(tl.float32) * x
    if tap_bias is not None:
        y += tl.load(tap_bias + c, mask=known, other=0).to(tl.float32)
    later = ()
    for j in tl.static_range(TAPS - 1):
        before = tl.load(window + j * WIDTH + c, mask=known, other=0).to(tl.float32)
        y += tl.load(taps + c * TAPS + j, mask=known, other=0).to(tl.float32) * before
        later = later + (before,)
    later = later + (x,)
    tl.debug_barrier()  # several warps may hold the same outputs: all have read the window before one writes
    for j in tl.static_range(TAPS - 1):
        tl.store(window + j * WIDTH + c, later[j + 1].to(window.dtype.element_ty), mask=known)
    return tl.where(known, y * sigmoid(y), x)


@triton.jit
def product(
    x, weight, bias, scale, norm, gate, taps, tap_bias, window, residual, y,
    x_row, gate_row, residual_row, eps, offset, factor, inputs, outputs, FIRST, WIDTH,
    BATCH: tl.constexpr, NORM: tl.constexpr, GROUPS: tl.constexpr, GATE_FIRST: tl.constexpr, PARTS: tl.constexpr,
    TAPS: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute ``ROWS`` outputs of each sequence: y = W x + b, x normed before and y convolved or added after.

    The norm divides by a number of the whole row (of each of ``GROUPS``), which is known when the row has been read:
    the product of what is not yet divided is divided in its place. Sums within 8 neighbours come first, so that a
    thread keeps one of 8 numbers until the end.
    """
    o = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column, known = tl.arange(0, BLOCK), o < outputs
    size = inputs // GROUPS
    blocks = tl.cdiv(size, BLOCK)
    w = _tile(weight, scale, o, column, known[:, None] & (column < size)[None, :], inputs, PARTS)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    totals = ()
    for _ in tl.static_range(BATCH):
        totals = totals + (tl.zeros([ROWS], tl.float32),)
    for g in range(GROUPS):
        sums, squares = (), ()
        for _ in tl.static_range(BATCH):
            sums = sums + (tl.zeros([ROWS, BLOCK // 8], tl.float32),)
            squares = squares + (tl.zeros([BLOCK // 8], tl.float32),)
        for n in range(blocks):
            ahead = g * blocks + n + 1  # the next tile of weights is asked for before this one is multiplied
            place = ahead % blocks * BLOCK + column
            more = known[:, None] & ((place < size) & (ahead < GROUPS * blocks))[None, :]
            following = _tile(weight, scale, o, ahead // blocks * size + place, more, inputs, PARTS)
            i, inside = g * size + n * BLOCK + column, n * BLOCK + column < size
            if norm is not None:
                gain = offset + tl.load(norm + i, mask=inside, other=0).to(tl.float32)
            wide = w.to(tl.float32)
            added, squared = (), ()
            for b in tl.static_range(BATCH):
                z = tl.load(x + b * x_row + i, mask=inside, other=0).to(tl.float32)
                if gate is not None:
                    opening = tl.load(gate + b * gate_row + i, mask=inside, other=0).to(tl.float32)
                    opening *= sigmoid(opening)
                    if GATE_FIRST:
                        z *= opening
                squared = squared + (squares[b] + tl.sum(tl.reshape(z * z, [BLOCK // 8, 8]), 1),)
                if norm is not None:
                    z *= gain
                if gate is not None and not GATE_FIRST:
                    z *= opening
                terms = tl.reshape(wide * z[None, :], [ROWS, BLOCK // 8, 8])
                added = added + (sums[b] + tl.sum(terms, 2),)
            sums, squares, w = added, squared, following
        joined = ()
        for b in tl.static_range(BATCH):
            total = tl.sum(sums[b], 1)
            if NORM:
                total *= tl.rsqrt(tl.sum(squares[b], 0) / size + eps)
            joined = joined + (totals[b] + total,)
        totals = joined
    for b in tl.static_range(BATCH):
        result = totals[b]
        if PARTS == 1:
            result *= tl.load(scale + o, mask=known, other=0).to(tl.float32)
        if bias is not None:
            result += tl.load(bias + o, mask=known, other=0).to(tl.float32)
        result = result.to(KIND).to(tl.float32)
        if taps is not None:
            result = _convolved(result, taps, tap_bias, window + b * (TAPS - 1) * WIDTH, o, FIRST, WIDTH, TAPS)
        if residual is not None:
            result = tl.load(residual + b * residual_row + o, mask=known, other=0).to(tl.float32) + factor * result
        tl.store(y + b * outputs + o, result.to(y.dtype.element_ty), mask=known)
