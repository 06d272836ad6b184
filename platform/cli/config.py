"""`expertmesh config`: look at and check a configuration without starting anything."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmesh.errors import ConfigError
from expertmesh.platform.cli.shared import WRONG_USE, Changes, Json, examples, print_json
from expertmesh.platform.config import MeshConfig, config_schema, load_config, parse_changes
from expertmesh.routing.transport import TlsSettings
from expertmesh.routing.transport.tls import load

config_app = typer.Typer(name="config", help="Show and check the configuration of a mesh.", no_args_is_help=True)


@config_app.command(
    epilog=examples("expertmesh config show", "expertmesh config show mesh.yaml --set experts.shards=3 --json")
)
def show(
    config: Annotated[
        str | None, typer.Argument(help="YAML file, checkpoint folder or demo; without it, the defaults.")
    ] = None,
    changes: Changes = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print the effective configuration, with all defaults."""
    loaded = load_config(config).with_changes(parse_changes(changes or []))
    typer.echo(loaded.model_dump_json(indent=2) if as_json else loaded.to_yaml(), nl=as_json)


@config_app.command(epilog=examples("expertmesh config check mesh.yaml", "expertmesh config check mesh.yaml --json"))
def check(
    config: Annotated[str, typer.Argument(help="YAML file, checkpoint folder or demo.")],
    changes: Changes = None,
    as_json: Json = False,
) -> None:
    """Check a configuration: exit code 0 if it can be used; else 2, with one line for each problem on stderr."""
    try:
        _check_files(load_config(config).with_changes(parse_changes(changes or [])))
    except ConfigError as error:
        if not as_json:
            raise
        print_json({"ok": False, "problems": str(error).splitlines()})
        raise typer.Exit(WRONG_USE) from None
    print_json({"ok": True, "problems": []}) if as_json else typer.echo(f"ok: {config}")


def _check_files(config: MeshConfig) -> None:
    if (tls := config.routing.tls) is not None:
        load(TlsSettings(**tls.model_dump(mode="json")))


@config_app.command(epilog=examples("expertmesh config schema"))
def schema() -> None:
    """Print the JSON schema of the configuration."""
    print_json(config_schema())
