"""The attention deployment: one engine a replica, told by the controller where the experts are."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from typing import Any, NoReturn

from ray import serve
from ray.serve.handle import DeploymentHandle
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.exceptions import EngineDeadError

from expertmesh.deployments.attention.engine import Engine, engine_arguments
from expertmesh.deployments.attention.settings import dispatch_settings
from expertmesh.deployments.messages import AttentionReport
from expertmesh.deployments.requests.feed import KVEventFeed
from expertmesh.deployments.requests.settings import metadata_of, routes_by_prefix
from expertmesh.deployments.runtime import mesh_secret, mesh_tls, node_id, prepare_replica, secret_path
from expertmesh.deployments.source import Source, addresses_for
from expertmesh.deployments.telemetry.attention import AttentionMetrics
from expertmesh.deployments.telemetry.recorder import publish_forever, recorder_for
from expertmesh.deployments.tokens.link import LinkLost
from expertmesh.deployments.tokens.outbox import Outboxes
from expertmesh.deployments.tracing.replica import ReplicaTracing
from expertmesh.errors import Unavailable
from expertmesh.kv_store.configured import REPORT_NAME as KV_STORE_REPORT
from expertmesh.kv_store.configured import tier_arguments
from expertmesh.platform.checkpoints import checkpoint_revision, expert_layout, open_checkpoint
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig
from expertmesh.platform.logs import vllm_logging
from expertmesh.platform.metrics.catalogue import DISPATCH, ENGINES, KV_STORE
from expertmesh.routing.dispatch import LoadCounters, Mailbox
from expertmesh.routing.placement import RoutingTable
from expertmesh.routing.vllm_plugin import MeshSettings, Role
from expertmesh.routing.vllm_plugin.loader import REPORT_NAME
from expertmesh.routing.vllm_plugin.orphan import OWNER_VARIABLE

log = logging.getLogger("expertmesh.attention")

_WATCH_S = 10.0
_RETRY_S = 1.0


class AttentionReplica:
    """Runs the engine, keeps its routing table fresh, reports its loads."""

    async def __init__(self, config: MeshConfig, controller: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        """Returns when the engine serves. A compiled engine runs the model first: it waits for experts."""
        origin = prepare_replica(config)
        self._config = config
        self._controller = controller
        self._node = node_id()
        self._id = serve.get_replica_context().replica_id.unique_id
        self._engine: Engine | None = None
        self._epoch = 0
        self._mailbox = Mailbox.create()
        self._loads: LoadCounters | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._tracing = ReplicaTracing.of(config, origin, self._mailbox)
        tls = mesh_tls(config)  # refuses what the engine's dispatcher would fail with
        self._outboxes = Outboxes(self._node, mesh_secret(config), config.routing.connect_timeout_s, tls)
        self._feed = KVEventFeed(self._mailbox.folder) if routes_by_prefix(config) else None
        self._metrics = AttentionMetrics(recorder_for(config, ENGINES, DISPATCH, KV_STORE), self._id)
        # For the engine's processes: whom to follow into death, and where their sockets are swept up.
        os.environ[OWNER_VARIABLE] = str(os.getpid())
        os.environ["VLLM_RPC_BASE_PATH"] = str(self._mailbox.folder)
        if config.telemetry.log_format == "json":
            logs = self._mailbox.folder / "logging.json"
            logs.write_text(json.dumps(vllm_logging(config.telemetry.log_level, origin)))
            os.environ["VLLM_LOGGING_CONFIG_PATH"] = str(logs)
        # An engine that holds the experts itself loads by vLLM's own loader (or its hardware plugin's), from files.
        colocated = config.experts.mode == "colocated"
        folder = await asyncio.to_thread(model_folder, config.model, whole=colocated)
        mesh = None
        loop = asyncio.get_running_loop()
        if config.experts.mode == "mesh":
            checkpoint = open_checkpoint(folder)
            layout = expert_layout(checkpoint)
            self._loads = LoadCounters(self._mailbox.loads_path, len(layout.layers), layout.num_experts)
            secret = str(secret_path(config, self._mailbox.folder))
            dispatch = dispatch_settings(config, self._node, checkpoint_revision(checkpoint))
            mesh = MeshSettings(
                Role.ATTENTION,
                str(self._mailbox.folder),
                secret,
                layout.layers,
                layout.num_experts,
                self._tracing.dispatch_sample,
                dispatch,
            )
            self._tasks.append(loop.create_task(self._follow_placement()))
        self._tasks.append(loop.create_task(self._report_forever()))
        self._tasks.append(loop.create_task(publish_forever(self._publish)))
        try:
            arguments = engine_arguments(config, folder, mesh)
            if self._feed is not None:
                arguments.update(self._feed.engine_arguments)
            if config.kv_store.url != "off":
                weights = checkpoint_revision(open_checkpoint(folder))
                arguments.update(tier_arguments(config, mesh_secret(config), weights, self._mailbox.folder))
            inactivity_s = config.attention.inactivity_timeout_s
            self._engine = await asyncio.to_thread(Engine, arguments, inactivity_s, self._metrics.take)
            if self._feed is not None:
                block_tokens = self._engine.config.cache_config.block_size
                addresses = addresses_for(config, f"kv-events-{self._id}")
                self._feed.serve(self._id, mesh_secret(config), addresses, block_tokens, tls)
        except BaseException:
            self._close()
            raise
        await self._report()

    async def generate(self, request: EngineCoreRequest, inbox: Source) -> None:
        """Sends the engine's outputs for one request (Engine.run) to an ingress; returns when all are sent.

        A caller that cancels it aborts the request, and so does a connection that is gone (LinkLost). If the engine is
        gone or hangs, so is this process.
        """
        assert self._engine is not None, "Serve sends requests only when __init__ is done"
        try:
            outbox = await self._outboxes.to(inbox)
            with self._tracing.request(request) as trace:

                def take(outputs: list[EngineCoreOutput]) -> None:
                    trace.got(outputs)
                    outbox.put(request.request_id, outputs)

                await self._engine.run(request, take)
            outbox.end(request.request_id)
        except LinkLost:
            raise
        except (EngineDeadError, Unavailable) as error:
            self._die(error)

    def record_replica_metadata(self) -> dict[str, Any]:
        """Tells Serve's routers where this replica's KV events are to be had."""
        return {} if self._feed is None else metadata_of(Source(self._node, self._feed.addresses))

    def check_health(self) -> None:
        """Raises if a task of the replica failed, so that Serve replaces it. Ends this process with its engine."""
        for task in self._tasks:
            if task.done():
                task.result()
        if self._engine is not None:
            try:
                self._engine.check()
            except Unavailable as error:
                self._die(error)

    def _die(self, reason: Exception) -> NoReturn:
        """Ends the process. Serve's routers leave a dead process out at once, one that only refuses requests later."""
        log.error("replica %s ends: %s", self._id, reason)
        if self._engine is not None:
            self._engine.kill()
        self._mailbox.close()
        os._exit(1)

    async def _follow_placement(self) -> None:
        while True:
            try:
                text: str | None = await self._controller.watch.remote(self._epoch, _WATCH_S)
            except Exception as error:  # the controller is away: the last placement stays in force
                log.warning("replica %s can't reach the controller: %r", self._id, error)
                await asyncio.sleep(_RETRY_S)
                continue
            if text is not None:
                table = RoutingTable.from_json(text)
                self._mailbox.publish(table)
                self._epoch = table.epoch
                await self._report()  # a drain waits for it

    async def _report_forever(self) -> None:
        while True:
            await self._report()
            await asyncio.sleep(self._config.telemetry.loads_interval_s)

    async def _report(self) -> None:
        stats: dict[str, Any] = {}
        if self._loads is not None:
            stats = {"dispatch": self._loads.as_dict(), "down": self._mailbox.trouble()}
            loaded = self._mailbox.folder / REPORT_NAME
            if loaded.exists():
                stats["loaded"] = json.loads(loaded.read_text())
        if self._engine is not None:
            stats["load"] = self._engine.load
            stats["served"] = self._engine.tally.as_dict()
        if (stored := self._kv_store_report()) is not None:
            stats["kv_store"] = stored
        report = AttentionReport(
            replica=self._id,
            node=self._node,
            ready=self._engine is not None,
            epoch=self._epoch,
            running=self._engine.running if self._engine is not None else 0,
            loads=self._loads.tokens.copy() if self._loads is not None else None,
            stats=stats,
        )
        try:
            await asyncio.wait_for(self._controller.report.remote(report), self._config.experts.heartbeat_timeout_s)
        except Exception as error:  # reports are for people; serving goes on without them
            log.warning("replica %s can't reach the controller: %r", self._id, error)

    def _kv_store_report(self) -> dict[str, Any] | None:
        """What the engine's tier wrote last; None before the first time, and without a store."""
        try:
            report: dict[str, Any] = json.loads((self._mailbox.folder / KV_STORE_REPORT).read_text())
        except FileNotFoundError:
            return None
        return report

    def _publish(self) -> None:
        """Tells the metrics what the engine and its process count."""
        if self._engine is not None:
            self._metrics.engine(self._engine.running, self._engine.load)
        if self._loads is not None:
            self._metrics.dispatch(self._loads.as_dict(), int(self._loads.tokens.sum()), self._epoch)
        self._metrics.kv_store(self._kv_store_report() or {"counts": {}, "servers": []})

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._outboxes.close()
        if self._feed is not None:
            self._feed.close()
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None
        self._tracing.close()
        self._mailbox.close()

    def __del__(self) -> None:
        if hasattr(self, "_tasks"):
            self._close()
