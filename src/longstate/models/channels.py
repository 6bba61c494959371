"""Channel mixers: what a block does to the channels of each step by themselves."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from .._errors import check_choice
from .._shapes import Float
from ..mixers._parts import Linear


def relu2(x: Tensor) -> Tensor:
    """Return max(x, 0)² (So et al., arXiv:2109.08668)."""
    return functional.relu(x).square()


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its approximation by tanh (Hendrycks and Gimpel, arXiv:1606.08415)."""
    return functional.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": functional.relu,
    "relu2": relu2,
}


class GatedMLP(nn.Module):
    """Mix the channels of each step: W₂ (u ∘ φ(g)), [u, g] = W₁ x.

    Args:
        d_model: Channels.
        hidden: Inner channels; 8/3 of ``d_model``, rounded up to a multiple of 64, when absent.
        bias: Whether the projections have biases.
        activation: φ: "silu", "gelu", "gelu_tanh", "relu" or "relu2".

    Raises:
        ValueError: If there is no inner channel, or no such activation.

    Source:
        Shazeer, arXiv:2002.05202 (SwiGLU). Names as in the hybrids of the state-spaces organisation.
    """

    def __init__(self, d_model: int, hidden: int | None = None, bias: bool = False, activation: str = "silu") -> None:
        super().__init__()
        hidden = 64 * math.ceil(d_model * 8 / 3 / 64) if hidden is None else hidden
        self.activation = _checked("GatedMLP", hidden, activation)
        self.fc1 = Linear(d_model, 2 * hidden, bias=bias)
        self.fc2 = Linear(hidden, d_model, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the projections."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return the mixed channels."""
        u, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(u * ACTIVATIONS[self.activation](gate))


class MLP(nn.Module):
    """Mix the channels of each step: W₂ φ(W₁ x).

    Args:
        d_model: Channels.
        hidden: Inner channels; 4 times ``d_model`` when absent.
        bias: Whether the projections have biases.
        activation: φ: "silu", "gelu", "gelu_tanh", "relu" or "relu2".

    Raises:
        ValueError: If there is no inner channel, or no such activation.

    Source:
        Vaswani et al., arXiv:1706.03762; relu²: So et al., arXiv:2109.08668.
    """

    def __init__(self, d_model: int, hidden: int | None = None, bias: bool = False, activation: str = "gelu") -> None:
        super().__init__()
        hidden = 4 * d_model if hidden is None else hidden
        self.activation = _checked("MLP", hidden, activation)
        self.fc1 = Linear(d_model, hidden, bias=bias)
        self.fc2 = Linear(hidden, d_model, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the projections."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return the mixed channels."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


def _checked(name: str, hidden: int, activation: str) -> str:
    if hidden < 1:
        raise ValueError(f"{name}(hidden={hidden}): wanted at least one inner channel")
    check_choice(name, "activation", activation, ACTIVATIONS)
    return activation
