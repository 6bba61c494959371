"""The compiled kernel: for a few rows, whose time is that of reading the weights once."""

from __future__ import annotations

import torch

from ... import native
from ..._shapes import Tensor
from .._register import unobserved

ROWS = 8  # that the kernel takes at most; more are better multiplied by blocks, as torch does
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
_FLOATS = (torch.float32, torch.bfloat16)


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, wanted: torch.dtype | None) -> str:
    """Return why the kernel does not take such arguments; "" if it does.

    Called for every token and layer, so without loops over the arguments.
    """
    if native.kernels is None:
        return native.reason
    # Before anything is asked of sizes: traced, the answer would be a promise about them.
    if not (unobserved(x, weight) if bias is None else unobserved(x, weight, bias)) or torch.is_autocast_enabled("cpu"):
        return "its kernel has no gradient, and autocast, torch.compile and torch.export do not see it"
    dtype, kind = x.dtype, weight.dtype
    if not (x.is_cpu and weight.is_cpu) or dtype not in _FLOATS or (kind is not dtype and kind is not torch.int8):
        return "its kernel takes float32 and bfloat16 on the CPU, and weights of the same type or int8"
    if bias is not None and (bias.dtype not in _FLOATS if wanted else bias.dtype is not dtype):
        return "its kernel takes a bias of the type of x; in float32 or bfloat16, if the result's type is given"
    if (scale is not None and scale.dtype not in _FLOATS) or (wanted is not None and wanted not in _FLOATS):
        return "its kernel takes scales, and gives results, in float32 and bfloat16"
    outputs, inputs = weight.shape
    if x.size(-1) != inputs or not 0 < x.numel() <= ROWS * inputs or not outputs:
        return f"its kernel takes 1 to {ROWS} rows, as long as those of the weights"
    if (weight.stride(1) != 1 and inputs > 1) or (bias is not None and bias.shape != (outputs,)):
        return "its kernel takes weights whose inputs lie side by side, and a bias for each output"
    return ""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Return what ``reference.linear`` returns."""
    assert native.kernels is not None
    outputs, inputs = weight.shape
    rows = x if x.ndim == 3 else x.reshape(1, -1, inputs)
    batch, length, _ = rows.shape
    apart, row, side = rows.stride()
    if side != 1 and inputs > 1:
        rows = rows.contiguous()
        apart, row, _ = rows.stride()
    y = rows.new_empty((batch, length, outputs), dtype=dtype)
    group, factors, added = inputs, (0, 0, 0, False), (0, 0, 0, False)
    if scale is not None:
        scale = scale.contiguous()
        groups = scale.shape[1]
        group, factors = inputs // groups, (scale.data_ptr(), 0, groups, scale.dtype is torch.bfloat16)
    if bias is not None:
        bias = bias.contiguous()
        added = (bias.data_ptr(), 0, 0, bias.dtype is torch.bfloat16)
    native.kernels.linear(
        batch,
        length,
        inputs,
        outputs,
        native.threads(),
        KINDS[weight.dtype],
        group,
        rows.data_ptr(),
        apart,
        row,
        x.dtype is torch.bfloat16,
        weight.data_ptr(),
        weight.stride(0),
        *factors,
        *added,
        y.data_ptr(),
        length * outputs,
        outputs,
        y.dtype is torch.bfloat16,
    )
    return y if x.ndim == 3 else y.view(*x.shape[:-1], outputs)
