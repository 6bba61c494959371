"""The page about the command line names every command and option, and none that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import typer.main

from longstate.cli import app

PAGE = (Path(__file__).parents[2] / "docs/reference/cli.md").read_text(encoding="utf-8")
COMMON = {"--help", "--traceback"}


def sections() -> dict[str, str]:
    """Return what the page says, by command."""
    _, *parts = re.split(r"^## longstate (\w[\w ]*)\n", PAGE, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands() -> dict[str, click.Command]:
    """Return all commands, those of a group by both names."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():
        below = getattr(command, "commands", {})
        found |= {f"{name} {part}": inner for part, inner in below.items()} if below else {name: command}
    return found


def test_the_page_has_every_command_with_its_options() -> None:
    assert set(sections()) == set(commands())
    for name, command in commands().items():
        options = {text for parameter in command.params for text in parameter.opts if text.startswith("--")} - COMMON
        named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", sections()[name])) - COMMON
        assert named == options, name
