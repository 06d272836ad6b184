"""`expertmesh render`: files for the tools that start clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertmesh.platform.cli.shared import Json, examples, print_json

render_app = typer.Typer(name="render", help="Write files for the tools that start clusters.", no_args_is_help=True)


@render_app.callback()
def _group() -> None:
    """Keeps `ray-cluster` a word of its own while it is the only command."""


@render_app.command(
    "ray-cluster",
    epilog=examples(
        "expertmesh render ray-cluster examples/aws/cpu-experts-r7i.yaml --output cluster",
        "expertmesh render ray-cluster my-mesh.yaml --stack stack.yaml --output cluster",
    ),
)
def ray_cluster(
    file: Annotated[Path, typer.Argument(help="YAML file with the sections `mesh` and `cluster`.")],
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path(),
    stack: Annotated[
        Path | None,
        typer.Option(help="What `expertmesh aws up --write` wrote; taken where FILE says nothing.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write `ray-cluster.yaml` for `ray up` and `serve.yaml` for `serve deploy`."""
    from expertmesh.platform.render import render_ray_cluster

    render_ray_cluster(file, stack).write(output)
    if as_json:
        print_json({"wrote": [str(output / name) for name in ("ray-cluster.yaml", "serve.yaml")]})
        return
    typer.echo(f"wrote ray-cluster.yaml and serve.yaml to {output}")
