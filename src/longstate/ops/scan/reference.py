"""The recurrence h_t = a_t ∘ h_{t−1} + b_t as a loop over time: the specification."""

from __future__ import annotations

import torch


def scan(
    a: torch.Tensor,
    b: torch.Tensor,
    initial: torch.Tensor,
    start: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every state ``[b t …]``, zero where a step does not count, and the last one; ``a`` is ``[…]`` or
    ``[b t …]``."""
    h, states = initial, []
    for t in range(b.shape[1]):
        a_t, b_t = a[:, t] if a.ndim == b.ndim else a, b[:, t]
        begins, counts = (None if x is None else x[:, t].view(-1, *[1] * (h.ndim - 1)) for x in (start, valid))
        if counts is not None:
            a_t, b_t = torch.where(counts, a_t, 1), torch.where(counts, b_t, 0)
        if begins is not None:
            a_t = torch.where(begins, 0, a_t)
        h = a_t * h + b_t
        states.append(h if counts is None else torch.where(counts, h, 0))
    return (torch.stack(states, 1) if states else torch.zeros_like(b)), h
