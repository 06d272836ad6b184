"""From a config to a Ray Serve application: the one place that turns sections into deployment options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from expertmesh.deployments.requests.settings import router_options
from expertmesh.deployments.runtime import mesh_tls
from expertmesh.errors import CheckpointError, ConfigError
from expertmesh.kv_store.configured import check_store
from expertmesh.platform.access.file import read_keys
from expertmesh.platform.checkpoints import check_checkpoint, expert_layout
from expertmesh.platform.checkpoints.source import model_folder
from expertmesh.platform.config import MeshConfig, load_config

APP_NAME = "expertmesh"

_HEALTH_CHECK_S = 1.0
_ENDING_S = 10.0
"""What a shard gets to end after its handover."""
_MOST_REPLICAS = 4096
_PLENTY = 100_000
"""Long polls and heartbeats are cheap; the controller's replica must never turn one away."""
_SMALL_CPUS = 0.1
"""Ray CPUs of the ingress and of the controller."""
_REFUSING_FACTOR = 2
"""HTTP requests that an ingress replica takes, as a multiple of those that it works on; it answers the rest itself."""


def build_app(arguments: Mapping[str, Any] | MeshConfig | None = None) -> Application:
    """The application of a config; for Python, and for `serve run expertmesh.deployments:build_app config=mesh.yaml`.

    arguments: a MeshConfig, or Serve's builder arguments: `config` (a YAML file or a model, as for `load_config`) or
    `mesh` (the config itself as a mapping). Raises ConfigError, or CheckpointError naming file and tensor, before
    anything starts.
    """
    config = arguments if isinstance(arguments, MeshConfig) else _config_of(arguments or {})
    check_model(config)
    check_store(config)
    if config.ingress.keys_file is not None:
        read_keys(config.ingress.keys_file)
    mesh_tls(config)
    # Imported here: classes of replicas need torch and vLLM, the CLI's other commands don't.
    from expertmesh.deployments.attention.deployment import AttentionReplica
    from expertmesh.deployments.controller.controller import Controller
    from expertmesh.deployments.ingress.deployment import Ingress

    controller = serve.deployment(
        name="controller",
        num_replicas=1,
        max_ongoing_requests=_PLENTY,
        ray_actor_options={"num_cpus": _SMALL_CPUS},
        logging_config=_logging(config),
    )(Controller).bind(config)
    attention = serve.deployment(name="attention", **_attention_options(config))(AttentionReplica).bind(
        config, controller
    )
    arguments_of_ingress: list[Any] = [config, attention, controller]
    if config.experts.mode == "mesh":
        arguments_of_ingress.append(_experts(config, controller))
    return serve.deployment(
        name="ingress",
        num_replicas=config.ingress.replicas,
        max_ongoing_requests=_REFUSING_FACTOR * config.ingress.max_ongoing_requests,
        max_queued_requests=config.ingress.max_ongoing_requests,
        backpressure_config={"status_code": 429, "retry_after_s": 1.0},
        health_check_period_s=_HEALTH_CHECK_S,
        ray_actor_options={"num_cpus": _SMALL_CPUS, "runtime_env": {"env_vars": _environment(config, 1)}},
        logging_config=_logging(config, access_log=config.telemetry.access_log),
    )(Ingress).bind(*arguments_of_ingress)


def check_model(config: MeshConfig) -> None:
    """Refuses a broken checkpoint, or one without routed experts for a mesh: CheckpointError, ConfigError."""
    layout = expert_layout(check_checkpoint(model_folder(config.model)))
    if config.experts.mode == "colocated":
        return
    if not layout.layers:
        raise ConfigError(
            f"experts.mode: 'mesh' needs a model with routed experts; {config.model.source} is dense: use 'colocated'"
        )
    scaling = config.autoscaling.experts
    if scaling is not None and scaling.min_shards < config.experts.redundancy:
        raise ConfigError(
            f"autoscaling.experts.min_shards: {scaling.min_shards} is less than experts.redundancy "
            f"({config.experts.redundancy})"
        )
    name, shards = "experts.shards", config.experts.shards
    if scaling is not None and scaling.max_shards > shards:
        name, shards = "autoscaling.experts.max_shards", scaling.max_shards
    if shards > layout.num_experts * config.experts.redundancy:
        raise CheckpointError(
            f"{name}: {shards} is more than the {layout.num_experts} experts of the model "
            f"times experts.redundancy ({config.experts.redundancy}): some shard would hold nothing"
        )


def required_cpus(config: MeshConfig) -> float:
    """Ray CPUs that the application reserves in all."""
    attention, experts = config.attention, config.experts
    scaling = config.autoscaling.attention
    replicas = scaling.max_replicas if scaling is not None else attention.replicas
    growing = config.autoscaling.experts
    most = experts.shards if growing is None else max(experts.shards, growing.max_shards)
    shards = most if experts.mode == "mesh" else 0
    return replicas * attention.cpus + shards * experts.cpus + (1 + config.ingress.replicas) * _SMALL_CPUS


def _config_of(arguments: Mapping[str, Any]) -> MeshConfig:
    unknown = set(arguments) - {"config", "mesh"}
    if unknown or len(arguments) > 1:
        raise ConfigError(f"builder arguments {sorted(arguments)}; allowed: one of config, mesh")
    return load_config(arguments.get("mesh", arguments.get("config")))


def _experts(config: MeshConfig, controller: Application) -> Application:
    from expertmesh.deployments.experts.deployment import ExpertShard

    experts = config.experts
    return serve.deployment(
        name="experts",
        **_scaled("experts", experts.shards),
        logging_config=_logging(config),
        health_check_period_s=_HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=experts.handover_timeout_s + _ENDING_S,
        ray_actor_options={
            "num_cpus": experts.cpus,
            "num_gpus": experts.gpus,
            "resources": dict(experts.resources),
            "runtime_env": {"env_vars": _environment(config, experts.threads)},
        },
    )(ExpertShard).bind(config, controller)


def _attention_options(config: MeshConfig) -> dict[str, Any]:
    attention, scaling = config.attention, config.autoscaling.attention
    configured = attention.replicas if scaling is None else scaling.min_replicas
    options: dict[str, Any] = {
        **router_options(config),
        "max_ongoing_requests": attention.max_num_seqs + attention.max_waiting_requests,
        "graceful_shutdown_timeout_s": attention.drain_timeout_s,
        "logging_config": _logging(config),
        "health_check_period_s": _HEALTH_CHECK_S,
        "ray_actor_options": {
            "num_cpus": attention.cpus,
            "num_gpus": attention.gpus,
            "resources": dict(attention.resources),
            "runtime_env": {"env_vars": _environment(config, attention.threads)},
        },
    }
    return {**options, **_scaled("attention", configured)}


def _scaled(deployment: str, configured: int) -> dict[str, Any]:
    """Options of a deployment whose replicas may be changed while it serves."""
    return {
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": _MOST_REPLICAS,
            "initial_replicas": configured,
            "upscale_delay_s": 0.0,  # whoever sets the number has waited
            "downscale_delay_s": 0.0,
            "policy": {
                "policy_function": "expertmesh.deployments.controller.policy:TargetPolicy",
                "policy_kwargs": {"deployment": deployment, "configured": configured},
            },
        }
    }


def _logging(config: MeshConfig, access_log: bool = False) -> LoggingConfig:
    telemetry = config.telemetry
    return LoggingConfig(
        log_level=telemetry.log_level.upper(), encoding=telemetry.log_format.upper(), enable_access_log=access_log
    )


def _environment(config: MeshConfig, threads: int) -> dict[str, str]:
    """What vLLM and OpenMP read when a replica's process starts."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # `auto` would bind every engine of a machine to the same cores
        "VLLM_LOGGING_LEVEL": config.telemetry.log_level.upper(),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "HF_HUB_OFFLINE": "1",  # checkpoints are folders; nothing is ever fetched by name
        "TOKENIZERS_PARALLELISM": "false",
    }
