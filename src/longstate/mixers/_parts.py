"""What several mixers are made of."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook as _global_hooks

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import convolution, linear, rms_norm
from ..ops._program import Product
from ..timeline import Timeline
from ._base import mark


class Linear(nn.Linear):
    """``torch.nn.Linear``, which reads its weights at the speed of memory when a few rows come (``ops.linear``)."""

    is_product = True  # of its weight, and of scales if it has any, with its input; not so of every class made from it

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the weight, and the bias."""
        return linear(input, self.weight, self.bias)


def product_of(module: nn.Module | None) -> Product | None:
    """Return what a layer multiplies with, if that is all that calling it does: it may be an adapter, or have hooks."""
    if module is None or "is_product" not in vars(type(module)) or looked_at(module):
        return None
    own = vars(module)["_parameters"] | vars(module)["_buffers"]
    return Product(own.get("quantized", own.get("weight")), own.get("bias"), own.get("scale"))


def taps_of(module: nn.Module | None) -> tuple[Tensor, Tensor | None] | None:
    """Return weight and bias of a short convolution with SiLU, if that is all that calling it does."""
    if type(module) is not ShortConvolution or looked_at(module) or module.activation != "silu":
        return None
    own = module._parameters
    weight, bias = own["weight"], own.get("bias")
    return None if weight is None else (weight.squeeze(1), bias)


def looked_at(module: nn.Module) -> bool:
    """Return whether calling a module does more than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module) or _global_hooks())


class RMSNorm(nn.Module):
    """Root-mean-square norm, optionally by groups of channels and beside a gate, in float32 at least.

        y = (offset + weight) ∘ x̂,    x̂ = x / √(mean(x²) + eps)

    With a gate, x ← x ∘ SiLU(gate) before the norm, or y ← y ∘ SiLU(gate) after it.

    Args:
        width: Channels: of the last axis.
        eps: Added to the mean square.
        groups: Groups of channels that are normed apart.
        offset: Added to the weight, which starts at 1 − offset.
        scale: Whether there is a weight at all.
        norm_before_gate: Whether a gate multiplies what was normed, and not what will be.

    Raises:
        ValueError: If the width does not divide into groups, ε is not positive, or there is an offset without a weight.

    Source:
        Zhang and Sennrich, arXiv:1910.07467; gated, arXiv:2405.21060; 1 + weight, arXiv:2402.19427.
    """

    def __init__(
        self,
        width: int,
        eps: float = 1e-5,
        groups: int = 1,
        offset: float = 0.0,
        scale: bool = True,
        norm_before_gate: bool = False,
    ) -> None:
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(f"RMSNorm(width={width}, groups={groups}): the width is not a multiple of groups")
        if not eps > 0:
            raise ValueError(f"RMSNorm(eps={eps}): wanted a small positive number, such as 1e-5")
        if offset and not scale:
            raise ValueError(f"RMSNorm(offset={offset}, scale=False): an offset is added to a weight. Leave one out.")
        self.eps, self.groups, self.offset, self.norm_before_gate = eps, groups, offset, norm_before_gate
        self.weight = mark(nn.Parameter(torch.empty(width))) if scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight so that it multiplies by 1."""
        if self.weight is not None:
            nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x: Float[Tensor, "*b d"], gate: Float[Tensor, "*b d"] | None = None) -> Float[Tensor, "*b d"]:
        """Return the normed input in the type of the weight (or of autocast); of the input where there is none."""
        return rms_norm(
            x,
            self.weight,
            gate,
            eps=self.eps,
            groups=self.groups,
            offset=self.offset,
            norm_before_gate=self.norm_before_gate,
        )


class ShortConvolution(nn.Module):
    """Causal depthwise convolution with the weight layout of ``torch.nn.Conv1d``, followed by SiLU or nothing.

    Args:
        width: Channels.
        taps: Inputs that each output sees.
        bias: Whether there is a bias.
        activation: "silu" or None.

    Raises:
        ValueError: If there is no tap, or no such activation.
    """

    def __init__(self, width: int, taps: int, bias: bool, activation: str | None = "silu") -> None:
        super().__init__()
        if taps < 1:
            raise ValueError(f"d_conv={taps}: a convolution has at least one tap. Take 4, or 1 for none.")
        if activation is not None:
            check_choice("ShortConvolution", "activation", activation, ["silu"])
        self.activation = activation
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
            activation=self.activation,
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
        self.linear = Linear(width, 2 * width)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return the gated mixture of channels."""
        # Transforms leave channels before time in memory, where GELU's backward pass takes several times as long.
        return functional.glu(self.linear(functional.gelu(x.contiguous())))


def conjugate(x: Float[Tensor, "*b two"]) -> Float[Tensor, "*b two"]:
    """Return the conjugates of complex numbers that are pairs of real ones."""
    return torch.stack([x[..., 0], -x[..., 1]], -1)


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
