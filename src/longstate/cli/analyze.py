"""``longstate analyze``: a page with pictures of a model's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ..checkpoints import load_pretrained
from ..checkpoints.published import check_apart, folder_of
from ..models import LanguageModel
from ._table import table


def command(
    folder: Annotated[str, typer.Argument(help="Folder of a model, published ones too, or of a training run.")],
    out: Annotated[str, typer.Option(help="Folder to write: index.html and its pictures.")],
) -> None:
    """Write a page about the layers of a model: poles, frequency responses, kernels, memory, Hankel singular values.

    Of a training run it also has the losses, and the poles before training.
    """
    # Here, because matplotlib is an extra and takes long to import.
    from ..analysis.report import HEADING, write_report

    source, place = folder_of(folder), Path(out)
    check_apart(source, out)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise FileExistsError(f"{out} exists already. Give another --out, or remove it.")
    model = load_pretrained(source)
    losses = None
    if (source / "loss.csv").is_file():
        from ..train.log import read_log

        losses = read_log(source / "loss.csv")
    rows = write_report(model, place, f"Layers of {folder}", _initial(source, model), losses)
    if shown := [row.cells for row in rows if not row.left_out]:
        typer.echo(table([HEADING, *shown]) + "\n")
    for row in rows:
        if row.left_out:
            typer.echo(f"{row.name} is left out: {row.left_out}")
    typer.echo(f"\nWrote to {place / 'index.html'}.")


def _initial(source: Path, model: LanguageModel) -> LanguageModel | None:
    """Return the model as the run in a folder began with it, if it is a run: its seed draws the same weights again."""
    if not (source / "options.yaml").is_file():
        return None
    from ..train.options import Options, read_config

    seed = Options(**read_config(source / "options.yaml")).seed
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LanguageModel.from_config(model.config)
