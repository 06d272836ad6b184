"""`expertmesh config`: look at and check a configuration without starting anything."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

from expertmesh.errors import ConfigError
from expertmesh.platform.config import config_schema, load_config, parse_changes

config_app = typer.Typer(name="config", help="Show and check the configuration of a mesh.", no_args_is_help=True)

_T = TypeVar("_T")


def _or_exit(action: Callable[[], _T]) -> _T:
    """What `action` returns; if the configuration is wrong, its problems go to stderr and the exit code is 1."""
    try:
        return action()
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


@config_app.command()
def show(
    config: Annotated[
        str | None, typer.Argument(help="YAML file, checkpoint folder or demo; without it, the defaults.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value, e.g. experts.shards=3. May be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print the effective configuration, with all defaults."""
    for change in changes or []:
        if "=" not in change:
            raise typer.BadParameter("write KEY=VALUE, for example experts.shards=3", param_hint="--set")
    loaded = _or_exit(lambda: load_config(config).with_changes(parse_changes(changes or [])))
    typer.echo(loaded.model_dump_json(indent=2) if as_json else loaded.to_yaml(), nl=as_json)


@config_app.command()
def check(config: Annotated[str, typer.Argument(help="YAML file, checkpoint folder or demo.")]) -> None:
    """Check a configuration: exit code 0 if it can be used; else 1, with one line for each problem on stderr."""
    _or_exit(lambda: load_config(config))
    typer.echo(f"ok: {config}")


@config_app.command()
def schema() -> None:
    """Print the JSON schema of the configuration."""
    typer.echo(json.dumps(config_schema(), indent=2))
