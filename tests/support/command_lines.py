"""Command lines as they stand in help and documentation, given to the real parser without being run."""

from __future__ import annotations

import shlex
from typing import Any, NamedTuple

import typer

from expertmesh.platform.cli import app


class Parsed(NamedTuple):
    """What the parser made of a line."""

    command: str
    """Its words, such as `placement show`."""
    values: dict[str, Any]
    """Of arguments and options, by parameter."""


def parsed(line: str) -> Parsed:
    """Raises typer.TyperException for a line that would be refused, ValueError for one of another program."""
    program, *words = shlex.split(line, comments=True)
    if not program.endswith("expertmesh"):
        raise ValueError(f"{line!r} runs {program}")
    command: Any = typer.main.get_command(app)
    context = typer.Context(command, info_name="expertmesh")
    names: list[str] = []
    while hasattr(command, "commands"):
        if not words or words[0] in ("--help", "--install-completion", "--show-completion"):
            return Parsed(" ".join(names), {})
        name, command, words = command.resolve_command(context, words)
        context = typer.Context(command, info_name=name, parent=context)
        names.append(name)
    if "--help" in words:
        return Parsed(" ".join(names), {})
    return Parsed(" ".join(names), command.make_context(names[-1], list(words), parent=context.parent).params)
