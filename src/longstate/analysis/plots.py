"""Pictures of layers as control engineers draw them: poles, kernels, frequency responses, memory, Hankel values.

Every function takes a layer, or several by the names they shall have in the legend, draws into ``axes`` or a figure of
its own, writes the figure to ``path`` if one is given, and returns it. Times are in nominal steps; with a
``sample_rate`` (steps a second) in seconds, and frequencies in hertz. All but ``plot_memory`` want linear
time-invariant layers, and raise ``ValueError`` for others.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .. import systems
from .._errors import check_choice
from .._shapes import Float, Tensor
from ..mixers import H3, Mixer
from ..systems import StateSpace
from .linear import continuous_poles, hankel_singular_values, linear_systems, memory

Layers = Mixer | Mapping[str, Mixer]
Path = str | os.PathLike[str] | None

# Told apart with any colour vision (Okabe and Ito), and by their dashes in print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", "-.", ":")
GREY = "#888888"
PAPER = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}  # behind words among lines


def plot_spectrum(
    layer: Layers,
    before: Mixer | Mapping[str, Tensor] | None = None,
    plane: str | None = None,
    sample_rate: float | None = None,
    axes: Axes | None = None,
    path: Path = None,
) -> Figure:
    """Draw the poles of all systems of a layer: how fast they decay, and how fast they turn.

    Args:
        layer: A layer, or several by name.
        before: The same layer before training, or its parameters then (``state_dict``), drawn below as circles.
        plane: "s" for the plane of continuous poles (those of Δ A), "z" for the disc of discrete ones; when absent,
            the plane for layers with continuous time alone.
        sample_rate: Steps a second.
        axes: Where to draw.
        path: Where to write.
    """
    layers = _named(layer)
    if before is not None:
        if len(layers) != 1:
            raise ValueError(
                f"plot_spectrum: before= goes with one layer, and {len(layers)} came. Draw them one by one."
            )
        ((name, after),) = layers.items()
        if not isinstance(before, Mixer):
            parameters, before = before, copy.deepcopy(after)
            before.load_state_dict(parameters)
        layers = {"before": before, name if isinstance(layer, Mapping) else "after": after}
    if plane is None:
        plane = "s" if all(_is_timed(one) for one in layers.values()) else "z"
    check_choice("plot_spectrum", "plane", plane, ("s", "z"))
    figure, axes = _axes(axes, (6.4, 5.6))
    rate = sample_rate or 1.0
    for i, (name, one) in enumerate(layers.items()):
        if plane == "s":
            poles = np.concatenate(continuous_poles(one)) * rate
        else:
            poles = np.concatenate([systems.poles(system) for system in linear_systems(one)])
        old = before is not None and i == 0
        mark: dict[str, Any] = (
            {"marker": "o", "facecolors": "none", "edgecolors": "#555555"} if old else {"marker": "x"}
        )
        color: dict[str, Any] = {} if old else {"color": COLORS[(i - (before is not None)) % len(COLORS)]}
        size, alpha = (36, 0.9) if len(poles) <= 300 else (14, 0.6)
        axes.scatter(
            poles.real, poles.imag, s=size, linewidths=0.9, alpha=alpha, label=_counted(name, poles), **mark, **color
        )
    (_s_plane if plane == "s" else _z_disc)(axes, sample_rate)
    _legend(axes)
    return _finished(figure, path)


def plot_kernel(
    layer: Layers,
    steps: int | None = None,
    channels: Sequence[int] | None = None,
    sample_rate: float | None = None,
    axes: Axes | None = None,
    path: Path = None,
) -> Figure:
    """Draw the kernel K_l of channels: what an impulse does to the output, l steps later.

    Args:
        layer: A layer, or several by name.
        steps: How many; when absent, as many as it takes to fade away, and 4096 at most.
        channels: Which channels; some of them when absent. Where channels mix, from an input to the output of the same
            number.
        sample_rate: Steps a second.
        axes: Where to draw all of them; when absent, each has axes of its own.
        path: Where to write.
    """
    lines = _lines(layer, channels)
    if axes is None:
        figure = Figure(figsize=(7.2, 1.2 + 1.4 * len(lines)), dpi=150, layout="constrained")
        panels = list(figure.subplots(len(lines), 1, squeeze=False)[:, 0])
    else:
        figure, panels = _figure_of(axes), [axes] * len(lines)
    for i, ((label, system), panel) in enumerate(zip(lines, panels, strict=True)):
        count = _duration([system]) if steps is None else steps
        taps = systems.impulse_response(system, count).real[:, 0, 0]
        if steps is None:
            # To where no more than a hundredth of what follows the first tap is left, as a norm.
            left = np.cumsum(taps[:0:-1] ** 2)[::-1]
            taps = taps[: max(16, 1 + int((left > 1e-4 * left[0]).sum()))]
        panel.plot(np.arange(len(taps)) / (sample_rate or 1.0), taps, **_line(i), label=label)
        panel.axhline(0, color=GREY, linewidth=0.6, zorder=0)
        panel.margins(x=0)
        # The skip from input to output would make all else flat.
        reach = 1.2 * np.abs(taps[1:]).max(initial=1e-12)
        if axes is None and abs(taps[0]) > 1.5 * reach:
            panel.set_ylim(-reach, reach)
            panel.annotate(
                f"at 0: {taps[0]:.3g}", (0.01, 0.05), xycoords="axes fraction", fontsize="x-small", bbox=PAPER
            )
        panel.set_ylabel("output")
        panel.grid(alpha=0.25)
        panel.legend(fontsize="small", loc="upper right")
    panels[-1].set_xlabel(f"time since the impulse ({_unit(sample_rate)})")
    return _finished(figure, path)


def plot_bode(
    layer: Layers,
    channels: Sequence[int] | None = None,
    sample_rate: float | None = None,
    axes: Iterable[Axes] | None = None,
    path: Path = None,
) -> Figure:
    """Draw the frequency response of channels: gain in decibels, and phase in degrees, up to the Nyquist frequency.

    Args:
        layer: A layer, or several by name.
        channels: Which channels, as for ``plot_kernel``.
        sample_rate: Steps a second.
        axes: Where to draw: the gain's and the phase's.
        path: Where to write.
    """
    if axes is None:
        figure = Figure(figsize=(7.2, 5.6), dpi=150, layout="constrained")
        gain, phase = figure.subplots(2, 1, sharex=True)
    else:
        gain, phase = axes
        figure = _figure_of(gain)
    rate = sample_rate or 1.0
    lines = _lines(layer, channels)
    cycles = np.geomspace(min(1e-3, 0.1 / _duration([system for _, system in lines])), 0.5, 600)
    for i, (label, system) in enumerate(lines):
        response = systems.frequency_response(system, 2 * np.pi * cycles / (system.dt or 1.0))[:, 0, 0]
        # A zero of the response, as far as a picture goes.
        decibels = 20 * np.log10(np.maximum(np.abs(response), 1e-12))
        gain.semilogx(cycles * rate, decibels, **_line(i), label=label)
        phase.semilogx(cycles * rate, np.degrees(np.unwrap(np.angle(response))), **_line(i))
    phase.yaxis.set_major_locator(_degrees(phase))
    gain.set_ylabel("gain (dB)")
    phase.set(ylabel="phase (degrees)", xlabel=f"frequency ({'Hz' if sample_rate else 'cycles per step'})")
    for one in (gain, phase):
        one.set_xlim(cycles[0] * rate, cycles[-1] * rate)
        one.grid(which="both", alpha=0.25)
    _legend(gain)
    return _finished(figure, path)


def plot_memory(
    layer: Layers,
    steps: int = 1024,
    inputs: Float[Tensor, "t d"] | None = None,
    sample_rate: float | None = None,
    axes: Axes | None = None,
    path: Path = None,
) -> Figure:
    """Draw how much of an input is in the outputs t steps later, against the most there is at any time.

    Args:
        layer: A causal layer, or several by name. One that is not linear and time-invariant is measured on inputs
            (``linear.memory``), white noise when absent.
        steps: How many.
        inputs: At least so many inputs to measure layers on, linear ones too.
        sample_rate: Steps a second.
        axes: Where to draw.
        path: Where to write.
    """
    figure, axes = _axes(axes, (7.2, 4.4))
    times = np.arange(1, steps + 1) / (sample_rate or 1.0)  # a logarithmic axis has no 0
    for i, (name, one) in enumerate(_named(layer).items()):
        left = memory(one, steps + 1, inputs)
        # Less than rounding is nothing.
        shown = np.where(left > 1e-14 * left.max(), left / left.max(), np.nan)
        axes.loglog(times, shown[1:], **_line(i), label=name)
    axes.set(xlabel=f"time since the input ({_unit(sample_rate)})", ylabel="response, of its largest")
    axes.set_xlim(times[0], times[-1])
    axes.set_ylim(top=2)
    return _finished(figure, path, axes)


def plot_hankel(layer: Layers, axes: Axes | None = None, path: Path = None) -> Figure:
    """Draw the Hankel singular values of a layer's systems, their median and range: how many states would do.

    Args:
        layer: A stable layer, or several by name.
        axes: Where to draw.
        path: Where to write.
    """
    figure, axes = _axes(axes, (7.2, 4.4))
    for i, (name, one) in enumerate(_named(layer).items()):
        values = np.stack(hankel_singular_values(one))
        values = np.maximum(values / values[:, :1], 1e-17)
        states = np.arange(1, values.shape[1] + 1)
        if len(values) > 1:
            axes.fill_between(
                states, values.min(0), values.max(0), color=COLORS[i % len(COLORS)], alpha=0.2, linewidth=0
            )
        axes.semilogy(states, np.median(values, 0), **_line(i), marker=".", label=_systems(name, len(values)))
    axes.set(xlabel="state of the balanced system", ylabel="Hankel singular value, of the largest")
    axes.set_ylim(max(axes.get_ylim()[0], 1e-16), 2)
    return _finished(figure, path, axes)


def _named(layer: Layers) -> Mapping[str, Mixer]:
    return layer if isinstance(layer, Mapping) else {type(layer).__name__: layer}


def _axes(axes: Axes | None, size: tuple[float, float]) -> tuple[Figure, Axes]:
    if axes is not None:
        return _figure_of(axes), axes
    # Without pyplot, which would keep the figure and look for a display.
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    return figure, figure.add_subplot()


def _figure_of(axes: Axes) -> Figure:
    return cast(Figure, axes.figure)


def _finished(figure: Figure, path: Path, axes: Axes | None = None) -> Figure:
    if axes is not None:
        axes.grid(which="both", alpha=0.25)
        _legend(axes)
    if path is not None:
        figure.savefig(path)
    return figure


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, min(4, 75 // (6 + max(map(len, labels), default=0))))
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize="small")


def _line(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i // len(COLORS) % len(DASHES)], "linewidth": 1.4}


def _unit(sample_rate: float | None) -> str:
    return "s" if sample_rate else "steps"


def _counted(name: str, poles: np.ndarray) -> str:
    return f"{name}: {len(poles):,} poles"


def _systems(name: str, count: int) -> str:
    return f"{name}: median and range of {count} systems" if count > 1 else name


def _lines(layer: Layers, channels: Sequence[int] | None) -> list[tuple[str, StateSpace]]:
    """Return what to draw: systems of one input and one output, and their labels."""
    layers, found = _named(layer), []
    for name, one in layers.items():
        wanted = _spread(one, 4 if len(layers) == 1 else 1) if channels is None else list(channels)
        read = linear_systems(one, channels=wanted)
        prefix = f"{name}, " if len(layers) > 1 else ""
        if len(read) == 1 and read[0].feedthrough.shape != (1, 1):
            whole = read[0]
            for c in wanted:
                part = StateSpace(whole.A, whole.B[:, [c]], whole.C[[c]], whole.feedthrough[[c]][:, [c]], whole.dt)
                found.append((f"{prefix}input {c} to output {c}", part))
        else:
            kind = "head" if isinstance(one, H3) else "channel"
            found += [(f"{prefix}{kind} {c}", system) for c, system in zip(wanted, read, strict=True)]
    return found


def _spread(layer: Mixer, count: int) -> list[int]:
    """Return a few channels, from the first to the last."""
    width = layer.n_heads if isinstance(layer, H3) else layer.d_model
    return sorted({round(x) for x in np.linspace(0, width - 1, count)})


def _duration(found: Sequence[StateSpace]) -> int:
    """Return how many steps kernels take to fade to a hundredth, from 32 to 4096."""
    largest = max((float(np.abs(systems.poles(system)).max(initial=0.0)) for system in found), default=0.0)
    if largest >= 1:
        return 4096
    longest = max(len(system.A) for system in found) if largest < 1e-6 else 0  # nothing but delays
    return int(np.clip(max(longest, np.log(1e-2) / np.log(max(largest, 1e-6))), 32, 4096))


def _is_timed(layer: Mixer) -> bool:
    """Return whether a layer has continuous time, which those that count steps refuse."""
    try:
        linear_systems(layer, 0.5, [0])
    except ValueError:
        return False
    return True


def _degrees(axes: Axes) -> Any:
    """Return ticks at simple fractions of a turn."""
    from matplotlib.ticker import MultipleLocator

    low, high = axes.get_ylim()
    return MultipleLocator(next((x for x in (15, 30, 45, 90, 180, 360, 720) if high - low <= 8 * x), 3600))


def _s_plane(axes: Axes, sample_rate: float | None) -> None:
    """Scale, shade and name the axes of the plane: both over decades, as poles spread."""
    points = np.concatenate([np.asarray(x.get_offsets()) for x in axes.collections])
    for values, scale, limits in (
        (points[:, 0], axes.set_xscale, axes.set_xlim),
        (points[:, 1], axes.set_yscale, axes.set_ylim),
    ):
        sizes = np.abs(values[np.abs(values) > 1e-9])
        small, large = (sizes.min(), sizes.max()) if len(sizes) else (1e-3, 1.0)
        small = 10 ** np.floor(np.log10(max(small, large * 1e-5)))
        scale("symlog", linthresh=small, linscale=1)
        limits(-2 * large, small / 2 if values.max() <= 0 else 2 * large)
    axes.axvspan(0, axes.get_xlim()[1], color=COLORS[1], alpha=0.12, linewidth=0)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.annotate(
        "unstable", (1, 0), xycoords="axes fraction", ha="right", va="bottom", fontsize="x-small", rotation=90
    )
    unit = "second" if sample_rate else "step"
    axes.set(xlabel=f"Re s (1 per {unit})", ylabel=f"Im s (radians per {unit})")
    axes.grid(alpha=0.25)


def _z_disc(axes: Axes, sample_rate: float | None) -> None:
    """Draw the unit circle, and circles of equal time constants."""
    turn = np.exp(2j * np.pi * np.linspace(0, 1, 361))
    axes.plot(turn.real, turn.imag, color="black", linewidth=1.0)
    for steps in (1, 2, 5, 20):
        radius = np.exp(-1 / steps)
        axes.plot(radius * turn.real, radius * turn.imag, color=GREY, linewidth=0.6, linestyle=":")
        text = f"{steps / sample_rate:.3g} s" if sample_rate else f"{steps}"
        axes.annotate(text, (0, -radius), ha="center", va="bottom", fontsize="x-small", bbox=PAPER)
    axes.axhline(0, color=GREY, linewidth=0.5, zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.5, zorder=0)
    reach = max(1.1, max(np.abs(np.asarray(x.get_offsets())).max(initial=0) for x in axes.collections) * 1.05)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
    axes.set(xlabel=f"Re z (dotted: time constants in {_unit(sample_rate)})", ylabel="Im z")
