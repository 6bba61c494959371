# mypy: disable-error-code="no-untyped-def"
"""Vandermonde products and their gradients on GPUs: products of small matrices, in double precision throughout.

Powers factor: with l = (i₀ + i) c + j, e^{lz} = e^{i₀cz} e^{icz} e^{jz}. A program makes the last two, tables of some
rows i and columns j, from the squares e^{2ˢz} by their bits, each by a product for every bit; the first goes from one
block of rows to the next by one product. What is left is a product of matrices, for which GPUs of data centres have
units in float64. So a power errs by a few 2⁻⁵³ for each bit of l and each block, and nothing as large as n l is in
memory.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..._shapes import Tensor
from .. import _triton

MOST_STATES = 64  # at once: their powers of all columns are in shared memory

FORWARD = _triton.Tiles(
    "vandermonde",
    default=dict(ROWS=32, COLUMNS=32, BLOCKS=8, num_warps=4),
    interpreter=dict(ROWS=2, COLUMNS=8, BLOCKS=2),
    space=dict(ROWS=[16, 32, 64], COLUMNS=[32, 64, 128], BLOCKS=[1, 2, 4, 8], num_warps=[4, 8]),
)
BACKWARD = _triton.Tiles(
    "vandermonde_backward",
    default=dict(ROWS=16, COLUMNS=64, BLOCKS=8, num_warps=4),
    interpreter=dict(ROWS=2, COLUMNS=8, BLOCKS=2),
    space=dict(ROWS=[16, 32], COLUMNS=[32, 64], BLOCKS=[1, 2, 4, 8], num_warps=[4, 8]),
)


@triton.jit
def _times(a, ai, b, bi, PAIRS: tl.constexpr):
    """Return a product: real part and imaginary part."""
    if PAIRS:
        return a * b - ai * bi, a * bi + ai * b
    else:
        return a * b, ai


@triton.jit
def _number(at, n, states, PAIRS: tl.constexpr):
    """Return real and imaginary parts of some numbers; 0 where there are no more states."""
    if PAIRS:
        real = tl.load(at + 2 * n, mask=n < states, other=0.0).to(tl.float64)
        return real, tl.load(at + 2 * n + 1, mask=n < states, other=0.0).to(tl.float64)
    else:
        real = tl.load(at + n, mask=n < states, other=0.0).to(tl.float64)
        return real, tl.zeros_like(real)


@triton.jit
def _powers(squares, n, count, states, stride, FIRST: tl.constexpr, LAST: tl.constexpr, PAIRS: tl.constexpr):
    """Return e^{count 2ᶠ z} for counts of LAST − FIRST bits: products of the squares from 2ᶠ, f = FIRST, on."""
    real = tl.zeros_like(n + count).to(tl.float64) + 1
    imaginary = tl.zeros_like(real)
    for s in tl.static_range(FIRST, LAST):
        b, bi = _number(squares + s * stride, n, states, PAIRS)
        product, rest = _times(real, imaginary, b, bi, PAIRS)
        bit = ((count >> (s - FIRST)) & 1) != 0
        real, imaginary = tl.where(bit, product, real), tl.where(bit, rest, imaginary)
    return real, imaginary


@triton.jit
def _forward(
    weights, squares, kernel, length, states, stride, segments,
    PAIRS: tl.constexpr, ADD: tl.constexpr, STATES: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // segments).to(tl.int64)
    first = tl.program_id(0) % segments * BLOCKS * ROWS
    parts: tl.constexpr = 2 if PAIRS else 1
    squares += row * BITS * stride
    n = tl.arange(0, STATES)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    fine, fine_i = _powers(squares, n[:, None], j[None, :], states, stride, 0, LOW, PAIRS)
    coarse, coarse_i = _powers(squares, n[None, :], i[:, None], states, stride, LOW, HIGH, PAIRS)
    here, here_i = _powers(squares, n[None, :], first, states, stride, LOW, BITS, PAIRS)
    w, w_i = _number(weights + row * stride, n[None, :], states, PAIRS)
    here, here_i = _times(here, here_i, parts * w, parts * w_i, PAIRS)
    step, step_i = _number(squares + HIGH * stride, n[None, :], states, PAIRS)
    for _ in range(BLOCKS):
        left, left_i = _times(coarse, coarse_i, here, here_i, PAIRS)
        taps = tl.dot(left, fine, out_dtype=tl.float64)
        if PAIRS:
            taps -= tl.dot(left_i, fine_i, out_dtype=tl.float64)
        at = (first + i)[:, None] * COLUMNS + j[None, :]
        to = kernel + row * length + at
        if ADD:
            taps += tl.load(to, mask=at < length, other=0.0).to(tl.float64)
        tl.store(to, taps.to(tl.float32), mask=at < length)
        here, here_i = _times(here, here_i, step, step_i, PAIRS)
        first += ROWS


@triton.jit
def _backward(
    grad, squares, partial, length, states, stride, segments, rows, all_states,
    PAIRS: tl.constexpr, STATES: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """With e_l = e^{lz}: Σ_l g_l e_l and Σ_l g_l l e_l, of a row's segment."""
    row = (tl.program_id(0) // segments).to(tl.int64)
    segment = tl.program_id(0) % segments
    first = segment * BLOCKS * ROWS
    squares += row * BITS * stride
    n = tl.arange(0, STATES)
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    fine, fine_i = _powers(squares, n[None, :], j[:, None], states, stride, 0, LOW, PAIRS)
    fine = tl.where(j[:, None] < length, fine, 0.0)  # of what grows: behind the end it may be infinite
    fine_i = tl.where(j[:, None] < length, fine_i, 0.0)
    coarse, coarse_i = _powers(squares, n[None, :], i[:, None], states, stride, LOW, HIGH, PAIRS)
    here, here_i = _powers(squares, n[None, :], first, states, stride, LOW, BITS, PAIRS)
    step, step_i = _number(squares + HIGH * stride, n[None, :], states, PAIRS)
    zeroth, first_order = tl.zeros([STATES], tl.float64), tl.zeros([STATES], tl.float64)
    zeroth_i, first_order_i = tl.zeros([STATES], tl.float64), tl.zeros([STATES], tl.float64)
    for _ in range(BLOCKS):
        at = (first + i)[:, None] * COLUMNS + j[None, :]
        g = tl.load(grad + row * length + at, mask=at < length, other=0.0).to(tl.float64)
        gj = g * j[None, :].to(tl.float64)
        a, b = tl.dot(g, fine, out_dtype=tl.float64), tl.dot(gj, fine, out_dtype=tl.float64)
        begin = (first + i)[:, None] * COLUMNS
        b += begin.to(tl.float64) * a
        a_i, b_i = tl.zeros_like(a), tl.zeros_like(b)
        if PAIRS:
            a_i, b_i = tl.dot(g, fine_i, out_dtype=tl.float64), tl.dot(gj, fine_i, out_dtype=tl.float64)
            b_i += begin.to(tl.float64) * a_i
        left, left_i = _times(coarse, coarse_i, here, here_i, PAIRS)
        left = tl.where(begin < length, left, 0.0)  # likewise
        left_i = tl.where(begin < length, left_i, 0.0)
        a, a_i = _times(left, left_i, a, a_i, PAIRS)
        b, b_i = _times(left, left_i, b, b_i, PAIRS)
        zeroth += tl.sum(a, 0)
        first_order += tl.sum(b, 0)
        if PAIRS:
            zeroth_i += tl.sum(a_i, 0)
            first_order_i += tl.sum(b_i, 0)
        here, here_i = _times(here, here_i, step, step_i, PAIRS)
        first += ROWS
    parts: tl.constexpr = 2 if PAIRS else 1
    to = partial + (segment * rows + row) * 2 * all_states * parts + n * parts
    tl.store(to, zeroth, mask=n < states)
    tl.store(to + all_states * parts, first_order, mask=n < states)
    if PAIRS:
        tl.store(to + 1, zeroth_i, mask=n < states)
        tl.store(to + all_states * parts + 1, first_order_i, mask=n < states)


def vandermonde(weights: Tensor, log_base: Tensor, length: int) -> Tensor:
    """Return what ``chunked.vandermonde`` returns, of weights in float32."""
    *shape, states = weights.shape
    kernel = weights.new_empty(*shape, length, dtype=torch.float32)
    if not states:
        return kernel.zero_()
    w, z = weights.reshape(-1, states), log_base.reshape(-1, states)
    options = _options(FORWARD, w, length)
    segments = _segments(options, length)
    squares, numbers = _squares(z, options["BITS"]), _parts(w)
    for n in range(0, states, MOST_STATES):
        some = min(states - n, MOST_STATES)
        _triton.launch(
            _forward, (w.shape[0] * segments,), numbers[:, n:], squares[:, :, n:], kernel, length, some,
            numbers.stride(0), segments, ADD=n > 0, **options,
        )  # fmt: skip
    return kernel


def vandermonde_backward(grad: Tensor, weights: Tensor, log_base: Tensor) -> tuple[Tensor, Tensor]:
    """Return what ``chunked.vandermonde_backward`` returns."""
    states, length = weights.shape[-1], grad.shape[-1]
    if not weights.numel():
        return torch.empty_like(weights), torch.empty_like(log_base)
    z, grad = log_base.reshape(-1, states), grad.contiguous()
    options = _options(BACKWARD, z, length)
    segments = _segments(options, length)
    squares = _squares(z, options["BITS"])
    partial = _parts(z.new_empty(segments, z.shape[0], 2, states))
    for n in range(0, states, MOST_STATES):
        some = min(states - n, MOST_STATES)
        _triton.launch(
            _backward, (z.shape[0] * segments,), grad, squares[:, :, n:], partial[:, :, :, n:], length, some,
            squares.stride(1), segments, z.shape[0], states, **options,
        )  # fmt: skip
    sums = partial.sum(0)
    if weights.is_complex():
        sums = 2 * torch.view_as_complex(sums)
    zeroth, first = (x.reshape(weights.shape) for x in sums.unbind(1))
    return zeroth.conj().resolve_conj().to(weights.dtype), (weights * first).conj().resolve_conj()


def _options(tiles: _triton.Tiles, x: Tensor, length: int) -> dict[str, Any]:
    """Return tiles no larger than the problem, and how many bits of l are those of rows and columns."""
    rows, states = x.shape
    use = tiles(x, rows=rows, n=states, l=length)
    count = _triton.cdiv(length, use["COLUMNS"])
    use["ROWS"] = min(use["ROWS"], _triton.power_of_2(count, 16))  # which a product of matrices takes at least
    use["BLOCKS"] = min(use["BLOCKS"], _triton.power_of_2(_triton.cdiv(count, use["ROWS"])))
    low = use["COLUMNS"].bit_length() - 1
    high = low + use["ROWS"].bit_length() - 1
    bits = max(high + 1, (length - 1).bit_length())
    together = min(MOST_STATES, _triton.power_of_2(states, 16))
    use["num_warps"] = max(use["num_warps"], together // 8)  # for their powers to fit in registers
    return use | dict(PAIRS=x.is_complex(), STATES=together, BITS=bits, LOW=low, HIGH=high)


def _segments(options: dict[str, Any], length: int) -> int:
    return _triton.cdiv(length, options["BLOCKS"] * options["ROWS"] * options["COLUMNS"])


def _squares(log_base: Tensor, bits: int) -> Tensor:
    """Return e^{2ˢz} ``[r s n]`` for s below ``bits``, complex ones as pairs. The arguments are exact."""
    scale = 2.0 ** torch.arange(bits, dtype=torch.float64, device=log_base.device)
    return _parts(torch.exp(log_base.resolve_conj()[:, None] * scale[:, None]))


def _parts(x: Tensor) -> Tensor:
    """Return numbers side by side; complex ones as pairs, along one more axis."""
    x = x.resolve_conj().contiguous()
    return torch.view_as_real(x) if x.is_complex() else x
