"""S5: one diagonal state space model with as many inputs and outputs as there are channels."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Inexact, Tensor
from ..ops import scan
from ..ops.selective_scan.discretization import coefficients
from ..systems import diagonal_modes, legs_normal, perturbed_legs
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._modes import PARAMETERIZATIONS, real_part, set_real_part_
from ._parts import OutputGate, check_steps, conjugate, log_uniform_


class S5State(NamedTuple):
    """The state of the modes that all channels share."""

    ssm: Inexact[Tensor, "b n"]


class S5(Mixer):
    """Run one diagonal linear time-invariant system with many inputs and many outputs (MIMO).

        x′(t) = diag(Λ) x(t) + B u(t),    y(t) = 2 Re(C x(t)) + D ∘ u(t)

    sampled with a step Δ learned for each mode, by a scan.

    Args:
        d_model: Channels: inputs and outputs of the system.
        d_state: Real states; of each conjugate pair of modes one is kept.
        n_blocks: How many copies of one system the initial Λ is made of.
        discretization: "zoh" or "bilinear".
        parameterization: How Re Λ comes from the parameter ``A_real``: "exp" (−e^w), "softplus" (−log(1 + e^w)),
            "stable" (−1/(w² + 0.1)), or "direct" (w, which nothing keeps negative). All start at the same Λ.
        dt_min: Smallest initial Δ, in nominal steps.
        dt_max: Largest initial Δ; they are drawn log-uniformly.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).
        initialization: That system: "legs" (the normal part of HiPPO-LegS) or "ptd" (HiPPO-LegS itself, perturbed and
            then diagonalised: S5-PTD).

    Raises:
        ValueError: If an option is none of those, or ``d_state`` does not divide into blocks of pairs.

    Source:
        Smith et al., arXiv:2208.04933; parameterisations of Re Λ, Wang and Li, arXiv:2311.14495; "ptd", Yu et al.,
        arXiv:2310.01698.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        n_blocks: int = 1,
        discretization: Literal["zoh", "bilinear"] = "zoh",
        parameterization: Literal["exp", "softplus", "direct", "stable"] = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        output: Literal["glu", "identity"] = "glu",
        initialization: Literal["legs", "ptd"] = "legs",
    ) -> None:
        super().__init__()
        check_choice("S5", "discretization", discretization, ("zoh", "bilinear"))
        check_choice("S5", "parameterization", parameterization, PARAMETERIZATIONS)
        check_choice("S5", "output", output, ("glu", "identity"))
        check_choice("S5", "initialization", initialization, ("legs", "ptd"))
        if n_blocks < 1 or d_state < 2 or d_state % (2 * n_blocks):
            raise ValueError(
                f"S5(d_state={d_state}, n_blocks={n_blocks}): each block needs an even number of states. "
                f"Try d_state={2 * max(1, n_blocks) * max(1, round(d_state / (2 * max(1, n_blocks))))}."
            )
        check_steps("S5", dt_min, dt_max)
        self.d_model, self.d_state, self.n_blocks = d_model, d_state, n_blocks
        self.discretization, self.parameterization = discretization, parameterization
        self.dt_min, self.dt_max, self.initialization = dt_min, dt_max, initialization
        modes = d_state // 2
        self.A_real = mark(nn.Parameter(torch.empty(modes)), 1e-3)
        self.A_imag = mark(nn.Parameter(torch.empty(modes)), 1e-3)
        self.B = mark(nn.Parameter(torch.empty(modes, d_model, 2)), 1e-3)
        self.C = mark(nn.Parameter(torch.empty(d_model, modes, 2)))
        self.D = mark(nn.Parameter(torch.empty(d_model)))
        self.log_dt = mark(nn.Parameter(torch.empty(modes)), 1e-3)
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw Δ, and B and C in the basis of the states, then take them to that of the modes."""
        if self.C.is_meta:
            return
        block = self.d_state // self.n_blocks
        if self.initialization == "ptd":
            eigenvalues, _, V, W, _ = (torch.from_numpy(x) for x in perturbed_legs(block))
        else:
            eigenvalues, _, V = (torch.from_numpy(x) for x in diagonal_modes(*legs_normal(block)))
            W = V.mH  # the eigenvectors of a normal matrix are orthonormal
        with torch.no_grad():
            eigenvalues = eigenvalues.repeat(self.n_blocks)
            set_real_part_(self.A_real, eigenvalues.real.numpy(), self.parameterization, "S5")
            self.A_imag.copy_(eigenvalues.imag)
            B = torch.randn(self.n_blocks, block, self.d_model, dtype=torch.float64) / self.d_model**0.5
            C = torch.randn(self.d_model, self.n_blocks, block, dtype=torch.float64) / self.d_state**0.5
            self.B.copy_(torch.view_as_real((W @ B.to(V.dtype)).flatten(0, 1)))
            self.C.copy_(torch.view_as_real((C.to(V.dtype) @ V).flatten(1)))
            nn.init.normal_(self.D)
            log_uniform_(self.log_dt, self.dt_min, self.dt_max)
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> S5State:
        """Return zeros."""
        dtype = state_dtype(self.C).to_complex()
        return S5State(torch.zeros(batch_size, *self.log_dt.shape, dtype=dtype, device=self.C.device))

    def forward(
        self, x: Float[Tensor, "b t d"], state: S5State | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], S5State]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        dtype = state_dtype(self.C)
        u = x.to(dtype)
        A = torch.complex(real_part(self.A_real.to(dtype), self.parameterization), self.A_imag.to(dtype))
        dt = self.log_dt.to(dtype).exp()
        if timeline.dt is not None:
            dt = dt * timeline.dt.to(dtype)[..., None]
        decay, phi = coefficients(dt * A, self.discretization)
        gain = dt if phi is None else dt * phi
        # Complex matrices as pairs of real ones: one real product each way.
        driven = torch.view_as_complex((u @ self.B.to(dtype).transpose(0, 1).flatten(1)).unflatten(-1, (-1, 2)))
        h, final = scan(
            decay,
            gain * driven,
            None if state is None else state.ssm,
            start=timeline.start,
            valid=timeline.valid,
        )
        y = torch.view_as_real(h).flatten(-2) @ (2 * conjugate(self.C.to(dtype))).flatten(1).mT
        y = (y + self.D * u).to(x.dtype)
        return zero_where_invalid(self.output(y), timeline.valid), S5State(final)
