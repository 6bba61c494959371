"""The mixer contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from .._shapes import Float, Tensor
from ..timeline import Timeline, zero_where_invalid


class Mixer(nn.Module, ABC):
    """A module that maps a sequence to a sequence, from a state to a state.

    Prefill, chunk and one-token decoding are the same call: one step is a sequence of length 1. A state is a value;
    it is never stored on the module and never changed in place.

    Attributes:
        causal: Whether outputs depend on the present and the past only.
        d_model: Channels in and out.
    """

    causal: bool = True
    d_model: int

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "b t d"], state: Any = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """Return outputs and the state after the last step.

        Args:
            x: Inputs.
            state: The state before them; the initial one when absent.
            timeline: When the steps happen, where sequences begin, and which steps count.

        Raises:
            ValueError: If shapes do not go together, or the timeline says what the mixer has no notion of.
        """

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """Return the state of ``batch_size`` sequences before their first step."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Give every parameter its initial value; also after construction on the meta device and ``to_empty``."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Convert parameters as torch does, and keep their marks: torch may put new ones in their place without
        them."""
        marks = {name: dict(vars(parameter)) for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            vars(parameter).update(marks[name])
        return self

    def _enter(self, x: Tensor, timeline: Timeline | None, timed: bool = True) -> tuple[Tensor, Timeline]:
        """Check inputs, expand the timeline to them, and clear the steps that do not count.

        A mixer that counts steps and is not ``timed`` takes no elapsed time.
        """
        name = type(self).__name__
        if not timed and timeline is not None and timeline.dt is not None:
            raise ValueError(f"{name}: the timeline has dt, but {name} counts steps and knows no time. Leave dt out.")
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"{name}: input of shape {list(x.shape)}, wanted [batch, time, d_model={self.d_model}]")
        timeline = Timeline() if timeline is None else timeline.expand(x.shape[0], x.shape[1])
        if timeline.dt is not None:
            # Cleared here and not after Δ is scaled: 0 times what may stand there would be no number in a gradient.
            timeline = timeline._replace(dt=zero_where_invalid(timeline.dt, timeline.valid))
        return zero_where_invalid(x, timeline.valid), timeline


def mark(parameter: nn.Parameter, learning_rate: float | None = None) -> nn.Parameter:
    """Mark a parameter that takes no weight decay and, if given, a learning rate of its own at most so large.

    Optimisers read the attributes ``_no_weight_decay`` and ``_lr``.
    """
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    if learning_rate is not None:
        parameter._lr = learning_rate  # type: ignore[attr-defined]
    return parameter


def state_dtype(parameter: Tensor) -> torch.dtype:
    """Return the type of a recurrent state beside a parameter: float32 at least."""
    return torch.promote_types(parameter.dtype, torch.float32)
