"""The kernel of a diagonal system, one tap after the other: the specification."""

from __future__ import annotations

import torch


def vandermonde(weights: torch.Tensor, log_base: torch.Tensor, length: int) -> torch.Tensor:
    """Return K_l = 2 Re Σ_n w_n e^{l z_n} ``[… l]``, or of real numbers the sum itself, in double precision."""
    taps = []
    for step in range(length):
        tap = (weights * torch.exp(step * log_base)).sum(-1)
        taps.append(2 * tap.real if tap.is_complex() else tap)
    return torch.stack(taps, -1) if taps else weights.new_zeros(*weights.shape[:-1], 0, dtype=torch.float64)
