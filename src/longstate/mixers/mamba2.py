"""Mamba-2: a selective state space model with one decay for each head (SSD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from .._shapes import Float, Tensor
from ..ops import linear_attention
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import Linear, RMSNorm, ShortConvolution, check_steps, log_uniform_, softplus_inverse
from ._step import Carried, Place, Step, fit


class Mamba2State(NamedTuple):
    """The window of the convolution, and the state of every head."""

    conv: Float[Tensor, "b window d"]
    ssm: Float[Tensor, "b h n p"]


class Mamba2(Mixer):
    """Run a state space model with one decay for each head, as linear attention with q = C, k = B, v = Δx and decay
    e^{ΔA}.

        [z, x, B, C, δ] = W_in u;  [x, B, C] ← SiLU(conv([x, B, C]));  Δ = clamp(softplus(δ + b_Δ))
        S_t = e^{Δ_t A} S_{t−1} + B_t (Δ_t x_t)ᵀ,    y_t = W_out RMSNorm((S_tᵀ C_t + D x_t) ∘ SiLU(z_t))

    With fewer SSM channels than inner ones, [z₀, x₀] come first in W_in u, and SiLU(z₀) ∘ x₀ stands before the norm's
    output.

    Args:
        d_model: Channels.
        d_state: States of each channel of a head.
        d_conv: Taps of the short convolution.
        expand: Inner channels, as a multiple of ``d_model``.
        head_dim: Channels of a head.
        n_groups: Groups of heads that share B and C.
        norm_groups: Groups of channels that the gated norm treats apart; ``n_groups`` when absent.
        norm_eps: The norm's ε.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.
        dt_limit: Bounds of Δ at all times.
        bias: Whether the projections in and out have biases.
        conv_bias: Whether the convolution has one.
        d_inner: Inner channels; expand · d_model when absent.
        d_ssm: How many of them pass through the state space model, the rest through a gate alone; all when absent.
        gated_norm: Whether there is a norm at all; without, W_out meets (Sᵀ C + D x) ∘ SiLU(z).
        norm_before_gate: Whether SiLU(z) multiplies what was normed, and not what will be.
        skip_per_channel: Whether D has an entry for each channel of each head, not one for each head.

    Raises:
        ValueError: If the SSM's channels are more than the inner ones or do not divide into heads, or the heads into
            groups.

    Source:
        Dao and Gu, arXiv:2405.21060. Weights are named and laid out as in its published checkpoints.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        dt_limit: Sequence[float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        d_inner: int | None = None,
        d_ssm: int | None = None,
        gated_norm: bool = True,
        norm_before_gate: bool = False,
        skip_per_channel: bool = False,
    ) -> None:
        super().__init__()
        inner, ssm, n_heads = _sizes(d_model, expand, d_inner, d_ssm, head_dim, n_groups)
        if norm_before_gate and not gated_norm:
            raise ValueError("Mamba2(gated_norm=False, norm_before_gate=True): there is no norm. Leave one out.")
        check_steps("Mamba2", dt_min, dt_max)
        if len(dt_limit) != 2 or not 0 <= dt_limit[0] <= dt_limit[1]:
            raise ValueError(
                f"Mamba2(dt_limit={dt_limit!r}): wanted the least and the largest Δ, such as (0.0, math.inf)"
            )
        self.d_model, self.d_inner, self.d_ssm, self.d_state = d_model, inner, ssm, d_state
        self.n_heads, self.head_dim, self.n_groups = n_heads, head_dim, n_groups
        self.dt_min, self.dt_max, self.dt_limit = dt_min, dt_max, (float(dt_limit[0]), float(dt_limit[1]))
        convolved = ssm + 2 * n_groups * d_state
        # How W_in u is cut: [z₀, x₀, z, (x, B, C), δ].
        self.parts = [inner - ssm, inner - ssm, ssm, convolved, n_heads]
        self.in_proj = Linear(d_model, sum(self.parts), bias=bias)
        self.conv1d = ShortConvolution(convolved, d_conv, conv_bias)
        self.dt_bias = mark(nn.Parameter(torch.empty(n_heads)))
        self.A_log = mark(nn.Parameter(torch.empty(n_heads)))
        self.D = mark(nn.Parameter(torch.empty(ssm if skip_per_channel else n_heads)))
        norm_groups = n_groups if norm_groups is None else norm_groups
        self.norm = RMSNorm(ssm, norm_eps, norm_groups, norm_before_gate=norm_before_gate) if gated_norm else None
        self.out_proj = Linear(inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A from −[1, 16] and Δ's bias so that Δ is log-uniform, set D = 1, and the projections as published."""
        for module in (self.in_proj, self.conv1d, self.norm, self.out_proj):
            if module is not None:
                module.reset_parameters()
        with torch.no_grad():
            nn.init.uniform_(self.A_log, 1, 16).log_()
            nn.init.ones_(self.D)
            self.dt_bias.copy_(softplus_inverse(log_uniform_(self.dt_bias, self.dt_min, self.dt_max).exp()))

    def initial_state(self, batch_size: int) -> Mamba2State:
        """Return zeros."""
        ssm = (batch_size, self.n_heads, self.d_state, self.head_dim)
        return Mamba2State(
            self.conv1d.initial_state(batch_size), self.A_log.new_zeros(ssm, dtype=state_dtype(self.A_log))
        )

    def forward(
        self, x: Float[Tensor, "b t d"], state: Mamba2State | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], Mamba2State]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        shared = self.n_groups * self.d_state
        z_0, x_0, z, u, dt = self.in_proj(x).split(self.parts, -1)
        u, window = self.conv1d(u, None if state is None else state.conv, timeline)
        u, B, C = u.split([self.d_ssm, shared, shared], -1)
        u = u.unflatten(-1, (self.n_heads, self.head_dim))
        dtype = state_dtype(self.A_log)
        dt = functional.softplus(dt.to(dtype) + self.dt_bias.to(dtype)).clamp(*self.dt_limit)
        if timeline.dt is not None:
            dt = dt * timeline.dt.to(dtype)[..., None]
        y, ssm = linear_attention(
            C.unflatten(-1, (self.n_groups, self.d_state)),
            B.unflatten(-1, (self.n_groups, self.d_state)),
            u,
            dt * -self.A_log.to(dtype).exp(),
            None if state is None else state.ssm,
            dt=dt,
            D=self.D if len(self.D) == self.n_heads else self.D.view(self.n_heads, -1),
            start=timeline.start,
            valid=timeline.valid,
        )
        y = y.flatten(-2)
        y = (y.to(dtype) * functional.silu(z.to(dtype))).to(x.dtype) if self.norm is None else self.norm(y, z)
        if self.d_ssm < self.d_inner:
            y = torch.cat([functional.silu(z_0) * x_0, y], -1)
        return zero_where_invalid(self.out_proj(y), timeline.valid), Mamba2State(window, ssm)

    def _write_token(self, step: Step, x: Place, conv: Carried, ssm: Carried) -> Place:
        """Write down what ``forward`` does with one token, if there is a norm, and no channel that skips the SSM."""
        projected = step.project(self, "in_proj", x)
        rest, _, z, u, dt = projected.split(self.parts)
        fit(self.norm if not rest.width else None)
        step_size, decay = step.head_steps(dt, self.dt_bias, self.A_log, step.watch.see(vars(self), "dt_limit"))
        shared = self.n_groups * self.d_state
        u, B, C = step.convolve(self, "conv1d", u, conv).split([self.d_ssm, shared, shared])
        y = step.linear_attention(C, B, u, decay, step_size, self.D, self.n_groups, ssm)
        return step.project(self, "out_proj", step.norm(self, "norm", y, z))


def _sizes(
    d_model: int, expand: float, d_inner: int | None, d_ssm: int | None, head_dim: int, n_groups: int
) -> tuple[int, int, int]:
    """Return the inner channels, those of the SSM, and the heads."""
    inner = int(expand * d_model) if d_inner is None else d_inner
    what = "expand·d_model" if d_inner is None else "d_inner"
    if d_ssm is not None and not 1 <= d_ssm <= inner:
        raise ValueError(f"Mamba2(d_ssm={d_ssm}): wanted 1 to {what} = {inner}, or None for all of them")
    ssm, what = (inner, what) if d_ssm is None else (d_ssm, "d_ssm")
    if ssm < 1 or head_dim < 1 or ssm % head_dim:
        raise ValueError(
            f"Mamba2(d_model={d_model}, head_dim={head_dim}): {what} = {ssm} is not a multiple of "
            f"head_dim. Try head_dim={math.gcd(ssm, max(1, head_dim))}."
        )
    n_heads = ssm // head_dim
    if n_groups < 1 or n_heads % n_groups:
        raise ValueError(
            f"Mamba2(n_groups={n_groups}): {n_heads} heads ({what} / head_dim) do not divide into "
            f"{n_groups} groups. Try n_groups={math.gcd(n_heads, max(1, n_groups))}."
        )
    return inner, ssm, n_heads
