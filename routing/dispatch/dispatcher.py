"""Dispatch and combine for one engine process.

For each MoE layer of each step: count the tokens of each expert, choose a copy for each, send every chosen shard one
frame with just the rows that it needs, and add up the rows that come back, always in the order of the table's shards,
so that the sum does not depend on who answers first. A shard that goes away, answers with an error or misses the
deadline loses its pairs to other copies at once; with no copy left the step waits for a newer table.
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
from expertmesh.routing.dispatch.mailbox import LoadCounters, TableSource
from expertmesh.routing.dispatch.policy import create_policy
from expertmesh.routing.placement import RoutingTable, Target
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.transport import Address, Peer, connect
from expertmesh.routing.wire import Limits, dispatch_parts
from expertmesh.routing.wire.frame import PAIR_BYTES

_RETRY_SHARD_S = 0.25
"""How long a shard that failed is left alone."""
_PATIENCE = 2.0
"""How many times as long as the failure took it is left alone while other copies can answer: a node that went dark
costs a timeout at each attempt, and an attempt at each step would cost more than the shard is worth."""
_WAIT_POLL_S = 0.005
"""How often a step without a copy looks for a newer table."""


@dataclass(frozen=True, slots=True)
class DispatchSettings:
    """How a dispatcher behaves; the fields of the config's `routing` section, in seconds."""

    node: str
    """Id of this node: shards on it are reached by unix socket."""
    revision: str
    """Identity of the checkpoint; a shard that serves another one is refused."""
    policy: str = "least_loaded"
    transport: str = "auto"
    limits: Limits = field(default_factory=Limits)
    frame_deadline_s: float = 10.0
    connect_timeout_s: float = 5.0
    unavailable_timeout_s: float = 60.0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a shard is left alone."""

    at: float
    """`time.monotonic()`"""
    cost_s: float
    """What the failure took."""
    why: str

    def over(self, now: float, patience: float) -> bool:
        """Whether the shard may be asked again."""
        return now - self.at >= max(_RETRY_SHARD_S, patience * self.cost_s)


@dataclass(slots=True)
class _Step:
    """One layer of one step while it is dispatched. T tokens, k experts each, pairs flattened to T * k."""

    layer: int
    x: torch.Tensor
    experts: np.ndarray[Any, np.dtype[np.int32]]
    weights: np.ndarray[Any, np.dtype[np.float32]]
    top_k: int
    answers: list[tuple[int, Request, torch.Tensor]]
    """(frame id, request, y); ids grow in the order of the table's shards"""
    lost: list[Request] = field(default_factory=list)
    """Frames in flight on a link that broke when another one was to follow."""
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
        self._secret = secret
        self._settings = settings
        self._policy = create_policy(settings.policy)
        self._loads = loads
        self._links: dict[str, Link] = {}
        self._by_fd: dict[int, Link] = {}
        self._poll = select.poll()
        self._down: dict[str, _Failure] = {}

    def __call__(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The routed experts' output of one layer: [T, H], a fresh tensor in x's dtype and on x's device.

        x: [T, H]; weights, ids: [T, k], router weights and the model's expert ids. Raises Unavailable if an expert
        has no shard for longer than the configured wait, WireError if the table does not know the layer.
        """
        if x.shape[0] == 0:
            return torch.empty_like(x)
        host = x.detach().contiguous().cpu()
        experts = ids.detach().to("cpu", torch.int32).contiguous().numpy().reshape(-1)
        step = _Step(
            layer,
            host,
            experts,
            weights.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1),
            ids.shape[1],
            [],
        )
        try:
            self._run(step)
        except BaseException:
            self._abandon()
            raise
        return self._combine(step).to(x.device)

    def close(self) -> None:
        """Closes every connection."""
        for link in list(self._links.values()):
            self._drop(link, "closed")

    def _run(self, step: _Step) -> None:
        """Sends and collects until every pair is answered."""
        todo: np.ndarray[Any, np.dtype[np.int64]] | None = None
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
        self,
        step: _Step,
        table: RoutingTable,
        todo: np.ndarray[Any, np.dtype[np.int64]] | None,
        failed: Sequence[int] = (),
    ) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """Sends the pairs `todo` (None: all), not to the targets `failed`; the pairs for which none is up, or None."""
        try:
            index = table.layer_index[step.layer]
        except KeyError:
            raise WireError(
                f"layer {step.layer} has no routed experts in the placement; it knows {table.layers}"
            ) from None
        experts = step.experts if todo is None else step.experts[todo]
        counts = np.bincount(experts, minlength=table.num_experts)
        if not step.counted:
            step.counted = True
            self._count(0)
            if self._loads is not None:
                self._loads.tokens[index] += counts
        chosen = self._choose(table, index, counts, failed)[experts]
        unplaced: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        refused: dict[int, np.ndarray[Any, np.dtype[np.int64]]] = {}
        used = np.bincount(chosen + 1).nonzero()[0] - 1
        for position in used.tolist():
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
        chosen = self._policy(counts, table.copies[index], self._up(table, failed, _PATIENCE))
        if self._down and (chosen[counts > 0] < 0).any():  # rather one that failed a while ago than none
            chosen = self._policy(counts, table.copies[index], self._up(table, failed, 0.0))
        return chosen

    def _send_frame(
        self, step: _Step, table: RoutingTable, position: int, pairs: np.ndarray[Any, np.dtype[np.int64]]
    ) -> bool:
        """Sends one shard its pairs; False if it can't be reached. Raises WireError if a frame can't hold them."""
        rows = pairs // step.top_k
        first = np.empty(len(rows), dtype=bool)
        first[0] = True
        np.not_equal(rows[1:], rows[:-1], out=first[1:])
        token_rows = rows[first]
        everything = len(token_rows) == step.x.shape[0]
        self._check_size(len(token_rows), step)
        target = table.targets[position]
        link = self._link(target, step.x)
        if link is None:
            return False
        x = step.x if everything else step.x.index_select(0, torch.from_numpy(token_rows))
        budget = self._settings.frame_deadline_s
        request = Request(
            next_frame_id(),
            pairs,
            None if everything else token_rows,
            len(token_rows),
            x.nbytes,
            time.monotonic() + budget,
            x.dtype,
        )
        parts = dispatch_parts(
            x,
            step.experts[pairs],
            (np.cumsum(first, dtype=np.int32) - 1).astype(np.int32, copy=False),
            step.weights[pairs],
            layer=step.layer,
            epoch=table.epoch,
            frame=request.frame,
            budget_ms=int(budget * 1000),
        )
        try:
            link.send(parts, request)
        except WireError as error:
            step.lost += [other for other in self._drop(link, str(error)) if other is not request]
            return False
        if link.has_output:
            self._poll.modify(link, select.POLLIN | select.POLLOUT)
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

    def _up(self, table: RoutingTable, failed: Sequence[int], patience: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which targets may be asked now: [S]."""
        up = np.ones(len(table.targets), dtype=bool)
        if self._down:
            now = time.monotonic()
            over = {shard for shard, failure in self._down.items() if failure.over(now, patience)}
            for position, target in enumerate(table.targets):
                up[position] = position not in failed and (target.shard not in self._down or target.shard in over)
            if patience:
                self._down = {shard: failure for shard, failure in self._down.items() if shard not in over}
        return up

    def _link(self, target: Target, x: torch.Tensor) -> Link | None:
        link = self._links.get(target.shard)
        if link is not None:
            return link
        begin = time.monotonic()
        try:
            sock, peer = connect(self._address(target), self._secret, self._settings.connect_timeout_s)
            try:
                self._check(peer, target, x)
            except WireError:
                sock.close()
                raise
        except WireError as error:
            self._mark_down(target.shard, str(error), time.monotonic() - begin)
            return None
        link = Link(sock, target.shard, self._settings.limits)
        self._links[target.shard] = link
        self._by_fd[link.fileno()] = link
        self._poll.register(link, select.POLLIN)
        return link

    def _check(self, peer: Peer, target: Target, x: torch.Tensor) -> None:
        """Raises WireError if the shard is not who it should be or doesn't take rows like x."""
        if peer.shard != target.shard or peer.revision != self._settings.revision:
            raise WireError(
                f"shard {peer.shard} with checkpoint {peer.revision} answers where {target.shard} "
                f"with {self._settings.revision} should be"
            )
        dtype = str(x.dtype).removeprefix("torch.")
        if peer.width != x.shape[1] or peer.dtype != dtype:
            raise WireError(
                f"shard {peer.shard} takes rows of width {peer.width} in {peer.dtype}; "
                f"the engine sends width {x.shape[1]} in {dtype}"
            )

    def _address(self, target: Target) -> Address:
        addresses = [Address.parse(text) for text in target.addresses]
        local = target.node == self._settings.node
        wanted = self._settings.transport
        for family in ("unix", "tcp") if local else ("tcp",):
            for address in addresses:
                if address.family == family and wanted in ("auto", family):
                    return address
        raise WireError(f"no way to shard {target.shard} by transport {wanted!r}: it listens at {target.addresses}")

    # -- collecting ---------------------------------------------------------------------------------------------

    def _collect(self, step: _Step) -> list[Request]:
        """Waits until every frame in flight is answered or lost; the lost ones."""
        lost, step.lost = step.lost, []
        while True:
            deadlines = [link.waiting[0].deadline for link in self._links.values() if link.waiting]
            if not deadlines:
                return lost
            left = min(deadlines) - time.monotonic()
            events = self._poll.poll(max(0.0, left) * 1000 + 1)
            for fd, event in events:
                link = self._by_fd.get(fd)
                if link is not None:
                    self._serve(step, link, event, lost)
            if left <= 0 or not events:  # also while bytes keep coming: the deadline is for the whole answer
                for link in list(self._links.values()):
                    if link.overdue():
                        seconds = self._settings.frame_deadline_s
                        lost += self._drop(link, f"shard {link.shard} did not answer in {seconds:g} s", seconds)

    def _serve(self, step: _Step, link: Link, event: int, lost: list[Request]) -> None:
        try:
            if event & select.POLLOUT:
                link.flush()
                if not link.has_output:
                    self._poll.modify(link, select.POLLIN)
            more = bool(event & ~select.POLLOUT)
            while more:
                try:
                    answered = link.receive()
                except Refused as refusal:
                    self._mark_down(link.shard, f"shard {link.shard}: {refusal}")
                    lost.append(refusal.request)
                else:
                    if answered is None:
                        return
                    request, y = answered
                    # A later frame on this link would overwrite the view.
                    step.answers.append((request.frame, request, y.clone() if step.wave or link.waiting else y))
                more = link.has_input
        except WireError as error:
            lost += self._drop(link, str(error))

    def _combine(self, step: _Step) -> torch.Tensor:
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

    # -- failures -----------------------------------------------------------------------------------------------

    def _drop(self, link: Link, why: str, cost_s: float = 0.0) -> list[Request]:
        self._poll.unregister(link)
        self._by_fd.pop(link.fileno(), None)
        self._links.pop(link.shard, None)
        self._mark_down(link.shard, why, cost_s)
        return link.close()

    def _abandon(self) -> None:
        """Ends a step half-way: answers that are still to come must not be taken for the next step's."""
        for link in list(self._links.values()):
            if link.waiting:
                self._drop(link, "the step was abandoned")

    def _mark_down(self, shard: str, why: str, cost_s: float = 0.0) -> None:
        self._down[shard] = _Failure(time.monotonic(), cost_s, why)

    def _count(self, event: int) -> None:
        if self._loads is not None:
            self._loads.events[event] += 1

    def _why_missing(self, step: _Step, table: RoutingTable | None, todo: np.ndarray[Any, np.dtype[np.int64]]) -> str:
        experts = sorted(set(step.experts[todo].tolist()))
        epoch = "no placement was ever published" if table is None else f"placement epoch {table.epoch}"
        reasons = "; ".join(failure.why for failure in self._down.values()) or "no shard holds them"
        waited = self._settings.unavailable_timeout_s
        return f"layer {step.layer}: no shard serves experts {experts} after {waited:g} s ({epoch}): {reasons}"
