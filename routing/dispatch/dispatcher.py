"""Dispatch and combine for one engine process.

For each MoE layer of each step: count the tokens of each expert, choose a copy for each, send every chosen shard one
frame with just the rows that it needs, and add up the rows that come back, always in the order in which they were sent,
so that the sum does not depend on who answers first. A shard that goes away, answers with an error or misses the
deadline loses its pairs to other copies at once; with no copy left the step waits for a newer table.

This runs once a layer and step on the engine's thread: what costs a microsecond here costs one for every layer.
"""

from __future__ import annotations

import select
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from expertmesh.errors import Unavailable, WireError
from expertmesh.routing.dispatch.link import Link, Refused, Request, next_frame_id
from expertmesh.routing.dispatch.links import PATIENCE, Links
from expertmesh.routing.dispatch.mailbox import LoadCounters, TableSource
from expertmesh.routing.dispatch.policy import create_policy
from expertmesh.routing.dispatch.settings import DispatchSettings
from expertmesh.routing.placement import RoutingTable
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.wire import dispatch_parts, dtype_code
from expertmesh.routing.wire.frame import PAIR_BYTES, combine_prefix

_WAIT_POLL_S = 0.005
"""How often a step without a copy looks for a newer table."""
_CACHED_SHAPES = 256

Positions = np.ndarray[Any, np.dtype[np.int64]]
"""Positions of pairs in the flattened [T, k] of a step, ascending."""


@dataclass(slots=True)
class _Step:
    """One layer of one step while it is dispatched. T tokens, k experts each, pairs flattened to T * k."""

    layer: int
    x: torch.Tensor
    """[T, H]"""
    experts: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    rows: np.ndarray[Any, np.dtype[np.int32]]
    """Token of each pair."""
    top_k: int
    answers: list[tuple[int, Request, torch.Tensor]] = field(default_factory=list)
    """(frame id, request, y); ids grow in the order of the table's shards"""
    lost: list[Request] = field(default_factory=list)
    """Requests in flight on a link that broke while more was sent on it."""
    counted: bool = False
    """Whether its tokens are in the load counters."""
    wave: int = 0
    """How often pairs had to be sent again."""


class Dispatcher:
    """Owns the connections to shards. Used by one thread; `close` it or leave it to the process' end."""

    def __init__(
        self, tables: TableSource, secret: bytes, settings: DispatchSettings, loads: LoadCounters | None = None
    ) -> None:
        self._tables = tables
        self._settings = settings
        self._policy = create_policy(settings.policy)
        self._loads = loads
        self._links = Links(secret, settings)
        self._rows_of: dict[tuple[int, int], np.ndarray[Any, np.dtype[np.int32]]] = {}

    def __call__(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The routed experts' output of one layer: [T, H], a fresh tensor in x's dtype and on x's device.

        x: [T, H]; weights, ids: [T, k], router weights and the model's expert ids. Raises Unavailable if an expert
        has no shard for longer than the configured wait, WireError if the table does not know the layer.
        """
        tokens, top_k = ids.shape
        if not tokens:
            return torch.empty_like(x)
        host = x.detach().contiguous().cpu()
        experts, router = _flat(ids, torch.int32), _flat(weights, torch.float32)
        step = _Step(layer, host, experts, router, self._token_of_pairs(tokens, top_k), top_k)
        try:
            self._run(step)
        except BaseException:
            self._links.abandon()
            raise
        return _combined(step).to(x.device)

    def close(self) -> None:
        """Closes every connection."""
        self._links.close()

    def _run(self, step: _Step) -> None:
        """Sends and collects until every pair is answered."""
        todo: Positions | None = None
        give_up = 0.0
        while True:
            table = self._tables.current()
            left = self._send(step, table, todo) if table is not None else np.arange(len(step.experts))
            lost = self._collect(step)
            if left is None and not lost:
                return
            todo = np.sort(np.concatenate([r.pairs for r in lost] + ([left] if left is not None else [])))
            if lost:
                self._count(1)
            if step.wave == 0:  # what the same links answer next would overwrite these views
                step.answers = [(frame, request, y.clone()) for frame, request, y in step.answers]
            step.wave += 1
            now = time.monotonic()
            give_up = give_up or now + self._settings.unavailable_timeout_s
            if now >= give_up:
                raise Unavailable(self._why_missing(step, table, todo))
            if left is not None:
                self._count(2)
                time.sleep(_WAIT_POLL_S)

    # -- sending ------------------------------------------------------------------------------------------------

    def _send(
        self, step: _Step, table: RoutingTable, todo: Positions | None, failed: Sequence[int] = ()
    ) -> Positions | None:
        """Sends the pairs `todo` (None: all), not to the targets `failed`; the pairs for which none is up, or None."""
        index = table.layer_index.get(step.layer)
        if index is None:
            raise WireError(f"layer {step.layer} has no routed experts in the placement; it knows {table.layers}")
        experts = step.experts if todo is None else step.experts[todo]
        counts = np.bincount(experts, minlength=table.num_experts)
        if not step.counted:
            step.counted = True
            self._count(0)
            if self._loads is not None:
                self._loads.tokens[index] += counts
        chosen = self._choose(table, index, counts, failed)[experts]
        unplaced: list[Positions] = []
        refused: dict[int, Positions] = {}
        used = (np.bincount(chosen + 1).nonzero()[0] - 1).tolist()
        for position in used:
            at = (chosen == position).nonzero()[0] if len(used) > 1 else np.arange(len(chosen))
            pairs = at if todo is None else todo[at]
            if position < 0:
                unplaced.append(pairs)
            elif not self._send_frame(step, table, position, pairs):
                refused[position] = pairs
        if refused:  # other copies take over at once; each turn has a shard less, so there is an end
            self._count(1)
            left = self._send(step, table, np.sort(np.concatenate(list(refused.values()))), (*failed, *refused))
            if left is not None:
                unplaced.append(left)
        return np.concatenate(unplaced) if unplaced else None

    def _choose(
        self, table: RoutingTable, index: int, counts: np.ndarray[Any, np.dtype[np.int64]], failed: Sequence[int]
    ) -> IntArray:
        """The target of each expert with tokens, -1 if none can be asked: [E]."""
        copies: IntArray = table.copies[index]
        if copies.shape[1] == 1 and not self._links.down:  # nothing to choose
            sole: IntArray = copies[:, 0]
            return sole
        chosen = self._policy(counts, copies, self._links.up(table, failed, PATIENCE))
        if self._links.down and (chosen[counts > 0] < 0).any():  # rather one that failed a while ago than none
            chosen = self._policy(counts, copies, self._links.up(table, failed, 0.0))
        return chosen

    def _send_frame(self, step: _Step, table: RoutingTable, position: int, pairs: Positions) -> bool:
        """Sends one shard its pairs; False if it can't be reached. Raises WireError if a frame can't hold them."""
        tokens, width = step.x.shape
        rows = step.rows[pairs]
        count, token_rows, x = tokens, None, step.x
        if tokens > 1:
            first = np.empty(len(rows), dtype=bool)
            first[0] = True
            np.not_equal(rows[1:], rows[:-1], out=first[1:])
            count = int(np.count_nonzero(first))
        self._check_size(count, step)
        link = self._links.get(table.targets[position], x)
        if link is None:
            return False
        if count != tokens:
            token_rows = rows[first].astype(np.int64)
            x = x.index_select(0, torch.from_numpy(token_rows))
            rows = np.cumsum(first, dtype=np.int32) - np.int32(1)
        frame = next_frame_id()
        seconds = self._settings.frame_deadline_s
        request = Request(
            frame,
            pairs,
            token_rows,
            count,
            x.nbytes,
            time.monotonic() + seconds,
            x.dtype,
            combine_prefix(dtype_code(x.dtype), step.layer, count, width),
        )
        parts = dispatch_parts(
            x,
            step.experts[pairs],
            rows,
            step.weights[pairs],
            layer=step.layer,
            epoch=table.epoch,
            frame=frame,
            budget_ms=int(seconds * 1000),
        )
        try:
            link.send(parts, request)
        except WireError as error:
            step.lost += [other for other in self._links.drop(link, str(error)) if other is not request]
            return False
        if link.has_output:
            self._links.watch_output(link)
        return True

    def _check_size(self, rows: int, step: _Step) -> None:
        limits, top_k, width = self._settings.limits, step.top_k, step.x.shape[1]
        if rows > limits.max_rows:
            raise WireError(f"{rows} rows for one shard; allowed: 1 to {limits.max_rows} (routing.max_frame_rows)")
        if top_k > limits.max_pairs_per_row:
            raise WireError(f"{top_k} experts a token; allowed: 1 to {limits.max_pairs_per_row}")
        if rows * (width * step.x.itemsize + top_k * PAIR_BYTES) > limits.max_bytes:
            raise WireError(
                f"{rows} rows of width {width} for one shard; allowed: {limits.max_bytes} bytes (routing.max_frame_mib)"
            )

    # -- collecting ---------------------------------------------------------------------------------------------

    def _collect(self, step: _Step) -> list[Request]:
        """Waits until every frame in flight is answered or lost; the lost ones."""
        lost, step.lost = step.lost, []
        links = self._links.by_shard
        while deadlines := [link.waiting[0].deadline for link in links.values() if link.waiting]:
            deadline = min(deadlines)
            for link, event in self._links.wait(deadline):
                self._serve(step, link, event, lost)
            # Also while bytes keep coming: the deadline is for the whole answer.
            if time.monotonic() > deadline:
                lost += self._links.drop_overdue(self._settings.frame_deadline_s)
        return lost

    def _serve(self, step: _Step, link: Link, event: int, lost: list[Request]) -> None:
        try:
            if event & select.POLLOUT:
                link.flush()
                self._links.watch_output(link)
            more = bool(event & ~select.POLLOUT)
            while more:
                try:
                    answered = link.receive()
                except Refused as refusal:
                    self._links.mark_down(link.shard, f"shard {link.shard}: {refusal}")
                    lost.append(refusal.request)
                else:
                    if answered is None:
                        return
                    request, y = answered
                    # A later frame on this link would overwrite the view.
                    step.answers.append((request.frame, request, y.clone() if step.wave or link.waiting else y))
                more = link.has_input
        except WireError as error:
            lost += self._links.drop(link, str(error))

    # -- small things -------------------------------------------------------------------------------------------

    def _token_of_pairs(self, tokens: int, top_k: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        """[0] * k + [1] * k + ...: [T * k]; kept, since steps come in few shapes."""
        if (tokens, top_k) not in self._rows_of:
            if len(self._rows_of) >= _CACHED_SHAPES:
                self._rows_of.clear()
            self._rows_of[tokens, top_k] = np.repeat(np.arange(tokens, dtype=np.int32), top_k)
        return self._rows_of[tokens, top_k]

    def _count(self, event: int) -> None:
        if self._loads is not None:
            self._loads.events[event] += 1

    def _why_missing(self, step: _Step, table: RoutingTable | None, todo: Positions) -> str:
        experts = sorted(set(step.experts[todo].tolist()))
        epoch = "no placement was ever published" if table is None else f"placement epoch {table.epoch}"
        reasons = "; ".join(failure.why for failure in self._links.down.values()) or "no shard holds them"
        waited = self._settings.unavailable_timeout_s
        return f"layer {step.layer}: no shard serves experts {experts} after {waited:g} s ({epoch}): {reasons}"


def _flat(tensor: torch.Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """[T, k] on any device -> [T * k] on this side, without a copy where there is nothing to change."""
    return tensor.detach().to("cpu", dtype).contiguous().view(-1).numpy()


def _combined(step: _Step) -> torch.Tensor:
    """The sum of a step's answers: [T, H], never a view into a link's buffer."""
    answers = sorted(step.answers, key=lambda answer: answer[0])
    assert sum(len(request.pairs) for _, request, _ in answers) == len(step.experts), "a pair was lost or doubled"
    whole = [y for _, request, y in answers if request.token_rows is None]
    if len(whole) == len(answers) == 2:
        return torch.add(whole[0], whole[1])
    if len(answers) == 1 and whole:
        return whole[0].clone()
    out = torch.zeros_like(step.x)
    for _, request, y in answers:
        if request.token_rows is None:
            out += y
        else:
            out.index_add_(0, torch.from_numpy(request.token_rows), y)
    return out
