"""Plots of losses."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, ScalarFormatter


def save_loss_plot(columns: Mapping[str, Sequence[float]], path: str | os.PathLike[str]) -> None:
    """Draw training and validation loss in bits per byte against tokens, as a PNG.

    Args:
        columns: ``tokens``, ``train_bits_per_byte`` and ``validation_bits_per_byte``; NaN where there is no value.
        path: The file to write.
    """
    # Without pyplot, which would keep the figure and look for a display.
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(columns["tokens"], columns["train_bits_per_byte"], linewidth=1, alpha=0.7, label="training")
    pairs = zip(columns["tokens"], columns["validation_bits_per_byte"], strict=True)
    held_out = [(x, y) for x, y in pairs if not math.isnan(y)]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", markersize=4, label=f"validation, {held_out[-1][1]:.3f} at last")
    # Losses fall fast and then slowly: a logarithmic axis shows both.
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(xlabel="training tokens", ylabel="loss (bits per byte, logarithmic)")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)
