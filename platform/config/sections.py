"""The sections of the configuration. Every default is here and only here, on the field that it belongs to."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator

from expertmesh.platform.config.engine_args import OWNED, allowed_engine_argument
from expertmesh.platform.config.fields import (
    Count,
    Fraction,
    Gibibytes,
    LocalPath,
    Mebibytes,
    Milliseconds,
    NonNegative,
    Quantity,
    Rows,
    Seconds,
    Section,
    Text,
    Tokens,
    loading,
    problem,
    unit,
)

DEMO = "demo"
"""The model name that stands for the small checkpoint that ExpertMesh builds itself; never a folder's name."""

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")


def _host(value: str) -> str:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        if not _HOST_NAME.fullmatch(value):
            raise problem(f"{value!r} is not an IP address or host name (without a port)") from None
    return value


def _resource_name(key: str) -> str:
    if key in ("CPU", "GPU"):
        raise problem(f"Ray counts this apart from other resources; use {key.lower()}s beside resources")
    if not key:
        raise problem("a resource needs a name")
    return key


Host = Annotated[str, AfterValidator(_host)]
Resources = dict[Annotated[str, AfterValidator(_resource_name)], Quantity]


class ModelConfig(Section):
    """The model that is served. The YAML shorthand `model: X` means `model: {source: X}`."""

    source: Text = Field(
        default=DEMO,
        description="Checkpoint folder (config.json, tokenizer and safetensors), or `demo`: a small model that is "
        "built on first use. A folder that is itself called demo is written `./demo`.",
    )
    served_name: Text | None = Field(
        default=None, description="Model name in the OpenAI API; null takes the last part of `source`."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Type of weights and activations; auto is vLLM's choice (a float32 checkpoint runs in bfloat16), "
        "and float32 for the demo, whose router logits nearly tie.",
    )
    max_model_len: Tokens | None = Field(
        default=None, description="Longest prompt and answer together; null takes what the model allows."
    )
    cache_dir: LocalPath | None = Field(
        default=None,
        description="Folder for files that ExpertMesh makes; null takes $EXPERTMESH_CACHE, else ~/.cache/expertmesh.",
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str | Path) else value

    @field_validator("source", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        # A Path is always a folder, never the name `demo`.
        return str(value.absolute()) if isinstance(value, Path) else value

    @field_validator("source", mode="after")
    @classmethod
    def _existing_folder(cls, value: str, info: ValidationInfo) -> str:
        where = loading(info)
        if value == DEMO or where is None:
            return value
        try:
            path = where.absolute(value)
        except RuntimeError as error:
            raise problem(f"{value!r} can't be expanded: {error}") from None
        if not path.is_dir():
            wrong = "is a file" if path.exists() else "does not exist"
            raise problem(f"{str(path)!r} {wrong}; allowed: {DEMO!r} or an existing checkpoint folder")
        return str(path)

    @property
    def name(self) -> str:
        """The model's name in the OpenAI API."""
        return self.served_name or Path(self.source).name or self.source

    @property
    def engine_dtype(self) -> str:
        """`dtype` as vLLM gets it, the same for attention replicas, shards and ingress."""
        return "float32" if self.dtype == "auto" and self.source == DEMO else self.dtype

    @property
    def resolved_cache_dir(self) -> Path:
        """`cache_dir`, else $EXPERTMESH_CACHE, else ~/.cache/expertmesh, of the process that asks. Need not exist."""
        if self.cache_dir is not None:
            return self.cache_dir
        return Path(os.environ.get("EXPERTMESH_CACHE") or "~/.cache/expertmesh").expanduser().absolute()


class AttentionConfig(Section):
    """The attention deployment: vLLM engines with everything of the model but its routed experts."""

    replicas: Count = Field(
        default=1,
        description="Attention replicas; with `autoscaling.attention` the range there takes its place.",
        json_schema_extra=unit("replicas"),
    )
    threads: Count = Field(
        default=1, description="CPU threads that each engine computes with.", json_schema_extra=unit("threads")
    )
    cpus: Quantity = Field(
        default=0.5, description="Ray CPUs that each replica reserves.", json_schema_extra=unit("CPUs")
    )
    gpus: Quantity = Field(
        default=0.0, description="Ray GPUs that each replica reserves.", json_schema_extra=unit("GPUs")
    )
    resources: Resources = Field(
        default_factory=dict, description="More Ray resources that each replica reserves, by name."
    )
    kv_cache_gib: Gibibytes | None = Field(
        default=None,
        description="Memory for the KV cache of each replica; null takes 1 GiB on CPU, what is left on a GPU.",
    )
    max_num_seqs: Count = Field(
        default=64, description="Sequences that one engine step computes at most.", json_schema_extra=unit("sequences")
    )
    max_num_batched_tokens: Tokens | None = Field(
        default=None, description="Tokens that one engine step computes at most; null takes vLLM's default."
    )
    prefix_caching: bool = Field(default=True, description="Reuse the KV cache of equal prompt beginnings.")
    compile: bool = Field(default=False, description="torch.compile and graphs; false runs eagerly.")
    engine_args: dict[Annotated[str, AfterValidator(allowed_engine_argument)], JsonValue] = Field(
        default_factory=dict,
        description="More vLLM engine arguments by their Python names. Those that the mesh sets itself are refused.",
        json_schema_extra={"propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$", "not": {"enum": list(OWNED)}}},
    )
    start_timeout_s: Seconds = Field(default=600.0, description="How long a replica may take to start.")
    inactivity_timeout_s: Seconds = Field(
        default=120.0, description="A stream without a token for this long is taken for dead."
    )

    @field_validator("max_num_batched_tokens")
    @classmethod
    def _a_token_for_each_sequence(cls, value: int | None, info: ValidationInfo) -> int | None:
        sequences = info.data.get("max_num_seqs")  # absent if it was refused itself
        if value is not None and sequences is not None and value < sequences:
            raise problem(f"{value} is less than attention.max_num_seqs ({sequences}); vLLM needs at least as many")
        return value


class ExpertsConfig(Section):
    """The expert deployment. With `mode: colocated` only `mode` is used."""

    mode: Literal["mesh", "colocated"] = Field(
        default="mesh",
        description="mesh: experts run in shards of their own; "
        "colocated: inside the attention replicas (dense models too).",
    )
    shards: Count = Field(
        default=2, description="Expert shards (replicas of the expert deployment).", json_schema_extra=unit("shards")
    )
    redundancy: Count = Field(
        default=1,
        description="Least number of shards that hold each expert; at most `experts.shards`.",
        json_schema_extra=unit("shards"),
    )
    spare_slots: NonNegative = Field(
        default=0,
        description="Experts that each shard holds in each layer beyond what redundancy needs: copies of hot ones.",
        json_schema_extra=unit("slots"),
    )
    threads: Count = Field(
        default=1, description="CPU threads that each shard computes with.", json_schema_extra=unit("threads")
    )
    cpus: Quantity = Field(
        default=0.5, description="Ray CPUs that each shard reserves.", json_schema_extra=unit("CPUs")
    )
    gpus: Quantity = Field(
        default=0.0, description="Ray GPUs that each shard reserves.", json_schema_extra=unit("GPUs")
    )
    resources: Resources = Field(
        default_factory=dict, description="More Ray resources that each shard reserves, by name."
    )
    max_batch_rows: Rows = Field(default=8192, description="Token rows that one shard computes at once.")
    heartbeat_interval_s: Seconds = Field(default=1.0, description="Time between two heartbeats of a shard.")
    heartbeat_timeout_s: Seconds = Field(
        default=5.0,
        description="A shard without a heartbeat for this long is taken for dead; "
        "more than `experts.heartbeat_interval_s`.",
    )
    start_timeout_s: Seconds = Field(default=600.0, description="How long a shard may take to start.")

    @field_validator("redundancy")
    @classmethod
    def _enough_shards(cls, value: int, info: ValidationInfo) -> int:
        shards = info.data.get("shards")
        if _used(info) and shards is not None and value > shards:
            raise problem(f"{value} copies of each expert need as many shards; experts.shards is {shards}")
        return value

    @field_validator("heartbeat_timeout_s")
    @classmethod
    def _longer_than_interval(cls, value: float, info: ValidationInfo) -> float:
        interval = info.data.get("heartbeat_interval_s")
        if _used(info) and interval is not None and value <= interval:
            raise problem(f"{value:g} must be more than experts.heartbeat_interval_s ({interval:g})")
        return value


def _used(info: ValidationInfo) -> bool:
    """Whether the experts section's fields mean anything; if not, how they fit together doesn't matter."""
    return info.data.get("mode") != "colocated"


class RebalanceConfig(Section):
    """Re-placement of experts while the mesh serves."""

    enabled: bool = Field(
        default=True,
        description="Move experts as traffic moves. Each shard keeps one more slot a layer free for it, to load into.",
    )
    interval_s: Seconds = Field(default=10.0, description="Time between two looks at the loads.")
    half_life_s: Seconds = Field(default=30.0, description="Loads this old count half.")
    moves: Count = Field(
        default=32,
        description="Slots that are changed at once at most, over all layers.",
        json_schema_extra=unit("slots"),
    )
    horizon_s: Seconds = Field(
        default=300.0, description="How long loads are expected to last: a move must win more time in it than it costs."
    )
    least_gain: Fraction = Field(
        default=0.02,
        description="Part of a layer's mean busy time by which each move must lower that of its busiest shard.",
    )


class RoutingConfig(Section):
    """How tokens reach the expert shards."""

    policy: Literal["live_cost", "least_loaded"] = Field(
        default="live_cost",
        description="How tokens are shared out among the copies of an expert. live_cost: by the measured speed "
        "and queue of each shard; least_loaded: by what this step gives each, all taken as equally fast.",
    )
    transport: Literal["auto", "unix", "tcp"] = Field(
        default="auto", description="auto: unix sockets on the same node and TCP between nodes."
    )
    bind_host: Host = Field(
        default="127.0.0.1",
        description="Address that shards listen on for TCP; auto is the node's address as Ray knows it.",
    )
    secret_file: LocalPath | None = Field(
        default=None,
        description="File with the cluster's secret, at least 16 bytes, closed to other users; "
        "null takes $EXPERTMESH_SECRET, else a secret that is made for this machine.",
    )
    max_frame_rows: Rows = Field(default=65536, description="Token rows that one frame holds at most.")
    max_frame_mib: Mebibytes = Field(default=512, description="Size of one frame at most.")
    frame_deadline_ms: Milliseconds = Field(
        default=10000.0,
        description="A shard that has not answered by then is given up, and the frame goes to another copy.",
    )
    connect_timeout_s: Seconds = Field(default=5.0, description="How long connecting to a shard may take.")
    unavailable_timeout_s: Seconds = Field(
        default=60.0, description="How long a step waits for a missing expert to be placed."
    )
    rebalance: RebalanceConfig = Field(
        default_factory=RebalanceConfig, description="Whether and how experts move between shards as traffic moves."
    )


def _yaml_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false


class KVStoreConfig(Section):
    """The tier of KV blocks that attention replicas share. Not there yet."""

    url: Annotated[Literal["off"], BeforeValidator(_yaml_off)] = Field(
        default="off",
        description="Only off so far: this version has no KV store, and each replica keeps its KV cache to itself.",
    )


class AttentionAutoscaling(Section):
    """Bounds for Ray Serve's own autoscaler, which follows the number of ongoing requests."""

    min_replicas: Count = Field(description="Fewest attention replicas.", json_schema_extra=unit("replicas"))
    max_replicas: Count = Field(
        description="Most attention replicas; at least `autoscaling.attention.min_replicas`.",
        json_schema_extra=unit("replicas"),
    )
    target_ongoing_requests: float = Field(
        default=8.0,
        gt=0,
        description="Ongoing requests per replica that the autoscaler aims at.",
        json_schema_extra=unit("requests"),
    )

    @field_validator("max_replicas")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("min_replicas")
        if least is not None and value < least:
            raise problem(f"{value} is below autoscaling.attention.min_replicas ({least})")
        return value


class AutoscalingConfig(Section):
    """Which deployments follow the load. Expert shards are not autoscaled yet."""

    attention: AttentionAutoscaling | None = Field(
        default=None, description="Autoscaling of the attention replicas; null keeps `attention.replicas`."
    )


class IngressConfig(Section):
    """The HTTP front with the OpenAI API."""

    host: Host = Field(default="127.0.0.1", description="Address that the HTTP server listens on.")
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port of the HTTP server.")
    replicas: Count = Field(default=1, description="Ingress replicas.", json_schema_extra=unit("replicas"))
    max_ongoing_requests: int = Field(
        default=256,
        ge=1,
        description="Requests that one ingress replica works on at once.",
        json_schema_extra=unit("requests"),
    )


class TelemetryConfig(Section):
    """Logs and load statistics."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="warning", description="Least severity that vLLM and ExpertMesh log."
    )
    access_log: bool = Field(default=False, description="Log a line for each HTTP request.")
    loads_interval_s: Seconds = Field(default=0.5, description="How often the experts' loads are read.")
