# mypy: disable-error-code="no-untyped-def, assignment"
"""The norm on GPUs, with its weight and gate: each row is read once each way, or twice backwards where it is wide.

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
from .._triton_parts import sigmoid, slope_of_silu

# ELEMENTS is what a program holds at once: one row of one group, or several where they are narrow. Backwards it reads
# rows wider than COLUMNS in parts.
FORWARD = _triton.Tiles(
    "rms_norm",
    default=dict(ELEMENTS=2048, num_warps=4),
    interpreter=dict(ELEMENTS=64),
    space=dict(ELEMENTS=[1024, 2048, 4096], num_warps=[2, 4, 8]),
)
BACKWARD = _triton.Tiles(
    "rms_norm_backward",
    default=dict(ELEMENTS=2048, COLUMNS=4096, PROGRAMS=528, num_warps=4),
    interpreter=dict(ELEMENTS=64, COLUMNS=32, PROGRAMS=3),
    space=dict(ELEMENTS=[1024, 2048, 4096], PROGRAMS=[264, 528, 1056], num_warps=[4, 8]),
)


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
        factor = g * sigmoid(g)
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
def _read(x, grad, weight, gate, offset, c, known, inside, GATE_FIRST: tl.constexpr):
    """Return what is normed, the gradient of what was (before the weight), x, the gate and the weight."""
    given = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
    z, g, w = given, given, 1.0
    if weight is not None:
        w = offset + tl.load(weight + c, mask=known, other=0.0).to(tl.float32)
    if gate is not None:
        g = tl.load(gate, mask=inside, other=0.0).to(tl.float32)
        if GATE_FIRST:
            z = given * g * sigmoid(g)
        else:
            d *= g * sigmoid(g)
    return z, d, given, g, w


@triton.jit
def _backward(
    grad, x, weight, gate, grad_x, grad_gate, partial, rows, length, programs, eps, offset, x_batch, x_step, gate_batch,
    gate_step, grad_batch, grad_step,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    GATE_FIRST: tl.constexpr,
):  # fmt: skip
    """Of n = z r, r = (mean z² + eps)^(−1/2), and d its gradient, that of z is r (d − n mean(d n)).

    Rows are gone through in PARTS of their columns, so that registers suffice: once for the two sums, and once more.
    """
    program = tl.program_id(0) // GROUPS
    column = tl.arange(0, WIDTH)[None, :]
    c = tl.program_id(0) % GROUPS * SIZE + column
    sums = ()
    for _part in tl.static_range(PARTS):
        sums = sums + (tl.zeros([ROWS, WIDTH], tl.float32),)
    first = program * ROWS
    while first < rows:
        row = first + tl.arange(0, ROWS)
        there, to = (row < rows)[:, None], (row.to(tl.int64) * (GROUPS * SIZE))[:, None] + c
        from_x, from_grad = (
            x + _at(row, length, x_batch, x_step) + c,
            grad + _at(row, length, grad_batch, grad_step) + c,
        )
        from_gate = from_x if gate is None else gate + _at(row, length, gate_batch, gate_step) + c
        squares, products = tl.zeros([ROWS, WIDTH], tl.float32), tl.zeros([ROWS, WIDTH], tl.float32)
        for i in tl.static_range(PARTS):
            known, at = column + i * WIDTH < SIZE, i * WIDTH
            z, d, _, _, w = _read(
                from_x + at, from_grad + at, weight, None if gate is None else from_gate + at, offset, c + at, known,
                there & known, GATE_FIRST,
            )  # fmt: skip
            squares += z * z
            products += d * w * z
        r = tl.rsqrt(tl.sum(squares, 1) / SIZE + eps)[:, None]
        mean = tl.sum(products, 1)[:, None] * r / SIZE
        added = ()
        for i in tl.static_range(PARTS):
            known, at = column + i * WIDTH < SIZE, i * WIDTH
            inside = there & known
            z, d, given, g, w = _read(
                from_x + at, from_grad + at, weight, None if gate is None else from_gate + at, offset, c + at, known,
                inside, GATE_FIRST,
            )  # fmt: skip
            n = z * r
            added = added + (sums[i] + d * n,)
            into = r * (d * w - n * mean)
            if gate is not None:
                if GATE_FIRST:
                    through = given * into
                    into *= g * sigmoid(g)
                else:
                    through = tl.load(from_grad + at, mask=inside, other=0.0).to(tl.float32) * w * n
                through *= slope_of_silu(g)
                tl.store(grad_gate + to + at, through.to(grad_gate.dtype.element_ty), mask=inside)
            tl.store(grad_x + to + at, into.to(grad_x.dtype.element_ty), mask=inside)
        sums = added
        first += programs * ROWS
    if weight is not None:
        to_sums = partial + program.to(tl.int64) * (GROUPS * SIZE) + c
        for i in tl.static_range(PARTS):
            tl.store(to_sums + i * WIDTH, tl.sum(sums[i], 0)[None, :], mask=column + i * WIDTH < SIZE)


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
    options["PARTS"] = _triton.cdiv(options["WIDTH"], options.pop("COLUMNS"))
    options["WIDTH"] //= options["PARTS"]
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
