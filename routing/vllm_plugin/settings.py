"""What an engine is told about the mesh: JSON in vLLM's `additional_config`, which reaches every worker process."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self

from expertmesh.errors import ConfigError

CONFIG_KEY = "expertmesh"
LOAD_FORMAT = "expertmesh"
CPU_EXECUTOR = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""`distributed_executor_backend` of an engine on CPU: the model runs in the engine core's own process.

By its short name vLLM would replace it by a process a worker, in which it can set OpenMP's environment, and spin on a
core while it waits for that process: the core that the shards need. Our engines have that environment from the start.
"""

CPU_WORKER = "expertmesh.routing.vllm_plugin.worker.MeshCPUWorker"
"""`worker_cls` of an engine on CPU."""
SCHEDULER = "expertmesh.routing.vllm_plugin.scheduler.MeshScheduler"
"""`scheduler_cls` of an engine whose experts are elsewhere."""
TRACEPARENT = "traceparent"
"""The one of an engine request's trace headers that names its span (W3C Trace Context)."""
UNAVAILABLE = "experts unavailable: "
"""What the `stop_reason` of a request begins with that ended because no shard had its experts; then why, for people."""


class Role(StrEnum):
    """Which part of the model a process holds."""

    ATTENTION = "attention"
    """Everything but the routed experts."""
    SHARD = "shard"
    """Routed experts only, on the real device while the rest of the model is on the meta device."""


@dataclass(frozen=True, slots=True)
class MeshSettings:
    """Settings of one engine process. Everything in it is JSON; the secret is named, never contained."""

    role: Role
    mailbox: str = ""
    """Folder shared with the attention replica (routing.dispatch.Mailbox)."""
    secret_file: str = ""
    """File with the cluster secret; must be readable by the engine's processes."""
    layers: tuple[int, ...] = ()
    """The model's layers with routed experts; of a shard: those that are really built."""
    num_experts: int = 0
    """Routed experts a layer."""
    dispatch_sample: float | None = None
    """Part of the dispatches of traced requests to sample; None: requests are not traced."""
    dispatch: dict[str, Any] = field(default_factory=dict)
    """DispatchSettings as JSON, see `DispatchSettings.of_json`. Files are named, never contained."""

    def to_additional_config(self) -> dict[str, Any]:
        """For `AsyncEngineArgs(additional_config=...)`."""
        return {CONFIG_KEY: asdict(self)}

    @classmethod
    def of(cls, additional_config: Any) -> Self | None:
        """The settings in an engine's additional_config; None if the engine is not part of a mesh."""
        if not isinstance(additional_config, dict) or CONFIG_KEY not in additional_config:
            return None
        values = dict(additional_config[CONFIG_KEY])
        try:
            values["role"] = Role(values["role"])
            values["layers"] = tuple(values.get("layers", ()))
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"additional_config.{CONFIG_KEY}: {error}") from error
