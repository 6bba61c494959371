"""``longstate import``: a published model in our own format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from .._errors import check_choice
from ..checkpoints import load_pretrained, save
from ..checkpoints.published import carry, check_apart, folder_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def command(
    folder: Annotated[str, typer.Argument(help="Folder of a published model, or its name on the Hugging Face hub.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    dtype: Annotated[
        str | None, typer.Option(help="Type of the weights, such as 'bfloat16'; else as they are.")
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read pytorch_model.bin, as weights only.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Write a published model, its tokenizer and its chat template in our own format."""
    if dtype is not None:
        check_choice("import", "dtype", dtype, DTYPES)
    source = folder_of(folder, revision, allow_pickle)
    check_apart(source, out)
    model = load_pretrained(source, dtype=DTYPES[dtype] if dtype else None, allow_pickle=allow_pickle)
    save(model, out)
    written = ["config.json", "model.safetensors", *carry(source, Path(out))]
    typer.echo(f"{sum(p.numel() for p in model.parameters()):,} parameters. Wrote to {out}: {', '.join(written)}")
