# mypy: ignore-errors
"""The kernels of the short convolution, forwards and backwards.

A program goes through some steps of some channels of a sequence. The last k − 1 inputs, and backwards in what is left
to add to their gradients, stand in its registers, so that each input is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_parts import sigmoid, slope_of_silu


@triton.jit
def _begins(start, at, T):
    """Return whether a sequence begins at a step; none does outside of the given ones."""
    return tl.load(start + at, mask=(at >= 0) & (at < T), other=0) != 0


@triton.jit
def _zero_if(flag, window):
    """Return rows, all of them zero where the flag is set."""
    rows = ()
    for i in tl.static_range(len(window)):
        rows = rows + (tl.where(flag, 0.0, window[i]),)
    return rows


@triton.jit
def _row(order, at, T):
    """Return where in memory the input ``at`` is, of those that count; the others come after these."""
    row = at
    if order is not None:
        row = tl.load(order + at, mask=(at >= 0) & (at < T), other=0)
    return row.to(tl.int64)


@triton.jit
def _window(u, initial, start, order, at, count, T, u_step, initial_step, c, inside, K: tl.constexpr):
    """Return the K − 1 inputs before step ``at``, the oldest first, with zeros for those of an earlier sequence."""
    rows = ()
    for i in tl.static_range(K - 1):
        p = at - (K - 1) + i
        if start is not None:
            rows = _zero_if(_begins(start, p, T), rows)
        x = tl.load(u + _row(order, p, T) * u_step + c, mask=inside & (p >= 0) & (p < count), other=0.0)
        x = x.to(tl.float32)
        if initial is not None:
            before = tl.load(initial + (p + K - 1) * initial_step + c, mask=inside & (p < 0), other=0.0)
            x = tl.where(p < 0, before.to(tl.float32), x)
        rows = rows + (x,)
    if start is not None:
        rows = _zero_if(_begins(start, at, T), rows)
    return rows


@triton.jit
def _convolve(taps, bias, window, x, K: tl.constexpr):
    """Return bias + Σ_i taps_i ∘ (the window and x)_i."""
    y = bias + taps[K - 1] * x
    for i in tl.static_range(K - 1):
        y += taps[i] * window[i]
    return y


@triton.jit
def _moved(window, x):
    """Return the window one step later."""
    return (window + (x,))[1:]


@triton.jit
def _zeros(count: tl.constexpr, WIDTH: tl.constexpr):
    """Return so many rows of zeros."""
    rows = ()
    for _ in tl.static_range(count):
        rows = rows + (tl.zeros([WIDTH], tl.float32),)
    return rows


@triton.jit
def _taps(weight, bias, weight_row, c, inside, K: tl.constexpr):
    taps = ()
    for i in tl.static_range(K):
        taps = taps + (tl.load(weight + c * weight_row + i, mask=inside, other=0.0).to(tl.float32),)
    offset = tl.zeros_like(taps[0])
    if bias is not None:
        offset = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def forward(
    u, weight, bias, initial, start, order, total, y, final,
    T, D, pieces, u_batch, u_step, weight_row, initial_batch, initial_step,
    SILU: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(D, WIDTH)
    c = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    inside = c < D
    first = tl.program_id(0) // across % pieces * TIME
    b = (tl.program_id(0) // across // pieces).to(tl.int64)
    u += b * u_batch
    y += b * T * D
    count = T
    if initial is not None:
        initial += b * initial_batch
    if start is not None:
        start += b * T
    if order is not None:
        order += b * T
        count = tl.load(total + b).to(tl.int32)
    taps, offset = _taps(weight, bias, weight_row, c, inside, K)
    window = _window(u, initial, start, order, first, count, T, u_step, initial_step, c, inside, K)
    for i in range(0, TIME, STEPS):
        inputs = ()
        for s in tl.static_range(STEPS):  # before the first result is written, so that they are under way together
            at = first + i + s
            inputs = inputs + (tl.load(u + _row(order, at, T) * u_step + c, mask=inside & (at < count), other=0.0),)
        for s in tl.static_range(STEPS):
            at = first + i + s
            if start is not None:
                window = _zero_if(_begins(start, at, T), window)
            x = inputs[s].to(tl.float32)
            result = _convolve(taps, offset, window, x, K)
            window = _moved(window, x)
            if SILU:
                result *= sigmoid(result)
            if order is not None:
                result = tl.where(at < count, result, 0.0)
            tl.store(y + _row(order, at, T) * D + c, result.to(y.dtype.element_ty), mask=inside & (at < T))
    if (first <= count) & (count < first + TIME):  # what the next step would see
        final += b * (K - 1) * D
        window = _window(u, initial, start, order, count, count, T, u_step, initial_step, c, inside, K)
        tl.debug_barrier()  # of a single step, ``final`` may be ``initial``: all of it must have been read
        for j in tl.static_range(K - 1):
            tl.store(final + j * D + c, window[j].to(final.dtype.element_ty), mask=inside)


@triton.jit
def backward(
    u, weight, bias, initial, start, order, total, grad, grad_final, grad_u, grad_initial, partial,
    T, D, pieces, u_batch, u_step, weight_row, initial_batch, initial_step, grad_batch, grad_step, final_batch,
    final_step,
    SILU: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(D, WIDTH)
    c = tl.program_id(0) % across * WIDTH + tl.arange(0, WIDTH)
    inside = c < D
    program = tl.program_id(0) // across
    first = program % pieces * TIME
    b = (program // pieces).to(tl.int64)
    u += b * u_batch
    grad += b * grad_batch
    grad_final += b * final_batch
    grad_u += b * T * D
    count = T
    if initial is not None:
        initial += b * initial_batch
        grad_initial += b * (K - 1) * D
    if start is not None:
        start += b * T
    if order is not None:
        order += b * T
        count = tl.load(total + b).to(tl.int32)
    since = count - K  # the first input of the sequence that the final window is of, if it is that late
    if start is not None:
        for i in tl.static_range(K - 1):
            since = tl.where(_begins(start, count - (K - 2) + i, T), count - (K - 2) + i, since)
    taps, offset = _taps(weight, bias, weight_row, c, inside, K)
    window = _window(u, initial, start, order, first, count, T, u_step, initial_step, c, inside, K)
    # Gradients: of the taps, and of the inputs in the window, as far as they are known.
    sums, pending, sum_of_all = _zeros(K, WIDTH), _zeros(K - 1, WIDTH), tl.zeros([WIDTH], tl.float32)
    seen = first * 0 + (K - 1)  # how many inputs before a step it sees
    for i in range(0, (TIME + K - 1 + STEPS - 1) // STEPS * STEPS, STEPS):
        inputs, grads = (), ()
        for s in tl.static_range(STEPS):
            at = first + i + s
            row, known = _row(order, at, T), inside & (at < count)
            inputs = inputs + (tl.load(u + row * u_step + c, mask=known, other=0.0),)
            grads = grads + (tl.load(grad + row * grad_step + c, mask=known, other=0.0),)
        for s in tl.static_range(STEPS):
            at = first + i + s
            if start is not None:
                begins = _begins(start, at, T)
                window = _zero_if(begins, window)
                seen = tl.where(begins, 0, seen)
            x, d = inputs[s].to(tl.float32), grads[s].to(tl.float32)
            if SILU:
                d *= slope_of_silu(_convolve(taps, offset, window, x, K))
                d = tl.where(at < count, d, 0.0)  # whatever the window holds
            own = tl.where(i + s < TIME, d, 0.0)
            added, terms = (), ()
            for j in tl.static_range(K - 1):
                added = added + (sums[j] + own * window[j],)
                term = taps[j] * d
                if start is not None:
                    term = tl.where(seen >= K - 1 - j, term, 0.0)
                terms = terms + (pending[j] + term,)
            sums = added + (sums[K - 1] + own * x,)
            sum_of_all += own
            terms = terms + (taps[K - 1] * d,)
            window = _moved(window, x)
            seen = tl.minimum(seen + 1, K - 1)
            # The oldest input of the window is complete, but for the final window's part.
            done, e = terms[0], at - (K - 1)
            pending = terms[1:]
            held = (at >= count) & (at - count < K - 1) & (e >= since)
            done += tl.load(grad_final + (at - count) * final_step + c, mask=inside & held, other=0.0).to(tl.float32)
            mine = inside & (e >= first) & (e < T) & (i + s < TIME + K - 1)
            tl.store(grad_u + _row(order, e, T) * D + c, done.to(grad_u.dtype.element_ty), mask=mine)
            if initial is not None:
                mask = inside & (e < 0) & (first == 0)
                tl.store(grad_initial + at * D + c, done.to(grad_initial.dtype.element_ty), mask=mask)
    rows = K if bias is None else K + 1
    partial += program.to(tl.int64) * rows * D + c
    for j in tl.static_range(K):
        tl.store(partial + j * D, sums[j], mask=inside)
    if bias is not None:
        tl.store(partial + K * D, sum_of_all, mask=inside)
