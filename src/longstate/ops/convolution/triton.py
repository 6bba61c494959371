"""The short convolution on GPUs: with bias, activation and window, one pass over the inputs each way."""

from __future__ import annotations

from typing import Any

import torch

from ..._shapes import Tensor
from ...timeline import Compaction
from .. import _triton
from . import _triton_kernels

FORWARD = _triton.Tiles(
    "short_convolution",
    default=dict(TIME=64, WIDTH=512, STEPS=4, num_warps=2),
    interpreter=dict(TIME=8, WIDTH=16, STEPS=2),
    space=dict(TIME=[32, 64, 128, 256], WIDTH=[256, 512, 1024], STEPS=[2, 4, 8], num_warps=[1, 2, 4]),
)
BACKWARD = _triton.Tiles(
    "short_convolution_backward",
    default=dict(TIME=128, WIDTH=256, STEPS=4, num_warps=2),
    interpreter=dict(TIME=8, WIDTH=16, STEPS=4),
    space=dict(TIME=[64, 128, 256], WIDTH=[128, 256, 512], STEPS=[2, 4, 8], num_warps=[1, 2, 4]),
)


def short(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Return outputs and the final window."""
    batch, length, width = u.shape
    taps = weight.shape[1]
    y, final = u.new_empty(u.shape), _triton.final_state(initial, (batch, taps - 1, width), u, length == 1, u.dtype)
    tensors, numbers = _given(u, weight, bias, initial, start, valid)
    # A program more than the steps need, where they fill the others: it finds the window after the last.
    tiles = _tiles(FORWARD, u, length, taps)
    pieces = length // tiles["TIME"] + 1
    grid = (_triton.cdiv(width, tiles["WIDTH"]) * pieces * batch,)
    _triton.launch(
        _triton_kernels.forward, grid, *tensors, y, final, length, width, pieces, *numbers, SILU=silu, K=taps, **tiles
    )
    return y, final


def short_backward(
    grad: Tensor,
    grad_final: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of u, weight, bias and initial window, those of what is absent empty."""
    batch, length, width = u.shape
    taps = weight.shape[1]
    grad, grad_final = _in_rows(grad), _in_rows(grad_final)
    grad_u = u.new_empty(u.shape)
    grad_initial = u.new_empty(0) if initial is None else initial.new_empty(initial.shape)
    tensors, numbers = _given(u, weight, bias, initial, start, valid)
    tiles = _tiles(BACKWARD, u, length, taps)
    pieces = max(1, _triton.cdiv(length, tiles["TIME"]))
    partial = weight.new_empty(pieces * batch, taps + (bias is not None), width, dtype=torch.float32)
    grid = (_triton.cdiv(width, tiles["WIDTH"]) * pieces * batch,)
    tensors += [grad, grad_final, grad_u, grad_initial, partial]
    numbers += [*grad.stride()[:2], *grad_final.stride()[:2]]
    _triton.launch(
        _triton_kernels.backward, grid, *tensors, length, width, pieces, *numbers, SILU=silu, K=taps, **tiles
    )
    sums = partial.sum(0)
    grad_bias = u.new_empty(0) if bias is None else sums[taps].to(bias.dtype)
    return grad_u, sums[:taps].T.to(weight.dtype), grad_bias, grad_initial


def _tiles(tiles: _triton.Tiles, u: Tensor, length: int, taps: int) -> dict[str, Any]:
    """Return tiles no larger than the problem, and smaller for more taps than four, so that all are in registers."""
    use, more = tiles(u, b=u.shape[0], t=length, d=u.shape[2], k=taps), _triton.power_of_2(_triton.cdiv(taps, 4))
    use["TIME"] = min(use["TIME"], _triton.power_of_2(length + 1))
    use["WIDTH"] = min(max(use["WIDTH"] // more, 1), _triton.power_of_2(u.shape[2]))
    use["STEPS"] = min(max(use["STEPS"] // more, 1), use["TIME"])
    return use


def _in_rows(x: Tensor) -> Tensor:
    """Return a tensor whose last axis lies side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _given(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    start: Tensor | None,
    valid: Tensor | None,
) -> tuple[list[Any], list[int]]:
    """Return what the kernels begin with: tensors, among them the order of the steps that count, and strides."""
    u, weight = _in_rows(u), _in_rows(weight)
    bias = None if bias is None else bias.contiguous()
    initial = None if initial is None else _in_rows(initial)
    order = total = None
    if valid is not None:
        compaction = Compaction.of(valid)
        order, total = compaction.order, compaction.total
        start = None if start is None else compaction.start(start)
    if start is not None:
        start = start.contiguous().view(torch.uint8)
    strides = [*u.stride()[:2], weight.stride(0), *((0, 0) if initial is None else initial.stride()[:2])]
    return [u, weight, bias, initial, start, order, total], strides
