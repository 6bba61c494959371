"""What several mixers are made of."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from .._shapes import Float, Tensor
from ..ops import convolution
from ..timeline import Timeline
from ._base import mark


class RMSNorm(nn.Module):
    """Root-mean-square norm, optionally by groups of channels and of a gated input, in float32 at least.

        y = weight ∘ x / √(mean(x²) + eps),    with x ← x ∘ SiLU(gate) if a gate is given

    Source:
        Zhang and Sennrich, arXiv:1910.07467; gated, arXiv:2405.21060.
    """

    def __init__(self, width: int, eps: float = 1e-5, groups: int = 1) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"RMSNorm(width={width}, groups={groups}): the width is not a multiple of groups")
        if not eps > 0:
            raise ValueError(f"RMSNorm(eps={eps}): wanted a small positive number, such as 1e-5")
        self.eps, self.groups = eps, groups
        self.weight = mark(nn.Parameter(torch.empty(width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1."""
        nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "b t d"], gate: Float[Tensor, "b t d"] | None = None) -> Float[Tensor, "b t d"]:
        """Return the normed input in the type of the weight (or of autocast)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if gate is not None:
            wide = wide * functional.silu(gate.to(wide.dtype))
        normed = functional.rms_norm(
            wide.unflatten(-1, (self.groups, -1)), (wide.shape[-1] // self.groups,), eps=self.eps
        )
        return normed.flatten(-2).to(self.weight.dtype) * self.weight


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with the weight layout of ``torch.nn.Conv1d``, followed by SiLU."""

    def __init__(self, width: int, taps: int, bias: bool) -> None:
        super().__init__()
        if taps < 1:
            raise ValueError(f"d_conv={taps}: a convolution has at least one tap. Take 4, or 1 for none.")
        self.weight = nn.Parameter(torch.empty(width, 1, taps))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias uniformly within ±1/√taps, as ``torch.nn.Conv1d`` does."""
        bound = 1 / math.sqrt(self.weight.shape[-1])
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, u: Float[Tensor, "b t d"], state: Float[Tensor, "b window d"] | None, timeline: Timeline
    ) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b window d"]]:
        """Return outputs and the last inputs."""
        return convolution.short(
            u,
            self.weight.squeeze(1),
            self.bias,
            state,
            activation="silu",
            start=timeline.start,
            valid=timeline.valid,
        )

    def initial_state(self, batch_size: int) -> Tensor:
        """Return a window of zeros."""
        return self.weight.new_zeros(batch_size, self.weight.shape[-1] - 1, self.weight.shape[0])


class OutputGate(nn.Module):
    """GELU, then a gated linear unit across channels: what follows the recurrence in S4D and S5 layers.

    y = (W₁ z) ∘ σ(W₂ z),    z = GELU(x)
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return the gated mixture of channels."""
        return functional.glu(self.linear(functional.gelu(x)))


def log_uniform_(x: Tensor, low: float, high: float) -> Tensor:
    """Fill a tensor with the logarithms of numbers spread log-uniformly over [low, high]."""
    return nn.init.uniform_(x, math.log(low), math.log(high))


def softplus_inverse(x: Tensor) -> Tensor:
    """Return y with log(1 + e^y) = x."""
    return x + torch.log(-torch.expm1(-x))


def check_steps(name: str, dt_min: float, dt_max: float) -> None:
    """Check a range of initial steps.

    Raises:
        ValueError: If it is not one.
    """
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"{name}(dt_min={dt_min}, dt_max={dt_max}): wanted 0 < dt_min ≤ dt_max, such as 0.001 and 0.1")
