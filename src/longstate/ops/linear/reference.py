"""The product with a matrix, one output after the other."""

from __future__ import annotations

import torch

from ..._shapes import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    """Return y_o = Σ_i W_oi x_i + b_o, with W_oi = scale_o(i) q_oi of weights with scales."""
    weight = weight.to(x.dtype)
    if scale is not None:
        group = weight.shape[1] // scale.shape[1]
        weight = torch.stack([weight[:, i] * scale[:, i // group].to(x.dtype) for i in range(weight.shape[1])], 1)
    y = torch.stack([(x * row).sum(-1) for row in weight], -1).to(dtype or x.dtype)
    return y if bias is None else y + bias.to(y.dtype)
