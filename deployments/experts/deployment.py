"""The expert deployment: each replica leases experts, loads just those, and serves them on its own sockets."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from typing import Any

import numpy as np
from ray.serve.handle import DeploymentHandle

from expertmesh.deployments.experts.shard import Shard, ShardSettings, new_shard_id
from expertmesh.deployments.messages import JoinRequest, Lease, Orders, ShardReport
from expertmesh.deployments.runtime import bind_host, mesh_secret, node_id, prepare_replica
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig
from expertmesh.routing.placement import Target
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.wire import Limits

log = logging.getLogger("expertmesh.experts")


class ExpertShard:
    """A shard's life: join, load, serve, report; join again if the controller forgot it."""

    async def __init__(self, config: MeshConfig, controller: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Returns when the shard serves, so that Serve counts it as running only then. Raises CheckpointError."""
        prepare_replica(config)
        self._config = config
        self._controller = controller
        self._id = new_shard_id()
        self._node = node_id()
        self._shard: Shard | None = None
        self._epoch = 0
        self._failed: tuple[IntArray, str] | None = None
        self._loading: asyncio.Task[None] | None = None
        self._lease = await self._join(None)
        self._beating = asyncio.get_running_loop().create_task(self._beat())
        try:
            self._shard = await asyncio.to_thread(self._load, self._lease)
        except BaseException:
            self._beating.cancel()
            await self._controller.leave.remote(self._id)
            raise
        self._shard.start()
        await self._report()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._config.experts.heartbeat_interval_s)
            await self._report()

    async def _join(self, held: int | None) -> Lease:
        while True:
            slots = self._shard.slots if self._shard is not None else None
            request = JoinRequest(self._id, self._node, held, slots, self._epoch)
            lease: Lease | None = await self._controller.join.remote(request)
            if lease is not None:
                return lease
            if held is not None:
                raise RuntimeError(f"shard {self._id} was away and its experts went to another")
            await asyncio.sleep(self._config.experts.heartbeat_interval_s)

    def _load(self, lease: Lease) -> Shard:
        routing, experts = self._config.routing, self._config.experts
        settings = ShardSettings(
            folder=model_folder(self._config.model),
            dtype=self._config.model.engine_dtype,
            threads=experts.threads,
            transport=routing.transport,
            bind_host=bind_host(self._config),
            limits=Limits(routing.max_frame_rows, routing.max_frame_mib << 20),
            max_batch_rows=experts.max_batch_rows,
        )
        return Shard(settings, mesh_secret(self._config), lease.slots, self._id)

    async def _report(self) -> None:
        shard = self._shard
        target = Target(self._id, self._node, tuple(shard.addresses)) if shard is not None else None
        held, stats = None, {}
        if shard is not None:
            held = shard.slots
            stats = {**asdict(shard.stats), "bytes_read": shard.bytes_read, "load_s": shard.load_s}
        failed, why = self._failed or (None, "")
        try:
            orders: Orders | None = await asyncio.wait_for(
                self._controller.heartbeat.remote(ShardReport(self._id, target, held, failed, why, stats)),
                self._config.experts.heartbeat_timeout_s,
            )
        except Exception as error:  # whatever keeps the controller away, serving goes on
            log.warning("shard %s can't reach the controller: %r", self._id, error)
            return
        if orders is None:
            await self._join(self._lease.index)
        elif shard is not None:
            self._epoch = shard.server.epoch = orders.epoch
            if orders.slots is not None and (self._loading is None or self._loading.done()):
                self._loading = asyncio.get_running_loop().create_task(self._obey(shard, orders.slots))

    async def _obey(self, shard: Shard, slots: IntArray) -> None:
        """Loads what was ordered and says so; a failure is told once for the same orders."""
        if self._failed is not None and np.array_equal(self._failed[0], slots):
            return
        try:
            await asyncio.to_thread(shard.load, slots)
            self._failed = None
        except Exception as error:  # the shard serves on with what it has; the controller plans without this
            log.exception("shard %s could not load what it was ordered to", self._id)
            self._failed = (slots, f"{type(error).__name__}: {error}")
        await self._report()

    def check_health(self) -> None:
        """Raises if the shard can't serve any more, so that Serve replaces it."""
        if self._beating.done():
            self._beating.result()
        if self._shard is not None and not self._shard.server.alive:
            raise RuntimeError(f"data plane of shard {self._id} ended: {self._shard.server.failure!r}")

    def __del__(self) -> None:
        if (beating := getattr(self, "_beating", None)) is not None:
            beating.cancel()
        if (shard := getattr(self, "_shard", None)) is not None:
            self._shard = None
            shard.stop()
            self._controller.leave.remote(self._id)
