"""Causal depthwise convolution as a loop over taps and time: the specification."""

from __future__ import annotations

import torch


def convolution(padded: torch.Tensor, taps: torch.Tensor, segment: torch.Tensor | None) -> torch.Tensor:
    """Return y_t = Σ_i taps_i ∘ u_{t−i} over the steps of the same segment.

    ``padded`` is ``[b l−1+t d]``: what came before, then the inputs; ``taps`` is ``[d l]``; ``segment`` is ``[b
    l−1+t]``.
    """
    before = taps.shape[1] - 1
    outputs = []
    for t in range(before, padded.shape[1]):
        y = torch.zeros_like(padded[:, 0])
        for i in range(taps.shape[1]):
            term = taps[:, i] * padded[:, t - i]
            if segment is not None:
                term = torch.where((segment[:, t - i] == segment[:, t])[:, None], term, 0)
            y = y + term
        outputs.append(y)
    return torch.stack(outputs, 1) if outputs else padded[:, :0]
