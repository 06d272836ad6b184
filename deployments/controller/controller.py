"""The controller deployment: one replica around `Membership`."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from expertmesh.deployments.controller.membership import Membership
from expertmesh.deployments.messages import AttentionReport, JoinRequest, Lease, ShardReport
from expertmesh.deployments.runtime import prepare_replica
from expertmesh.platform.checkpoints import checkpoint_revision, expert_layout, open_checkpoint
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig
from expertmesh.routing.placement import even_slots

log = logging.getLogger("expertmesh.controller")


class Controller:
    """Keeps members, placement and loads; answers the admin API. Serving goes on without it."""

    def __init__(self, config: MeshConfig) -> None:
        prepare_replica(config)
        checkpoint = open_checkpoint(model_folder(config.model))
        layout = expert_layout(checkpoint)
        meshed = config.experts.mode == "mesh"
        shards = config.experts.shards if meshed else 1
        slots = even_slots(len(layout.layers), layout.num_experts, shards, config.experts.redundancy if meshed else 1)
        self._config = config
        self._revision = checkpoint_revision(checkpoint)
        self._expert_bytes = layout.total_expert_bytes
        timeout_s = config.experts.heartbeat_timeout_s
        self._members = Membership(layout.layers, layout.num_experts, slots, timeout_s, time.monotonic)
        self._changed = asyncio.Event()
        self._started = time.monotonic()
        self._expiry: asyncio.Task[None] | None = None

    # -- shards -------------------------------------------------------------------------------------------------

    async def join(self, request: JoinRequest) -> Lease | None:
        """A lease of experts; None while all are taken: ask again."""
        self._watch_expiry()
        return self._members.join(request)

    async def heartbeat(self, report: ShardReport) -> int | None:
        """Takes a shard's report; the current epoch, or None if the shard must join (again)."""
        before = self._members.epoch
        if not self._members.heartbeat(report):
            return None
        if self._members.epoch != before:
            self._announce()
        return self._members.epoch

    async def leave(self, shard: str) -> None:
        """A shard goes: its experts are for the next one that joins."""
        self._members.leave(shard)
        self._announce()

    # -- attention replicas -------------------------------------------------------------------------------------

    async def watch(self, known_epoch: int, wait_s: float) -> str | None:
        """The routing table (JSON) once it is newer than `known_epoch`; None after `wait_s` seconds without one.

        A controller that has just come back stays silent until its shards have, so that nobody trades a table that
        works for an empty one.
        """
        deadline = time.monotonic() + wait_s
        while True:
            table = self._members.table()
            settled = time.monotonic() - self._started > 2 * self._config.experts.heartbeat_timeout_s
            if table.epoch > known_epoch and (table.missing == 0 or settled):
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
        self._watch_expiry()
        self._members.report(report)

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
                "addresses": list(m.target.addresses) if m.target else [],
                "experts": int((members.slots[m.index] >= 0).sum()),
                "seen_s": round(now - m.seen, 3),
                **m.stats,
            }
            for m in sorted(members.shards.values(), key=lambda m: m.index)
        ]
        serving = any(a["ready"] for a in attention)
        complete = not meshed or table.missing == 0
        return {
            "model": self._config.model.name,
            "mode": self._config.experts.mode,
            "health": "ok" if serving and complete else "starting" if not serving else "degraded",
            "revision": self._revision,
            "placement": {
                "epoch": table.epoch,
                "layers": len(members.layers),
                "experts": members.num_experts,
                "redundancy": table.redundancy if meshed else 0,
                "missing_experts": table.missing if meshed else 0,
                "expert_bytes": self._expert_bytes,
            },
            "attention": attention,
            "shards": shards,
        }

    async def placement(self) -> dict[str, Any]:
        """Expert ids in each slot: `slots[shard index][layer][slot]`, -1 empty, and which shard serves each index."""
        members = self._members
        return {
            "epoch": members.epoch,
            "layers": list(members.layers),
            "experts": members.num_experts,
            "shards": {str(m.index): m.shard for m in members.shards.values() if m.target is not None},
            "slots": members.slots.tolist(),
        }

    async def loads(self) -> dict[str, Any]:
        """Tokens dispatched: `tokens[layer][expert]`, and pairs computed by each shard."""
        return {
            "layers": list(self._members.layers),
            "tokens": self._members.loads().tolist(),
            "by_shard": {m.shard: int(m.stats.get("pairs", 0)) for m in self._members.shards.values()},
        }

    # -- housekeeping -------------------------------------------------------------------------------------------

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _watch_expiry(self) -> None:
        if self._expiry is None or self._expiry.done():
            self._expiry = asyncio.get_running_loop().create_task(self._expire_forever())

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(self._config.experts.heartbeat_interval_s)
            if gone := self._members.expire():
                log.warning("not heard of for %g s: %s", self._config.experts.heartbeat_timeout_s, ", ".join(gone))
                self._announce()
