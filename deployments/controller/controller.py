"""The controller deployment: one replica around `Membership`, `Takeover`, `Replacement` and `Planner`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from ray import serve

from expertmesh.deployments.controller.chronicle import Chronicle
from expertmesh.deployments.controller.durable import (
    Deposed,
    KeyValues,
    Office,
    PlacementState,
    RayKeyValues,
    first_epoch,
)
from expertmesh.deployments.controller.events import Kind, Timeline
from expertmesh.deployments.controller.history import INTERVAL_S, History
from expertmesh.deployments.controller.membership import Membership, ShardMember
from expertmesh.deployments.controller.planner import (
    Planner,
    Situation,
    measured_rates,
    planning_slots,
    predicted_balancedness,
)
from expertmesh.deployments.controller.replacement import Replacement
from expertmesh.deployments.controller.scaling import Request, Scaling
from expertmesh.deployments.controller.takeover import Takeover
from expertmesh.deployments.messages import AttentionReport, JoinRequest, Lease, Orders, ShardReport
from expertmesh.deployments.runtime import prepare_replica
from expertmesh.deployments.telemetry.controller import ControllerMetrics, Figures
from expertmesh.deployments.telemetry.recorder import publish_forever, recorder_for
from expertmesh.platform.autoscaling.targets import Targets
from expertmesh.platform.checkpoints import checkpoint_revision, expert_layout, open_checkpoint
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.metrics.catalogue import CONTROLLER
from expertmesh.routing.placement import Limits, Move, RoutingTable, even_slots, loaded_slots, slots_per_shard
from expertmesh.routing.placement.static import IntArray

log = logging.getLogger("expertmesh.controller")

_MISSED_HEARTBEATS = 2
"""Of a shard to which an attention replica's connection broke: then it is taken for dead."""
_BUSY = "another plan is being carried out; `placement show` lists its moves"
_LOADING_BYTES_A_SECOND = 1e9
"""Assumed until a shard has measured it."""


class Controller:
    """Keeps members, placement and loads; answers the admin API. Serving goes on without it."""

    def __init__(self, config: MeshConfig, store: KeyValues | None = None) -> None:
        """store: what outlives the controller; Ray's, which is there in a Serve replica, unless given."""
        if store is None:
            prepare_replica(config)
        checkpoint = open_checkpoint(model_folder(config.model))
        layout = expert_layout(checkpoint)
        meshed = config.experts.mode == "mesh"
        shards, redundancy = (config.experts.shards, config.experts.redundancy) if meshed else (1, 1)
        rebalance = config.routing.rebalance
        spare = config.experts.spare_slots if meshed else 0
        staging = meshed and rebalance.enabled
        slots = initial_slots(len(layout.layers), layout.num_experts, shards, redundancy, spare, staging)
        self._config = config
        self._revision = checkpoint_revision(checkpoint)
        application = serve.get_replica_context().app_name if store is None else ""
        store = RayKeyValues() if store is None else store
        self._office = Office(store, application)
        self._decided = PlacementState(f"{self._revision}: {slots.shape} x {redundancy}", slots, False)
        if (before := self._office.inherited) is not None and before.of == self._decided.of:
            self._decided, slots = before, before.slots
        self._deposed: Deposed | None = None
        self._expert_bytes = layout.total_expert_bytes
        self._logical_experts = max(1, len(layout.layers) * layout.num_experts)
        interval_s = config.experts.heartbeat_interval_s
        self._members = Membership(
            layout.layers,
            layout.num_experts,
            slots,
            config.experts.heartbeat_timeout_s,
            time.monotonic,
            redundancy=redundancy,
            spare=spare,
            staging=staging,
            suspect_s=_MISSED_HEARTBEATS * interval_s,
            intervals_s=(interval_s, max(interval_s, config.telemetry.loads_interval_s)),
        )
        self._members.epoch = first_epoch(self._office.term)
        self._replacement = Replacement(self._members, redundancy)
        self._takeover = Takeover(self._members, self._replacement, config.experts.max_slots)
        self._targets: Targets | None = Targets(store, application)
        self._scaling = Scaling(config, self._members, self._targets)
        limits = Limits(1, rebalance.moves, horizon_s=rebalance.horizon_s, least_gain=rebalance.least_gain)
        self._staging = staging
        self._frozen = self._decided.frozen
        self._balancedness = 1.0
        self._counted: dict[str, tuple[int, float]] = {}
        """`pairs` and `busy_s` of each shard when the loads were last looked at."""
        self._changed = asyncio.Event()
        self._announced = 0
        self._told = asyncio.Event()
        self._timeline = Timeline(self._office.term, time.time, self._ring)
        self._chronicle = Chronicle(self._timeline, self._members, self._replacement, self._takeover)
        self._history = History(len(layout.layers), layout.num_experts, time.time)
        term = self._office.term
        self._timeline.add(Kind.OFFICE, f"the controller of term {term} takes office", term=term)
        self._started = time.monotonic()
        self._planner = Planner(
            len(layout.layers), layout.num_experts, redundancy, rebalance.half_life_s, limits, self._started
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._metrics = ControllerMetrics(
            recorder_for(config, CONTROLLER), self._members, self._replacement, self._takeover, self._scaling
        )

    def check_health(self) -> None:
        """Raises once another controller has taken office, so that Serve ends this one."""
        if self._deposed is not None:
            raise self._deposed

    # -- shards -------------------------------------------------------------------------------------------------

    async def join(self, request: JoinRequest) -> Lease | None:
        """A lease of experts; None while all are taken: ask again."""
        self._check_office(request.seen_epoch)
        self._keep_house()
        lease = self._members.join(request)
        self._chronicle.look_at_members()
        return lease

    async def heartbeat(self, report: ShardReport) -> Orders | None:
        """Takes a shard's report; what it is to hold, or None if the shard must join (again)."""
        self._keep_house()
        if not self._members.heartbeat(report):
            return None
        self._follow_up()
        return self._members.orders(report.shard)

    async def leave(self, shard: str) -> None:
        """A shard goes: its experts are for the next one that joins."""
        self._members.leave(shard)
        self._follow_up()

    async def leaving(self, shard: str) -> None:
        """A shard goes as soon as others serve its experts: its orders say when."""
        self._members.leaving(shard)
        self._follow_up()

    # -- attention replicas -------------------------------------------------------------------------------------

    async def watch(self, known_epoch: int, wait_s: float) -> str | None:
        """The routing table (JSON) once it is newer than `known_epoch`; None after `wait_s` seconds without one.

        A controller that has just come back stays silent until its shards have, so that nobody trades a table that
        works for an empty one.
        """
        deadline = time.monotonic() + wait_s
        while True:
            self._keep_house()
            table = self._members.table()
            if table.epoch > known_epoch and (table.missing == 0 or self._settled):
                return table.to_json()
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            changed = self._changed
            try:
                await asyncio.wait_for(changed.wait(), left)
            except TimeoutError:
                return None

    async def report(self, report: AttentionReport) -> None:
        """Takes an attention replica's report."""
        self._check_office(report.epoch)
        self._keep_house()
        self._members.report(report)
        self._expire()

    @property
    def _settled(self) -> bool:
        """Whether those that this controller doesn't know yet had time to come back to it."""
        return time.monotonic() - self._started > 2 * self._config.experts.heartbeat_timeout_s

    # -- admin --------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """What `expertmesh status` shows; see platform.client for the fields."""
        members, now = self._members, time.monotonic()
        table = members.table()
        meshed = self._config.experts.mode == "mesh"
        attention = [
            {
                "replica": m.report.replica,
                "node": m.report.node,
                "ready": m.report.ready,
                "epoch": m.report.epoch,
                "running": m.report.running,
                "seen_s": round(now - m.seen, 3),
                **m.report.stats,
            }
            for m in members.attention.values()
        ]
        shards = [
            {
                "shard": m.shard,
                "node": m.node,
                "index": m.index,
                "ready": m.target is not None,
                "leaving": m.leaving,
                "addresses": list(m.target.addresses) if m.target else [],
                "experts": int((members.slots[m.index] >= 0).sum()),
                "seen_s": round(now - m.seen, 3),
                **m.stats,
            }
            for m in sorted(members.shards.values(), key=lambda m: m.index)
        ]
        return {
            "model": self._config.model.name,
            "mode": self._config.experts.mode,
            "health": self._health(table),
            "revision": self._revision,
            "placement": {
                "epoch": table.epoch,
                "layers": len(members.layers),
                "experts": members.num_experts,
                "redundancy": table.redundancy if meshed else 0,
                "missing_experts": table.missing if meshed else 0,
                "expert_bytes": self._expert_bytes,
                "balancedness": round(self._balancedness, 4),
                "moves": len(self._replacement.running),
                "frozen": self._frozen,
            },
            "attention": attention,
            "shards": shards,
            "wanted": self._scaling.numbers,
        }

    def _health(self, table: RoutingTable) -> str:
        """ok; starting, while no replica serves; degraded, while an expert is missing."""
        if not any(member.report.ready for member in self._members.attention.values()):
            return "starting"
        return "degraded" if self._config.experts.mode == "mesh" and table.missing else "ok"

    async def placement(self) -> dict[str, Any]:
        """Expert ids in each slot: `slots[shard index][layer][slot]`, -1 empty, and which shard serves each index; the
        moves on their way and those that ended lately."""
        members = self._members
        return {
            "epoch": members.epoch,
            "layers": list(members.layers),
            "experts": members.num_experts,
            "shards": {str(m.index): m.shard for m in members.shards.values() if m.target is not None},
            "slots": members.slots.tolist(),
            "frozen": self._frozen,
            "running": [str(move) for move in self._replacement.running],
            "ended": [str(move) for move in self._replacement.ended],
        }

    async def plan(self) -> dict[str, Any]:
        """The moves that would pay now, in words, and balancedness as it is; nothing is carried out."""
        moves = await self._planned()
        return {"moves": [str(move) for move in moves], "balancedness": round(self._balancedness, 4)}

    async def apply(self) -> dict[str, Any]:
        """Plans now, also when frozen, and begins to carry it out; `moves` is empty if nothing pays.

        Raises ValueError where shards have no staging slots (routing.rebalance.enabled), or while another plan is being
        carried out.
        """
        if not self._staging:
            raise ValueError("routing.rebalance.enabled is false: shards have no slot to load into")
        if self._replacement.busy:
            raise ValueError(_BUSY)
        moves = await self._planned()
        if self._replacement.busy:
            raise ValueError(_BUSY)  # begun while this one was made
        self._begin(moves)
        return {"moves": [str(move) for move in moves], "balancedness": round(self._balancedness, 4)}

    async def freeze(self, frozen: bool) -> dict[str, Any]:
        """Stops re-placing by itself, or starts again. Moves on their way are finished."""
        if frozen != self._frozen:
            self._chronicle.froze(frozen)
        self._frozen = frozen
        self._remember()
        return {"frozen": frozen}

    async def scale(self, attention: Request = None, experts: Request = None) -> dict[str, int | None]:
        """Sets how many replicas there are to be, `auto` for what the signals or the configuration say; what is wanted
        then. Raises ValueError for a number that can't be."""
        before = self._scaling.numbers
        after = self._scaling.scale(attention, experts)
        self._chronicle.scaled(before, after, "hand")
        return after

    async def loads(self) -> dict[str, Any]:
        """Tokens dispatched: `tokens[layer][expert]`, lately `rows_a_second[layer][expert]`; layers in which traffic
        has just shifted; pairs computed by each shard."""
        layers = self._members.layers
        return {
            "layers": list(layers),
            "tokens": self._members.loads().tolist(),
            "rows_a_second": self._planner.loads.rows_a_second.round(3).tolist(),
            "shifted": [layers[position] for position in self._planner.shifted],
            "by_shard": {m.shard: int(m.stats.get("pairs", 0)) for m in self._members.shards.values()},
        }

    async def heat(self) -> dict[str, Any]:
        """`rows_a_second[layer][expert]` of the last seconds."""
        return {
            "layers": list(self._members.layers),
            "experts": self._members.num_experts,
            "rows_a_second": self._history.rows_a_second.round(1).tolist(),
        }

    async def history(self, after: float) -> dict[str, Any]:
        """The samples of the last minutes that ended after `after`, in seconds since 1970; see history.py."""
        self._keep_house()
        return self._history.since(after)

    async def events(self, after: int, wait_s: float) -> list[dict[str, Any]]:
        """Events with ids above `after`, as soon as there are any; none after `wait_s` seconds without one."""
        self._keep_house()
        if after > self._timeline.newest:  # another mesh's id, or one of a controller that is in office instead of this
            await asyncio.to_thread(self._office.check)
        deadline = time.monotonic() + wait_s
        while True:
            told = self._told
            if events := self._timeline.after(after):
                return [event.to_dict() for event in events]
            try:
                await asyncio.wait_for(told.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return []

    # -- re-placement -------------------------------------------------------------------------------------------

    def _situation(self) -> Situation:
        members = self._members
        serving = members.present()
        ready = np.zeros(len(members.slots), dtype=bool)
        ready[list(serving)] = True
        return Situation(
            slots=planning_slots(members.slots, members.usual(), self._staging),
            loads=self._planner.current(members.loads(), time.monotonic()),
            rates=measured_rates({index: self._lately(m) for index, m in serving.items()}, len(members.slots)),
            ready=ready,
            settled=self._takeover.settled,
            usual=members.usual(),
            expert_bytes=self._expert_bytes // self._logical_experts,
            bytes_a_second=_bandwidth(serving.values()),
        )

    def _lately(self, member: ShardMember) -> dict[str, float]:
        pairs, busy_s = self._counted.get(member.shard, (0, 0.0))
        return {"pairs": member.stats.get("pairs", 0) - pairs, "busy_s": member.stats.get("busy_s", 0.0) - busy_s}

    async def _planned(self) -> list[Move]:
        """The moves that would pay now. Changes nothing but what is known of balancedness."""
        situation = self._situation()

        def work() -> tuple[list[Move], float]:
            return self._planner.moves(situation), predicted_balancedness(situation)

        moves, self._balancedness = await asyncio.to_thread(work)
        return moves

    def _begin(self, moves: Sequence[Move]) -> None:
        if moves:
            self._replacement.start(moves)
            self._follow_up()

    async def _rebalance_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.routing.rebalance.interval_s)
            try:
                if self._planner.observe(self._members.loads(), time.monotonic()):
                    log.info("traffic has shifted in %d layers", len(self._planner.shifted))
                    self._chronicle.shifted(len(self._planner.shifted))
                moves = await self._planned()
                self._counted = {
                    m.shard: (m.stats.get("pairs", 0), m.stats.get("busy_s", 0.0))
                    for m in self._members.shards.values()
                }
                if not (self._frozen or self._replacement.busy):
                    self._begin(moves)
            except Exception:  # a bug in planning must not end it: serving doesn't depend on it
                log.exception("no plan was made")

    def __del__(self) -> None:
        """Serve calls it when the application is removed: the next one begins with what its configuration says.

        And when another controller has taken over, whose numbers they are then.
        """
        if (targets := getattr(self, "_targets", None)) is not None:
            self._targets = None
            with contextlib.suppress(Deposed):
                self._office.check()
                targets.clear()

    # -- housekeeping -------------------------------------------------------------------------------------------

    def _follow_up(self, lost: Collection[str] = ()) -> None:
        """To be called when something has changed: experts change hands, moves go on, watchers get the new table.

        lost: members that were not heard of in time.
        """
        self._chronicle.look_at_members(lost)
        self._takeover.advance()
        self._replacement.advance()
        self._chronicle.look_at_placement()
        self._remember()
        if self._members.epoch != self._announced:
            self._announced = self._members.epoch
            changed, self._changed = self._changed, asyncio.Event()
            changed.set()
            if self._config.experts.mode == "mesh":
                self._chronicle.published(self._announced, self._members.table().missing)

    def _ring(self) -> None:
        """Wakes whoever waits for events."""
        told, self._told = self._told, asyncio.Event()
        told.set()

    def _remember(self) -> None:
        """Writes down what has been decided since the last time, for the controller after this one."""
        decided, slots = self._decided, self._members.slots
        if np.array_equal(decided.slots, slots) and decided.frozen == self._frozen:
            return
        self._decided = PlacementState(decided.of, slots.copy(), self._frozen)
        try:
            self._office.save(self._decided)
        except Deposed as deposed:
            self._step_down(deposed)
        except Exception:  # Ray's head is away: it is written with the next change
            log.exception("the placement could not be written down")

    def _check_office(self, seen_epoch: int) -> None:
        """Raises Deposed if a member has seen a later term's epoch: this controller must not outbid it."""
        if seen_epoch >= first_epoch(self._office.term + 1):
            deposed = Deposed(f"epoch {seen_epoch} is of a later term than {self._office.term}")
            self._step_down(deposed)
            raise deposed

    def _step_down(self, why: Deposed) -> None:
        """Decides nothing more; `check_health` has Serve end this process."""
        self._deposed = why
        log.error("this controller ends: %s", why)
        for task in self._tasks:
            task.cancel()

    def _keep_house(self) -> None:
        """Starts what goes on by itself. Raises Deposed if another controller is in office: none may follow this."""
        if self._deposed is not None:
            raise self._deposed
        if self._tasks and not any(task.done() for task in self._tasks):
            return
        for task in self._tasks:
            task.cancel()
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(self._expire_forever()),
            loop.create_task(self._sample_forever()),
            loop.create_task(publish_forever(self._publish)),
        ]
        scaling = self._config.autoscaling
        if scaling.attention is not None or scaling.experts is not None:
            self._tasks.append(loop.create_task(self._scale_forever()))
        if self._staging:
            self._tasks.append(loop.create_task(self._rebalance_forever()))

    def _publish(self) -> None:
        table = self._members.table()
        missing = table.missing if self._config.experts.mode == "mesh" else 0
        self._metrics.publish(Figures(self._health(table) == "ok", missing, self._balancedness, self._frozen))

    async def _sample_forever(self) -> None:
        while True:
            await asyncio.sleep(INTERVAL_S)
            try:
                self._history.take(self._members, time.monotonic())
            except Exception:  # figures for people: nothing depends on them
                log.exception("no sample was taken")

    async def _scale_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.autoscaling.interval_s)
            try:
                before = self._scaling.numbers
                self._scaling.decide(self._balancedness, time.monotonic())
                self._chronicle.scaled(before, self._scaling.numbers, "signals")
            except Exception:  # the numbers stay as they are
                log.exception("the signals could not be looked at")

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.experts.heartbeat_interval_s / 2)
            try:
                await asyncio.to_thread(self._office.check)
            except Deposed as deposed:
                self._step_down(deposed)
                return
            except Exception:  # Ray's head is away
                log.exception("nobody can say who is in office")
            if self._settled:
                self._members.give_up_starting()
            self._expire()

    def _expire(self) -> None:
        if gone := self._members.expire():
            log.warning("not heard of in time: %s", ", ".join(gone))
        self._follow_up(gone)


def initial_slots(layers: int, experts: int, shards: int, redundancy: int, spare: int, staging: bool) -> IntArray:
    """[shards, layers, slots] expert ids of a start without known loads; -1 where a slot is empty.

    spare: slots of each shard and layer for more copies than redundancy asks for; staging: whether there is one more,
    always empty.
    """
    slots = even_slots(layers, experts, shards, redundancy)
    if spare:
        width = min(slots_per_shard(experts, shards, redundancy) + spare, experts)
        slots = loaded_slots(np.ones((layers, experts)), shards, width, redundancy)
    return np.pad(slots, ((0, 0), (0, 0), (0, int(staging))), constant_values=-1)


def _bandwidth(members: Iterable[ShardMember]) -> float:
    """Bytes a second at which shards read experts, over all that they have read."""
    read, seconds = 0, 0.0
    for member in members:
        read += member.stats.get("bytes_read", 0)
        seconds += member.stats.get("load_s", 0.0)
    return read / seconds if read and seconds else _LOADING_BYTES_A_SECOND
