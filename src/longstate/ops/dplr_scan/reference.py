"""Systems of a diagonal minus a low rank, with a solve of dense matrices at each step: the specification."""

from __future__ import annotations

import torch


def dplr_scan(
    u: torch.Tensor,
    dt: torch.Tensor,
    poles: torch.Tensor,
    P: torch.Tensor,
    Q: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    initial: torch.Tensor,
    start: torch.Tensor | None,
    alpha: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs ``[b t d]`` and the final state ``[b d n]``; complex modes bring their conjugates along."""
    n, x, outputs = poles.shape[-1], initial, []
    if poles.is_complex():
        x = torch.cat([x, x.conj()], -1)
        poles, B, C = (torch.cat([v, v.conj()], -1) for v in (poles, B, C))
        P, Q = (torch.cat([m, m.conj()], -2) for m in (P, Q))
    A = torch.diag_embed(poles) - P @ Q.mH
    identity = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    for t in range(u.shape[1]):
        if start is not None:
            x = torch.where(start[:, t, None, None], 0, x)
        step = dt[:, t, :, None]
        right = x + (1 - alpha) * step * (A @ x[..., None])[..., 0] + step * u[:, t, :, None] * B
        x = torch.linalg.solve(identity - alpha * step[..., None] * A, right)
        y = (C * x).sum(-1)
        outputs.append(y.real if y.is_complex() else y)
    return torch.stack(outputs, 1) if outputs else u.clone(), x[..., :n].clone()
