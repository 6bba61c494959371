"""A page about a model: its layers in a table, and the pictures of each that is a linear system."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from .. import systems
from .._files import replacing
from ..mixers import Mixer
from ..models import LanguageModel
from . import plots
from .curves import save_loss_plot
from .linear import UNDAMPED, hankel_singular_values, linear_systems

MEMORY_STEPS = 512


class Summary(NamedTuple):
    """What a table says of a layer.

    Attributes:
        name: Its number and its mixer.
        states: Real numbers in the state of one of its systems.
        time_constant: Steps in which its slowest pole falls to 1/e; infinite where one does not fall.
        margin: How far its poles are from the unit circle; negative when unstable.
        hankel: The largest Hankel singular value; None where a pole does not fall.
        left_out: Why there is nothing of the above; "" where there is.
    """

    name: str
    states: int = 0
    time_constant: float = 0.0
    margin: float = 0.0
    hankel: float | None = None
    left_out: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of a row under ``HEADING``."""
        if self.left_out:
            return (self.name, "", "", "", "")
        hankel = "" if self.hankel is None else f"{self.hankel:.3g}"
        return (self.name, str(self.states), f"{self.time_constant:.4g}", f"{self.margin:.3g}", hankel)


HEADING = ("layer", "states", "slowest time constant (steps)", "stability margin", "largest Hankel value")


def summarize(name: str, layer: Mixer) -> Summary:
    """Return what a table says of a layer."""
    try:
        found = linear_systems(layer)
    except ValueError as error:
        reason, _, _ = str(error).removeprefix("linear_systems: ").partition(". ")
        return Summary(name, left_out=f"{reason}.")
    margin = min(systems.stability_margin(system) for system in found)
    if margin <= UNDAMPED:
        return Summary(name, len(found[0].A), float("inf"), margin)
    constant = -1 / float(np.log1p(-margin)) if margin < 1 else 0.0
    hankel = max(float(x.max(initial=0.0)) for x in hankel_singular_values(layer))
    return Summary(name, len(found[0].A), constant, margin, hankel)


def write_report(
    model: LanguageModel,
    folder: str | os.PathLike[str],
    title: str,
    initial: LanguageModel | None = None,
    losses: Mapping[str, Sequence[float]] | None = None,
) -> list[Summary]:
    """Write ``index.html`` and its pictures into a folder, and return the rows of its table.

    Args:
        model: The model.
        folder: Where to; made if it does not exist.
        title: The heading of the page.
        initial: The model before training, whose poles are drawn beside those after it.
        losses: Columns for ``curves.save_loss_plot``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = [block.mixer for block in model.backbone.layers]
    starts: list[Any] = [None] * len(layers) if initial is None else [block.mixer for block in initial.backbone.layers]
    named = {f"{i} {type(layer).__name__}": layer for i, layer in enumerate(layers) if isinstance(layer, Mixer)}
    rows = [summarize(name, layer) for name, layer in named.items()]
    body = [_table(rows)]
    if losses is not None and losses["tokens"]:
        save_loss_plot(losses, folder / "loss.png")
        body.append(_section("Losses", [_image("loss.png", "Loss in bits per byte against training tokens.")]))
    causal = {name: layer for name, layer in named.items() if layer.causal}
    if causal:
        plots.plot_memory(causal, MEMORY_STEPS, path=folder / "memory.png")
        about = (
            "How much of an input is in the outputs so many steps later. Layers that are not linear time-invariant"
            " systems are measured on white noise, with all that belongs to them."
        )
        body.append(_section("Memory", [_image("memory.png", about)]))
    for row, (name, layer) in zip(rows, named.items(), strict=True):
        if row.left_out:
            body.append(_section(f"Layer {name}", [f"<p>Left out: {html.escape(row.left_out)}</p>"]))
        else:
            start = starts[int(name.split()[0])]
            body.append(_section(f"Layer {name}", _pictures(folder, name, layer, start, row.hankel is not None)))
    page = PAGE.format(title=html.escape(title), body="\n".join(body))
    with replacing(folder / "index.html") as part:
        part.write_text(page, encoding="utf-8")
    return rows


def _pictures(folder: Path, name: str, layer: Mixer, start: Mixer | None, stable: bool) -> list[str]:
    number = name.split()[0]
    trained = ", before training and after" if start is not None else ""
    wanted: list[tuple[str, Figure, str]] = [
        (
            "poles",
            plots.plot_spectrum(layer, before=start),
            f"Poles{trained}. The further left, or from the circle, the faster they decay; the further from the real"
            " axis, the faster they turn.",
        ),
        ("bode", plots.plot_bode(layer), "Gain and phase of some channels."),
        ("kernel", plots.plot_kernel(layer), "What an impulse does to the output of some channels."),
    ]
    if stable:
        about = "Hankel singular values: where they have fallen to little, fewer states would do."
        wanted.append(("hankel", plots.plot_hankel(layer), about))
    found = []
    for kind, figure, about in wanted:
        figure.savefig(folder / f"layer{number}-{kind}.png")
        found.append(_image(f"layer{number}-{kind}.png", about))
    return found


def _table(rows: Sequence[Summary]) -> str:
    cells = [f"<tr>{''.join(f'<th>{text}</th>' for text in HEADING)}</tr>"]
    for row in rows:
        link, *others = (html.escape(text) for text in row.cells)
        first = f'<td><a href="#layer-{link.replace(" ", "-")}">{link}</a></td>'
        rest = "".join(f"<td>{x}</td>" for x in others) if not row.left_out else '<td colspan="4">left out</td>'
        cells.append(f"<tr>{first}{rest}</tr>")
    lines = "\n".join(cells)
    return f"<table>\n{lines}\n</table>"


def _section(title: str, parts: Sequence[str]) -> str:
    anchor = html.escape(title).lower() if not title.startswith("Layer") else f"layer{title[5:]}"
    return (
        f'<section id="{anchor.replace(" ", "-")}">\n<h2>{html.escape(title)}</h2>\n'
        + "\n".join(parts)
        + "\n</section>"
    )


def _image(file: str, about: str) -> str:
    return (
        f'<figure><img src="{file}" alt="{html.escape(about)}"><figcaption>{html.escape(about)}</figcaption></figure>'
    )


# Nothing from elsewhere: the page can be read without a network.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; }}
th, td {{ border-bottom: 1px solid #ccc; padding: 0.3rem 0.8rem; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
td[colspan] {{ text-align: left; color: #666; }}
figure {{ margin: 1rem 0 2rem; }}
img {{ max-width: 100%; }}
figcaption {{ color: #555; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>One step is one token. The time constant is that of the slowest pole, in which it falls to 1/e; the stability margin
is its distance from the unit circle; the largest Hankel singular value is the most that one state passes on from past
inputs to later outputs.</p>
{body}
</body>
</html>
"""
