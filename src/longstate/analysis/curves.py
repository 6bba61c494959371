"""Plots of losses."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter


def save_loss_plot(columns: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> None:
    """Draw training and validation loss in bits per byte against tokens, as a PNG.

    Args:
        columns: ``tokens``, ``train_bits_per_byte`` and ``validation_bits_per_byte``; NaN where there is no value.
        path: The file to write.
    """
    # Without pyplot, which would keep the figure and look for a display.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    tokens, training = columns["tokens"], columns["train_bits_per_byte"]
    axes.plot(tokens, training, color="tab:blue", alpha=0.3, linewidth=1, label="training, mean since the last row")
    axes.plot(tokens, _smooth(training), color="tab:blue", label="training, smoothed")
    held_out = [(x, y) for x, y in zip(tokens, columns["validation_bits_per_byte"], strict=True) if not math.isnan(y)]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", color="tab:orange", markersize=4, label="validation")
        axes.annotate(f"{held_out[-1][1]:.3f}", held_out[-1], xytext=(0, 8), textcoords="offset points", ha="right")
    # The first steps lie far above all others and would flatten the rest.
    top = sorted(training)[int(0.98 * (len(training) - 1))] if training else 1.0
    low = min([*training, *(y for _, y in held_out)], default=0.0)
    axes.set_ylim(max(low - 0.1 * (top - low) - 0.02, 0), top + 0.05 * (top - low) + 0.02)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(xlabel="training tokens", ylabel="loss (bits per byte)", title="Loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def _smooth(values: Sequence[float], half_life: float = 5.0) -> list[float]:
    """Return the exponential mean, corrected for its beginning, in which a value's weight halves every so many rows."""
    keep = 0.5 ** (1 / half_life)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(mean / weight)
    return result
