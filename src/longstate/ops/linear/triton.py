"""The product of a few rows with weights on GPUs, and in the same kernel what stands before and after it in a layer.

It takes the time of reading the weights once. A kernel of its own for a norm or a convolution of one token would take
about as long as a tenth of them: it waits for the one before it, and the memory waits with it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from ..._shapes import Tensor
from .. import _triton
from . import _triton_kernels

# With EARLY, a kernel starts and asks for its first weights while the one before it is still at work: whole steps show
# what that gives, not one kernel by itself.
TILES = _triton.Tiles(
    "token_product",
    default=dict(ROWS=8, BLOCK=1024, EARLY=0, num_warps=4),
    interpreter=dict(ROWS=32, BLOCK=32),
    space=dict(ROWS=[2, 4, 8, 16], BLOCK=[512, 1024, 2048], num_warps=[2, 4, 8]),
)


class Norm(NamedTuple):
    """The norm of the inputs, as in ``ops.rms_norm``."""

    weight: Tensor | None
    gate: Tensor | None
    eps: float
    groups: int
    offset: float
    norm_before_gate: bool


class Taps(NamedTuple):
    """A short convolution with SiLU of the outputs from ``first`` on; its window ``[b k−1 d]`` moves on in place."""

    weight: Tensor
    bias: Tensor | None
    window: Tensor
    first: int


_KINDS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


def product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    norm: Norm | None = None,
    taps: Taps | None = None,
    residual: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Return what ``ops.linear`` makes of a few rows, normed before; after it some of the outputs convolved, or all of
    them times a factor added to a residual stream.

    Args:
        x: Rows ``[b i]``.
        weight: Weights ``[o i]``.
        bias: What is added to the product.
        scale: Of int8 weights: a factor for each output and group of inputs.
        dtype: The type of the product.
        norm: The norm of the rows.
        taps: The convolution of some of the outputs.
        residual: What the outputs are added to ``[b o]``, whose type the result has then.
        factor: What the outputs are multiplied with before.
    """
    (batch, inputs), outputs = x.shape, len(weight)
    y = x.new_empty((batch, outputs), dtype=dtype if residual is None else residual.dtype)
    use = TILES(x, rows=batch, inputs=inputs, outputs=outputs)
    norms = norm or Norm(None, None, 1.0, 1, 0.0, False)
    use["BLOCK"] = max(8, min(use["BLOCK"], _triton.power_of_2(inputs // norms.groups)))
    convolution = (None, None, None) if taps is None else (taps.weight, taps.bias, taps.window)
    rows = (0 if z is None else z.stride(0) for z in (x, norms.gate, residual))
    numbers = (norms.eps, norms.offset, factor, inputs, outputs)
    columns, many = (0, 0, 1) if taps is None else (taps.first, *taps.weight.shape), use.pop("ROWS")
    options = dict(launch_pdl=True) if use["EARLY"] and not _triton.interpreted else {}
    _triton.launch(
        _triton_kernels.product, (_triton.cdiv(outputs, many),),
        x, weight, bias, scale, norms.weight, norms.gate, *convolution, residual, y, *rows, *numbers, *columns[:2],
        BATCH=batch, NORM=norm is not None, GROUPS=norms.groups, GATE_FIRST=not norms.norm_before_gate,
        PARTS=0 if scale is None else scale.shape[1], TAPS=columns[2], KIND=_KINDS[dtype], ROWS=many, **use, **options,
    )  # fmt: skip
    return y
