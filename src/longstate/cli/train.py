"""``longstate train``: the options are those of ``train.Options``, read from there."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..train import Options
from ..train import train as run
from ..train.loop import OPTIONS_NAME
from ..train.options import read_config, resumed


def _parameters() -> list[inspect.Parameter]:
    """Return the command's parameters: one for each option, and those that are about the command itself."""
    hints = get_type_hints(Options)
    found: list[tuple[str, Any, Any, Any]] = [("typer_context", typer.Context, None, inspect.Parameter.empty)]
    for field in dataclasses.fields(Options):
        kind, default = hints[field.name], field.default
        if field.name == "text":
            about, kind, default = typer.Argument(help=field.metadata["help"]), list[str] | None, None
        else:
            about = typer.Option(help=field.metadata["help"])
        found.append((field.name, kind, about, default))
    config = typer.Option(help="YAML file with these options; the command line goes before it.")
    resume = typer.Option("--resume", help="Go on with the run in --out, with the options that it began with.")
    found += [("config", str | None, config, None), ("resume", bool, resume, False)]
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            annotation=kind if about is None else Annotated[kind, about],
            default=default,
        )
        for name, kind, about, default in found
    ]


def command(**values: Any) -> None:
    """Train a language model on text, and print a sample of what it writes.

    Without text, it learns from the sources of Python's standard library, which every machine has.
    """
    context, config, resume = (values.pop(name) for name in ("typer_context", "config", "resume"))
    given = {name: x for name, x in values.items() if context.get_parameter_source(name).name != "DEFAULT"}
    if config is not None:
        given = {**read_config(config), **given}
    if not resume:
        run(Options(**given))
        return
    out = Path(given.get("out", values["out"]))
    if not (out / OPTIONS_NAME).is_file():
        raise FileNotFoundError(f"{out}: there is no run to resume. Give the folder of one with --out.")
    run(resumed(Options(**read_config(out / OPTIONS_NAME)), {**given, "out": str(out)}), resume=True)


# Typer reads the signature, and finds here what the class of options says.
command.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
