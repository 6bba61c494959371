"""The linear systems that layers run, read off one step of theirs: matrices for all of ``longstate.systems``."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from .. import state as states
from .. import systems
from .._shapes import Float, Inexact, Tensor
from ..mixers import H3, Mega, Megalodon, Mixer
from ..mixers._diagonal import run_modes
from ..mixers._parts import OutputGate
from ..systems import StateSpace
from ..timeline import Timeline

TOLERANCE = 1e-9  # how far a step may be from the sum of what its parts do, relative to its largest number
LARGEST = 2**26  # numbers in the matrices of a layer: half a gigabyte
PIECE = 2**22  # numbers in the states of one call
UNDAMPED = 1e-12  # how near the unit circle poles are on it, as far as rounding tells
INSTANT = 2.0**-18  # of a nominal step: short enough for every rule, and long enough for float64


class _Step(NamedTuple):
    """The part of a layer that may be linear: from ``[b 1 width]`` and a state to outputs alike and the next state."""

    run: Callable[[Tensor, Any, Timeline], tuple[Tensor, Any]]
    initial: Callable[[int], Any]
    width: int


def linear_systems(layer: Mixer, dt: float = 1.0, channels: Sequence[int] | None = None) -> list[StateSpace]:
    """Return the discrete linear systems that a layer runs, from what one step does to unit states and unit inputs.

        x_{t+1} = A x_t + B u_t,    y_t = C x_t + D u_t

    There is a system of one input and one output for each channel (each head of H3), or a single one of all channels
    where they mix. States are real: a complex one is two. What follows the recurrence (a gated linear unit) is left
    out, and of Mega, Megalodon and H3 all but the moving averages and the diagonal systems. That the step is linear is
    tested with random states and inputs.

    Args:
        layer: A linear time-invariant layer of any type; computed in float64 on the CPU.
        dt: The time that the step takes, in nominal steps; for layers with continuous time.
        channels: Which channels' systems are wanted; all when absent. A single system has all in any case.

    Raises:
        ValueError: If the layer is not linear and time-invariant, has too many states for matrices, or counts steps
            and a ``dt`` came.
    """
    return [StateSpace(A, B, C, D, dt) for A, B, C, D in zip(*_matrices(layer, dt, channels), strict=True)]


def continuous_poles(layer: Mixer) -> list[Inexact[np.ndarray, " n"]]:
    """Return the poles of each system of a layer with continuous time, per nominal step: of S4D, λ Δ.

    They are (log of) the poles of a step that takes nearly no time, which every rule of discretisation has in common.

    Raises:
        ValueError: If the layer counts steps, or is not linear and time-invariant.
    """
    return [np.log(systems.poles(system)) / INSTANT for system in linear_systems(layer, INSTANT)]


def hankel_singular_values(layer: Mixer) -> list[Float[np.ndarray, " n"]]:
    """Return the Hankel singular values of each system of a layer, the largest first: how many states it needs.

    The Gramians of all systems are summed together, W ← W + A W Aᵀ with A ← A² from W = B Bᵀ on.

    Raises:
        ValueError: If the layer is not linear and time-invariant, or not stable.
    """
    A, B, C, _ = _matrices(layer, 1.0, None)
    reach, show = (_gramian_root(*pair, type(layer).__name__) for pair in ((A, B), (A.mT, C.mT)))
    return list(np.linalg.svd(show.mT @ reach, compute_uv=False))


def memory(layer: Mixer, steps: int, inputs: Float[Tensor, "t d"] | None = None) -> Float[np.ndarray, " l"]:
    """Return how much of an input is in the outputs 0, 1, 2, … steps later: the norm of what they do about it.

    Of a linear time-invariant layer it is √Σ K_l², over all channels of its kernel (``linear_systems``). Any other
    causal layer is run, with all that belongs to it, on inputs of which the one ``steps`` before the end is moved by a
    little in random directions; it depends on the inputs then.

    Args:
        layer: A causal layer.
        steps: How many steps.
        inputs: At least ``steps`` of them; white noise, and as much of it before the step that is moved, when absent.

    Raises:
        ValueError: If the layer is not causal, or there are too few inputs.
    """
    if inputs is None:
        try:
            found = linear_systems(layer)
        except ValueError:
            pass
        else:
            taps = (np.abs(systems.impulse_response(system, steps)) ** 2 for system in found)
            return np.asarray(np.sqrt(sum(x.sum((1, 2)) for x in taps)))
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(2 * steps, layer.d_model, generator=generator, dtype=torch.float64)
    if not layer.causal or len(inputs) < steps:
        raise ValueError(
            f"memory({type(layer).__name__}, steps={steps}): wanted a causal layer, and no fewer inputs than steps,"
            f" not {len(inputs)}"
        )
    layer, x = copy.deepcopy(layer).double().cpu().eval(), inputs.double().cpu()
    # Of a random vector of signs s, the mean of |J s|² is ‖J‖². Moved both ways, errors of second order cancel.
    signs = torch.randn(8, layer.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sign()
    moved = x.repeat(16, 1, 1)
    moved[:, -steps] += 1e-5 * torch.cat([signs, -signs])
    with torch.no_grad():
        ahead, back = layer(moved)[0][:, -steps:].chunk(2)
    return np.asarray(((ahead - back) / 2e-5).square().sum(-1).mean(0).sqrt())


def _matrices(layer: Mixer, dt: float, channels: Sequence[int] | None) -> list[Float[np.ndarray, "g ..."]]:
    """Return A, B, C and D of all systems of a layer together."""
    name, step = type(layer).__name__, _linear_part(layer)
    timeline = Timeline() if dt == 1 else Timeline(dt=torch.full((1, 1), dt, dtype=torch.float64))
    chosen = list(range(step.width)) if channels is None else list(channels)
    if not all(0 <= channel < step.width for channel in chosen):
        raise ValueError(f"linear_systems(channels={chosen}): {name} has channels 0 to {step.width - 1}")
    initial = step.initial(1)
    if initial is None:
        raise ValueError(
            f"linear_systems: {name} is no system with a state: its outputs depend on steps to come, or on all of the"
            " past. Look at the layers inside a route one by one; plot_memory is for any causal layer."
        )
    tensors = states.flatten(initial)
    axes = {key: [i for i, n in enumerate(x.shape) if i and n == step.width] for key, x in tensors.items()}
    # Channels with states of their own are read all at once, each by its place on an axis as long as there are
    # channels. A wrong guess at that axis does not pass the test of linearity; no axis is for channels that mix.
    guesses = [{key: found[i] for key, found in axes.items()} for i in (0, -1) if all(axes.values())] + [{}]
    with torch.no_grad():
        if not layer.causal or not _is_linear(step, timeline):
            raise ValueError(
                f"linear_systems: {name} is not a linear time-invariant system: what a step does depends on its inputs"
                " or on when it happens. S4D, S5 and LRU are such systems; plot_memory is for any causal layer."
            )
        found = (_Reader(step, timeline, guess, chosen).read(name) for guess in guesses)
        return next(matrices for matrices in found if matrices is not None)


def _is_linear(step: _Step, timeline: Timeline) -> bool:
    """Return whether a step takes a random sum of states and inputs to the sum of what it takes them to."""
    like, generator = step.initial(3), torch.Generator().manual_seed(0)
    tensors = states.flatten(like)
    if not all(x.is_floating_point() for x in tensors.values()):
        return False  # steps are counted
    tensors["input"] = torch.empty(3, 1, step.width)
    for key, x in tensors.items():
        first, second = torch.randn(2, *x.shape[1:], generator=generator, dtype=torch.float64)
        tensors[key] = torch.stack([first, second, first - 2 * second])
    y, after = step.run(tensors.pop("input"), states.unflatten(tensors, like), timeline)
    outputs = states.flatten(after)
    if outputs.keys() != tensors.keys() or any(outputs[key].shape != x.shape for key, x in tensors.items()):
        return False
    return all(
        bool((x[0] - 2 * x[1] - x[2]).abs().max() <= TOLERANCE * x.abs().max())
        for x in (y, *outputs.values())
        if x.numel()
    )


def _gramian_root(
    A: Float[np.ndarray, "g n n"], B: Float[np.ndarray, "g n i"], name: str
) -> Float[np.ndarray, "g n n"]:
    """Return R with R Rᵀ = Σ_t A^t B Bᵀ (A^t)ᵀ of systems together."""
    if np.abs(np.linalg.eigvals(A)).max(initial=0.0) >= 1 - UNDAMPED:
        raise ValueError(f"hankel_singular_values: {name} has a pole on the unit circle or outside: it is not stable")
    W = B @ B.mT
    while np.abs(A).max(initial=0.0) > 1e-30:
        W, A = W + A @ W @ A.mT, A @ A
    values, V = np.linalg.eigh((W + W.mT) / 2)
    return np.asarray(V * np.sqrt(np.maximum(values, 0))[:, None])


def _linear_part(layer: Mixer) -> _Step:
    """Return what may be linear of a copy in float64."""
    layer = copy.deepcopy(layer).double().cpu().eval()
    initial = layer.initial_state
    if isinstance(layer, Mega | Megalodon):
        average: nn.Module = layer.ema if isinstance(layer, Mega) else layer.cema
        return _Step(average, lambda batch: initial(batch).ssm, layer.d_model)
    if isinstance(layer, H3):
        (log_decay, B, C), skip, heads = layer.system(), layer.D, layer.n_heads

        def run(x: Tensor, state: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
            y, state = run_modes(x, log_decay, B, C, state, timeline)
            return y + skip * x, state

        return _Step(run, lambda batch: initial(batch).ssm[:, 0, 0], heads)
    if isinstance(getattr(layer, "output", None), OutputGate):
        layer.output = nn.Identity()
    return _Step(layer, initial, layer.d_model)


class _Reader:
    """Reads matrices off a step that is linear: of channels apart, given the axis of each state's tensor that counts
    them, or of all together. ``[g …]`` counts systems: as many as channels, or one.
    """

    def __init__(self, step: _Step, timeline: Timeline, axes: dict[str, int], chosen: Sequence[int]) -> None:
        self.step, self.timeline, self.axes = step, timeline, axes
        self.shapes = {key: x.shape[1:] for key, x in states.flatten(step.initial(1)).items()}
        self.inputs = 1 if axes else step.width  # of a system
        self.groups = step.width if axes else 1
        self.chosen = list(chosen) if axes else [0]
        self.size = sum(math.prod(shape) for shape in self.shapes.values()) // self.groups

    def read(self, name: str) -> list[Float[np.ndarray, "g ..."]] | None:
        """Return A, B, C and D of the chosen systems, or None where they are not apart."""
        total = self.size + self.inputs
        if len(self.chosen) * total**2 > LARGEST:
            raise ValueError(
                f"linear_systems: {name} has {self.size} states{' a channel' if self.axes else ''}, too many for"
                f" matrices of {len(self.chosen)} systems. Name fewer channels, or make a smaller layer."
            )
        units = torch.eye(total, dtype=torch.float64).split(max(1, PIECE // (total * self.groups)))
        rows = [self._apply(unit[:, None].expand(-1, self.groups, -1))[:, self.chosen] for unit in units]
        matrix = torch.cat(rows).permute(1, 2, 0)
        probe = torch.randn(self.groups, total, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        wanted = (matrix @ probe[self.chosen, :, None])[..., 0]
        if not (self._apply(probe[None])[0, self.chosen] - wanted).abs().max() <= TOLERANCE * wanted.abs().max():
            return None
        n = self.size
        blocks = (matrix[:, :n, :n], matrix[:, :n, n:], matrix[:, n:, :n], matrix[:, n:, n:])
        return [x.contiguous().numpy() for x in blocks]

    def _apply(self, x: Float[Tensor, "b g m"]) -> Float[Tensor, "b g m"]:
        """Return states and outputs after a step from states and inputs, those of a system in a row."""
        tensors, begin = {}, 0
        for key, shape in self.shapes.items():
            end = begin + math.prod(shape) // self.groups
            if self.axes:
                axis = self.axes[key]
                rest = [n for i, n in enumerate(shape, 1) if i != axis]
                tensors[key] = x[..., begin:end].reshape(*x.shape[:2], *rest).movedim(1, axis)
            else:
                tensors[key] = x[:, 0, begin:end].reshape(-1, *shape)
            begin = end
        state = states.unflatten(tensors, self.step.initial(len(x)))
        y, state = self.step.run(x[..., begin:].reshape(len(x), 1, -1), state, self.timeline)
        after = states.flatten(state)
        parts = [after[key].movedim(self.axes.get(key, 1), 1).reshape(*x.shape[:2], -1) for key in self.shapes]
        return torch.cat([*parts, y.reshape(*x.shape[:2], -1)], -1)
