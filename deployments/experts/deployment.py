"""The expert deployment: each replica leases experts, loads just those, and serves them on its own sockets.

It serves an expert as soon as it is loaded. When it is told to stop, or its node is about to be taken away, it says so
to the controller and serves on until others have its experts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import asdict
from typing import Any

import httpx
import numpy as np
from ray.serve.handle import DeploymentHandle

from expertmesh.deployments.experts.shard import Shard, ShardSettings, new_shard_id
from expertmesh.deployments.messages import JoinRequest, Lease, Orders, ShardReport
from expertmesh.deployments.runtime import bind_host, drain_node, mesh_secret, mesh_tls, node_id, prepare_replica
from expertmesh.deployments.telemetry.experts import ShardMetrics
from expertmesh.deployments.telemetry.recorder import publish_forever, recorder_for
from expertmesh.errors import CheckpointError
from expertmesh.platform.autoscaling.spot import InstanceMetadata
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.metrics.catalogue import SHARDS
from expertmesh.routing.placement import Target
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.wire import Limits

log = logging.getLogger("expertmesh.experts")

_STUCK_DEADLINES = 3
"""A batch that takes so many times a frame's deadline never ends: nobody waits for it any more."""

_NOTICE_S = 5.0
"""Between two questions to the metadata service; a notice comes two minutes before."""
_ANSWER_S = 5.0
"""How long a shard that is told to stop waits for the controller's ear, which may be stopping too."""


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
        self._news = asyncio.Event()
        """There is something that the controller should know before the next heartbeat."""
        self._released = asyncio.Event()
        self._ending = False
        loop = asyncio.get_running_loop()
        self._lease = await self._join(None)
        self._beating = loop.create_task(self._beat())
        self._watching = loop.create_task(self._watch_node())
        self._metrics = ShardMetrics(recorder_for(config, SHARDS))
        self._publishing = loop.create_task(publish_forever(self._publish))
        try:
            self._shard = shard = await asyncio.to_thread(self._open, self._lease)
            shard.start()
            self._loading = loop.create_task(self._obey(shard, self._lease.slots))
            await self._loading
            if self._failed is not None:
                raise CheckpointError(self._failed[1])
        except BaseException:
            self._close()
            await self._controller.leave.remote(self._id)
            raise
        await self._report()

    async def _beat(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._config.experts.heartbeat_interval_s)
            self._news.clear()
            await self._report()

    async def _watch_node(self) -> None:
        """Leaves, and has Serve replace every replica of this node, once it is about to be taken away."""
        url = self._config.experts.spot_notice_url
        if url is None:
            return
        async with InstanceMetadata(url) as metadata:
            notice = None
            while notice is None:
                await asyncio.sleep(_NOTICE_S)
                try:
                    notice = await metadata.notice()
                except (httpx.HTTPError, ValueError) as error:
                    log.warning("no word about this node's future: %r", error)
        log.warning("this node gets %s at %s: its replicas go elsewhere", notice.action, notice.at)
        try:
            await self._controller.leaving.remote(self._id)
            drain_node(self._node, notice.at)
        except Exception:  # then it goes without a handover, like one that dies
            log.exception("node %s can't be drained", self._node)

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

    def _open(self, lease: Lease) -> Shard:
        """A shard with room for the lease and no expert yet."""
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
        secret, tls = mesh_secret(self._config), mesh_tls(self._config)
        return Shard(settings, secret, np.full_like(lease.slots, -1), self._id, tls=tls)

    async def _report(self) -> None:
        shard = self._shard
        target, held, stats = None, None, {}
        if shard is not None:
            held = shard.slots
            if (held >= 0).any():
                target = Target(self._id, self._node, tuple(shard.addresses))
            read = {"bytes_read": shard.bytes_read, "bytes_fetched": shard.bytes_fetched}
            stats = {**asdict(shard.stats), **read, "load_s": shard.load_s}
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
            self._lease = await self._join(self._lease.index)  # what is new in it comes as an order
            if self._ending:  # the controller that was told so is gone
                await self._controller.leaving.remote(self._id)
        elif shard is not None and orders.epoch >= self._epoch:  # lower: a controller that has been deposed
            self._epoch = shard.server.epoch = orders.epoch
            if orders.released:
                self._released.set()
            if orders.slots is not None and (self._loading is None or self._loading.done()):
                self._loading = asyncio.get_running_loop().create_task(self._obey(shard, orders.slots))

    async def _obey(self, shard: Shard, slots: IntArray) -> None:
        """Loads what was ordered and says so; a failure is told once for the same orders."""
        if self._failed is not None and np.array_equal(self._failed[0], slots):
            return
        loop = asyncio.get_running_loop()

        def progress() -> None:
            loop.call_soon_threadsafe(self._news.set)

        try:
            await asyncio.to_thread(shard.load, slots, progress)
            self._failed = None
        except Exception as error:  # the shard serves on with what it has; the controller plans without this
            log.exception("shard %s could not load what it was ordered to", self._id)
            self._failed = (slots, f"{type(error).__name__}: {error}")
        self._news.set()

    def _publish(self) -> None:
        if self._shard is not None:
            self._metrics.publish(self._shard)

    def check_health(self) -> None:
        """Raises if the shard can't serve any more, so that Serve replaces it."""
        if self._beating.done():
            self._beating.result()
        if self._shard is not None and not self._shard.server.alive:
            raise RuntimeError(f"data plane of shard {self._id} ended: {self._shard.server.failure!r}")
        if (
            self._shard is not None
            and self._shard.stats.stuck_s > _STUCK_DEADLINES * self._config.routing.frame_deadline_ms / 1000
        ):
            raise RuntimeError(f"a batch on shard {self._id} has taken {self._shard.stats.stuck_s:.0f} s")

    async def _leave(self) -> None:
        """Serves on until others have its experts, in bounded time, and ends."""
        heard = False
        try:
            await asyncio.wait_for(self._controller.leaving.remote(self._id), _ANSWER_S)
            heard = True
            self._news.set()
            await asyncio.wait_for(self._released.wait(), self._config.experts.handover_timeout_s)
        except Exception as error:  # away, or nobody has room: what others can't take over is gone for now
            log.warning("shard %s ends without a handover: %r", self._id, error)
        self._close()
        if heard:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._controller.leave.remote(self._id), _ANSWER_S)

    def _close(self) -> None:
        self._beating.cancel()
        self._watching.cancel()
        self._publishing.cancel()
        if (shard := self._shard) is not None:
            self._shard = None
            shard.stop()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """Serve calls it when the replica is told to stop, and awaits what it returns."""
        if getattr(self, "_shard", None) is None or self._ending:
            return None
        self._ending = True
        return self._leave()
