"""What `expertmesh top` shows, out of the mesh's answers; nothing here asks or waits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # OpenAI's package takes a second to import, which the other commands need not wait for
    from expertmesh.platform.client import Heat, History, HistorySample, MeshEvent, MeshStatus, Placement

_HEALTH = {"ok": "bold green", "starting": "bold yellow", "degraded": "bold red"}
_BAD = ("shard_lost", "replica_lost", "experts_missing", "moves_failed")
_GOOD = ("shard_serving", "replica_ready", "experts_whole", "moves_done")
_BLOCKS = " ▁▂▃▄▅▆▇█"
_HOT, _MOVES, _EVENTS = 5, 4, 12
_NONE = "-"


@dataclass(frozen=True, slots=True)
class View:
    """One look at the mesh."""

    status: MeshStatus
    placement: Placement
    heat: Heat
    history: History
    events: Sequence[MeshEvent]
    """The oldest first."""


def page(view: View, height: int | None) -> RenderableType:
    """The frame; height: lines of the terminal, None for as many as it takes."""
    fixed: list[RenderableType] = [
        _head(view),
        _figures(view),
        _shards(view),
        _replicas(view),
        _hot(view),
        *_moves(view.placement),
    ]
    if height is None:
        return Group(*fixed, *_events(view.events, _EVENTS))
    members = len(view.status.shards) + len(view.status.attention)
    left = height - (15 + members + min(len(view.placement.running), _MOVES))
    return Group(*fixed, *_events(view.events, max(left, 0)))


def _head(view: View) -> Text:
    status, placement = view.status, view.status.placement
    missing = placement.missing_experts
    return Text.assemble(
        (status.health, _HEALTH.get(status.health, "bold")),
        f"  {status.model}, {placement.layers} layers x {placement.experts} experts, epoch {placement.epoch}",
        (f"  {missing} experts served by nobody", "bold red") if missing else "",
        "  frozen" if placement.frozen else "",
    )


def _figures(view: View) -> Table:
    """Figures of the last interval, and how they came to be over the last minute."""
    samples = view.history.samples
    last = samples[-1] if samples else None
    grid = Table.grid(padding=(0, 3))
    figures = [
        ("A:E", _NONE if last is None else f"{last.attention}:{last.shards}", ""),
        _figure("tokens/s", samples, lambda s: s.tokens_s, "{:.1f}"),
        _figure("first token", samples, lambda s: s.ttft_s, "{:.3f} s"),
        _figure("between tokens", samples, lambda s: s.itl_s, "{:.3f} s"),
        _figure("KV hits", samples, lambda s: s.kv_hits, "{:.0%}"),
        _figure("balancedness", samples, lambda s: s.balancedness, "{:.2f}"),
    ]
    grid.add_row(*(Text(name, "dim") for name, _, _ in figures))
    grid.add_row(*(Text(now, "bold") for _, now, _ in figures))
    grid.add_row(*(Text(line, "cyan") for _, _, line in figures))
    return grid


def _figure(
    name: str, samples: Sequence[HistorySample], of: Callable[[HistorySample], float | None], form: str
) -> tuple[str, str, str]:
    values = [of(sample) for sample in samples[-15:]]
    known = [value for value in values if value is not None]
    if not known:
        return name, _NONE, ""
    most = max(known) or 1.0
    line = "".join(" " if value is None else _BLOCKS[round(8 * value / most)] for value in values)
    return name, form.format(known[-1]), line


def _shards(view: View) -> Table:
    table = _table("shard", "state", ">experts", "busy", ">rows/s", ">share", ">heard")
    rates = view.history.shards
    total = sum(rate.rows_s for rate in rates.values())
    for shard in view.status.shards:
        rate = rates.get(shard.shard)
        busy, rows = (rate.busy, rate.rows_s) if rate is not None else (0.0, 0.0)
        state = "leaving" if shard.leaving else "serving" if shard.ready else "loading"
        table.add_row(
            f"{shard.index} {shard.shard}",
            Text(state, "green" if state == "serving" else "yellow"),
            str(shard.experts),
            _bar(busy),
            f"{rows:.0f}",
            f"{rows / total:.0%}" if total else _NONE,
            f"{shard.seen_s:.1f} s",
        )
    return table


def _replicas(view: View) -> Table:
    table = _table("attention replica", "state", ">running", ">waiting", "KV use", ">tokens/s", ">heard")
    for replica in view.status.attention:
        rate = view.history.attention.get(replica.replica)
        table.add_row(
            replica.replica,
            Text("ready", "green") if replica.ready else Text("loading", "yellow"),
            str(replica.running),
            str(replica.load.waiting),
            _bar(replica.load.kv_use),
            f"{rate.tokens_s:.1f}" if rate is not None else _NONE,
            f"{replica.seen_s:.1f} s",
        )
    return table


def _hot(view: View) -> Text:
    hottest = view.heat.hottest(_HOT)
    words = "   ".join(f"layer {layer} expert {expert}: {rows:.0f} rows/s" for layer, expert, rows in hottest)
    return Text.assemble(("hottest  ", "dim"), words or "no traffic", "\n")


def _moves(placement: Placement) -> list[Text]:
    running = placement.running
    lines = [Text(f"moving: {move}", "yellow") for move in running[:_MOVES]]
    more = len(running) - _MOVES
    return [*lines, Text(f"and {more} more moves", "yellow")] if more > 0 else lines


def _events(events: Sequence[MeshEvent], most: int) -> list[Text]:
    shown = list(events)[-most:] if most else []
    return [
        Text.assemble(
            (f"{datetime.fromtimestamp(event.at):%H:%M:%S}  ", "dim"),
            (event.text, "red" if event.kind in _BAD else "green" if event.kind in _GOOD else ""),
        )
        for event in reversed(shown)
    ]


def _table(*headers: str) -> Table:
    """Headers that begin with > are of figures."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 2, 0, 0))
    for header in headers:
        table.add_column(header.lstrip(">"), justify="right" if header[0] == ">" else "left", overflow="fold")
    return table


def _bar(part: float, width: int = 10) -> Text:
    full = round(width * min(max(part, 0.0), 1.0))
    return Text.assemble(("█" * full, "cyan"), ("░" * (width - full), "dim"), f" {part:4.0%}")
