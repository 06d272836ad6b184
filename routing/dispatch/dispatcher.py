"""Dispatch and combine for one engine process.

For each MoE layer of each step: count the tokens of each expert, share them out over its copies, send every shard one
frame with just the rows that it needs, and add up the rows that come back, always in the order of the table, so that
the sum does not depend on who answers first. A shard that goes away, answers with an error or is overdue loses its
pairs to other copies; with no copy left the step waits for a newer table, up to a deadline, and then goes on without
the rows that it can't have.

This runs once a layer and step on the engine's thread: what costs a microsecond here costs one for every layer. So
bytes are moved by `routing/native`, and where nothing fails and there is no copy to choose, little else is done.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from expertmesh.errors import Unavailable, WireError
from expertmesh.routing import native
from expertmesh.routing.dispatch.copies import LayerCopies, TableCopies
from expertmesh.routing.dispatch.link import Link
from expertmesh.routing.dispatch.links import PATIENCE, Links
from expertmesh.routing.dispatch.mailbox import EVENTS, LoadCounters, TableSource
from expertmesh.routing.dispatch.outage import FailedRows, Outage
from expertmesh.routing.dispatch.patience import ServiceTimes
from expertmesh.routing.dispatch.settings import DispatchSettings
from expertmesh.routing.dispatch.sharing import create_policy
from expertmesh.routing.dispatch.split import Counts, Mask
from expertmesh.routing.placement import RoutingTable
from expertmesh.routing.wire import dtype_code

_WAIT_POLL_S = 0.005
"""How often a step without a copy looks for a newer table."""

_DISPATCHES, _RETRIES, _WAITS, _REFUSED, _BROKEN, _OVERDUE = range(len(EVENTS))

Positions = np.ndarray[Any, np.dtype[np.int64]]
"""Positions of pairs in the flattened [T, k] of a step, ascending."""


Frame = tuple[int, native.ClientStream]
"""A frame in flight: the position of its shard in the table, and the stream that it is sent on."""


class _Step:
    """One layer of one step while it is dispatched. T tokens, k experts each, pairs flattened to T * k."""

    __slots__ = ("counts", "experts", "layer", "out", "shares", "weights", "x")

    def __init__(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> None:
        self.layer = layer
        self.x = _on_host(x, x.dtype)
        """[T, H], like the next two contiguous and on the host."""
        self.weights = _on_host(weights, torch.float32)
        """[T, k]"""
        self.experts = _on_host(ids, torch.int32)
        """[T, k]"""
        self.counts: Counts | None = None
        """Tokens of each expert; in the load counters as soon as they are here."""
        self.shares: Counts | None = None
        """What the policy said about the frames in flight; None: there was nothing to choose."""
        self.out: torch.Tensor | None = None
        """[T, H], the sum of what was answered so far; None if nothing was."""


class Dispatcher:
    """Owns the connections to shards. Used by one thread; `close` it or leave it to the process' end."""

    def __init__(
        self,
        tables: TableSource,
        secret: bytes,
        settings: DispatchSettings,
        loads: LoadCounters | None = None,
        failed_rows: FailedRows | None = None,
        tell_trouble: Callable[[list[str]], None] = lambda shards: None,
    ) -> None:
        """failed_rows: where rows are noted that no shard could answer in time; None raises Unavailable instead;
        tell_trouble: is told which shards have failed since their last answer, whenever these have changed."""
        self._tables = tables
        self._settings = settings
        self._budget_ms = int(settings.frame_deadline_s * 1000)
        self._policy = create_policy(settings.policy)
        self._loads = loads
        self._links = Links(secret, settings, tell_trouble)
        self._times = ServiceTimes()
        self._outage = Outage()
        self._failed_rows = failed_rows
        self._copies: TableCopies | None = None
        limits = settings.limits
        self._packer = native.StepPacker(limits.max_rows, limits.max_bytes, limits.max_pairs_per_row)
        self._frame_ids = itertools.count(1)

    def __call__(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The routed experts' output of one layer: [T, H], a fresh tensor in x's dtype and on x's device.

        x: [T, H]; weights, ids: [T, k], router weights and the model's expert ids. Where an expert has no shard for
        longer than the configured wait, the rows that need it are noted as failed, and what they get means nothing.
        Raises WireError if the table does not know the layer or the expert, or a frame can't hold what a shard would
        have to take.
        """
        if not len(ids):
            return torch.empty_like(x)
        step = _Step(layer, x, weights, ids)
        try:
            y = self._run(step)
        except BaseException:
            self._links.abandon()
            raise
        return y if x.is_cpu else y.to(x.device)

    def close(self) -> None:
        """Closes every connection."""
        self._links.close()

    def _run(self, step: _Step) -> torch.Tensor:
        """Sends and collects until every pair is answered or given up: the sum."""
        todo: Positions | None = None
        give_up = 0.0
        while True:
            table = self._tables.current()
            lost: list[Positions] = []
            unplaced: Positions | None
            if table is None:
                unplaced = np.arange(step.experts.numel())
            else:
                copies = self._layer(table, step.layer)
                began = time.monotonic_ns()
                frames, unplaced = self._stage(step, table, copies, todo)
                staged = time.monotonic_ns()
                done = self._exchange(step, table, copies, frames)
                exchanged = time.monotonic_ns()
                self._add(step, table, copies, frames)
                if self._loads is not None:
                    native.add_parts(self._loads.parts, frames, began, staged, exchanged)
                if done and unplaced is None:
                    assert step.out is not None
                    if self._outage:
                        self._outage.served(step.layer, step.experts.view(-1).numpy())
                    return step.out
                lost = self._lost(table, frames)
            if unplaced is not None and self._outage:
                unplaced = self._without_given_up(step, table, unplaced)
            todo = np.sort(np.concatenate([*lost, *([unplaced] if unplaced is not None else [])]))
            if not len(todo):
                return torch.zeros_like(step.x) if step.out is None else step.out
            if lost:
                self._count(_RETRIES)
            now = time.monotonic()
            give_up = give_up or now + self._settings.unavailable_timeout_s
            if now >= give_up:
                if self._failed_rows is None:
                    raise Unavailable(self._why_missing(step, table, todo))
                self._outage.give_up(step.layer, step.experts.view(-1).numpy()[todo])
            elif unplaced is not None:
                self._count(_WAITS)
                time.sleep(_WAIT_POLL_S)

    def _without_given_up(self, step: _Step, table: RoutingTable | None, unplaced: Positions) -> Positions:
        """Fails the rows of pairs that nobody waits for any more; the other pairs."""
        experts = step.experts.view(-1).numpy()[unplaced]
        given_up = self._outage.among(step.layer, experts)
        if given_up.any() and self._failed_rows is not None:
            rows = np.unique(unplaced[given_up] // step.experts.shape[1])
            self._failed_rows.add(rows, self._why_missing(step, table, unplaced[given_up]))
        waited_for: Positions = unplaced[~given_up]
        return waited_for

    # -- sending ------------------------------------------------------------------------------------------------

    def _stage(
        self, step: _Step, table: RoutingTable, copies: LayerCopies, todo: Positions | None
    ) -> tuple[list[Frame], Positions | None]:
        """Packs the pairs `todo` (None: all): frames in the order of the table, and pairs for which no shard is up."""
        if step.counts is None:
            step.counts = self._counted(step, table, copies.index)
        counts = step.counts
        if todo is not None:
            counts = np.bincount(step.experts.view(-1).numpy()[todo], minlength=table.num_experts)
        failed: list[int] = []
        while True:  # each turn has a shard less, so there is an end
            step.shares = self._shares(table, copies, counts, failed)
            used = self._route(step, table, copies, todo)
            frames: list[Frame] = []
            known = len(failed)
            for position in used:
                if position >= 0:
                    link = self._links.get(table.targets[position], step.x)
                    if link is None:
                        failed.append(position)
                    else:
                        frames.append((position, link.stream))
            if len(failed) == known:
                break
            self._count(_RETRIES)
        for position, stream in frames:
            self._packer.stage(position, stream, step.layer, table.epoch, next(self._frame_ids), self._budget_ms)
        if used[0] >= 0:
            return frames, None
        return frames, np.frombuffer(self._packer.positions(-1), dtype=np.int64)

    def _layer(self, table: RoutingTable, layer: int) -> LayerCopies:
        known = self._copies
        if known is None or known.table is not table:
            known = self._copies = TableCopies(table)
            self._policy.use(table)
            self._links.keep(table)
            self._times.keep({target.shard for target in table.targets})
            self._outage.heal(table)
        copies = known.layers.get(layer)
        if copies is None:
            raise WireError(f"layer {layer} has no routed experts in the placement; it knows {table.layers}")
        return copies

    def _counted(self, step: _Step, table: RoutingTable, index: int) -> Counts:
        counts = np.zeros(table.num_experts, dtype=np.int64)
        native.count_experts(step.experts.data_ptr(), step.experts.numel(), counts, step.layer)
        self._count(_DISPATCHES)
        if self._loads is not None:
            self._loads.tokens[index] += counts
        return counts

    def _shares(self, table: RoutingTable, copies: LayerCopies, counts: Counts, failed: Sequence[int]) -> Counts | None:
        """Tokens for each copy, [E, C]; None where there is nothing to choose."""
        links = self._links
        if not (copies.has_choice or links.down or failed):
            return None
        shares = self._policy.shares(copies, counts, links.up(table, failed, PATIENCE))
        if links.down and (shares.sum(axis=1) < counts).any():  # rather one that failed a while ago than none
            shares = self._policy.shares(copies, counts, links.up(table, failed, 0.0))
        return shares

    def _route(self, step: _Step, table: RoutingTable, copies: LayerCopies, todo: Positions | None) -> list[int]:
        """Positions of the targets that get pairs, ascending, -1 among them if some have none."""
        x, experts = step.x, step.experts
        tokens, top_k = experts.shape
        return self._packer.route(
            x.data_ptr(),
            dtype_code(x.dtype),
            x.shape[1],
            experts.data_ptr(),
            step.weights.data_ptr(),
            tokens,
            top_k,
            copies.copies,
            step.shares,
            len(table.targets),
            todo,
        )

    # -- collecting ---------------------------------------------------------------------------------------------

    def _exchange(self, step: _Step, table: RoutingTable, copies: LayerCopies, frames: list[Frame]) -> bool:
        """Sends what is staged and waits: whether all was answered. What is overdue has another copy to go to, or has
        had the whole deadline."""
        deadline_s = self._settings.frame_deadline_s
        patience_s = self._patience_s(table, frames) if copies.has_choice else deadline_s
        if native.exchange(frames, patience_s):
            return True
        if patience_s < deadline_s:
            overdue = [frame for frame in frames if frame[1].state == native.OVERDUE]
            if overdue:
                up = self._links.up(table, [position for position, _ in overdue], PATIENCE)
                native.exchange([f for f in overdue if not self._has_way_out(step, copies, f[0], up)], deadline_s)
        return all(stream.state == native.ANSWERED for _, stream in frames)

    def _patience_s(self, table: RoutingTable, frames: list[Frame]) -> float:
        settings = self._settings
        patience_s = settings.hedge_after_s
        for position, stream in frames:
            expected_s = self._times.expected_s(table.targets[position].shard, stream.rows)
            if expected_s is None:
                return settings.frame_deadline_s
            patience_s = max(patience_s, settings.hedge_service_times * expected_s)
        return min(patience_s, settings.frame_deadline_s)

    def _has_way_out(self, step: _Step, copies: LayerCopies, position: int, up: Mask) -> bool:
        """Whether every pair of a target has a copy on another one that is up."""
        pairs = np.frombuffer(self._packer.positions(position), dtype=np.int64)
        held = copies.copies[np.unique(step.experts.view(-1).numpy()[pairs])]
        return bool(((held >= 0) & up[held]).any(axis=1).all())

    def _add(self, step: _Step, table: RoutingTable, copies: LayerCopies, frames: list[Frame]) -> None:
        """Adds what was answered, always in the order of the table, and lets the policy learn from it."""
        fresh = step.out is None
        if step.out is None:
            step.out = torch.empty_like(step.x)
        self._packer.combine(step.out.data_ptr(), frames, fresh)
        if self._links.strikes:
            self._links.forgive(table.targets[i].shard for i, stream in frames if stream.state == native.ANSWERED)
        if copies.has_choice and step.shares is not None:
            answered = {position: stream for position, stream in frames if stream.state == native.ANSWERED}
            self._policy.observe(copies, step.shares, answered)
            for position, stream in answered.items():
                seconds = (stream.computed_us + stream.waited_us) * 1e-6
                self._times.observe(table.targets[position].shard, stream.rows, seconds)

    def _lost(self, table: RoutingTable, frames: list[Frame]) -> list[Positions]:
        """The pairs of the frames that were not answered, whose shards are left alone from now on."""
        lost: list[Positions] = []
        for position, stream in frames:
            if stream.state != native.ANSWERED:
                self._give_up(self._links.by_shard[table.targets[position].shard])
                lost.append(np.frombuffer(self._packer.positions(position), dtype=np.int64))
        return lost

    def _give_up(self, link: Link) -> None:
        """Leaves a shard alone that did not answer; an error is no reason to hang up."""
        if link.stream.state == native.REFUSED:
            self._count(_REFUSED)
            self._links.mark_down(link.shard, link.refusal())
        elif link.stream.state == native.OVERDUE:
            self._count(_OVERDUE)
            cost_s = min(self._settings.hedge_after_s, self._settings.frame_deadline_s)
            self._links.drop(link, f"shard {link.shard} did not answer in time", cost_s)
        else:
            self._count(_BROKEN)
            self._links.drop(link, link.failure())

    # -- small things -------------------------------------------------------------------------------------------

    def _count(self, event: int) -> None:
        if self._loads is not None:
            self._loads.events[event] += 1

    def _why_missing(self, step: _Step, table: RoutingTable | None, todo: Positions) -> str:
        experts = np.unique(step.experts.view(-1).numpy()[todo]).tolist()
        epoch = "no placement was ever published" if table is None else f"placement epoch {table.epoch}"
        reasons = "; ".join(failure.why for failure in self._links.down.values()) or "no shard holds them"
        waited = self._settings.unavailable_timeout_s
        return f"layer {step.layer}: no shard serves experts {experts} after {waited:g} s ({epoch}): {reasons}"


def _on_host(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor, contiguous and on this side, without a copy where there is nothing to change."""
    if tensor.is_cpu and tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.detach().to("cpu", dtype).contiguous()
