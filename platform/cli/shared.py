"""What all commands share: exit codes, examples in the help, JSON on stdout."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

FAILED = 1
"""Exit code: out of reach, refused, or it did not work."""
WRONG_USE = 2
"""Exit code: the command line, a configuration or a file that it names is wrong; nothing was done."""
NOT_WELL = 3
"""Exit code: the command worked, and what it looked at is not as it should be."""
INTERRUPTED = 130
"""Exit code: Ctrl-C."""

EXIT_CODES = {
    0: "it worked",
    FAILED: "it did not work: out of reach, refused, or broken on the way",
    WRONG_USE: "the command line, the configuration or a file that it names is wrong; nothing was done",
    NOT_WELL: "it worked, and what it looked at is not well (`status`, `kv verify`, `aws status`)",
    INTERRUPTED: "Ctrl-C, where that is not the way to end the command",
}

HEADING = "Examples:"


def _config_keys(incomplete: str) -> list[str]:
    """For the shell: the dotted keys that begin so, ready for their value."""
    from expertmesh.platform.config import config_schema
    from expertmesh.platform.config.schema import dotted_keys

    return [f"{key}=" for key in dotted_keys(config_schema()) if key.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a config field, e.g. experts.shards=3; may be repeated.",
        autocompletion=_config_keys,
    ),
]


def examples(*commands: str) -> str:
    """The end of a command's help. Each of `commands` is one line that can be typed; a test parses them."""
    return "\n".join([HEADING, *(f"  {command}" for command in commands)])


def print_json(value: Any) -> None:
    """On stdout, for people and programs."""
    typer.echo(json.dumps(value, indent=2))
