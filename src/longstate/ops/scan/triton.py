# mypy: disable-error-code="no-untyped-def"
"""The kernels for GPUs, forwards and backwards in time: what is read is read once, or twice where few channels leave
the device empty unless time is cut into segments.

A program takes some channels of one sequence through a segment in tiles [STEPS, WIDTH]. Each lane of a warp has a
channel and all steps of a tile, so that a scan over them is the plain recurrence in registers, and the loads of a
tile are under way together. Complex numbers are read as 64 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import native
from ..._shapes import Tensor
from .. import _triton

# ``programs`` is how many there must be for their loads to keep a large device's memory busy.
TILES = _triton.Tiles(
    "scan",
    default={"width": 32, "steps": 32, "warps": 1, "programs": 1056},
    interpreter={"width": 8, "steps": 8, "programs": 12},
    space={"width": [32, 64, 128], "steps": [16, 32, 64], "warps": [1, 2, 4]},
)
LEAST = 128  # steps of a segment


@triton.jit
def _join(s1, ar1, ai1, br1, bi1, s2, ar2, ai2, br2, bi2):
    """Join two runs of steps h ← a h + b of complex numbers, the second of which begins anew if s2."""
    br = tl.where(s2 != 0, br2, ar2 * br1 - ai2 * bi1 + br2)
    bi = tl.where(s2 != 0, bi2, ar2 * bi1 + ai2 * br1 + bi2)
    return s1 | s2, ar1 * ar2 - ai1 * ai2, ar1 * ai2 + ai1 * ar2, br, bi


@triton.jit
def _join_real(s1, a1, b1, s2, a2, b2):
    """Join two runs of steps h ← a h + b, the second of which begins anew if s2."""
    return s1 | s2, a1 * a2, tl.where(s2 != 0, b2, a2 * b1 + b2)


@triton.jit
def _places(rows, columns):
    """Return where numbers are, from the first row on. A lane takes one of a row, not several side by side, for which
    the hint is (they do not begin where wide loads do): no other lane then has steps of its channels."""
    return tl.multiple_of(rows[:, None] + columns[None, :], [1, 1])


@triton.jit
def _read(x, at, there, PAIRS: tl.constexpr):
    """Return numbers' real and imaginary parts in float32; for real ones 0 for the latter."""
    if PAIRS:
        both = tl.load(x + at, there, 0)
        re, im = both.to(tl.int32).to(tl.float32, bitcast=True), (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        re = tl.load(x + at, there, 0.0).to(tl.float32)
        im = tl.zeros_like(re)
    return re, im


@triton.jit
def _write(x, at, re, im, there, PAIRS: tl.constexpr):
    """Store numbers' real and imaginary parts."""
    if PAIRS:
        low = re.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(x + at, low | (im.to(tl.int32, bitcast=True).to(tl.int64) << 32), there)
    else:
        tl.store(x + at, re.to(x.dtype.element_ty), there)


@triton.jit
def _last(x, STEPS: tl.constexpr):
    """Return the last of [STEPS, WIDTH], exactly: the others' bits are replaced by zeros, which costs nothing where one
    thread holds all steps."""
    bits = tl.where(tl.arange(0, STEPS)[:, None] == STEPS - 1, x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, 0).to(tl.float32, bitcast=True)


@triton.jit
def _states(s, ar, ai, br, bi, hr, hi, STEPS: tl.constexpr, PAIRS: tl.constexpr):
    """Return the states of a tile after the state h [WIDTH], and the products of its coefficients."""
    goes_on = (tl.arange(0, STEPS)[:, None] == 0) & (s == 0)
    if PAIRS:
        br += tl.where(goes_on, ar * hr[None] - ai * hi[None], -0.0)
        bi += tl.where(goes_on, ar * hi[None] + ai * hr[None], -0.0)
        _, ar, ai, br, bi = tl.associative_scan((s, ar, ai, br, bi), 0, _join)
    else:
        br = tl.where(goes_on, ar * hr[None] + br, br)
        _, ar, br = tl.associative_scan((s, ar, br), 0, _join_real)
    return ar, ai, br, bi


@triton.jit
def _carry_on(hr, hi, ends, at, plane, there):
    """Return the state after a segment, from what is stored of it: its end from zero, the product of its coefficients,
    and whether anything began anew in it."""
    er, ei = tl.load(ends + at, there, 0.0), tl.load(ends + plane + at, there, 0.0)
    ar, ai = tl.load(ends + 2 * plane + at, there, 0.0), tl.load(ends + 3 * plane + at, there, 0.0)
    goes_on = tl.load(ends + 4 * plane + at, there, 0.0) == 0
    goes_on &= (hr != 0) | (hi != 0)  # a product of coefficients may be infinite where none of them is
    return tl.where(goes_on, ar * hr - ai * hi, 0.0) + er, tl.where(goes_on, ar * hi + ai * hr, 0.0) + ei


@triton.jit
def _before(initial, ends, hr, hi, batch, batches, segment, plane, width, c, known, PAIRS: tl.constexpr):
    """Return the state before a segment, from the initial one (or zero, given) and the ends of those before."""
    if initial is not None:
        hr, hi = _read(initial, batch * width + c, known, PAIRS)
    if ends is not None:
        for j in range(segment):
            end = (tl.cast(j, tl.int64) * batches + batch) * width + c
            hr, hi = _carry_on(hr, hi, ends, end, plane, known)
    return hr, hi


@triton.jit
def _past(states, first_state, before, batch, length, width, t, t_0, c, inside, counts, PAIRS: tl.constexpr):
    """Return the states h_{t−1} that go into steps t, from ``t_0`` on, of those that count."""
    size = tl.cast(width, tl.int64)
    last = t - 1
    if before is not None:
        last = tl.load(before + batch * length + t, inside, 0).to(tl.int32)
    there = _places((last - t_0).to(tl.int64) * width, c)
    xr, xi = _read(states + (batch * length + t_0) * size, there, counts & (last >= 0)[:, None], PAIRS)
    if first_state is not None:
        yr, yi = _read(first_state + batch * size, _places(t * 0, c), counts & (last < 0)[:, None], PAIRS)
        xr, xi = xr + yr, xi + yi
    return xr, xi


@triton.jit
def _store_end(ends, plane, hr, hi, pr, pi, anew, known):
    """Store what ``_carry_on`` reads."""
    tl.store(ends, hr, known)
    tl.store(ends + plane, hi, known)
    tl.store(ends + 2 * plane, pr, known)
    tl.store(ends + 3 * plane, pi, known)
    tl.store(ends + 4 * plane, tl.zeros_like(hr) + anew, known)


@triton.jit
def _position(batches):
    """Return the piece of the channels, the sequence and the segment of time of a program of a grid (pieces × batches,
    segments), and how many pieces and segments there are. Only the first side of a grid may be long."""
    pieces = tl.num_programs(0) // batches
    return tl.program_id(0) % pieces, (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(1), tl.num_programs(1)


@triton.jit
def _run(
    b, a, initial, start, valid, h, final, ends, grad_a, states, first_state, before, b_batch, b_row, a_batch, a_row,
    batches, length, width, span,
    BACK: tl.constexpr, FIXED: tl.constexpr, PAIRS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run h_t = a_t h_{t−1} + b_t in one segment of ``span`` steps. Without h: the segment's end from zero, the product
    of its coefficients and whether anything began anew in it.

    BACK in time, λ_t = g_t + ā_{t+1} λ_{t+1}: g stands in ``b``, λ goes to ``h``, and ``grad_a`` is λ_t h̄_{t−1}. One
    step more, before the first, gives the gradient of the initial state. The states h_t are in ``states``, the first of
    all in ``first_state``; ``before`` says which of them is h_{t−1}, where that is not t − 1.
    """
    piece, batch, segment, segments = _position(batches)
    c = piece * WIDTH + tl.arange(0, WIDTH)
    known, size = c < width, tl.cast(width, tl.int64)
    plane = segments * batches * size
    hr, hi = tl.zeros([WIDTH], tl.float32), tl.zeros([WIDTH], tl.float32)
    pr, pi, sum_r, sum_i, lost_r, lost_i, anew = hr + 1, hi, hr, hi, hr, hi, 0
    if h is not None:
        hr, hi = _before(initial, ends, hr, hi, batch, batches, segment, plane, width, c, known, PAIRS)
    row = tl.arange(0, STEPS)
    way = -row if BACK else row
    stop = tl.minimum(length + (1 if BACK else 0), (segment + 1) * span)
    for begin in range(segment * span, stop, STEPS):
        i = begin + row
        t = length - 1 - i if BACK else i
        on = t + 1 if BACK else t  # the step whose coefficient leads here
        t_0 = tl.cast(length - 1 - begin if BACK else begin, tl.int64)  # of the tile's first row
        on_0 = t_0 + 1 if BACK else t_0
        inside, on_inside = (i < stop) & (t >= 0), (i < stop) & (on < length)
        there = inside[:, None] & known[None, :]
        br, bi = _read(b + batch * b_batch + t_0 * b_row, _places(way * b_row, c), there, PAIRS)
        if FIXED:
            ar, ai = _read(a, c[None, :], known[None, :], PAIRS)
        else:
            there_a = on_inside[:, None] & known[None, :]
            ar, ai = _read(a + batch * a_batch + on_0 * a_row, _places(way * a_row, c), there_a, PAIRS)
        ar = tl.where(on_inside[:, None], ar, 1.0)
        ai = tl.where(on_inside[:, None], -ai if BACK else ai, 0.0)
        s = tl.zeros([STEPS, WIDTH], tl.int32)
        counts = there
        if valid is not None:
            now = tl.load(valid + batch * length + on, on_inside, 0) != 0
            ar, ai = tl.where(now[:, None], ar, 1.0), tl.where(now[:, None], ai, 0.0)
            counts = there & (tl.load(valid + batch * length + t, inside, 0) != 0)[:, None]
            br, bi = tl.where(counts, br, 0.0), tl.where(counts, bi, 0.0)
        if start is not None:
            s = tl.load(start + batch * length + on, on_inside, 0).to(tl.int32)
            anew += tl.sum(s, 0)
            s = s[:, None].broadcast_to(STEPS, WIDTH)
        ar, ai, br, bi = _states(s, ar, ai, br, bi, hr, hi, STEPS, PAIRS)
        hr, hi = _last(br, STEPS), _last(bi, STEPS)
        if h is None:
            qr, qi = _last(ar, STEPS), _last(ai, STEPS) if PAIRS else pi
            pr, pi = (pr * qr - pi * qi, pr * qi + pi * qr) if PAIRS else (pr * qr, pi)
        else:
            out_r, out_i = (br, bi) if valid is None else (tl.where(counts, br, 0.0), tl.where(counts, bi, 0.0))
            at, rows = _places(way * width, c), (batch * length + t_0) * size
            _write(h + rows, at, out_r, out_i, there, PAIRS)
            if BACK:
                if start is not None:
                    counts &= (tl.load(start + batch * length + t, inside, 0) == 0)[:, None]
                xr, xi = _past(states, first_state, before, batch, length, width, t, t_0, c, inside, counts, PAIRS)
                gr, gi = (br * xr + bi * xi, bi * xr - br * xi) if PAIRS else (br * xr, bi)
                gr, gi = tl.where(counts, gr, 0.0), tl.where(counts, gi, 0.0)
                if FIXED:  # what is lost in adding a tile's sum is added to the next
                    xr, xi = tl.sum(gr, 0) - lost_r, tl.sum(gi, 0) - lost_i
                    lost_r, lost_i = (sum_r + xr - sum_r) - xr, (sum_i + xi - sum_i) - xi
                    sum_r, sum_i = sum_r + xr, sum_i + xi
                else:
                    _write(grad_a + rows, at, gr, gi, there, PAIRS)
    part = (tl.cast(segment, tl.int64) * batches + batch) * width
    if h is None:
        _store_end(ends + part + c, plane, hr, hi, pr, pi, anew, known)
    else:
        if FIXED and BACK:
            _write(grad_a, part + c, sum_r, sum_i, known, PAIRS)
        if segment == segments - 1:
            tl.debug_barrier()  # it may lie where the initial state does, which all warps have read then
            _write(final, batch * size + c, hr, hi, known, PAIRS)


def scan(
    a: Tensor, b: Tensor, initial: Tensor | None, start: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what ``chunked.scan`` returns; of real numbers, a and b may be bfloat16 or float16."""
    h = b.new_empty(b.shape)
    dtype = torch.complex64 if b.is_complex() else torch.float32
    final = _triton.final_state(initial, (b.shape[0], *b.shape[2:]), b, b.shape[1] == 1, dtype)
    _launch(a, b, a.ndim < b.ndim, initial, start, valid, h, final)
    return h, final


def scan_backward(
    grad: Tensor,
    grad_final: Tensor,
    a: Tensor,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    h: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what ``chunked.scan_backward`` returns."""
    fixed = a.ndim < h.ndim
    grad_b, grad_initial = h.new_empty(h.shape), grad_final.new_empty(grad_final.shape)
    before = None
    if valid is not None:  # where a step does not count h is zero: the state is that of the last which did, or began
        there = valid if start is None else valid | start
        last = torch.where(there, torch.arange(1, h.shape[1] + 1, device=h.device), 0).cummax(1).values - 1
        before = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1).contiguous()
    past = (h, initial, before)
    grad_a = _launch(a, grad, fixed, grad_final, start, valid, grad_b, grad_initial, past)
    return grad_a.sum(0).view(a.shape).to(a.dtype) if fixed else grad_a.view(a.shape), grad_b, grad_initial


def _launch(
    a: Tensor,
    b: Tensor,
    fixed: bool,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    h: Tensor,
    final: Tensor,
    past: tuple[Tensor | None, ...] | None = None,
) -> Tensor:
    """Run the recurrence on b into h and final; back in time if there is a past, for the gradient of a."""
    rows = _rows(b)
    (batch, length, width), pairs, back = rows.shape, b.is_complex(), past is not None
    coefficients = native.in_rows(a.resolve_conj().reshape(1, 1, -1)) if fixed else _rows(a)
    use, grid, span = _split(b, batch, length + back, width, pairs or back)
    grad_a = a.new_empty((grid[1] * batch, width) if fixed else a.shape, dtype=final.dtype if fixed else a.dtype)
    strides = [*rows.stride()[:2], *coefficients.stride()[:2]]
    inputs = (_numbers(initial), *(native.side_by_side(x) for x in (start, valid)))
    states, first, before = past if past is not None else (None, None, None)
    behind = (_numbers(grad_a) if back else None, _numbers(states), _numbers(first), before)
    sizes = (*strides, batch, length, width, span)
    flags = (back, fixed, pairs, use["steps"], use["width"])

    def start_kernel(
        h: Tensor | None, final: Tensor | None, ends: Tensor | None, behind: tuple[Tensor | None, ...]
    ) -> None:
        arguments = (_bits(coefficients), *inputs, _numbers(h), _numbers(final), ends, *behind)
        _triton.launch(_run, grid, _bits(rows), *arguments, *sizes, *flags, num_warps=use["warps"])

    ends = None
    if grid[1] > 1:
        ends = b.new_empty((5, grid[1], batch, width), dtype=torch.float32)
        start_kernel(None, None, ends, (None,) * 4)
    start_kernel(h, final, ends, behind)
    return grad_a


def _rows(x: Tensor) -> Tensor:
    """Return ``[b t …]`` as rows ``[b t n]`` of numbers side by side."""
    if x.ndim != 3:
        x = x.flatten(2) if x.ndim > 3 else x.unsqueeze(2)
    return _triton.rows(x.resolve_conj())


def _numbers(x: Tensor | None) -> Tensor | None:
    """Return a tensor as the kernel takes it: side by side, and a complex number as 64 bits."""
    return None if x is None else _bits(x.resolve_conj().contiguous())


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int64) if x.is_complex() else x


def _split(x: Tensor, batch: int, length: int, width: int, wide: bool) -> tuple[dict[str, int], tuple[int, int], int]:
    """Return the tile, the grid (pieces of the channels × sequences, segments of time) and the steps of a segment."""
    use = TILES(x, batch=batch, length=length, width=width)
    use["steps"] = min(use["steps"] // (2 if wide else 1), _triton.power_of_2(length))  # so that registers suffice
    across = _triton.cdiv(width, use["width"])
    # Segments are read twice: two of them would gain nothing.
    least = use["steps"] if _triton.interpreted else LEAST
    segments = min(use["programs"] // max(1, across * batch), _triton.cdiv(length, least))
    span = _triton.cdiv(length, segments) if segments > 2 else length
    span = max(_triton.cdiv(span, use["steps"]), 1) * use["steps"]
    return use, (across * batch, max(1, _triton.cdiv(length, span))), span
