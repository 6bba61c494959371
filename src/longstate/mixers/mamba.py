"""Mamba: a selective state space model (S6) behind a short convolution and a gate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import linear, selective_scan
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._parts import Linear, RMSNorm, ShortConvolution, check_steps, log_uniform_, product_of, softplus_inverse
from ._step import Carried, Place, Step, fit


class MambaState(NamedTuple):
    """The window of the convolution, and the state of every channel."""

    conv: Float[Tensor, "b window d"]
    ssm: Float[Tensor, "b d n"]


class StepProjection(Linear):
    """A linear map whose bias is added in float32 at least: in bfloat16 it gives visibly other steps.

    It gives what a linear layer does, and is called wherever anybody looks, so that adapters and hooks work.
    """

    is_product = True

    def forward(self, input: Tensor) -> Tensor:
        """Return the product with the weight, and the bias."""
        return linear(input, self.weight, self.bias, dtype=state_dtype(self.bias))


class Mamba(Mixer):
    """Run a state space model whose step, input and output coefficients are functions of the input.

        [x, z] = W_in u;  x ← SiLU(conv(x));  [δ, B, C] = W_x x;  Δ = softplus(W_Δ δ + b_Δ)
        h_t = e^{Δ_t A} ∘ h_{t−1} + Δ_t B_t x_t,    y_t = W_out((C_tᵀ h_t + D ∘ x_t) ∘ SiLU(z_t))

    With inner norms, δ, B and C pass through an RMSNorm each before they are used.

    Args:
        d_model: Channels.
        d_state: States of each inner channel.
        d_conv: Taps of the short convolution.
        expand: Inner channels, as a multiple of ``d_model``.
        dt_rank: Rank of Δ's projection; ⌈d_model / 16⌉ when absent.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.
        bias: Whether the projections in and out have biases.
        conv_bias: Whether the convolution has one.
        inner_norm: "plain" (without weights, as in Falcon-Mamba), "weighted" (as in Jamba), or None for no norms.
        inner_norm_eps: Their ε.

    Raises:
        ValueError: If a size is not positive, or there is no such ``inner_norm``.

    Source:
        Gu and Dao, arXiv:2312.00752. Weights are named and laid out as in its published checkpoints. Inner norms:
        Lieber et al., arXiv:2403.19887; Zuo et al., arXiv:2410.05355.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        bias: bool = False,
        conv_bias: bool = True,
        inner_norm: str | None = None,
        inner_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        inner = int(expand * d_model)
        dt_rank = math.ceil(d_model / 16) if dt_rank is None else dt_rank
        if min(inner, d_state, dt_rank) < 1:
            raise ValueError(
                f"Mamba(d_model={d_model}, d_state={d_state}, expand={expand}, dt_rank={dt_rank}): sizes start at 1"
            )
        check_steps("Mamba", dt_min, dt_max)
        if inner_norm is not None:
            check_choice("Mamba", "inner_norm", inner_norm, ("plain", "weighted"))
        self.d_model, self.d_inner, self.d_state, self.dt_rank = d_model, inner, d_state, dt_rank
        self.dt_min, self.dt_max, self.inner_norm = dt_min, dt_max, inner_norm
        self.in_proj = Linear(d_model, 2 * inner, bias=bias)
        self.conv1d = ShortConvolution(inner, d_conv, conv_bias)
        self.x_proj = Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = StepProjection(dt_rank, inner)
        mark(self.dt_proj.bias)
        self.dt_norm, self.B_norm, self.C_norm = (
            nn.Identity() if inner_norm is None else RMSNorm(n, inner_norm_eps, scale=inner_norm == "weighted")
            for n in (dt_rank, d_state, d_state)
        )
        self.A_log = mark(nn.Parameter(torch.empty(inner, d_state)))
        self.D = mark(nn.Parameter(torch.empty(inner)))
        self.out_proj = Linear(inner, d_model, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set A = −(1 … n) and D = 1, draw Δ's bias so that Δ is log-uniform, and the projections as published."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        for norm in (self.dt_norm, self.B_norm, self.C_norm):
            if isinstance(norm, RMSNorm):
                norm.reset_parameters()
        with torch.no_grad():
            self.A_log.copy_(torch.arange(1, self.d_state + 1, dtype=torch.float64).log().expand_as(self.A_log))
            nn.init.ones_(self.D)
            nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            self.dt_proj.bias.copy_(softplus_inverse(log_uniform_(self.dt_proj.bias, self.dt_min, self.dt_max).exp()))

    def initial_state(self, batch_size: int) -> MambaState:
        """Return zeros."""
        ssm = self.A_log.new_zeros(batch_size, *self.A_log.shape, dtype=state_dtype(self.A_log))
        return MambaState(self.conv1d.initial_state(batch_size), ssm)

    def forward(
        self, x: Float[Tensor, "b t d"], state: MambaState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], MambaState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        u, z = self.in_proj(x).chunk(2, -1)
        u, window = self.conv1d(u, None if state is None else state.conv, timeline)
        low, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt, dt_bias = self._project_steps(self.dt_norm(low))
        y, ssm = selective_scan(
            u,
            dt,
            self.A_log,
            self.B_norm(B),
            self.C_norm(C),
            self.D,
            None if state is None else state.ssm,
            gate=z,
            dt_bias=dt_bias,
            dt_softplus=True,
            elapsed=timeline.dt,
            log_A=True,
            start=timeline.start,
            valid=timeline.valid,
        )
        y = self.out_proj(y)
        return zero_where_invalid(y, timeline.valid), MambaState(window, ssm)

    def _project_steps(self, low: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what Δ is computed from, and the bias if the scan is to add it, which saves a pass over memory."""
        product = None if torch.compiler.is_compiling() else product_of(self.dt_proj)
        if product is None:
            return self.dt_proj(low), None
        return linear(low, product.weight, scale=product.scale), product.bias

    def _write_token(self, step: Step, x: Place, conv: Carried, ssm: Carried) -> Place:
        """Write down what ``forward`` does with one token."""
        u, z = step.project(self, "in_proj", x).split([self.d_inner, self.d_inner])
        u = step.convolve(self, "conv1d", u, conv)
        low, B, C = step.project(self, "x_proj", u).split([self.dt_rank, self.d_state, self.d_state])
        product = fit(product_of(step.watch.module(self, "dt_proj")))
        dt = step.linear(step.norm(self, "dt_norm", low), product._replace(bias=None), torch.float32)
        B, C = step.norm(self, "B_norm", B), step.norm(self, "C_norm", C)
        y = step.selective_scan(u, dt, product.bias, self.A_log, B, C, self.D, z, ssm)
        return step.project(self, "out_proj", y)
