"""`expertmesh placement`: where experts are, which moves would pay, and whether they are made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.platform.cli.connected import Url, connected
from expertmesh.platform.cli.shared import examples, print_json

if TYPE_CHECKING:
    from expertmesh.platform.client import Placement, Plan

placement_app = typer.Typer(
    name="placement", help="Show where experts are, and move them as traffic moves.", no_args_is_help=True
)

_PLAN_TIMEOUT_S = 40.0
"""A plan over many layers is seconds of work."""
_SHOWN_ENDED = 10

Json = Annotated[bool, typer.Option("--json", help="Print the mesh's JSON.")]


@placement_app.command(epilog=examples("expertmesh placement show", "expertmesh placement show --json"))
def show(url: Url = None, as_json: Json = False) -> None:
    """Show which experts each shard holds in each layer, and the moves on their way."""
    with connected(url) as client:
        if as_json:
            print_json(client.mesh.raw("placement"))
            return
        for line in _page(client.mesh.placement()):
            typer.echo(line)


@placement_app.command(epilog=examples("expertmesh placement plan"))
def plan(url: Url = None, as_json: Json = False) -> None:
    """Show the moves that would pay now, without making them."""
    with connected(url, _PLAN_TIMEOUT_S) as client:
        _tell(client.mesh.plan(), as_json)


@placement_app.command(epilog=examples("expertmesh placement apply", "expertmesh placement show"))
def apply(url: Url = None, as_json: Json = False) -> None:
    """Plan now and begin to move experts, also when frozen. Serving goes on meanwhile."""
    with connected(url, _PLAN_TIMEOUT_S) as client:
        _tell(client.mesh.apply(), as_json)


@placement_app.command(epilog=examples("expertmesh placement freeze", "expertmesh placement freeze --off"))
def freeze(
    url: Url = None,
    off: Annotated[bool, typer.Option("--off", help="Let experts be moved again.")] = False,
    as_json: Json = False,
) -> None:
    """Stop moving experts by itself; moves on their way are finished."""
    with connected(url) as client:
        client.mesh.freeze(not off)
    if as_json:
        print_json({"frozen": not off})
        return
    typer.echo("experts are moved as traffic moves" if off else "experts stay where they are")


def _tell(made: Plan, as_json: bool) -> None:
    if as_json:
        print_json(made.model_dump())
        return
    typer.echo(f"balancedness {made.balancedness:.3f}")
    for move in made.moves:
        typer.echo(move)
    if not made.moves:
        typer.echo("no move would pay")


def _page(placement: Placement) -> list[str]:
    lines = [f"epoch {placement.epoch}{', frozen' if placement.frozen else ''}"]
    for index, layers in enumerate(placement.slots):
        lines.append(f"shard {index} ({placement.shards.get(index, 'nobody')})")
        for number, held in zip(placement.layers, layers, strict=True):
            experts = " ".join(str(expert) for expert in sorted(held) if expert >= 0)
            lines.append(f"  layer {number}: {experts}")
    lines += ["moves on their way:", *(f"  {move}" for move in placement.running)] if placement.running else []
    ended = placement.ended[-_SHOWN_ENDED:]
    return lines + (["ended lately:", *(f"  {move}" for move in ended)] if ended else [])
