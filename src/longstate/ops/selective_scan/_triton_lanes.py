# mypy: disable-error-code="no-untyped-def, assignment"
"""How the gradient of the selective scan lies in registers, and its sums over channels and states.

A program takes D = W L R channels of one sequence and N = M S states through time in tiles of T steps. What is there
for each step, channel and state has the axes [R, S, W, M, L] in each of T variables: a thread has R channels of S
states, a warp's 32 lanes are M times S states and L times R channels, and W warps share out the channels. So all steps
of a state are in one thread; of its channels and states each thread adds up some before lanes are.

Triton lays out an array's last axes over the lanes of a warp, the axis before them over the warps, and the others
within threads: of the axes above M and L, W, and R and S, if there are 32 M L lanes and W warps.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def settle(x):
    """Return x. A running sum over an axis of one keeps the compiler from laying out all that follows as memory has x:
    it is handed around once, through shared memory."""
    return tl.sum(tl.cumsum(x[None], 0), 0)


@triton.jit
def of_channels(x, R: tl.constexpr, S: tl.constexpr, W: tl.constexpr, M: tl.constexpr, L: tl.constexpr):
    """Return what there is for each step and channel [T, D] as a variable for each step. The sum over an axis of one
    keeps the compiler from computing it anew in each of the threads that want it."""
    T: tl.constexpr = x.shape[0]
    x = tl.sum(tl.reshape(x, [1, T, W * L * R]), 0)
    x = tl.permute(tl.reshape(x, [T, W, L, R]), [0, 3, 1, 2])
    return _steps(x[:, :, None, :, None, :].broadcast_to(T, R, S, W, M, L))


@triton.jit
def of_states(x, R: tl.constexpr, S: tl.constexpr, W: tl.constexpr, M: tl.constexpr, L: tl.constexpr):
    """Return what there is for each step and state [T, N] as a variable for each step."""
    T: tl.constexpr = x.shape[0]
    x = tl.permute(tl.reshape(x, [T, M, S]), [0, 2, 1])
    return _steps(x[:, None, :, None, :, None].broadcast_to(T, R, S, W, M, L))


@triton.jit
def _steps(x):
    """Return the slices of the first axis, exactly: the others' bits are replaced by zeros, which costs nothing where a
    thread holds them all."""
    bits, step = x.to(tl.int32, bitcast=True), tl.arange(0, x.shape[0])[:, None, None, None, None, None]
    slices = ()
    for i in tl.static_range(x.shape[0]):
        slices = slices + (tl.sum(tl.where(step == i, bits, 0), 0).to(tl.float32, bitcast=True),)
    return slices


@triton.jit
def over_states(values, M: tl.constexpr):
    """Return the sums over states [T, D], of a variable [R, W, M, L] for each step."""
    T: tl.constexpr = len(values)
    R: tl.constexpr = values[0].shape[0]
    W: tl.constexpr = values[0].shape[1]
    L: tl.constexpr = values[0].shape[3]
    steps: tl.constexpr = min(T, M)  # whose sums the lanes share out
    x = tl.reshape(_join(_folded(_flat(values), L, M)), [R, W, steps, M // steps, L, T // steps])
    if M > steps:
        x = tl.sum(x, 3, keep_dims=True)
    x = tl.permute(x, [2, 5, 1, 4, 0, 3])
    return tl.reshape(x, [T, W * L * R])


@triton.jit
def over_channels(values, L: tl.constexpr):
    """Return the sums over channels [T, N], of a variable [S, W, M, L] for each step."""
    T: tl.constexpr = len(values)
    S: tl.constexpr = values[0].shape[0]
    W: tl.constexpr = values[0].shape[1]
    M: tl.constexpr = values[0].shape[2]
    steps: tl.constexpr = min(T, L)
    x = tl.reshape(_join(_folded(_flat(values), 1, L)), [S, W, M, steps, L // steps, T // steps])
    if L > steps:
        x = tl.sum(x, 4, keep_dims=True)
    x = tl.permute(tl.sum(x, 1), [2, 4, 1, 0, 3])
    return tl.reshape(x, [T, M * S])


@triton.jit
def _flat(values):
    """Return variables [X, W, M, L] as [X, W, M L]."""
    flat = ()
    for i in tl.static_range(len(values)):
        x = values[i]
        flat = flat + (tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] * x.shape[3]]),)
    return flat


@triton.jit
def _folded(values, stride: tl.constexpr, count: tl.constexpr):
    """Add up over ``count`` lanes, ``stride`` apart, as far as there are variables to give each lane sums of its own:
    log₂(count) times, half of the lanes give theirs of the first half of the variables for those of the second."""
    if len(values) > 1 and count > 1:
        half: tl.constexpr = len(values) // 2
        fewer = ()
        for i in tl.static_range(half):
            fewer = fewer + (_fold(values[i], values[half + i], stride * count // 2),)
        return _folded(fewer, stride, count // 2)
    else:
        return values


@triton.jit
def _fold(x, y, stride: tl.constexpr):
    """Return, for pairs of lanes that are ``stride`` apart, the sum of x in the first and that of y in the second: one
    number for each lane to send, where two sums in both lanes would be two."""
    shape: tl.constexpr = [x.shape[0], x.shape[1], x.shape[2] // (2 * stride), 2, stride]
    second = tl.arange(0, 2)[None, None, None, :, None] == 1
    u, v = tl.reshape(x, shape), tl.reshape(y, shape)
    return tl.reshape(tl.where(second, v, u) + tl.flip(tl.where(second, u, v), 3), x.shape)


@triton.jit
def _join(values):
    """Return variables as one, with a last axis (its bits the first the highest) for which of them it is."""
    if len(values) > 1:
        half: tl.constexpr = len(values) // 2
        pairs = ()
        for i in tl.static_range(half):
            pairs = pairs + (tl.join(values[i], values[half + i]),)
        return _join(pairs)
    else:
        return values[0]
