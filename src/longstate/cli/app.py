"""The commands together, and the one place where an error becomes a line for the user."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import torch
import typer
from safetensors import SafetensorError

from .. import __version__
from . import analyze, bench, doctor, export, generate, import_, info, train

app = typer.Typer(
    name="longstate",
    help="Train, sample and look at sequence models with a linear recurrence.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("train", short_help="Train a language model on text.")(train.command)
app.command("generate", short_help="Write on from a prompt.")(generate.command)
app.command("info", short_help="Say how large a model is and what a token costs.")(info.command)
app.command("analyze", short_help="Write a page with pictures of a model's layers.")(analyze.command)
app.command("import", short_help="Take a published model into our own format.")(import_.command)
app.command("export", short_help="Write a model as transformers reads it.")(export.command)
app.add_typer(bench.app, name="bench")
app.command("doctor", short_help="Say what is installed and which backends run.")(doctor.command)

_TRACEBACK = "--traceback"
# The packages of an extra, by what Python calls them.
_EXTRAS = dict.fromkeys(("lightning", "matplotlib", "rich", "tensorboard", "tokenizers"), "train")
_EXTRAS |= {"torchdiffeq": "ode", "transformers": "hf"}


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
    traceback: Annotated[bool, typer.Option(_TRACEBACK, help="Show where in the program an error arose.")] = False,
) -> None:
    """Take what is common to all commands; both options do their work elsewhere."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with its exit code: 2 after a user's mistake, which is told in one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(args=list(arguments), prog_name="longstate", standalone_mode=False)
    except Exception as error:
        message = _message(error)
        if message is None or _TRACEBACK in arguments:
            raise
        print("longstate:", " ".join(message.split()), file=sys.stderr)
        code = 2
    sys.exit(code or 0)


def _message(error: Exception) -> str | None:
    """Return what to tell the user; None for what is no user's mistake but ours, and keeps its traceback."""
    if hasattr(error, "format_message"):  # typer's errors, whose class is at another place in every other version
        return f"{error.format_message()} See longstate --help."
    if isinstance(error, ModuleNotFoundError):
        # Lightning does not name what it misses, which is TensorBoard.
        extra = _EXTRAS.get((error.name or "tensorboard").split(".")[0])
        return f"{error}. It comes with: pip install 'longstate[{extra}]'" if extra else None
    if isinstance(error, SafetensorError) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        what = getattr(error, "strerror", None) or error
        return f"{what}: the file was not written, and what was there before is untouched. Make room and go on."
    if isinstance(error, torch.OutOfMemoryError):
        return f"{error}. Try a smaller --batch-size, --context or --d-model."
    return str(error) if isinstance(error, ValueError | OSError) else None
