"""``longstate bench``: measurements that the package itself makes use of."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..ops import _triton

app = typer.Typer(help="Measure what the package makes use of.", rich_markup_mode=None)


@app.callback()
def _group() -> None:
    """Keep ``tune`` a command of its own name though it is the only one."""


@app.command("tune", short_help="Choose the tiles of the GPU kernels for this machine's GPU.")
def tune(
    only: Annotated[str, typer.Option(help="A part of the names of the workloads to take.")] = "",
    out: Annotated[Path | None, typer.Option(help="The table to add to; the package's own if left out.")] = None,
) -> None:
    """Try sizes of tiles, warps and stages for every kernel and write the best into the table that the kernels read."""
    from ..bench.tune import merged, write
    from ..bench.tune import tune as tuned

    path = out or Path(str(resources.files("longstate.ops").joinpath("tuned.json")))
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    table = _triton.read_table(path) if path.exists() else {}
    for found in tuned(device, only, say=typer.echo):
        table = merged(table, found)
        write(table, path)  # each time: what was found so far is kept if this is broken off
    typer.echo(f"Written to {path}.")
