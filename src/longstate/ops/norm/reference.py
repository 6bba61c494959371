"""The root-mean-square norm as its formula: the specification, and the portable form."""

from __future__ import annotations

import torch


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    gate: torch.Tensor | None,
    eps: float,
    groups: int,
    offset: float,
    norm_before_gate: bool,
) -> torch.Tensor:
    """Return the normed input in the type of the weight; of the input where there is none."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor = None if gate is None else torch.nn.functional.silu(gate.to(wide.dtype))
    if factor is not None and not norm_before_gate:
        wide, factor = wide * factor, None
    width = wide.shape[-1]
    y = torch.rms_norm(wide.unflatten(-1, (groups, -1)), (width // groups,), eps=eps).flatten(-2)
    if weight is None:
        return (y if factor is None else y * factor).to(x.dtype)
    if factor is None and not offset:
        return y.to(weight.dtype) * weight
    # 1 + a small weight, rounded to bfloat16, would lose most of the weight.
    y = y * (offset + weight.to(y.dtype))
    return (y if factor is None else y * factor).to(weight.dtype)
