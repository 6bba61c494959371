"""The recurrence h_t = a_t ∘ h_{t−1} + b_t as a loop over time: the specification."""

from __future__ import annotations

import torch


def scan(a: torch.Tensor, b: torch.Tensor, initial: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every state ``[b t …]`` and the last one; ``a`` is ``[…]`` or ``[b t …]``."""
    h, states = initial, []
    for t in range(b.shape[1]):
        h = (a[:, t] if a.ndim == b.ndim else a) * h + b[:, t]
        states.append(h)
    return (torch.stack(states, 1) if states else torch.zeros_like(b)), h
