# mypy: disable-error-code="no-untyped-def"
"""The kernels that carry a state through time: over chunks, between segments, and one step."""

from __future__ import annotations

import triton
import triton.language as tl

from .._triton_parts import LOG2E, softplus
from ._triton_chunks import chunk_factors, chunk_weights, decayed, operand, product, steps_of, store_tile, tile


@triton.jit
def outputs(
    q, k, v, state, scores, high, low, document, into, step, height, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return Σ_{s≤t} P_ts v_s + e^{G_t} q_t S for the steps of a chunk; see ``walk``."""
    rows = tl.arange(0, CHUNK)
    if scores is not None:
        weights = tile(scores, rows, rows, CHUNK, height, CHUNK).to(tl.float32)
    else:
        weights = chunk_weights(product(q, tl.trans(k), PRECISION), high, low, document, height, CHUNK)
    if step is not None:
        weights = weights * step[None, :]
    result = product(q, operand(state, q), PRECISION)
    if high is not None or document is not None:
        result = decayed(result, into[:, None])
    return product(operand(weights, v), v, PRECISION, result)


@triton.jit
def walk(
    v, q, k, high, low, dt, D, document, scores, through, initial, y, final, kept, left, v_batch,
    v_step: tl.constexpr, v_head, q_batch, q_step: tl.constexpr, q_group, k_batch, k_step: tl.constexpr, k_group,
    dt_batch, dt_step: tl.constexpr, dt_head, D_head, D_value: tl.constexpr, T, H: tl.constexpr,
    SHARED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, SEGMENT, BETWEEN, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk over the chunks of a segment with the state of some channels of a head.

    In a chunk before which the state is S, y_t = Σ_{s≤t} P_ts v_s + e^{G_t} q_t S + D v_t, and the state after it is
    e^{G_c} S + Σ_s e^{G_c − G_s} k_s (Δ_s v_s)ᵀ, with P_ts = e^{G_t − G_s} (q_t · k_s) Δ_s. Backwards in time the
    adjoint of the state is the same of other arguments: e^{G_c} S + Σ_t e^{G_t} q_t (∂y_t)ᵀ, with q for k and ∂y for v.

    Where decays are per channel, P (without Δ) comes as ``scores``, q and k come with their factors, and what is left
    of a state after each chunk as ``through``.

    Args:
        high: Running sums of the decays in chunks ``[b h j c]``, ``low`` their second part: see ``running_sums``.
        initial: States before segments ``[i b h k p]``; zero when absent.
        y: Outputs; none are computed when absent.
        final: The state after the last segment, or the states after all of them if ``left`` is wanted.
        kept: States before every ``BETWEEN`` chunks ``[j b h k p]``, forwards the last of them after all.
        left: What is left of a state after each segment ``[i b h k]``.
        SHARED: Heads that share a group; ``SEGMENT``: chunks of a segment.
    """
    blocks, segment = tl.cdiv(P, VALUES), tl.program_id(1)
    pair = (tl.program_id(0) // blocks).to(tl.int64)  # sequence and head
    batch, head, pairs = pair // H, pair % H, tl.num_programs(0) // blocks
    group, rows, keys = head // SHARED, tl.arange(0, CHUNK), tl.arange(0, KEYS)
    values = (tl.program_id(0) % blocks) * VALUES + tl.arange(0, VALUES)
    v, k = v + batch * v_batch + head * v_head, k + batch * k_batch + group * k_group
    if y is not None:
        q += batch * q_batch + group * q_group
    state, rest = tl.zeros([KEYS, VALUES], tl.float32), tl.full([KEYS], 1.0, tl.float32)
    if initial is not None:
        state += tile(initial + (segment * pairs + pair) * K * P, keys, values, P, K, P).to(tl.float32)
    begin, chunks = segment * SEGMENT, tl.cdiv(T, CHUNK)
    many = tl.minimum(SEGMENT, chunks - begin)
    for n in range(many):
        i = begin + (many - 1 - n if REVERSE else n)
        first, height = i.to(tl.int64) * CHUNK, T - i * CHUNK
        if kept is not None:
            if (i % BETWEEN == BETWEEN - 1) | (i == chunks - 1) if REVERSE else i % BETWEEN == 0:
                store_tile(kept + ((i // BETWEEN) * pairs + pair) * K * P, keys, values, P, K, P, state)
        v_here = tile(v + first * v_step, rows, values, v_step, height, P)
        k_here = tile(k + first * k_step, rows, keys, k_step, height, K)
        high_here = None if high is None else high + (pair * chunks + i) * CHUNK
        low_here = None if low is None else low + (pair * chunks + i) * CHUNK
        starts = None if document is None else document + batch * T + first
        into, out, kept_on = chunk_factors(high_here, low_here, starts, i, height, CHUNK)
        factor = into if REVERSE else out
        if dt is not None:
            step = steps_of(dt + batch * dt_batch + head * dt_head + first * dt_step, rows, dt_step, height)
            factor = factor * step
        if y is not None:
            q_here = tile(q + first * q_step, rows, keys, q_step, height, K)
            result = outputs(
                q_here, k_here, v_here, state, None if scores is None else scores + (pair * T + first) * CHUNK,
                high_here, low_here, starts, into, None if dt is None else step, height, CHUNK, PRECISION,
            )  # fmt: skip
            if D is not None:
                skip = tl.load(D + head * D_head + values * D_value, mask=values < P, other=0.0).to(tl.float32)
                result += skip[None, :] * v_here.to(tl.float32)
            store_tile(y + ((batch * T + first) * H + head) * P, rows, values, H * P, height, P, result)
        kept_on = tl.full([KEYS], 1.0, tl.float32) * kept_on
        if through is not None:
            kept_on = tl.load(through + (pair * chunks + i) * K + keys, mask=keys < K, other=0.0)
        written = operand(v_here.to(tl.float32) * factor[:, None], v_here)
        if high is not None or document is not None or through is not None:
            state = decayed(state, kept_on[:, None])
        state = product(tl.trans(k_here), written, PRECISION, state)
        rest *= kept_on
    if left is not None:
        store_tile(final + (segment * pairs + pair) * K * P, keys, values, P, K, P, state)
        tl.store(left + (segment * pairs + pair) * K + keys, rest, mask=(keys < K) & (tl.program_id(0) % blocks == 0))
    elif final is not None:
        if segment == (0 if REVERSE else tl.num_programs(1) - 1):
            store_tile(final + pair * K * P, keys, values, P, K, P, state)
            if kept is not None and not REVERSE:
                store_tile(kept + (tl.cdiv(chunks, BETWEEN) * pairs + pair) * K * P, keys, values, P, K, P, state)


@triton.jit
def combine(states, left, initial, MANY, K, P, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace what each segment adds to the state by the state before it: S_{i+1} = left_i S_i + states_i.

    Args:
        states: ``[i b h k p]``.
        left: ``[i b h k]``.
        initial: The state before the first segment ``[b h k p]``; zero when absent.
        MANY: The number of segments.
    """
    pair, pairs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = number < K * P
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + pair * K * P + number, mask=inside, other=0.0).to(tl.float32)
    for n in range(MANY):
        at = (MANY - 1 - n if REVERSE else n) * pairs + pair
        added = tl.load(states + at * K * P + number, mask=inside, other=0.0)
        factor = tl.load(left + at * K + number // P, mask=inside, other=0.0)
        tl.store(states + at * K * P + number, state, mask=inside)
        state = decayed(state, factor) + added


@triton.jit
def step(
    v, q, k, g, dt, D, document, initial, y, final, v_batch, v_head, q_batch, q_group, k_batch, k_group,
    g_batch, g_head, dt_batch, dt_head, D_head, bias, A_log, least, most, D_value: tl.constexpr, H: tl.constexpr,
    SHARED: tl.constexpr, K: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr, KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):  # fmt: skip
    """Take one step: S ← e^g S + k (Δ v)ᵀ, y = Sᵀ q + D v. A program reads its part of the state before it writes
    it.

    With A_log, Δ is the softplus of what comes and of a bias, between ``least`` and ``most``, and g = −Δ e^{A_log}.
    """
    blocks = tl.cdiv(P, VALUES)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = pair // H, pair % H
    group = head // SHARED
    keys, values = tl.arange(0, KEYS), (tl.program_id(0) % blocks) * VALUES + tl.arange(0, VALUES)
    there, wide = keys < K, values < P
    square = pair * K * P + keys[:, None] * P + values[None, :]
    state = tl.zeros([KEYS, VALUES], tl.float32)
    if initial is not None:
        state += tl.load(initial + square, mask=there[:, None] & wide[None, :], other=0.0).to(tl.float32)
    if g is not None:
        at = g + batch * g_batch + head * g_head
        if CHANNELS:
            state *= tl.exp2(tl.load(at + keys, mask=there, other=0.0).to(tl.float32) * LOG2E)[:, None]
        else:
            state *= tl.exp2(tl.load(at).to(tl.float32) * LOG2E)
    if dt is not None:
        size = tl.load(dt + batch * dt_batch + head * dt_head).to(tl.float32)
    if A_log is not None:
        size += tl.load(bias + head).to(tl.float32)
        size = tl.minimum(tl.maximum(softplus(size), least), most)
        rate = tl.exp2(tl.load(A_log + head).to(tl.float32) * LOG2E)
        state *= tl.exp2(-LOG2E * size * rate)
    if document is not None:
        state = tl.where(tl.load(document + batch) == 0, state, 0.0)
    q_here = tl.load(q + batch * q_batch + group * q_group + keys, mask=there, other=0.0).to(tl.float32)
    k_here = tl.load(k + batch * k_batch + group * k_group + keys, mask=there, other=0.0).to(tl.float32)
    v_here = tl.load(v + batch * v_batch + head * v_head + values, mask=wide, other=0.0).to(tl.float32)
    written = v_here
    if dt is not None:
        written = v_here * size
    state += k_here[:, None] * written[None, :]
    result = tl.sum(state * q_here[:, None], 0)
    if D is not None:
        result += tl.load(D + head * D_head + values * D_value, mask=wide, other=0.0).to(tl.float32) * v_here
    tl.store(y + pair * P + values, result.to(y.dtype.element_ty), mask=wide)
    tl.store(final + square, state, mask=there[:, None] & wide[None, :])
