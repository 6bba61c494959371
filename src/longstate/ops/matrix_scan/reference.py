"""The recurrence h_t = A h_{t−1} + b_t as a loop over time: the specification."""

from __future__ import annotations

import torch


def matrix_scan(
    A: torch.Tensor,
    b: torch.Tensor,
    initial: torch.Tensor,
    start: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every state ``[b t n]``, zero where a step does not count, and the last one."""
    h, states = initial, []
    for t in range(b.shape[1]):
        if start is not None:
            h = torch.where(start[:, t, None], 0, h)
        after = h @ A.mT + b[:, t]
        h = after if valid is None else torch.where(valid[:, t, None], after, h)
        states.append(h if valid is None else torch.where(valid[:, t, None], h, 0))
    return (torch.stack(states, 1) if states else torch.zeros_like(b)), h
