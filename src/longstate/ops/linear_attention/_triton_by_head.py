# mypy: disable-error-code="no-untyped-def"
"""The kernel of the gradients where all key channels of a head decay alike.

With the state S before a chunk, the adjoint L of the state after it, M_ts = e^{G_t − G_s} (∂y_t · v_s) for s ≤ t of one
document and W = M ∘ (q kᵀ),

    ∂q_t = Σ_s M_ts Δ_s k_s + e^{G_t} S ∂y_t,    ∂k_s = Δ_s (Σ_t M_ts q_t + e^{G_c − G_s} L v_s),
    ∂(Δ_s v_s) = Σ_t e^{G_t − G_s} (q_t · k_s) ∂y_t + e^{G_c − G_s} Lᵀ k_s.

∂G_t is what y_t is sensitive to, Σ_s W_ts Δ_s + e^{G_t} q_t S ∂y_t, less what v_t is, Δ_t (Σ_r W_rt + e^{G_c − G_t} k_t
L v_t); and at the chunk's end, what L is. A log decay is in all later sums of its chunk.

The gradients of queries and those of keys are the same of other arguments, back in time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._triton_chunks import (
    chunk_factors,
    chunk_weights,
    decayed,
    first_steps,
    moved,
    operand,
    position,
    product,
    steps_of,
    store_tile,
    tile,
)


@triton.jit
def within(
    u, z, own, x, high, low, document, rows, u_step: tl.constexpr, z_step: tl.constexpr, height, P: tl.constexpr,
    CHUNK: tl.constexpr, VALUES: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return M, q kᵀ, and this with its decays (in ``REVERSE`` all ``[s t]``) of a chunk; see ``half``."""
    M = tl.zeros([CHUNK, CHUNK], tl.float32)
    for value in tl.range(0, P, VALUES, disable_licm=True):
        values = value + tl.arange(0, VALUES)
        z_tile = tile(z, rows, values, z_step, height, P)
        M = product(tile(u, rows, values, u_step, height, P), tl.trans(z_tile), PRECISION, M)
    plain, weights = product(own, tl.trans(x), PRECISION), tl.full([CHUNK, CHUNK], 1.0, tl.float32)
    weights = chunk_weights(weights, high, low, document, height, CHUNK, REVERSE)
    return M * weights, plain, plain * weights


@triton.jit
def of_other(high, low, document, i, other, height, CHUNK: tl.constexpr, REVERSE: tl.constexpr):
    """Return with what the steps of the other chunk come into a state that moves over it, and what is kept of that."""
    into, out, kept = chunk_factors(high, low, document, other, height, CHUNK)
    return into if REVERSE else out, tl.where(other == i, 1.0, kept)


@triton.jit
def store_decays(dg, change, end, document, first, chunk, at, rows, height, H: tl.constexpr, FIXED: tl.constexpr):
    """Store the gradients of log decays: sums of changes up to the chunk's end, and of what is sensitive beyond."""
    change = tl.cumsum(change, 0, reverse=True) + end
    if document is not None:
        change = tl.where(first_steps(document, first, rows, height), 0.0, change)
    if FIXED:
        tl.store(dg + chunk, tl.sum(tl.where(rows < height, change, 0.0), 0))
    else:
        tl.store(dg + at + rows * H, change, mask=rows < height)


@triton.jit
def half(
    u, z, own, x, high, low, dt, D, document, states, opposite, gradient, dv, dg, ddt, dD, u_batch,
    u_step: tl.constexpr, u_head, z_batch, z_step: tl.constexpr, z_head, own_batch, own_step: tl.constexpr, own_group,
    x_batch, x_step: tl.constexpr, x_group, dt_batch, dt_step: tl.constexpr, dt_head, D_head, D_value: tl.constexpr,
    line, i, batches, chunks, T, H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    PIECES: tl.constexpr, FIXED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
    PRECISION: tl.constexpr, REVERSE: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Compute what follows from states before a chunk, ∂q and its part of ∂G; in ``REVERSE``, what follows from the
    adjoints of those after it: the other gradients.

    States stand in memory for pairs of chunks. Of each pair, the chunk that has no state of its own moves one over the
    other chunk, and takes its product with what is ``opposite``: both are then there at the same time.

    Args:
        u: ∂y, and z is v, own is q and x is k; in ``REVERSE``, v, ∂y, k and q.
        gradient: That of ``own``.
        APART: Whether the chunk has no state of its own.
        line: The number of sequence, group and piece; ``i`` that of the chunk.
    """
    piece, shared = line % PIECES, (line // PIECES).to(tl.int64)
    batch, group = shared // GROUPS, shared % GROUPS
    other = tl.minimum(i + 1, chunks - 1) if REVERSE else tl.maximum(i - 1, 0)  # itself, for the last without one
    first, height, rows, keys = i.to(tl.int64) * CHUNK, T - i * CHUNK, tl.arange(0, CHUNK), tl.arange(0, KEYS)
    begin, more = other.to(tl.int64) * CHUNK, tl.where(other == i, 0, T - other * CHUNK)
    own += batch * own_batch + group * own_group + first * own_step
    x += batch * x_batch + group * x_group
    own_here = tile(own, rows, keys, own_step, height, K)
    x_here = tile(x + first * x_step, rows, keys, x_step, height, K)
    if APART:
        x_there = tile(x + begin * x_step, rows, keys, x_step, more, K)
    starts, starts_there = None, None
    if document is not None:
        starts, starts_there = document + batch * T + first, document + batch * T + begin
    total = tl.zeros([CHUNK, KEYS], tl.float32)
    # Fewer values at a time where most is held.
    PART: tl.constexpr = VALUES // 2 if REVERSE and APART and VALUES > 16 else VALUES
    for n in tl.range(H // GROUPS // PIECES, disable_licm=True):
        head = (group * PIECES + piece) * (H // GROUPS // PIECES) + n
        at, pair = (batch * T + first) * H + head, (batch * H + head) * chunks
        high_here, low_here = None if high is None else high + (pair + i) * CHUNK, None
        if low is not None:
            low_here = low + (pair + i) * CHUNK
        step = tl.full([CHUNK], 1.0, tl.float32)
        if dt is not None:
            dt_here = dt + batch * dt_batch + head * dt_head
            step = steps_of(dt_here + first * dt_step, rows, dt_step, height)
        u_here, z_here = u + batch * u_batch + head * u_head, z + batch * z_batch + head * z_head
        # Registers are scarce: the products within the chunk go first, and are gone when those with states come; q kᵀ,
        # which all heads share, is found again for each; and addresses are not found before the loops.
        M, plain, scores = within(
            u_here + first * u_step, z_here + first * z_step, own_here, x_here, high_here, low_here, starts, rows,
            u_step, z_step, height, P, CHUNK, VALUES, REVERSE, PRECISION,
        )  # fmt: skip
        if not REVERSE:
            M *= step[None, :]
        change = tl.sum(M * plain, 1)
        if REVERSE:
            scores, M = scores.to(states.dtype.element_ty), M * step[:, None]
        total = product(operand(M, x_here), x_here, PRECISION, total)
        into, out, through = chunk_factors(high_here, low_here, starts, i, height, CHUNK)
        factor = out if REVERSE else into
        if APART:
            high_there, low_there = None if high is None else high + (pair + other) * CHUNK, None
            if low is not None:
                low_there = low + (pair + other) * CHUNK
            factor_there, kept = of_other(
                high_there, low_there, starts_there, i, other, T - other * CHUNK, CHUNK, REVERSE
            )  # fmt: skip
            if dt is not None and not REVERSE:
                factor_there *= steps_of(dt_here + begin * dt_step, rows, dt_step, more)
        square = ((i // 2 * batches + batch) * H + head) * K * P
        through_states, carried = tl.zeros([CHUNK], tl.float32), 0.0
        for value in tl.range(0, P, PART, disable_licm=True):
            values = value + tl.arange(0, PART)
            state = tile(states + square, keys, values, P, K, P)
            if APART:
                z_tile = tile(z_here + begin * z_step, rows, values, z_step, more, P)
                state = moved(state, x_there, z_tile, factor_there, kept, PRECISION)
                if high is not None:
                    facing = tile(opposite + square, keys, values, P, K, P)
                    carried += tl.sum(state * facing.to(tl.float32))
                state = state.to(states.dtype.element_ty)
            if document is not None:
                state = tl.where(tl.max(factor, 0) > 0.0, state, 0.0)
            u_tile = tile(u_here + first * u_step, rows, values, u_step, height, P).to(tl.float32)
            if REVERSE or high is not None:
                of_state = product(own_here, state, PRECISION)
                through_states += tl.sum(of_state * u_tile, 1)
            if REVERSE:
                z_tile = tile(z_here + first * z_step, rows, values, z_step, height, P)
                dv_tile = of_state * factor[:, None]
                dv_tile = product(scores, z_tile, PRECISION, dv_tile) * step[:, None]
                if D is not None:
                    skip = tl.load(D + head * D_head + values * D_value, mask=values < P, other=0.0).to(tl.float32)
                    dv_tile += skip[None, :] * z_tile.to(tl.float32)
                    products = tl.sum(u_tile * z_tile.to(tl.float32), 0)
                    tl.store(dD + ((batch * chunks + i) * H + head) * P + values, products, mask=values < P)
                store_tile(dv + at * P, rows, values, H * P, height, P, dv_tile)
            u_tile = (u_tile * (factor * step if REVERSE else factor)[:, None]).to(states.dtype.element_ty)
            total = product(u_tile, tl.trans(state), PRECISION, total)
        through_states *= factor
        change += through_states
        if REVERSE:
            if ddt is not None:
                tl.store(ddt + at + rows * H, change.to(ddt.dtype.element_ty), mask=rows < height)
            change *= -step
        if high is not None:
            end = decayed(carried, through) if APART else 0.0
            if REVERSE:
                end += tl.sum(through_states * step, 0)
            store_decays(dg, change, end, starts, first, (batch * chunks + i) * H + head, at, rows, height, H, FIXED)
    at = (((piece * batches + batch) * T + first) * GROUPS + group) * K
    store_tile(gradient + at, rows, keys, GROUPS * K, height, K, total)


@triton.jit
def of_its_pair(i, given, REVERSE: tl.constexpr):
    """Compute a half of chunk i; see ``half``."""
    if i % 2 == (0 if REVERSE else 1):
        half(*given, REVERSE, True)
    else:
        half(*given, REVERSE, False)


@triton.jit
def gradients(
    dy, v, q, k, high, low, dt, D, document, states, later, dq, dk, dv, dg, ddt, dD, dy_batch,
    dy_step: tl.constexpr, dy_head, v_batch, v_step: tl.constexpr, v_head, q_batch, q_step: tl.constexpr, q_group,
    k_batch, k_step: tl.constexpr, k_group, dt_batch, dt_step: tl.constexpr, dt_head, D_head, D_value: tl.constexpr,
    T, H: tl.constexpr, GROUPS: tl.constexpr, K: tl.constexpr, P: tl.constexpr, PIECES: tl.constexpr,
    FIXED: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a chunk; those of q and k are sums over the heads of a piece of a group. Both halves of
    a chunk are in one grid, side by side, so that what one reads the other finds in the cache.

    Args:
        states: S for the even chunks ``[j b h k p]``.
        later: L for the odd chunks, and for the last one.
        dq: ``[i b t g k]``; ``dk`` likewise.
        dg: The two parts of each half ``[2 b t h]``; if decays are ``FIXED``, their sums over chunks ``[2 b j h]``.
        dD: Sums of ∂y v over chunks ``[b j h p]``.
        PIECES: Into how many pieces the heads of a group are cut.
    """
    line, i, lines, chunks = position(T, CHUNK)
    reverse, line, batches, part = line % 2, line // 2, lines // (2 * PIECES * GROUPS), 0
    if dg is not None:
        part = batches.to(tl.int64) * (chunks if FIXED else T) * H
    if reverse == 0:
        of_its_pair(
            i,
            (
                dy, v, q, k, high, low, dt, None, document, states, later, dq, None, dg, None, None,
                dy_batch, dy_step, dy_head, v_batch, v_step, v_head, q_batch, q_step, q_group, k_batch, k_step,
                k_group, dt_batch, dt_step, dt_head, 0, 0, line, i,
                batches, chunks, T, H, GROUPS, K, P, PIECES, FIXED, CHUNK, KEYS, VALUES, PRECISION,
            ), False
        )  # fmt: skip
    else:
        of_its_pair(
            i,
            (
                v, dy, k, q, high, low, dt, D, document, later, states, dk, dv, None if dg is None else dg + part, ddt,
                dD, v_batch, v_step, v_head, dy_batch, dy_step, dy_head, k_batch, k_step, k_group, q_batch, q_step,
                q_group, dt_batch, dt_step, dt_head, D_head, D_value, line, i,
                batches, chunks, T, H, GROUPS, K, P, PIECES, FIXED, CHUNK, KEYS, VALUES, PRECISION,
            ), True
        )  # fmt: skip
