"""`expertmesh scale`: how many attention replicas and expert shards a running mesh is to have."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from expertmesh.platform.cli.connected import Url, connected
from expertmesh.platform.cli.shared import Json, print_json

_DEPLOYMENTS = ("attention", "experts")


def scale(
    numbers: Annotated[
        list[str],
        typer.Argument(
            metavar="attention=N experts=N",
            help="What is to be changed; `auto` instead of a number goes back to autoscaling, or to the configuration.",
        ),
    ],
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Add or remove attention replicas and expert shards of a running mesh. Requests go on meanwhile.

    The command returns at once; `expertmesh status --watch` shows replicas coming and going.
    """
    wanted = _parsed(numbers)
    with connected(url) as client:
        result = client.mesh.scale(wanted.get("attention"), wanted.get("experts"))
    if as_json:
        print_json(result.model_dump())
        return
    typer.echo(f"attention: {result.attention}")
    if result.experts is not None:
        typer.echo(f"experts: {result.experts}")


def _parsed(numbers: list[str]) -> dict[str, int | Literal["auto"]]:
    wanted: dict[str, int | Literal["auto"]] = {}
    for text in numbers:
        deployment, _, number = text.partition("=")
        if deployment not in _DEPLOYMENTS or deployment in wanted or not (number == "auto" or number.isdecimal()):
            raise typer.BadParameter(f"{text!r}; allowed: attention=N, experts=N, each once, N a number or auto")
        wanted[deployment] = "auto" if number == "auto" else int(number)
    return wanted
