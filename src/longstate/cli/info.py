"""``longstate info``: how large a model is, and what a token costs."""

from __future__ import annotations

from typing import Annotated

import typer

from ..analysis.cost import Cost, token_cost
from ..checkpoints import load_pretrained
from ._table import table


def command(
    folder: Annotated[str, typer.Argument(help="Folder of a model, published ones too, or of a training run.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens read before the one that is looked at.")] = 1024,
) -> None:
    """Say how large a model and its state are, and what one more token costs."""
    costs = token_cost(load_pretrained(folder).eval(), context)
    total = Cost("all", *map(sum, list(zip(*costs, strict=True))[1:]))
    heading = ("layer", "parameters", "state bytes", "FLOPs/token", "bytes/token")
    typer.echo(table([heading, *((cost.name, *(f"{x:,}" for x in cost[1:])) for cost in [*costs, total])]))
    typer.echo(
        f"\nFor one token of one sequence, after {context:,} others. FLOPs: matrix products, attention, recurrences\n"
        "and short convolutions (a product and a sum are two); not norms, gates and activations. Bytes: parameters\n"
        "and state read, state written."
    )
