# mypy: disable-error-code="no-untyped-def"
"""Kernels that go from chunk to chunk with a state, or its gradient, or take one step: a program for some columns."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_parts import LOG2E
from ._triton_parts import load, product, store


@triton.jit
def passed(through, state, at, K: tl.constexpr, KB: tl.constexpr, CHANNELS: tl.constexpr):
    """Return what is left of a state after a chunk; of no number nothing, where a sequence begins."""
    if CHANNELS:
        channel = tl.arange(0, KB)
        left = tl.load(through + at * K + channel, mask=channel < K, other=0)[:, None]
    else:
        left = tl.load(through + at)
    return tl.where(left == 0, 0.0, left * state)


@triton.jit
def forward(
    k, written, erase, into, out, through, initial, states, kept, final, k_b, k_t, k_g, length, chunks, heads,
    repeats, lines, every, keep,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk over ``every`` chunks, each program from an initial state of its own: U ← U − W S, S ← through S + K_outᵀ U.

    U takes the place of what is ``written`` in the beginning. Stores the state before each chunk (``states``), the
    ``final`` state of the sequence and those every ``keep`` chunks (``kept``). Without ``states``, the state after each
    walk is stored alone (``final``); and without ``written``, that is Φ of S ← Φ S, from the identity.
    """
    line, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * PB + tl.arange(0, PB)
    batch, head, first = line // heads, line % heads, tl.program_id(2) * every
    row, channel = tl.arange(0, C), tl.arange(0, KB)
    KIND: tl.constexpr = erase.dtype.element_ty
    size: tl.constexpr = K * P
    walk = tl.program_id(2) * lines + line
    state = tl.zeros([KB, PB], tl.float32)
    if initial is not None:
        state = load(initial + walk * size, channel, P, K, column, P)
    if written is None:
        state = (channel[:, None] == column[None, :]).to(tl.float32)
    k += batch * k_b + (head // repeats) * k_g
    last = tl.minimum(first + every, chunks)
    for n in range(first, last):
        at, rows = line * chunks + n, length - n * C
        step = (at - line * chunks) * C
        if kept is not None:
            if n % keep == 0:
                store(kept + (n // keep * lines + line) * size, channel, P, K, column, P, state)
        narrow = state.to(KIND)
        if states is not None:
            store(states + at * size, channel, P, K, column, P, narrow)
        here = product(load(erase + at * C * K, row, K, C, channel, K), narrow, PRECISION)
        if into is not None:
            here = tl.where(tl.load(into + at * C + row)[:, None] == 0, 0.0, here)
        if written is not None:
            here += load(written + at * C * P, row, P, C, column, P)
            if states is not None:
                store(written + at * C * P, row, P, C, column, P, here)
        if out is not None:
            kept_of = tl.load(out + at * C + row)[:, None]
            here = tl.where(kept_of == 0, 0.0, here * kept_of)
        if through is not None:
            state = passed(through, state, at, K, KB, CHANNELS)
        key = load(k + step * k_t, row, k_t, rows, channel, K).to(KIND)
        state += product(tl.trans(key), here.to(KIND), PRECISION)
    if states is None:
        store(final + walk * size, channel, P, K, column, P, state)
    elif last == chunks:
        if kept is not None:
            store(kept + ((chunks + keep - 1) // keep * lines + line) * size, channel, P, K, column, P, state)
        if final is not None:
            store(final + line * size, channel, P, K, column, P, state)


@triton.jit
def backward(
    q, k, grad, source, erase, into, out, through, last, laters, first, q_b, q_t, q_g, k_b, k_t, k_g, grad_b,
    grad_t, grad_h, length, chunks, heads, repeats, lines, every,
    K: tl.constexpr, P: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr,
    CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk back over ``every`` chunks, each program from the gradient R of its last state (``last``).

        X ← scoresᵀ ∂y + K_out R,    R ← through R + Q_intoᵀ ∂y − K_intoᵀ diag(β) Tᵀ X,    ∂U = X.

    X takes the place of scoresᵀ ∂y (``source``); the gradients of the state after each chunk (``laters``) and of the
    initial one (``first``) are stored. Without ``laters``, that of the state before each walk is stored alone.
    """
    line, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * PB + tl.arange(0, PB)
    batch, head, begin = line // heads, line % heads, tl.program_id(2) * every
    row, channel = tl.arange(0, C), tl.arange(0, KB)
    KIND: tl.constexpr = erase.dtype.element_ty
    size: tl.constexpr = K * P
    walk = tl.program_id(2) * lines + line
    later = tl.zeros([KB, PB], tl.float32)
    if last is not None:
        later = load(last + walk * size, channel, P, K, column, P)
    q += batch * q_b + (head // repeats) * q_g
    k += batch * k_b + (head // repeats) * k_g
    grad += batch * grad_b + head * grad_h
    end = tl.minimum(begin + every, chunks)
    for back in range(end - begin):
        n = end - 1 - back
        at, rows = line * chunks + n, length - n * C
        step = (at - line * chunks) * C
        narrow = later.to(KIND)
        if laters is not None:
            store(laters + at * size, channel, P, K, column, P, narrow)
        key = load(k + step * k_t, row, k_t, rows, channel, K).to(KIND)
        here = product(key, narrow, PRECISION)
        if out is not None:
            here *= tl.load(out + at * C + row)[:, None]
        here += load(source + at * C * P, row, P, C, column, P)
        if laters is not None:
            store(source + at * C * P, row, P, C, column, P, here)
        came = load(grad + step * grad_t, row, grad_t, rows, column, P).to(KIND)
        if not CHANNELS:
            if into is not None:
                came = (came * tl.load(into + at * C + row)[:, None]).to(KIND)
        if through is not None:
            later = passed(through, later, at, K, KB, CHANNELS)
        query = load(q + step * q_t, row, q_t, rows, channel, K).to(KIND)
        later += product(tl.trans(query), came, PRECISION)
        erased = load(erase + at * C * K, row, K, C, channel, K)
        later += product(tl.trans(erased), here.to(KIND), PRECISION)
    if laters is None or begin == 0:
        store(first + walk * size, channel, P, K, column, P, later)


@triton.jit
def combine(
    ends, maps, given, states, lines, walks,
    K: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Store the state before each walk, S ← Φ S + E from the one ``given``, where E is what a walk ends with from
    zero (``ends``) and Φ its map (``maps``); or ``BACK`` from walk to walk the gradient of the state after each, with
    Φᵀ for Φ.

    Where a row of Φ is zero, nothing of S is left there, were it no number.
    """
    line, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * PB + tl.arange(0, PB)
    channel = tl.arange(0, ROWS)
    state = tl.zeros([ROWS, PB], tl.float32)
    if given is not None:
        state = load(given + line * K * P, channel, P, K, column, P)
    for i in range(walks):
        n = i
        if BACK:
            n = walks - 1 - i
        at = (n * lines + line) * K
        store(states + at * P, channel, P, K, column, P, state)
        tl.debug_barrier()  # rows of the state are read again, some at a time, by other threads than wrote them
        state = tl.zeros([ROWS, PB], tl.float32)
        left = tl.zeros([ROWS], tl.int32)
        for some in range(0, K, KB):
            inner = some + tl.arange(0, KB)
            if BACK:
                part = tl.trans(load(maps + at * K, inner, K, K, channel, K))
            else:
                part = load(maps + at * K, channel, K, K, inner, K)
            left = tl.maximum(left, tl.max((part != 0).to(tl.int32), 1))
            state += product(part, load(states + at * P, inner, P, K, column, P), "tf32x3")
        state = tl.where(left[:, None] == 0, 0.0, state) + load(ends + at * P, channel, P, K, column, P)


@triton.jit
def step(
    q, k, v, beta, g, start, initial, y, final,
    q_b, _q, q_g, k_b, _k, k_g, v_b, _v, v_h, beta_b, _beta, beta_h, g_b, _g, g_h, heads, repeats,
    K: tl.constexpr, P: tl.constexpr, KB: tl.constexpr, PB: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Take one step: S ← e^g S, u = β (v − Sᵀ k), y = Sᵀ q + (q · k) u, S ← S + k uᵀ, in one pass over the state."""
    line, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * PB + tl.arange(0, PB)
    batch, head, channel = line // heads, line % heads, tl.arange(0, KB)
    group, there, inside = head // repeats, channel < K, column < P
    query = tl.load(q + batch * q_b + group * q_g + channel, mask=there, other=0).to(tl.float32)
    key = tl.load(k + batch * k_b + group * k_g + channel, mask=there, other=0).to(tl.float32)
    value = tl.load(v + batch * v_b + head * v_h + column, mask=inside, other=0).to(tl.float32)
    strength = tl.load(beta + batch * beta_b + head * beta_h).to(tl.float32)
    state = tl.zeros([KB, PB], tl.float32)
    if initial is not None:
        state = load(initial + line * K * P, channel, P, K, column, P)
        if g is not None:
            g += batch * g_b + head * g_h
            if CHANNELS:
                state *= tl.exp2(tl.load(g + channel, mask=there, other=0).to(tl.float32) * LOG2E)[:, None]
            else:
                state *= tl.exp2(tl.load(g).to(tl.float32) * LOG2E)
        if start is not None:
            state = tl.where(tl.load(start + batch), 0.0, state)
    written = strength * (value - tl.sum(key[:, None] * state, 0))
    read = tl.sum(query[:, None] * state, 0) + tl.sum(query * key, 0) * written
    tl.store(y + line * P + column, read.to(y.dtype.element_ty), mask=inside)
    store(final + line * K * P, channel, P, K, column, P, state + key[:, None] * written[None, :])
