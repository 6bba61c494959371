"""A fixed linear system for each channel, as a loop over time: the specification."""

from __future__ import annotations

import torch


def state_space(
    u: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor,
    start: torch.Tensor | None,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return y_t = C x_t ``[b t d]``, zero where a step does not count, and the last x_t = A x_{t−1} + B u_t
    ``[b d n]``."""
    x, outputs = initial, []
    for t in range(u.shape[1]):
        if start is not None:
            x = torch.where(start[:, t, None, None], 0, x)
        after = (A @ x.movedim(0, -1)).movedim(-1, 0) + B * u[:, t, :, None]
        y = (C * after).sum(-1)
        if valid is not None:
            after, y = torch.where(valid[:, t, None, None], after, x), torch.where(valid[:, t, None], y, 0)
        x = after
        outputs.append(y)
    return torch.stack(outputs, 1) if outputs else u.clone(), x.clone()
