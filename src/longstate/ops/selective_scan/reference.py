"""The selective recurrence as a loop over time: the specification."""

from __future__ import annotations

import torch


def selective_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor,
    start: torch.Tensor | None,
    discretization: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs ``[b t d]`` without the skip D, and the final state ``[b d n]``."""
    h, outputs = initial, []
    for t in range(u.shape[1]):
        z = dt[:, t, :, None] * A
        if discretization == "bilinear":
            decay, gain = (1 + z / 2) / (1 - z / 2), 1 / (1 - z / 2)
        else:
            decay, gain = torch.exp(z), torch.ones_like(z)
        if discretization == "zoh":
            gain = torch.where(z == 0, 1, torch.expm1(z) / torch.where(z == 0, 1, z))
        B_t, C_t = (x[:, t, None] if x.ndim == 3 else x for x in (B, C))
        if start is not None:
            decay = torch.where(start[:, t, None, None], 0, decay)
        h = decay * h + gain * B_t * (dt[:, t] * u[:, t])[..., None]
        y = (C_t * h).sum(-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(u)), h
