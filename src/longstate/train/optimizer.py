"""AdamW with its parameter groups, and the learning rate over a run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .._shapes import Tensor

# The cosine ends at this part of the largest learning rate.
_FLOOR = 0.01


def parameter_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Sort parameters by what they take of weight decay and learning rate.

    Only matrices decay: not vectors (norms, biases), nor what a mixer marks with ``_no_weight_decay`` (A, Δ, D).
    A mixer may ask for a smaller learning rate with ``_lr``.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for parameter in model.parameters():
        decays = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
        rate = min(learning_rate, getattr(parameter, "_lr", learning_rate))
        groups.setdefault((rate, weight_decay if decays else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "largest_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def adamw(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW with β₂ = 0.95, usual for language models."""
    return torch.optim.AdamW(parameter_groups(model, learning_rate, weight_decay), betas=(0.9, 0.95))


def rate_factor(progress: float, warmup: float) -> float:
    """Return the part of the largest learning rate at a part of the run: a rise, then half a cosine."""
    if progress < warmup:
        return progress / warmup
    turn = math.cos(math.pi * min((progress - warmup) / (1 - warmup), 1.0))
    return _FLOOR + (1 - _FLOOR) * (1 + turn) / 2


def set_rates(groups: Iterable[dict[str, Any]], factor: float) -> None:
    """Set the learning rate of every group to its part of the group's largest."""
    for group in groups:
        group["lr"] = factor * group["largest_lr"]
