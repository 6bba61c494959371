"""HiPPO-LegS: a memory of all of the past in Legendre polynomials, without a scale of time."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from .._errors import check_choice
from .._shapes import Float, Tensor
from ..ops import scan
from ..timeline import Timeline, zero_where_invalid
from ._base import Mixer, mark, state_dtype
from ._legendre import exact_by_entry, exact_by_step, gauss, legendre, rational_by_entry, rational_by_step
from ._parts import OutputGate

# How much of a step is taken implicitly; None: it is solved exactly.
_IMPLICIT: dict[str, float | None] = {"euler": 0.0, "bilinear": 0.5, "backward_euler": 1.0, "zoh": None}


class HiPPOLegSState(NamedTuple):
    """What every channel remembers, and since when."""

    memory: Float[Tensor, "b d n"]
    elapsed: Float[Tensor, " b"]


class HiPPOLegS(Mixer):
    """Project all of the past of each channel onto Legendre polynomials, and read it out.

        c′(t) = (A c(t) + B u(t))/t,    y(t) = C c(t),    A and B fixed (``systems.legs``)

    c_k is the coefficient of √(2k+1) P_k(2s/t − 1) in u(s), 0 ≤ s ≤ t. The memory begins at t = t₀, as if the input had
    been 0 before. A step that takes dt from t on has the discrete form of x′ = A x + B u for the step dt/t, and for
    "zoh" the exact one, of length log(1 + dt/t). So a signal twice as slow, and as late, leaves the same memory.

    An entry of c depends on those below it alone. So a long sequence takes ``d_state`` scans over time, the k-th driven
    by what the polynomials below k leave of the input, and a short one takes a scan over the entries for each step.
    "zoh", for which a step is a full triangular matrix, is a loop over the steps. Training keeps a few times
    ``d_state`` tensors of the input's size.

    Args:
        d_model: Channels.
        d_state: n, the coefficients of a channel.
        discretization: "bilinear", "zoh", "backward_euler", or "euler", which is unstable while t is below
            ½ ``d_state`` · dt.
        t_0: t₀, the age of the memory at the first step of a sequence, in nominal steps.
        output: "glu" (GELU and a gated linear unit across channels) or "identity" (the linear system alone).

    Raises:
        ValueError: If an option is none of those, there is no state, or t₀ is not positive.

    Source:
        Gu et al., arXiv:2008.07669, theorem 2 and section 2.3.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        discretization: Literal["bilinear", "zoh", "backward_euler", "euler"] = "bilinear",
        t_0: float = 1.0,
        output: Literal["glu", "identity"] = "glu",
    ) -> None:
        super().__init__()
        check_choice("HiPPOLegS", "discretization", discretization, tuple(_IMPLICIT))
        check_choice("HiPPOLegS", "output", output, ("glu", "identity"))
        if d_state < 1:
            raise ValueError(f"HiPPOLegS(d_state={d_state}): there is at least one coefficient. Try d_state=64.")
        if not t_0 > 0:
            raise ValueError(f"HiPPOLegS(t_0={t_0}): a memory begins after t = 0, where 1/t is infinite. Try t_0=1.0.")
        self.d_model, self.d_state, self.discretization, self.t_0 = d_model, d_state, discretization, t_0
        self._quadrature = gauss(d_state) if discretization == "zoh" else ([], [])
        self.C = mark(nn.Parameter(torch.empty(d_model, d_state)))
        self.output = OutputGate(d_model) if output == "glu" else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw C from a normal distribution: then outputs are as large as what is remembered."""
        nn.init.normal_(self.C)
        if isinstance(self.output, OutputGate):
            self.output.linear.reset_parameters()

    def initial_state(self, batch_size: int) -> HiPPOLegSState:
        """Return an empty memory."""
        memory = torch.zeros(batch_size, *self.C.shape, dtype=state_dtype(self.C), device=self.C.device)
        return HiPPOLegSState(memory, memory.new_zeros(batch_size, dtype=torch.float64))

    def forward(
        self, x: Float[Tensor, "b t d"], state: HiPPOLegSState | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], HiPPOLegSState]:
        """Return outputs and the state after the last step."""
        x, timeline = self._enter(x, timeline)
        memory, elapsed = self.initial_state(x.shape[0]) if state is None else state
        u = x.to(memory.dtype)
        if timeline.dt is None:
            dt = zero_where_invalid(elapsed.new_ones(x.shape[:2]), timeline.valid)
        else:
            dt = timeline.dt.double()
        # A step that does not count has length 0 and leaves the memory as it is, whatever the rule.
        after, final = scan(dt.new_ones(1), dt[..., None], elapsed[:, None], start=timeline.start)
        step = dt / (self.t_0 + after[..., 0] - dt)
        given, implicit = (u, step, memory, self.C.to(u.dtype), timeline.start), _IMPLICIT[self.discretization]
        if implicit is None:
            # A graph would have each step in it, and an exported one takes any length.
            exact = exact_by_entry if torch.compiler.is_compiling() else exact_by_step
            y, memory = exact(*given, self._quadrature)
        else:
            few = not torch.compiler.is_exporting() and x.shape[1] < self.d_state
            y, memory = (rational_by_step if few else rational_by_entry)(*given, implicit)
        y = zero_where_invalid(self.output(y.to(x.dtype)), timeline.valid)
        return y, HiPPOLegSState(memory, final[:, 0])

    def reconstruct(self, state: HiPPOLegSState, at: Float[Tensor, " points"]) -> Float[Tensor, "b d points"]:
        """Return what the memory holds the input to have been.

        Args:
            state: A state.
            at: When: 0 is the begin of memory, t₀ before the first step, and 1 is now.
        """
        return state.memory @ legendre(self.d_state, at.double()).mT.to(state.memory.dtype)
