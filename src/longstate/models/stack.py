"""A stack of pre-norm residual blocks, each a mixer and, if wanted, a channel mixer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .._errors import check_choice, nearest
from .._shapes import Float, Tensor
from ..mixers import MIXERS, Mixer
from ..mixers._parts import RMSNorm
from ..routes import ROUTES
from ..timeline import Timeline
from ._one_token import one_token
from .channels import MLP, GatedMLP
from .experts import Experts

LayerSpec = str | Mapping[str, Any]

# The names by which models call them, under "kind".
CHANNEL_MIXERS: dict[str, type[nn.Module]] = {"gated": GatedMLP, "plain": MLP, "experts": Experts}
# What a layer adds to the residual stream leaves it through one of these.
_LAST = ("out_proj.weight", "o_proj.weight", "linear_out.weight", "fc2.weight", "fc2")


class Block(nn.Module):
    """Add to the residual stream what a mixer makes of it, and then what a channel mixer does; either may be absent.

    r ← r + m · mixer(norm(r));    r ← r + m · mlp(norm2(r))
    """

    is_sum = True  # of its input with these; not so of every class made from it

    def __init__(
        self, mixer: Mixer | None, mlp: nn.Module | None, norm: Callable[[], RMSNorm], residual_multiplier: float
    ) -> None:
        super().__init__()
        self.norm = None if mixer is None else norm()
        self.mixer = mixer
        self.norm2 = None if mlp is None else norm()
        self.mlp = mlp
        self.residual_multiplier = residual_multiplier

    def initial_state(self, batch_size: int) -> Any:
        """Return the mixer's state before the first step; an empty one without a mixer."""
        return () if self.mixer is None else self.mixer.initial_state(batch_size)

    def forward(
        self, residual: Float[Tensor, "b t d"], state: Any, timeline: Timeline | None
    ) -> tuple[Float[Tensor, "b t d"], Any]:
        """Return the residual stream and the mixer's state."""
        if self.mixer is None or self.norm is None:
            state = ()
        else:
            y, state = self.mixer(self.norm(residual), state, timeline)
            residual = torch.add(residual, y, alpha=self.residual_multiplier)
        if self.mlp is not None and self.norm2 is not None:
            residual = torch.add(residual, self.mlp(self.norm2(residual)), alpha=self.residual_multiplier)
        return residual, state


class Stack(nn.Module):
    """Run mixers one after the other on a residual stream.

    Args:
        d_model: Channels of the residual stream.
        layers: For each layer the name of a mixer, or a mapping with that name under "mixer" (None for no mixer) and
            options of its constructor; a mapping may also hold "mlp", which replaces the stack's for this layer. The
            mixers of a route are given likewise: {"mixer": "bidirectional", "ahead": "s5", "back": {"mixer": "s4d"}}.
        mlp: The channel mixer after each mixer: options of its constructor, and under "kind" which one: "gated" (the
            default), "plain" or "experts"; none when absent.
        embedding: What takes inputs to ``[b t d]``, such as ``torch.nn.Embedding``; nothing when absent.
        norm_eps: ε of all norms of the stack.
        residual_in_fp32: Whether the residual stream stays in float32 when the weights are narrower.
        checkpoint_activations: Whether blocks recompute their insides in the backward pass, which then needs one
            activation per layer and step.
        norm_offset: Added to the weights of all norms of the stack: 1 where they are kept as differences from 1.
        embedding_multiplier: Factor of what the embedding gives.
        residual_multiplier: Factor of what each mixer and each channel mixer adds.

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
        norm_offset: float = 0.0,
        embedding_multiplier: float = 1.0,
        residual_multiplier: float = 1.0,
    ) -> None:
        super().__init__()
        if isinstance(layers, str) or not isinstance(layers, Sequence):
            raise ValueError(
                f'Stack(layers={layers!r}): wanted a list with an entry for each layer, such as ["mamba2"] * 4'
            )
        self.d_model = d_model
        self.residual_in_fp32, self.checkpoint_activations = residual_in_fp32, checkpoint_activations
        self.embedding_multiplier = embedding_multiplier
        self.embedding = embedding
        norm = partial(RMSNorm, d_model, norm_eps, offset=norm_offset)
        self.layers = nn.ModuleList(
            Block(*_parts(i, d_model, layer, mlp), norm, residual_multiplier) for i, layer in enumerate(layers)
        )
        self.norm_f = norm()
        self._scale_residual_branches()

    def reset_parameters(self) -> None:
        """Give every parameter of the blocks its initial value."""
        for module in self.layers.modules():
            if isinstance(module, Mixer | RMSNorm | GatedMLP | MLP | Experts):
                module.reset_parameters()
        self.norm_f.reset_parameters()
        self._scale_residual_branches()

    def _scale_residual_branches(self) -> None:
        """Shrink what each branch adds, so that the residual stream of a deep stack starts with a variance of order 1.

        Source:
            Radford et al., 2019 (GPT-2); so do the published Mamba models.
        """
        branches: list[nn.Parameter] = [
            parameter
            for name, parameter in self.layers.named_parameters()
            if name.endswith(tuple(f".{last}" for last in _LAST))
        ]
        with torch.no_grad():
            for weight in branches:
                weight.div_(math.sqrt(len(branches)))

    def initial_state(self, batch_size: int) -> tuple[Any, ...]:
        """Return the states of ``batch_size`` sequences before their first step, one for each layer."""
        return tuple(block.initial_state(batch_size) for block in self._blocks())

    def _blocks(self) -> Iterator[Block]:
        return cast(Iterator[Block], iter(self.layers))

    def forward(
        self, x: Tensor, state: tuple[Any, ...] | None = None, timeline: Timeline | None = None
    ) -> tuple[Float[Tensor, "b t d"], tuple[Any, ...]]:
        """Return the normed residual stream, and the states of all layers.

        Args:
            x: What the embedding takes, or ``[b t d]`` as it comes out of it.
            state: One state for each layer; the initial ones when absent.
            timeline: When the steps happen, where sequences begin, and which steps count.

        Raises:
            ValueError: If the state is that of another number of layers.
        """
        if state is not None and len(state) != len(self.layers):
            raise ValueError(f"Stack: a state of {len(state)} layers came to a stack of {len(self.layers)}")
        residual = x if self.embedding is None or x.is_floating_point() else self.embedding(x)
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        if self.embedding_multiplier != 1:
            residual = residual * self.embedding_multiplier
        if (taken := one_token(self, residual, state, timeline)) is not None:
            return taken
        states = []
        for i, block in enumerate(self._blocks()):
            arguments = (residual, None if state is None else state[i], timeline)
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                residual, after = checkpoint(block, *arguments, use_reentrant=False)
            else:
                residual, after = block(*arguments)
            states.append(after)
        return self.norm_f(residual), tuple(states)


def _parts(
    i: int, d_model: int, layer: LayerSpec, mlp: Mapping[str, Any] | None
) -> tuple[Mixer | None, nn.Module | None]:
    """Build mixer and channel mixer of a layer from its description."""
    where = f"layers[{i}]"
    spec = layer
    if isinstance(layer, Mapping):
        spec, mlp = {name: value for name, value in layer.items() if name != "mlp"}, layer.get("mlp", mlp)
    without = isinstance(spec, Mapping) and spec.get("mixer", 0) is None
    if without and (len(spec) > 1 or mlp is None):
        raise ValueError(f"{where} = {layer!r:.200}: a layer without a mixer has an mlp, and no other options")
    return (
        None if without else _mixer(where, d_model, spec),
        None if mlp is None else _channel_mixer(f"{where}: mlp", d_model, mlp),
    )


def _mixer(where: str, d_model: int, spec: Any) -> Mixer:
    """Build a mixer, or a route with the mixers that it is made of, from its description."""
    options: dict[str, Any] = {"mixer": spec} if isinstance(spec, str) else {}
    if isinstance(spec, Mapping):
        options = dict(spec)
    name = options.pop("mixer", None)
    if not isinstance(name, str):
        raise ValueError(f'{where} = {spec!r:.200}: wanted the name of a mixer, or {{"mixer": name, option: value, …}}')
    if name in MIXERS:
        return cast(Mixer, _construct(f"{where}: {name}", MIXERS[name], (d_model,), options))
    if name not in ROUTES:
        raise ValueError(f"{where}: there is no mixer {name!r}.{nearest(name, (*MIXERS, *ROUTES))}")
    for part in _parameters(ROUTES[name]):
        kinds = str(part.annotation).split(" | ")
        if "Mixer" in kinds and part.name in options and (options[part.name] is not None or "None" not in kinds):
            options[part.name] = _mixer(f"{where}: {name}: {part.name}", d_model, options[part.name])
    return cast(Mixer, _construct(f"{where}: {name}", ROUTES[name], (), options))


def _channel_mixer(where: str, d_model: int, options: Any) -> nn.Module:
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: options {options!r} are no mapping of names to values")
    options = dict(options)
    kind = options.pop("kind", "gated")
    check_choice(where, "kind", kind, CHANNEL_MIXERS)
    return _construct(where, CHANNEL_MIXERS[kind], (d_model,), options)


def _parameters(kind: type[Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(kind.__init__).parameters.values())[1:]


def _construct(where: str, kind: type[Any], first: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """Call a constructor with options that came as data."""
    if not isinstance(options, Mapping):
        raise ValueError(f"{where}: options {options!r} are no mapping of names to values")
    parameters = _parameters(kind)[len(first) :]
    known = [parameter.name for parameter in parameters]
    for option in options:
        if option not in known:
            raise ValueError(f"{where} has no option {option!r}.{nearest(option, known)}")
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in options:
            raise ValueError(f"{where}: {parameter.name} is missing")
    check_kinds(where, kind.__init__, options)
    try:
        return kind(*first, **options)
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
