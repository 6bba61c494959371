"""The recurrence h_t = a_t h_{t−1} + b_t of small matrices as a loop over time: the specification."""

from __future__ import annotations

import torch


def block_scan(
    a: torch.Tensor,
    b: torch.Tensor,
    initial: torch.Tensor,
    start: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return every state ``[b t n k p]``, zero where a step does not count, and the last one; ``a`` is ``[n k k]`` or
    ``[b t n k k]``."""
    h, states = initial, []
    for t in range(b.shape[1]):
        begins, counts = (None if x is None else x[:, t].view(-1, 1, 1, 1) for x in (start, valid))
        before = h if begins is None else torch.where(begins, 0, h)
        after = torch.matmul(a[:, t] if a.ndim == b.ndim else a, before) + b[:, t]
        h = after if counts is None else torch.where(counts, after, before)
        states.append(after if counts is None else torch.where(counts, after, 0))
    return (torch.stack(states, 1) if states else torch.zeros_like(b)), h
