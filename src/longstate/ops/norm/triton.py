# mypy: disable-error-code="no-untyped-def"
"""The norm on GPUs, with its weight and gate: each row is read once each way.

Backwards, a program goes through many rows and adds up the gradient of the weight as it does; statistics are computed
again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..._shapes import Tensor
from .. import _triton

# ELEMENTS is what a program holds at once: one row of one group, or several where they are narrow.
FORWARD = _triton.Tiles(
    "rms_norm",
    default=dict(ELEMENTS=2048, num_warps=4),
    interpreter=dict(ELEMENTS=64),
    space=dict(ELEMENTS=[1024, 2048, 4096], num_warps=[2, 4, 8]),
)
BACKWARD = _triton.Tiles(
    "rms_norm_backward",
    default=dict(ELEMENTS=2048, PROGRAMS=528, num_warps=4),
    interpreter=dict(ELEMENTS=64, PROGRAMS=3),
    space=dict(ELEMENTS=[1024, 2048, 4096], PROGRAMS=[264, 528, 1056], num_warps=[4, 8]),
)


@triton.jit
def _sigmoid(x):
    e = tl.exp2(-1.4426950408889634 * tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1 + e)


@triton.jit
def _at(row, length, batch_stride, step_stride):
    """Return where rows of ``[b t d]`` begin."""
    row = row.to(tl.int64)
    return (row // length * batch_stride + row % length * step_stride)[:, None]


@triton.jit
def _forward(
    x, weight, gate, y, rows, length, eps, offset, x_batch, x_step, gate_batch, gate_step,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROUND: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // GROUPS * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)[None, :]  # of two axes, so that weights lie in registers as inputs do
    c = tl.program_id(0) % GROUPS * SIZE + column
    inside = (row < rows)[:, None] & (column < SIZE)
    z = tl.load(x + _at(row, length, x_batch, x_step) + c, mask=inside, other=0.0).to(tl.float32)
    factor = tl.full([ROWS, WIDTH], 1.0, tl.float32)
    if gate is not None:
        g = tl.load(gate + _at(row, length, gate_batch, gate_step) + c, mask=inside, other=0.0).to(tl.float32)
        factor = g * _sigmoid(g)
        if GATE_FIRST:
            z *= factor
    result = z * tl.rsqrt(tl.sum(z * z, 1) / SIZE + eps)[:, None]
    if weight is not None:
        w = tl.load(weight + c, mask=column < SIZE, other=0.0)
        if ROUND:
            result = result.to(w.dtype).to(tl.float32)
        result *= offset + w.to(tl.float32)
    if gate is not None and not GATE_FIRST:
        result *= factor
    to = y + (row.to(tl.int64) * (GROUPS * SIZE))[:, None] + c
    tl.store(to, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad, x, weight, gate, grad_x, grad_gate, partial, rows, length, programs, eps, offset, x_batch, x_step, gate_batch,
    gate_step, grad_batch, grad_step,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, GATE_FIRST: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) // GROUPS
    column = tl.arange(0, WIDTH)[None, :]
    c = tl.program_id(0) % GROUPS * SIZE + column
    w = tl.full([1, WIDTH], 1.0, tl.float32)
    if weight is not None:
        w = offset + tl.load(weight + c, mask=column < SIZE, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, WIDTH], tl.float32)
    first = program * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < SIZE)
        to = (row.to(tl.int64) * (GROUPS * SIZE))[:, None] + c
        given = tl.load(x + _at(row, length, x_batch, x_step) + c, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(grad + _at(row, length, grad_batch, grad_step) + c, mask=inside, other=0.0).to(tl.float32)
        z = given
        if gate is not None:
            g = tl.load(gate + _at(row, length, gate_batch, gate_step) + c, mask=inside, other=0.0).to(tl.float32)
            s = _sigmoid(g)
            factor = g * s
            slope = s * (1 + tl.minimum(tl.maximum(g, -104.0), 104.0) * _sigmoid(-g))
            if GATE_FIRST:
                z = given * factor
            else:
                slope *= d * w
                d *= factor
        # Of n = z r, r = (mean z² + eps)^(−1/2), and d its gradient, that of z is r (d − n mean(d n)).
        r = tl.rsqrt(tl.sum(z * z, 1) / SIZE + eps)[:, None]
        n = z * r
        sums += d * n
        d *= w
        into = r * (d - n * (tl.sum(d * n, 1) / SIZE)[:, None])
        if gate is not None:
            through = slope * (given * into if GATE_FIRST else n)
            tl.store(grad_gate + to, through.to(grad_gate.dtype.element_ty), mask=inside)
            if GATE_FIRST:
                into *= factor
        tl.store(grad_x + to, into.to(grad_x.dtype.element_ty), mask=inside)
        first += programs * ROWS
    if weight is not None:
        at = partial + program.to(tl.int64) * (GROUPS * SIZE) + c
        tl.store(at, tl.sum(sums, 0)[None, :], mask=column < SIZE)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    groups: int,
    offset: float,
    norm_before_gate: bool,
) -> Tensor:
    """Return what ``reference.rms_norm`` returns."""
    y = x.new_empty(x.shape, dtype=(x if weight is None else weight).dtype)
    x, gate = _in_rows(x), None if gate is None else _in_rows(gate)
    weight = None if weight is None else weight.contiguous()
    rows, options = _options(FORWARD, x, groups, 1024)
    # As in the reference: what was normed takes the weight's type before the weight multiplies it.
    narrow, gated_after = weight is not None and weight.dtype != torch.float32, gate is not None and norm_before_gate
    grid = (_triton.cdiv(rows, options["ROWS"]) * groups,)
    numbers = [rows, x.shape[1], float(eps), float(offset), *x.stride()[:2], *_strides(gate)]
    options |= dict(GATE_FIRST=not norm_before_gate, ROUND=narrow and not gated_after and not offset)
    _triton.launch(_forward, grid, x, weight, gate, y, *numbers, **options)
    return y


def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    gate: Tensor | None,
    eps: float,
    groups: int,
    offset: float,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and gate, those of what is absent empty."""
    grad_x = x.new_empty(x.shape)
    grad_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    grad, x, gate = _in_rows(grad), _in_rows(x), None if gate is None else _in_rows(gate)
    weight = None if weight is None else weight.contiguous()
    rows, options = _options(BACKWARD, x, groups, 512)
    programs = min(_triton.cdiv(options.pop("PROGRAMS"), groups), _triton.cdiv(rows, options["ROWS"]))
    partial = None if weight is None else x.new_empty(programs, x.shape[2], dtype=torch.float32)
    numbers = [rows, x.shape[1], programs, float(eps), float(offset), *x.stride()[:2], *_strides(gate)]
    tensors = [x, weight, gate, grad_x, grad_gate, partial]
    numbers += grad.stride()[:2]
    _triton.launch(
        _backward, (programs * groups,), grad, *tensors, *numbers, GATE_FIRST=not norm_before_gate, **options
    )
    grad_weight = x.new_empty(0) if weight is None or partial is None else partial.sum(0).to(weight.dtype)
    return grad_x, grad_weight, grad_gate


def _options(tiles: _triton.Tiles, x: Tensor, groups: int, most: int) -> tuple[int, dict[str, Any]]:
    """Return the number of rows, and how they are laid out: at most so many numbers of one a warp, up to 16 warps."""
    size = x.shape[2] // groups
    rows = x.shape[0] * x.shape[1] if size else 0
    use = tiles(x, rows=rows, size=size)
    width = _triton.power_of_2(size)
    use["num_warps"] = max(use["num_warps"], min(16, width // most))
    return rows, use | dict(GROUPS=groups, SIZE=size, WIDTH=width, ROWS=max(1, use.pop("ELEMENTS") // width))


def _in_rows(x: Tensor) -> Tensor:
    """Return ``[… d]`` as ``[b t d]`` whose last axis lies side by side, without a copy where its strides allow."""
    if x.ndim != 3:
        x = x.reshape(math.prod(x.shape[:-2]), *([1] * (2 - x.ndim)), *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))
