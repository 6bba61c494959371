"""Cauchy sums, one pole after the other: the specification."""

from __future__ import annotations

import torch


def cauchy(weights: torch.Tensor, nodes: torch.Tensor, poles: torch.Tensor) -> torch.Tensor:
    """Return K_l = Σ_n w_n / (z_l − λ_n) ``[… l]``; complex poles bring their conjugates along."""
    total = torch.zeros(*weights.shape[:-1], len(nodes), dtype=nodes.dtype, device=nodes.device)
    for n in range(poles.shape[-1]):
        w, pole = weights[..., n, None], poles[..., n, None]
        total = total + w / (nodes - pole)
        if weights.is_complex():
            total = total + w.conj() / (nodes - pole.conj())
    return total
