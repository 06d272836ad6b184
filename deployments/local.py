"""A mesh on this machine, or on a running Ray cluster, from start to clean end."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray import serve
from ray._private import ray_constants
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus, LoggingConfig

from expertmesh.deployments import haproxy
from expertmesh.deployments.builder import APP_NAME, build_app, required_cpus
from expertmesh.errors import ConfigError, Unavailable
from expertmesh.kv_store import EmbeddedServer
from expertmesh.kv_store.configured import embedded_link, embedded_password
from expertmesh.platform.config import MeshConfig, cluster_secret
from expertmesh.routing.dispatch import Mailbox

Progress = Callable[[dict[str, str]], None]
"""Gets each deployment's state in a few words, whenever it may have changed."""

_OBJECT_STORE_BYTES = 200 << 20
"""Tokens and heartbeats pass through Ray's object store, weights and hidden states don't."""
_POLL_S = 0.25


class LocalMesh:
    """Deploys a config as a Serve application. Use as a context manager, or `start` and `close`.

    Without `address` it starts a private Ray on this machine, which ends with the mesh and leaves nothing behind.
    """

    def __init__(self, config: MeshConfig, address: str | None = None) -> None:
        self.config = config
        self._address = address
        self._folder: str | None = None
        self._store: EmbeddedServer | None = None

    @property
    def metrics_url(self) -> str | None:
        """Where Prometheus finds the metrics while the mesh runs; None where a Ray cluster's nodes each have theirs."""
        if self._address is not None:
            return None
        (node,) = [node for node in ray.nodes() if node["Alive"]]
        return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    @property
    def url(self) -> str:
        """Where the OpenAI API answers, without `/v1`."""
        host = self.config.ingress.host
        shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.config.ingress.port}"

    def start(self, progress: Progress | None = None) -> Self:
        """Returns when every replica serves.

        Raises ConfigError or CheckpointError before anything starts, Unavailable if a replica can't start (with
        Serve's message) or is not ready in the config's time. Nothing is left running then.
        """
        try:
            self._start_store()
            self._start_ray()
            ingress = self.config.ingress
            serve.start(
                http_options=HTTPOptions(host=ingress.host, port=ingress.port),
                logging_config=LoggingConfig(
                    log_level=self.config.telemetry.log_level.upper(),
                    encoding=self.config.telemetry.log_format.upper(),
                    enable_access_log=self.config.telemetry.access_log,
                ),
            )
            target = serve.RunTarget(target=build_app(self.config), name=APP_NAME, route_prefix="/")
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            self._wait(progress)
        except BaseException:
            self.close()
            raise
        return self

    def close(self) -> None:
        """Removes the application, and the private Ray with everything that belongs to it. May be called again."""
        if ray.is_initialized():
            self._close_ray()
        if self._store is not None:
            self._store.close()
            self._store = None

    def _close_ray(self) -> None:
        with contextlib.suppress(Exception):  # whatever state it is in, what follows ends it
            serve.delete(APP_NAME) if self._address else serve.shutdown()
        ray.shutdown()
        Mailbox.sweep()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start_store(self) -> None:
        if self.config.kv_store.url != "embedded":
            return
        if self._address is not None:
            raise ConfigError("kv_store.url: 'embedded' is for a mesh on one machine; a Ray cluster needs a server")
        secret = cluster_secret(self.config, create_in=self.config.model.resolved_cache_dir)
        budget = int(self.config.kv_store.memory_gib * 2**30)
        self._store = EmbeddedServer(budget, embedded_password(secret), embedded_link(self.config))

    def _start_ray(self) -> None:
        options: dict[str, Any] = {"log_to_driver": self.config.telemetry.log_level in ("debug", "info")}
        if self._address is not None:
            ray.init(address=self._address, **options)
            return
        self._folder = tempfile.mkdtemp(prefix="xm-")  # short: Ray puts unix sockets below it
        variables = {}
        if self.config.ingress.proxy == "haproxy":
            variables = haproxy.environment(Path(self._folder) / "haproxy")
        with _on_loopback(), haproxy.set_for_children(variables):
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(required_cpus(self.config))),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _metrics_export_port=self.config.telemetry.metrics_port,
                _temp_dir=self._folder,
                logging_level=logging.WARNING,
                **options,
            )

    def _wait(self, progress: Progress | None) -> None:
        deadline = time.monotonic() + max(self.config.attention.start_timeout_s, self.config.experts.start_timeout_s)
        while True:
            application = serve.status().applications.get(APP_NAME)
            states = {} if application is None else dict(application.deployments)
            if progress is not None:
                progress({name: _in_words(state) for name, state in states.items()})
            status = application.status if application is not None else ApplicationStatus.DEPLOYING
            if status == ApplicationStatus.RUNNING:
                return
            broken = [
                f"{name}: {state.message}"
                for name, state in states.items()
                if state.status == "UNHEALTHY" or state.status == "DEPLOY_FAILED"
            ]
            if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY) or broken:
                message = "; ".join(broken) or (application.message if application is not None else "")
                raise Unavailable(f"the mesh can't start: {message}")
            if time.monotonic() > deadline:
                raise Unavailable(f"the mesh was not ready in time: { {n: _in_words(s) for n, s in states.items()} }")
            time.sleep(_POLL_S)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """A Ray that is started meanwhile listens on 127.0.0.1, metrics included. On Linux it would on every address, and
    whoever reaches its ports may run any code; what keeps it from that on other systems is this switch."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _in_words(state: Any) -> str:
    counts = {str(getattr(name, "value", name)).lower(): n for name, n in state.replica_states.items()}
    running, total = counts.get("running", 0), sum(counts.values())
    return f"{running}/{total} running" if total else "waiting"


def find_cluster() -> str | None:
    """The Ray cluster to use: $RAY_ADDRESS, or None for a private one."""
    return os.environ.get("RAY_ADDRESS") or None
