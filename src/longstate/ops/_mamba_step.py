"""All of a Mamba mixer for one token of each sequence, in one call of compiled kernels.

What it computes is what the mixer computes by the ops ``linear``, ``convolution.short`` and ``selective_scan``: the
same kernels run in the same order (Δ alone is not rounded to bfloat16 between its product and its bias). Only the time
between them is saved, which is longer than they take themselves where weights are few or narrow.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .. import native
from .._shapes import Float, Tensor
from ._register import unobserved
from .linear.cpu import KINDS, ROWS

_KINDS = (torch.float32, torch.bfloat16)
_NONE = (0, 0, 0, False)


class Product(NamedTuple):
    """What a linear layer multiplies with: weights ``[o i]``, and of int8 ones scales ``[o groups]``."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


class Weights(NamedTuple):
    """What a Mamba mixer is made of."""

    in_proj: Product
    taps: Float[Tensor, "d k"]
    conv_bias: Float[Tensor, " d"] | None
    x_proj: Product
    dt_proj: Product
    A_log: Float[Tensor, "d n"]
    D: Float[Tensor, " d"]
    out_proj: Product


def takes(x: Float[Tensor, "b t d"], weights: Weights, conv: Tensor, ssm: Tensor) -> bool:
    """Return whether the kernels take a step: of one token each of a few sequences, with nobody looking on."""
    if native.kernels is None or x.shape[1] != 1 or not 0 < x.shape[0] <= ROWS or x.dtype not in _KINDS:
        return False
    small = (weights.taps, weights.A_log, weights.D, conv, ssm)
    products = (weights.in_proj, weights.x_proj, weights.dt_proj, weights.out_proj)
    tensors = [y for y in (x, *small, weights.conv_bias, *(y for p in products for y in p)) if y is not None]
    if not unobserved(*tensors) or torch.is_autocast_enabled("cpu"):
        return False
    for y in tensors:
        if not y.is_cpu or not y.is_contiguous():
            return False
    if not native.takes(weights.taps, weights.conv_bias, weights.A_log, weights.D) or ssm.dtype is not torch.float32:
        return False
    for weight, _, scale in products:
        if weight.dtype is not (x.dtype if scale is None else torch.int8):
            return False
    return conv.dtype is x.dtype and weights.taps.shape[1] <= native.kernels.MOST_TAPS


def mamba_step(
    x: Float[Tensor, "b 1 d"], weights: Weights, conv: Float[Tensor, "b window i"], ssm: Float[Tensor, "b i n"]
) -> tuple[Float[Tensor, "b 1 d"], Float[Tensor, "b window i"], Float[Tensor, "b i n"]]:
    """Return the output of one token of each sequence, the window and the state after it.

    Source:
        Gu and Dao, arXiv:2312.00752, section 3.4.
    """
    assert native.kernels is not None
    batch, _, d_model = x.shape
    inner, states = weights.A_log.shape
    rank, taps, threads = weights.dt_proj.weight.shape[1], weights.taps.shape[1], native.threads()
    narrow, size = x.dtype is torch.bfloat16, x.element_size()
    y, window, state = torch.empty_like(x), torch.empty_like(conv), torch.empty_like(ssm)

    A_log, D = native.single(weights.A_log), native.single(weights.D)

    # What stands between the kernels: Δ in float32, the rest in the type of x.
    widths = (2 * inner, inner, rank + 2 * states, inner)
    room = torch.empty(batch * (4 * inner + size * sum(widths)), dtype=torch.uint8)
    dt = (room.data_ptr(), inner, inner, False)
    places, at = [], dt[0] + 4 * batch * inner
    for width in widths:
        places.append((at, width, width, narrow))
        at += size * batch * width
    (xz, _, _, _), u, (low, _, _, _), gated = places
    wide, long = 2 * inner, rank + 2 * states

    def product(p: Product, source: tuple[int, ...], result: tuple[int, ...]) -> tuple[int, ...]:
        weight, bias, scale = p
        outputs, inputs = weight.shape
        groups = 1 if scale is None else scale.shape[1]
        return (
            *(batch, 1, inputs, outputs, threads, KINDS[weight.dtype], inputs // groups),
            *(*source, weight.data_ptr(), inputs),
            *(_NONE if scale is None else (scale.data_ptr(), 0, groups, scale.dtype is torch.bfloat16)),
            *native.vector(bias),
            *result,
        )

    native.kernels.mamba_step(
        *product(weights.in_proj, (x.data_ptr(), d_model, d_model, narrow), places[0]),
        *(batch, 1, inner, taps, True, threads, xz, wide, wide, narrow),
        *(*native.matrix(weights.taps), *native.vector(weights.conv_bias)),
        *(*native.rows(conv), 0, 0, *u, *native.rows(window)),
        *product(weights.x_proj, u, places[2]),
        *product(weights.dt_proj, (low, long, long, narrow), dt),
        *(batch, 1, inner, states, 1, True, True, threads, *u, *dt, xz + size * inner, wide, wide, narrow),
        *(low + size * rank, long, long, narrow, low + size * (rank + states), long, long, narrow),
        *(native.address(A_log), native.address(D), 0, ssm.data_ptr(), 0, 0, *gated, state.data_ptr(), 0),
        *product(weights.out_proj, gated, (y.data_ptr(), d_model, d_model, narrow)),
    )
    return y, window, state
