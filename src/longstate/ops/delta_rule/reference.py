"""The delta rule as a loop over time: the specification."""

from __future__ import annotations

import torch


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    log_decay: torch.Tensor | None,
    initial: torch.Tensor,
    start: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs ``[b t h p]`` and the final state ``[b h k p]``."""
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    state, outputs = initial, []
    for t in range(q.shape[1]):
        if log_decay is not None:
            g = log_decay[:, t].exp()
            state = state * (g[..., None, None] if log_decay.ndim < 4 else g[..., None])
        if start is not None:
            state = torch.where(start[:, t, None, None, None], 0, state)
        found = (k[:, t, :, None, :] @ state).squeeze(-2)
        state = state + k[:, t, :, :, None] * (beta[:, t, :, None] * (v[:, t] - found))[:, :, None, :]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))
    return (torch.stack(outputs, 1) if outputs else torch.zeros_like(v)), state
