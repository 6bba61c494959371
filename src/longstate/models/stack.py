"""A stack of pre-norm residual blocks, each a mixer and, if wanted, a gated MLP."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .._errors import nearest
from .._shapes import Float, Tensor
from ..mixers import MIXERS, Mixer
from ..mixers._parts import RMSNorm
from ..timeline import Timeline

LayerSpec = str | Mapping[str, Any]


class GatedMLP(nn.Module):
    """Mix the channels of each step: W₂ (u ∘ SiLU(g)), [u, g] = W₁ x.

    Args:
        d_model: Channels.
        hidden: Inner channels; 8/3 of ``d_model``, rounded up to a multiple of 64, when absent.
        bias: Whether the projections have biases.

    Source:
        Shazeer, arXiv:2002.05202 (SwiGLU). Names as in the hybrids of the state-spaces organisation.
    """

    def __init__(self, d_model: int, hidden: int | None = None, bias: bool = False) -> None:
        super().__init__()
        hidden = 64 * math.ceil(d_model * 8 / 3 / 64) if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"GatedMLP(hidden={hidden}): wanted at least one inner channel")
        self.fc1 = nn.Linear(d_model, 2 * hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, d_model, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the projections."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        """Return the mixed channels."""
        u, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(u * functional.silu(gate))


class Block(nn.Module):
    """Add to the residual stream what a mixer makes of it, and then what an MLP does.

    r ← r + mixer(norm(r));    r ← r + mlp(norm2(r))
    """

    def __init__(self, d_model: int, mixer: Mixer, mlp: GatedMLP | None, norm_eps: float) -> None:
        super().__init__()
        self.norm = RMSNorm(d_model, norm_eps)
        self.mixer = mixer
        self.norm2 = None if mlp is None else RMSNorm(d_model, norm_eps)
        self.mlp = mlp

    def forward(
        self, residual: Float[Tensor, "b t d"], state: Any, timeline: Timeline | None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """Return the residual stream and the mixer's state."""
        y, state = self.mixer(self.norm(residual), state, timeline)
        residual = residual + y
        if self.mlp is not None and self.norm2 is not None:
            residual = residual + self.mlp(self.norm2(residual))
        return residual, state


class Stack(nn.Module):
    """Run mixers one after the other on a residual stream.

    Args:
        d_model: Channels of the residual stream.
        layers: For each layer the name of a mixer, or a mapping with that name under "mixer" and options of its
            constructor; a mapping may also hold "mlp", which replaces the stack's for this layer.
        mlp: Options of a gated MLP after each mixer ({} for the default one); none when absent.
        embedding: What takes inputs to ``[b t d]``, such as ``torch.nn.Embedding``; nothing when absent.
        norm_eps: ε of all norms of the stack.
        residual_in_fp32: Whether the residual stream stays in float32 when the weights are narrower.
        checkpoint_activations: Whether blocks recompute their insides in the backward pass, which then needs one
            activation per layer and step.

    Raises:
        ValueError: If a layer names no mixer, or an option that the mixer does not have.
    """

    def __init__(
        self,
        d_model: int,
        layers: Sequence[LayerSpec],
        mlp: Mapping[str, Any] | None = None,
        embedding: nn.Module | None = None,
        norm_eps: float = 1e-5,
        residual_in_fp32: bool = True,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise ValueError(
                f'Stack(layers={layers!r}): wanted a list with an entry for each layer, such as ["mamba2"] * 4'
            )
        self.d_model = d_model
        self.residual_in_fp32, self.checkpoint_activations = residual_in_fp32, checkpoint_activations
        self.embedding = embedding
        self.layers = nn.ModuleList(_block(i, d_model, layer, mlp, norm_eps) for i, layer in enumerate(layers))
        self.norm_f = RMSNorm(d_model, norm_eps)
        self._scale_residual_branches()

    def reset_parameters(self) -> None:
        """Give every parameter of the blocks its initial value."""
        for module in self.layers.modules():
            if isinstance(module, Mixer | GatedMLP | RMSNorm):
                module.reset_parameters()
        self.norm_f.reset_parameters()
        self._scale_residual_branches()

    def _scale_residual_branches(self) -> None:
        """Shrink what each branch adds, so that the residual stream of a deep stack starts with a variance of order 1.

        Source:
            Radford et al., 2019 (GPT-2); so do the published Mamba models.
        """
        branches = [
            module.weight
            for block in self._blocks()
            for name, module in block.named_modules()
            if name.rpartition(".")[2] in ("out_proj", "o_proj", "fc2") and isinstance(module, nn.Linear)
        ]
        with torch.no_grad():
            for weight in branches:
                weight /= math.sqrt(len(branches))

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        """Return the states of ``batch_size`` sequences before their first step, one for each layer."""
        return tuple(block.mixer.initial_state(batch_size) for block in self._blocks())

    def _blocks(self) -> Iterator[Block]:
        return cast(Iterator[Block], iter(self.layers))

    def forward(
        self, x: Tensor, state: tuple[Any, ...] | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], tuple[Any, ...]]:
        """Return the normed residual stream, and the states of all layers.

        Args:
            x: What the embedding takes, or ``[b t d]`` without one.
            state: One state for each layer; the initial ones when absent.
            timeline: When the steps happen, where sequences begin, and which steps count.

        Raises:
            ValueError: If the state is that of another number of layers.
        """
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"Stack: a state of {len(state)} layers came to a stack of {len(self.layers)}")
        residual = x if self.embedding is None else self.embedding(x)
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        states = []
        for i, block in enumerate(self._blocks()):
            arguments = (residual, None if state is None else state[i], timeline)
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                residual, after = checkpoint(block, *arguments, use_reentrant=False)
            else:
                residual, after = block(*arguments)
            states.append(after)
        return self.norm_f(residual), tuple(states)


def _block(i: int, d_model: int, layer: LayerSpec, mlp: Mapping[str, Any] | None, norm_eps: float) -> Block:
    """Build a layer from its description."""
    options: dict[str, Any] = {"mixer": layer} if isinstance(layer, str) else {}
    if isinstance(layer, Mapping):
        options = dict(layer)
    if not isinstance(options.get("mixer"), str):
        raise ValueError(
            f'layers[{i}] = {layer!r:.200}: wanted the name of a mixer, or {{"mixer": name, option: value, …}}'
        )
    name, mlp = options.pop("mixer"), options.pop("mlp", mlp)
    if name not in MIXERS:
        raise ValueError(f"layers[{i}]: there is no mixer {name!r}.{nearest(name, MIXERS)}")
    mixer = _construct(f"layers[{i}]: {name}", MIXERS[name], d_model, options)
    return Block(
        d_model, mixer, None if mlp is None else _construct(f"layers[{i}]: mlp", GatedMLP, d_model, mlp), norm_eps
    )


def _construct(where: str, kind: type[Any], d_model: int, options: Mapping[str, Any]) -> Any:
    """Call a constructor with options that came as data."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: options {options!r} are no mapping of names to values")
    known = list(inspect.signature(kind.__init__).parameters)[2:]
    for option in options:
        if option not in known:
            raise ValueError(f"{where} has no option {option!r}.{nearest(option, known)}")
    check_kinds(where, kind.__init__, options)
    try:
        return kind(d_model, **options)
    except (TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"{where} with {dict(options)}: an option has the wrong kind of value ({reason})") from error


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "None": (type(None),)}


def check_kinds(where: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Check numbers, switches and ``None`` among arguments that came as data against a function's annotations.

    Raises:
        ValueError: If one is of another kind: a word that stands for a switch would always be true.
    """
    for parameter in inspect.signature(function).parameters.values():
        kinds = str(parameter.annotation).split(" | ")
        if parameter.name in options and all(kind in _KINDS for kind in kinds):
            value = options[parameter.name]
            if not isinstance(value, tuple(t for kind in kinds for t in _KINDS[kind])) or (
                isinstance(value, bool) and "bool" not in kinds
            ):
                raise ValueError(f"{where}: {parameter.name} is {value!r}, wanted {parameter.annotation}")
