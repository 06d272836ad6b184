"""`expertmesh kv`: what is in the store of KV blocks, empty it, are its values sound."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from expertmesh.platform.cli.shared import NOT_WELL, Changes, Json, examples, print_json

if TYPE_CHECKING:
    from expertmesh.kv_store import StoreSettings
    from expertmesh.kv_store.admin import ServerStats

kv_app = typer.Typer(name="kv", help="Look into the store of KV blocks that a config names.", no_args_is_help=True)

Source = Annotated[
    str | None,
    typer.Argument(help="YAML config, checkpoint folder or demo, as for `serve`; by default the demo's."),
]


@kv_app.command(epilog=examples("expertmesh kv stats mesh.yaml", "expertmesh kv stats --set kv_store.url=embedded"))
def stats(source: Source = None, changes: Changes = None, as_json: Json = False) -> None:
    """Show each server's memory, blocks by what wrote them, evictions and expiries.

    Takes time in proportion to the number of blocks.
    """
    from expertmesh.kv_store import admin

    found = admin.stats(_store(source, changes))
    if as_json:
        print_json([asdict(server) for server in found])
        return
    for server in found:
        for line in _page(server):
            typer.echo(line)


@kv_app.command(epilog=examples("expertmesh kv flush mesh.yaml"))
def flush(source: Source = None, changes: Changes = None, as_json: Json = False) -> None:
    """Remove all blocks, of every model and tenant, and nothing else of the server. A running mesh goes on."""
    from expertmesh.kv_store import admin

    removed = admin.flush(_store(source, changes))
    print_json({"removed": removed}) if as_json else typer.echo(f"{removed} blocks removed")


@kv_app.command(epilog=examples("expertmesh kv verify mesh.yaml", "expertmesh kv verify mesh.yaml --json"))
def verify(source: Source = None, changes: Changes = None, as_json: Json = False) -> None:
    """Read every block and check that it is what was written. The exit code is 3 if one isn't."""
    from expertmesh.kv_store import admin

    counts = {verdict.value: count for verdict, count in admin.verify(_store(source, changes)).items()}
    words = ", ".join(f"{count} {name}" for name, count in counts.items())
    print_json(counts) if as_json else typer.echo(words)
    if any(count for name, count in counts.items() if name != "sound"):
        raise typer.Exit(NOT_WELL)


def _store(source: str | None, changes: list[str] | None) -> StoreSettings:
    """Raises ConfigError."""
    from expertmesh.kv_store.configured import server_of
    from expertmesh.platform.config import cluster_secret, load_config, parse_changes

    config = load_config(source).with_changes(parse_changes(changes or []))
    return server_of(config, cluster_secret(config, create_in=config.model.resolved_cache_dir))


def _page(server: ServerStats) -> list[str]:
    from rich.filesize import decimal

    limit = f" of {decimal(server.limit_bytes)}" if server.limit_bytes else ""
    return [
        f"{server.endpoint}  version {server.version}, {server.policy}",
        f"  {server.blocks} blocks, {decimal(server.used_bytes)}{limit} used",
        f"  {server.evicted} evicted, {server.expired} expired",
        *(f"  {identity}: {count} blocks" for identity, count in sorted(server.by_identity.items())),
    ]
