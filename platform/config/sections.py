"""The sections of the configuration. Every default is here and only here, on the field that it belongs to."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationInfo, field_validator, model_validator

from expertmesh.errors import ConfigError
from expertmesh.platform.config.engine_args import OWNED, allowed_engine_argument
from expertmesh.platform.config.fields import (
    Count,
    Fraction,
    Gibibytes,
    Kibibytes,
    LocalPath,
    Mebibytes,
    Milliseconds,
    NonNegative,
    Quantity,
    Rows,
    Seconds,
    Section,
    Share,
    Text,
    Tokens,
    loading,
    problem,
    unit,
)
from expertmesh.platform.config.problems import show
from expertmesh.platform.weights.s3_location import S3_SCHEME, S3Location

DEMO = "demo"
"""The model name that stands for the small checkpoint that ExpertMesh builds itself; never a folder's name."""

_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?(\.[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?)*\.?")

_ORIGIN = r"https?://[A-Za-z0-9._-]+(:[0-9]{1,5})?"

_COLLECTOR = r"(https?://[A-Za-z0-9._-]+:[0-9]{1,5}(/[A-Za-z0-9._~/-]*)?|grpcs?://[A-Za-z0-9._-]+:[0-9]{1,5})"


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


def _origins(values: list[str]) -> list[str]:
    for value in values:
        if value != "*" and not re.fullmatch(_ORIGIN, value):
            raise problem(f"{show(value)} is not the origin of a web page; allowed: http(s)://host[:port], or *")
    return values


def _endpoint_url(value: str) -> str:
    if not re.fullmatch(_ORIGIN, value):
        raise problem(f"{show(value)} is not the address of a service; allowed: http(s)://host[:port]")
    return value


def _collector(value: str) -> str:
    if not re.fullmatch(_COLLECTOR, value):
        raise problem(
            f"{show(value)} is not the address of an OTLP collector; allowed: http(s)://host:port[/path], "
            "grpc(s)://host:port"
        )
    return value


Host = Annotated[str, AfterValidator(_host)]
Origins = Annotated[
    list[str],
    AfterValidator(_origins),
    Field(json_schema_extra={"items": {"type": "string", "pattern": rf"^(\*|{_ORIGIN})$"}}),
]
EndpointUrl = Annotated[str, AfterValidator(_endpoint_url), Field(json_schema_extra={"pattern": f"^{_ORIGIN}$"})]
CollectorUrl = Annotated[str, AfterValidator(_collector), Field(json_schema_extra={"pattern": f"^{_COLLECTOR}$"})]
Resources = dict[Annotated[str, AfterValidator(_resource_name)], Quantity]


class S3Config(Section):
    """How a model in S3 is reached. Credentials come from where AWS's tools look for them, never from here."""

    endpoint_url: EndpointUrl | None = Field(
        default=None, description="Address of the S3 service; null takes AWS's own (or $AWS_ENDPOINT_URL_S3)."
    )
    region: Text | None = Field(default=None, description="Region; null takes that of the environment or profile.")
    requester_pays: bool = Field(default=False, description="Pay for requests to a bucket whose owner doesn't.")
    connections: Count = Field(
        default=16, description="Reads at once, in each process.", json_schema_extra=unit("connections")
    )
    attempts: Count = Field(
        default=8, description="Failures in a row after which a read is given up.", json_schema_extra=unit("attempts")
    )
    keep_tensors: bool = Field(
        default=True,
        description="Keep what was read in `model.cache_dir` for the next start; false keeps only the small files.",
    )


class ModelConfig(Section):
    """The model that is served. The YAML shorthand `model: X` means `model: {source: X}`."""

    source: Text = Field(
        default=DEMO,
        description="Checkpoint folder (config.json, tokenizer and safetensors), `s3://bucket/prefix` with such files, "
        "or `demo`: a small model that is built on first use. A folder that is itself called demo is written `./demo`.",
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

    s3: S3Config = Field(default_factory=S3Config, description="How a `source` in S3 is reached.")

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
    def _folder_or_url(cls, value: str, info: ValidationInfo) -> str:
        where = loading(info)
        if value.startswith(S3_SCHEME):
            try:
                S3Location.parse(value)
            except ConfigError as error:
                raise problem(str(error)) from None
            return value
        if value == DEMO or where is None:
            return value
        try:
            path = where.absolute(value)
        except RuntimeError as error:
            raise problem(f"{value!r} can't be expanded: {error}") from None
        if not path.is_dir():
            wrong = "is a file" if path.exists() else "does not exist"
            raise problem(f"{str(path)!r} {wrong}; allowed: {DEMO!r}, an existing checkpoint folder, or {S3_SCHEME}...")
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
        default=120.0,
        description="An engine that has requests and gives no token for any of them for this long is taken for dead; "
        "longer than the longest prompt takes, and than `routing.unavailable_timeout_s`.",
    )
    drain_timeout_s: Seconds = Field(
        default=60.0,
        description="How long a replica that is told to stop goes on with its requests; others then take them over.",
    )
    max_waiting_requests: Count = Field(
        default=192,
        description="Requests that wait in one replica at most, beyond the `attention.max_num_seqs` that it computes; "
        "more wait at the ingress.",
        json_schema_extra=unit("requests"),
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
    max_slots: Count | None = Field(
        default=None,
        description="Experts of a layer that a shard takes over at most, with its own, when others die or leave; "
        "null: as many as its memory has room for.",
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
        "more than `experts.heartbeat_interval_s`. 12 times as long while it loads experts, and up to that while the "
        "others' come late, too.",
    )
    spot_notice_url: Annotated[str, Field(pattern=r"^https?://[^/]+$")] | None = Field(
        default=None,
        description="Instance metadata service that each shard asks whether its node is about to be taken away, on EC2 "
        "`http://169.254.169.254`; null asks nobody.",
    )
    handover_timeout_s: Seconds = Field(
        default=60.0, description="How long a shard that is told to stop serves on for others to load its experts."
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


class RequestRoutingConfig(Section):
    """How a request gets its attention replica."""

    policy: Literal["prefix", "load"] = Field(
        default="prefix",
        description="prefix: where the least must wait and the least of the prompt must be computed, by what each "
        "replica says that its KV cache holds; load: Ray Serve's choice, the less loaded of two taken at random.",
    )


class TlsConfig(Section):
    """TLS 1.3 on TCP between attention replicas and shards, and on KV event streams. Both sides show certificates."""

    cert_file: LocalPath = Field(
        description="PEM file with this node's certificate, authorities between it and one of `ca_file` behind it. "
        "This and the other two files are read again when they change."
    )
    key_file: LocalPath = Field(description="PEM file with its private key, closed to other users.")
    ca_file: LocalPath = Field(
        description="PEM file of the authorities whose certificates a peer may have. Whoever has one is a member of "
        "the mesh: let them sign for nobody else. Names in certificates are not compared."
    )
    renew_after_s: Seconds = Field(
        default=3600.0,
        description="Age at which a connection from an attention replica to a shard is opened anew, with the "
        "certificates of the time.",
    )


class RoutingConfig(Section):
    """How tokens reach the expert shards, and requests an attention replica."""

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
        description="Address that shards, replicas and the ingress listen on for TCP; auto is the node's address as "
        "Ray knows it.",
    )
    secret_file: LocalPath | None = Field(
        default=None,
        description="File with the cluster's secret, at least 16 bytes, closed to other users; "
        "null takes $EXPERTMESH_SECRET, else a secret that is made for this machine.",
    )
    tls: TlsConfig | None = Field(
        default=None,
        description="Encryption between nodes. null: TCP is plain. Set: plain TCP is neither made nor accepted.",
    )
    max_frame_rows: Rows = Field(default=65536, description="Token rows that one frame holds at most.")
    max_frame_mib: Mebibytes = Field(default=512, lt=1 << 42, description="Size of one frame at most.")
    frame_deadline_ms: Milliseconds = Field(
        default=10000.0,
        description="A shard that has not answered by then is given up, whether or not there is another copy.",
    )
    hedge_after_ms: Milliseconds = Field(
        default=150.0,
        description="Where other copies could answer, a frame goes to them once it is overdue, and never before this.",
    )
    hedge_service_times: float = Field(
        default=8.0,
        ge=1,
        description="A frame is overdue after so many times what frames of its size took lately.",
        json_schema_extra=unit("times"),
    )
    connect_timeout_s: Seconds = Field(default=5.0, description="How long connecting to a shard may take.")
    unavailable_timeout_s: Seconds = Field(
        default=60.0, description="How long a step waits for a missing expert to be placed."
    )
    requests: RequestRoutingConfig = Field(
        default_factory=RequestRoutingConfig,
        description="How a request gets its attention replica, where it has a choice.",
    )
    rebalance: RebalanceConfig = Field(
        default_factory=RebalanceConfig, description="Whether and how experts move between shards as traffic moves."
    )


def _yaml_off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads a bare `off` as false


_STORE_URL = re.compile(
    r"^(off|embedded|unix:///[A-Za-z0-9_./-]{1,90}|rediss?://[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"
    r"(:([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]))?"
    r"(\?cluster=(true|false))?)$"
)


class IamConfig(Section):
    """ElastiCache's IAM authentication; AWS credentials are found as the AWS tools find them."""

    cache_name: Text = Field(description="Id of the replication group, or name of the serverless cache.")
    region: Text = Field(description="AWS region of the cache.")
    serverless: bool = Field(default=False, description="Whether `cache_name` is a serverless cache.")


class KVStoreConfig(Section):
    """The store of KV blocks that attention replicas share. With `url: off` only `url` is used."""

    url: Annotated[Text, BeforeValidator(_yaml_off)] = Field(
        default="off",
        description="off: each replica keeps its KV cache to itself; embedded: a Valkey that starts and ends with a "
        "mesh on one machine; redis://HOST[:PORT], rediss://HOST[:PORT] (TLS) or unix:///PATH: that server, with "
        "`?cluster=true` behind it a cluster.",
        json_schema_extra={"pattern": _STORE_URL.pattern},
    )
    username: Text | None = Field(default=None, description="ACL user of the server; null is the default user.")
    password_file: LocalPath | None = Field(
        default=None, description="File with the user's password; null: the server asks for none."
    )
    ca_file: LocalPath | None = Field(
        default=None,
        description="PEM file of the authorities that may sign the certificate of a rediss:// server; "
        "null takes the system's.",
    )
    iam: IamConfig | None = Field(
        default=None, description="ElastiCache's IAM authentication for `username`, in place of a password."
    )
    memory_gib: Gibibytes = Field(
        default=1.0, description="Memory of the embedded server; blocks not used for longest are dropped first."
    )
    host_memory_mib: Mebibytes = Field(
        default=512,
        description="Memory of each attention replica that blocks pass through on their way; it keeps the latest ones.",
    )
    ttl_s: Annotated[int, Field(ge=1, json_schema_extra=unit("s"))] = Field(
        default=86400, description="How long the store keeps a block after it was written."
    )
    lookup_timeout_ms: Milliseconds = Field(
        default=100.0,
        description="How long a request waits to hear which blocks are there; a server that misses it is left alone "
        "until it answers again.",
    )
    load_timeout_s: Seconds = Field(
        default=5.0,
        description="How long reading a prompt's blocks may take at most; less where computing them is quicker.",
    )
    write_timeout_s: Seconds = Field(default=5.0, description="How long writing a few blocks may take.")

    @field_validator("url")
    @classmethod
    def _known_form(cls, value: str) -> str:
        if "@" in value:
            raise problem("holds a user or password; use kv_store.username and kv_store.password_file")
        if not _STORE_URL.fullmatch(value):
            raise problem(
                "is none of off, embedded, redis://HOST[:PORT], rediss://HOST[:PORT] (with ?cluster=true for a "
                "cluster), unix:///PATH"
            )
        return value

    @field_validator("username")
    @classmethod
    def _only_for_a_server(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("url") == "embedded":
            raise problem("the embedded server has no users; name a server in kv_store.url")
        return value

    @field_validator("ca_file")
    @classmethod
    def _only_with_tls(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        url = info.data.get("url", "off")
        if value is not None and url != "off" and not url.startswith("rediss://"):
            raise problem("is for rediss:// only")
        return value

    @field_validator("iam")
    @classmethod
    def _needs_tls_and_a_user(cls, value: IamConfig | None, info: ValidationInfo) -> IamConfig | None:
        url = info.data.get("url", "off")
        if value is None or url == "off":
            return value
        if not url.startswith("rediss://"):
            raise problem("IAM authentication needs TLS: use rediss:// in kv_store.url")
        if info.data.get("username") is None:
            raise problem("IAM authentication needs kv_store.username, the ElastiCache user")
        if info.data.get("password_file") is not None:
            raise problem("with IAM authentication there is no password; remove kv_store.password_file")
        return value


class AttentionAutoscaling(Section):
    """When attention replicas are added and removed: by the highest of their means over what is aimed at."""

    min_replicas: Count = Field(description="Fewest attention replicas.", json_schema_extra=unit("replicas"))
    max_replicas: Count = Field(
        description="Most attention replicas; at least `autoscaling.attention.min_replicas`.",
        json_schema_extra=unit("replicas"),
    )
    target_ongoing_requests: float = Field(
        default=8.0,
        gt=0,
        description="Requests in the engine of each replica that are aimed at.",
        json_schema_extra=unit("requests"),
    )
    waiting: float = Field(
        default=2.0,
        gt=0,
        description="Requests that wait in the engine of each replica that are aimed at.",
        json_schema_extra=unit("requests"),
    )
    kv_use: Fraction = Field(default=0.8, description="Part of the KV cache in use that is aimed at.")
    ttft_ms: Milliseconds = Field(default=2000.0, description="Time to first token that is aimed at.")
    up_after_s: Seconds = Field(default=10.0, description="How long there must be too much to do.")
    down_after_s: Seconds = Field(default=300.0, description="How long fewer replicas must be enough.")
    cooldown_s: Seconds = Field(default=60.0, description="Time between two changes at least.")

    @field_validator("max_replicas")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("min_replicas")
        if least is not None and value < least:
            raise problem(f"{value} is below autoscaling.attention.min_replicas ({least})")
        return value


class ExpertsAutoscaling(Section):
    """When expert shards are added and removed: by how busy they are, as far as re-placement can't even it out."""

    min_shards: Count = Field(description="Fewest expert shards.", json_schema_extra=unit("shards"))
    max_shards: Count = Field(
        description="Most expert shards; at least `autoscaling.experts.min_shards`.", json_schema_extra=unit("shards")
    )
    busy: Fraction = Field(default=0.6, description="Part of the time that the busiest shard computes, aimed at.")
    queueing: float = Field(
        default=1.0, gt=0, description="Seconds that frames wait for each second of computing, aimed at."
    )
    balancedness: Fraction = Field(
        default=0.8, description="Balancedness that re-placement is expected to reach: less adds no shard."
    )
    up_after_s: Seconds = Field(default=10.0, description="How long there must be too much to do.")
    down_after_s: Seconds = Field(default=300.0, description="How long fewer shards must be enough.")
    cooldown_s: Seconds = Field(default=60.0, description="Time between two changes at least.")

    @field_validator("max_shards")
    @classmethod
    def _not_below_min(cls, value: int, info: ValidationInfo) -> int:
        least = info.data.get("min_shards")
        if least is not None and value < least:
            raise problem(f"{value} is below autoscaling.experts.min_shards ({least})")
        return value


class AutoscalingConfig(Section):
    """Which deployments follow the load. A number set with `expertmesh scale` goes before it."""

    attention: AttentionAutoscaling | None = Field(
        default=None, description="Autoscaling of the attention replicas; null keeps `attention.replicas`."
    )
    experts: ExpertsAutoscaling | None = Field(
        default=None, description="Autoscaling of the expert shards; null keeps `experts.shards`."
    )
    interval_s: Seconds = Field(default=2.0, description="Time between two looks at the signals.")


class IngressConfig(Section):
    """The HTTP front with the OpenAI API."""

    host: Host = Field(default="127.0.0.1", description="Address that the HTTP server listens on.")
    port: int = Field(default=8000, ge=1, le=65535, description="TCP port of the HTTP server.")
    replicas: Count = Field(default=1, description="Ingress replicas.", json_schema_extra=unit("replicas"))
    proxy: Literal["serve", "haproxy"] = Field(
        default="serve",
        description="What takes HTTP connections: Serve's own proxy, or HAProxy, which Ray brings along and which "
        "costs a fraction; its read-only pages of statistics listen on every address. A Ray cluster that runs already "
        "decides itself, by RAY_SERVE_ENABLE_HA_PROXY=1 in the environment of its nodes.",
    )
    max_ongoing_requests: int = Field(
        default=256,
        ge=1,
        description="Sequences that one ingress replica works on at once; further requests get 429.",
        json_schema_extra=unit("sequences"),
    )
    max_wait_s: Seconds = Field(
        default=120.0,
        description="A request that would wait longer than this for its first token, by what those of late have "
        "waited, gets 429; set it to the time to first token that is still of use.",
    )
    replica_timeout_s: Seconds = Field(
        default=120.0,
        description="How long a request waits for an attention replica that takes it, at its start or after its "
        "replica died; then it gets 503.",
    )
    keys_file: LocalPath | None = Field(
        default=None,
        description="File of API keys that `expertmesh keys` writes, read again when it changes. With null no key is "
        "asked for, and the admin routes answer on loopback only.",
    )
    cors_origins: Origins = Field(
        default=[], description="Origins of web pages that may call the API from a browser; * allows any."
    )
    max_body_mib: Mebibytes = Field(default=32, description="Size of a request's body at most.")
    max_header_kib: Kibibytes = Field(default=32, description="Size of a request's URL and headers together at most.")


class TelemetryConfig(Section):
    """Logs, metrics, traces and load statistics."""

    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="warning", description="Least severity that vLLM and ExpertMesh log."
    )
    log_format: Literal["text", "json"] = Field(
        default="text", description="Log lines for people, or JSON objects, one a line, for machines."
    )
    access_log: bool = Field(default=False, description="Log a line for each HTTP request.")
    traces_endpoint: CollectorUrl | None = Field(
        default=None,
        description="OTLP collector that gets the traces: `http(s)://host:port[/path]` (without a path `/v1/traces`) "
        "or `grpc(s)://host:port`; null makes none. Headers with credentials come from "
        "$OTEL_EXPORTER_OTLP_HEADERS, never from here.",
    )
    traces_sample: Share = Field(
        default=1.0,
        description="Part of the requests that are traced; of those with a `traceparent` header, what it says.",
    )
    dispatch_sample: Share = Field(
        default=0.01,
        description="Part of the dispatches to shards, a layer of a step each, that become spans in traced requests; "
        "at most 64 a request.",
    )
    loads_interval_s: Seconds = Field(default=0.5, description="How often the experts' loads are read.")
    metrics: bool = Field(default=True, description="Report the mesh's own metrics to Ray's Prometheus exporter.")
    metrics_port: int = Field(
        default=0,
        ge=0,
        le=65535,
        description="Loopback port of the metrics of a mesh that starts its own Ray; 0 for any that is free, which "
        "`expertmesh serve` prints.",
    )
