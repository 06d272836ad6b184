"""`expertmesh status`: what a running mesh is made of and how it does."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from expertmesh.errors import ExpertMeshError
from expertmesh.platform.cli.connected import Url, connected, in_one_line
from expertmesh.platform.cli.shared import NOT_WELL

if TYPE_CHECKING:  # OpenAI's package takes a second to import, which the other commands need not wait for
    from expertmesh.platform.client import Client, ExpertShard, MeshStatus

_PERIOD_S = 2.0
_PIPE_WIDTH = 160
_COLOURS = {"ok": "bold green", "starting": "bold yellow", "degraded": "bold red"}


def status(
    url: Url = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the mesh's JSON, with --watch a line each time.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every 2 seconds until Ctrl-C.")] = False,
) -> None:
    """Show a running mesh: health, placement, attention replicas and expert shards.

    The exit code is 0 if its health is ok, 3 if it isn't, and 1 if it can't be reached.

    A mesh that wants a key gets $EXPERTMESH_API_KEY, or what the file $EXPERTMESH_API_KEY_FILE holds.
    """
    with connected(url) as client:
        view = _watch(client, as_json) if watch else _show(client, as_json)
    raise typer.Exit(0 if view.ok else NOT_WELL)


@dataclass(frozen=True, slots=True)
class _View:
    """One look at the mesh: what to print, and whether it is well."""

    shown: RenderableType
    ok: bool


def _look(client: Client, as_json: bool, indent: int | None = None) -> _View:
    if as_json:
        raw = client.mesh.raw("status")
        return _View(json.dumps(raw, indent=indent), raw.get("health") == "ok")
    seen = client.mesh.status()
    return _View(_page(seen), seen.ok)


def _show(client: Client, as_json: bool) -> _View:
    view = _look(client, as_json, indent=2)
    typer.echo(view.shown) if as_json else _console().print(view.shown)
    return view


def _watch(client: Client, as_json: bool) -> _View:
    """The last view before Ctrl-C. Raises if there is no first one; a mesh that goes away later is waited for."""
    view, console = _look(client, as_json), _console()
    with suppress(KeyboardInterrupt):
        while True:
            console.clear()
            typer.echo(view.shown) if as_json else console.print(view.shown)
            time.sleep(_PERIOD_S)
            try:
                view = _look(client, as_json)
            except ExpertMeshError as error:
                gone = in_one_line(error)
                view = _View(
                    json.dumps({"health": "unreachable", "error": gone}) if as_json else Text(gone, "red"), False
                )
    return view


def _console() -> Console:
    """No markup: names come from the mesh. Piped output has no terminal's width, and the tables need one."""
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def _page(status: MeshStatus) -> RenderableType:
    parts: list[RenderableType] = [_summary(status), _attention(status)]
    if status.shards or status.mode == "mesh":
        parts.append(_shards(status.shards))
    return Group(*parts)


def _summary(status: MeshStatus) -> Table:
    placement, missing = status.placement, status.placement.missing_experts
    grid = Table.grid("", "", padding=(0, 2))
    grid.add_row("health", Text(status.health, _COLOURS.get(status.health, "bold")))
    grid.add_row("model", f"{status.model} (checkpoint {status.revision})")
    grid.add_row(
        "experts", f"{placement.experts} in each of {placement.layers} layers, {decimal(placement.expert_bytes)}"
    )
    grid.add_row("mode", status.mode)
    grid.add_row("placement epoch", str(placement.epoch))
    grid.add_row("redundancy", str(placement.redundancy))
    grid.add_row("missing experts", Text(str(missing), "bold red" if missing else ""))
    return grid


def _attention(status: MeshStatus) -> Table:
    table = _table("attention replicas", "replica", "node", "ready")
    for header in ("epoch", "running", "dispatches", "retries", "loaded", "seen ago"):
        table.add_column(header, justify="right", overflow="fold")
    for replica in status.attention:
        table.add_row(
            replica.replica,
            _short(replica.node),
            _yes_no(replica.ready),
            str(replica.epoch),
            str(replica.running),
            str(replica.dispatch.dispatches),
            str(replica.dispatch.retries),
            decimal(replica.loaded.bytes_read) if replica.loaded else "-",
            _ago(replica.seen_s),
        )
    return table


def _shards(shards: list[ExpertShard]) -> Table:
    table = _table("expert shards", "shard", "index", "node", "ready")
    for header in ("experts", "pairs", "busy", "read", "seen ago"):
        table.add_column(header, justify="right", overflow="fold")
    for shard in shards:
        table.add_row(
            shard.shard,
            str(shard.index),
            _short(shard.node),
            _yes_no(shard.ready),
            str(shard.experts),
            str(shard.pairs),
            f"{shard.busy_s:.1f} s",
            decimal(shard.bytes_read),
            _ago(shard.seen_s),
        )
    return table


def _table(title: str, *headers: str) -> Table:
    """Narrow enough for 80 columns; what doesn't fit is folded, never cut off."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.show_edge = table.pad_edge = False
    table.padding = (0, 1, 0, 0)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _short(node: str) -> str:
    """Enough of Ray's node id (56 hex digits) to tell nodes apart."""
    return node[:8]


def _yes_no(value: bool) -> Text:
    return Text("yes", "green") if value else Text("no", "red")


def _ago(seconds: float) -> str:
    return f"{seconds:.1f} s"
