"""`expertmesh events`: the mesh's timeline, a line each."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.platform.cli.connected import Url, connected

if TYPE_CHECKING:  # OpenAI's package takes a second to import, which the other commands need not wait for
    from expertmesh.platform.client import MeshEvent


def events(
    url: Url = None,
    after: Annotated[int | None, typer.Option(help="Only events with ids above this.", show_default=False)] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on as they come, until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event's JSON, a line each.")] = False,
) -> None:
    """Show what happened in a running mesh: members that came and went, epochs, moves, scaling."""
    with connected(url) as client, suppress(KeyboardInterrupt):
        for event in client.mesh.events(after, follow=follow):
            typer.echo(event.model_dump_json() if as_json else in_one_line(event))


def in_one_line(event: MeshEvent) -> str:
    """Time of day and text."""
    return f"{datetime.fromtimestamp(event.at):%H:%M:%S}  {event.text}"
