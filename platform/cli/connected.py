"""What the commands that talk to a running mesh share: where it is, and how its absence is told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.errors import ConfigError, ExpertMeshError, Unavailable
from expertmesh.platform.cli.shared import FAILED

if TYPE_CHECKING:  # OpenAI's package takes a second to import, which the other commands need not wait for
    from expertmesh.platform.client import Client

_TIMEOUT_S = 10.0
"""Twice what the ingress waits for its controller."""

Url = Annotated[
    str | None,
    typer.Option(help="The mesh's URL; without it $EXPERTMESH_URL, else http://127.0.0.1:8000.", show_default=False),
]


@contextmanager
def connected(url: str | None, timeout_s: float = _TIMEOUT_S) -> Iterator[Client]:
    """A client of the mesh; a mesh that can't be reached ends the command with one line and exit code 1."""
    from expertmesh.platform.client import Client

    try:
        client = Client(base_url=url, timeout=timeout_s, max_retries=0)
    except ConfigError as error:
        raise ConfigError(str(error).replace("base_url:", "--url:", 1)) from None
    with client:
        try:
            yield client
        except Unavailable as error:
            typer.echo(f"error: {in_one_line(error)}", err=True)
            raise typer.Exit(FAILED) from None


def in_one_line(error: ExpertMeshError) -> str:
    """The message, with what to do if nobody listens."""
    from openai import APIConnectionError

    text = " ".join(str(error).split())
    nobody_there = isinstance(error.__cause__, APIConnectionError)
    return f"{text}; is it running? start it with `expertmesh serve`" if nobody_there else text
