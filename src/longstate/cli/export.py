"""``longstate export``: a model as transformers reads a family of models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints import load_pretrained, save
from ..checkpoints.published import carry, check_apart, folder_of, special_tokens


def command(
    folder: Annotated[str, typer.Argument(help="Folder of a model, ours or published.")],
    family: Annotated[str, typer.Option(help="What to write, such as 'mamba2': model_type in transformers.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
) -> None:
    """Write a model, its tokenizer and its chat template so that transformers opens it."""
    source = folder_of(folder)
    check_apart(source, out)
    model = load_pretrained(source)
    save(model, out, family, special_tokens(source))
    written = ["config.json", "model.safetensors", *carry(source, Path(out))]
    typer.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters. Wrote to {out}: {', '.join(written)}")
