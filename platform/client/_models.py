"""What the admin API answers, as frozen values.

Fields that this version doesn't know are ignored, so a client may be older than its mesh; counters that a replica
hasn't reported yet (it is still loading) are zero or None.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    # "model" is a word of our API; pydantic keeps the prefix "model_" for itself.
    model_config = ConfigDict(frozen=True, extra="ignore", protected_namespaces=())


class DispatchCounts(_Answer):
    """An attention replica's dispatches since its engine started."""

    dispatches: int = 0
    """MoE layers computed through the shards, one for each layer and step."""
    retries: int = 0
    """Frames sent again to another copy."""
    waits: int = 0
    """Times that a layer waited for a missing expert to be placed."""


class LoadedBytes(_Answer):
    """What an attention replica read of the checkpoint."""

    bytes_read: int = 0
    tensors_read: int = 0
    tensors_skipped: int = 0
    """Expert tensors, which the shards hold."""
    seconds: float = 0.0


class ReplicaLoad(_Answer):
    """What autoscaling goes by, besides the requests in the engine."""

    waiting: int = 0
    """Requests that wait in the engine."""
    kv_use: float = 0.0
    """Part of the KV cache that is in use, 0 to 1."""
    ttft_s: float | None = None
    """Mean time to first token of late; None if there was none."""


class Served(_Answer):
    """What an attention replica's engine has served since it started; times as it sees them."""

    requests: int = 0
    """That got their first token."""
    prompt_tokens: int = 0
    """Of these."""
    cached_tokens: int = 0
    """Prompt tokens that were in the engine's own KV cache."""
    fetched_tokens: int = 0
    """Prompt tokens whose KV came from the store."""
    tokens: int = 0
    """Generated."""
    ttft_s: float = 0.0
    """Times to first token, added up over `requests`."""
    intervals: int = 0
    """Tokens after the first."""
    itl_s: float = 0.0
    """Times between tokens, added up over `intervals`."""


class AttentionReplica(_Answer):
    """An attention replica, as of its last report."""

    replica: str
    node: str
    """Ray's node id."""
    ready: bool
    epoch: int
    """Placement epoch that it dispatches by."""
    running: int
    """Requests in its engine."""
    seen_s: float
    """Seconds since that report."""
    load: ReplicaLoad = ReplicaLoad()
    served: Served = Served()
    dispatch: DispatchCounts = DispatchCounts()
    loaded: LoadedBytes | None = None
    """None while it loads, and where the experts are in the engines (mode `colocated`)."""


class ExpertShard(_Answer):
    """An expert shard, as of its last heartbeat. Counters are since it started."""

    shard: str
    index: int
    """Which of the placement's shards it is: the index into `Placement.slots`."""
    node: str
    """Ray's node id."""
    ready: bool
    leaving: bool = False
    """It serves on until others have its experts, and goes."""
    addresses: list[str] = []
    """Where its data plane listens; empty while it loads."""
    experts: int
    """Physical experts that it holds, of all layers."""
    seen_s: float
    """Seconds since that heartbeat."""
    frames: int = 0
    batches: int = 0
    """Kernel calls: fewer than frames where requests waited together."""
    pairs: int = 0
    """(token, expert) pairs computed."""
    busy_s: float = 0.0
    """Seconds in the kernel."""
    waited_s: float = 0.0
    """Seconds that answered frames waited before they were computed, added up."""
    refused: int = 0
    """Frames answered with an error."""
    connections: int = 0
    """Open now."""
    layer_pairs: dict[int, int] = {}
    """`pairs` by the model's layer number."""
    stuck_s: float = 0.0
    """How long the kernel call at hand has taken."""
    bytes_read: int = 0
    """Of the checkpoint."""


class PlacementSummary(_Answer):
    """The placement in figures."""

    epoch: int
    layers: int
    """Layers with routed experts."""
    experts: int
    """Logical experts of one layer."""
    redundancy: int
    """Least number of shards that hold each logical expert; 0 while one is missing, or without shards."""
    missing_experts: int
    """Logical experts, of all layers, that no shard serves."""
    expert_bytes: int = 0
    """Size of all routed experts in the checkpoint."""
    balancedness: float = 1.0
    """Mean shard load over the greatest, mean over the layers, that the recent loads give with this placement."""
    moves: int = 0
    """Experts that are being moved."""
    frozen: bool = False
    """Whether re-placement by itself is switched off."""


class Wanted(_Answer):
    """`POST /mesh/scale`: how many replicas there are to be, by hand, by autoscaling, or by the configuration."""

    attention: int
    experts: int | None = None
    """None where the experts are in the engines (mode `colocated`)."""


class MeshStatus(_Answer):
    """`GET /mesh/status`."""

    model: str
    """Its name in the OpenAI API."""
    mode: str
    """`mesh`, or `colocated` where the experts are in the engines."""
    health: str
    """`ok`, `starting` (no attention replica is ready) or `degraded` (experts are missing)."""
    revision: str
    """Identity of the checkpoint."""
    placement: PlacementSummary
    attention: list[AttentionReplica]
    shards: list[ExpertShard]
    wanted: Wanted | None = None

    @property
    def ok(self) -> bool:
        """Whether every request can be served now."""
        return self.health == "ok"


class Placement(_Answer):
    """`GET /mesh/placement`: which physical experts are where."""

    epoch: int
    layers: list[int]
    """The model's number of each layer with routed experts."""
    experts: int
    """Logical experts of one layer."""
    shards: Mapping[int, str]
    """Serving shard of each index; an index that is not there has no shard now."""
    slots: list[list[list[int]]]
    """[shard index][position in `layers`][slot]: expert id, -1 where a slot is empty."""
    frozen: bool = False
    """Whether re-placement by itself is switched off."""
    running: list[str] = []
    """Moves on their way, in words."""
    ended: list[str] = []
    """Moves that ended lately, the oldest first."""

    def holders(self, layer: int, expert: int) -> list[str]:
        """Serving shards that hold `expert` of the model's layer `layer`; none if it is missing.

        Raises ValueError if `layer` has no routed experts or no such expert.
        """
        if layer not in self.layers:
            raise ValueError(f"layer {layer} has no routed experts; allowed: {self.layers}")
        if not 0 <= expert < self.experts:
            raise ValueError(f"layer {layer} has no expert {expert}; allowed: 0 to {self.experts - 1}")
        at = self.layers.index(layer)
        return [shard for index, shard in sorted(self.shards.items()) if expert in self.slots[index][at]]


class Loads(_Answer):
    """`GET /mesh/loads`: how much each expert has had to do since the controller started."""

    layers: list[int]
    """The model's number of each layer with routed experts."""
    tokens: list[list[int]]
    """[position in `layers`][expert]: tokens dispatched."""
    by_shard: Mapping[str, int]
    """(token, expert) pairs that each shard computed since it started."""
    rows_a_second: list[list[float]] = []
    """[position in `layers`][expert]: recent load, decayed."""
    shifted: list[int] = []
    """The model's number of each layer whose traffic has just changed."""


class Plan(_Answer):
    """`GET /mesh/placement/plan` and `POST /mesh/placement/apply`."""

    moves: list[str]
    """What each move does and what it gains, in words; empty if nothing would pay."""
    balancedness: float
    """As it is, before the moves."""


class Heat(_Answer):
    """`GET /mesh/heat`: what each expert has to do now."""

    layers: list[int]
    """The model's number of each layer with routed experts."""
    experts: int
    """Logical experts of one layer."""
    rows_a_second: list[list[float]]
    """[position in `layers`][expert]: (token, expert) pairs dispatched a second; what was 6 s ago counts half."""

    def hottest(self, count: int) -> list[tuple[int, int, float]]:
        """(layer, expert, rows a second), the most loaded first; only those with any load."""
        loads = (
            (layer, expert, rows)
            for layer, row in zip(self.layers, self.rows_a_second, strict=True)
            for expert, rows in enumerate(row)
            if rows > 0
        )
        return sorted(loads, key=lambda load: (-load[2], load[:2]))[:count]


class HistorySample(_Answer):
    """The mesh over one interval; a mean is None where there was nothing to take it of."""

    at: float
    """Its end, seconds since 1970."""
    attention: int
    """Replicas that were ready."""
    shards: int
    """That served."""
    running: int
    """Requests in the engines."""
    waiting: int
    """Of these, waiting."""
    requests_s: float
    """First tokens a second."""
    tokens_s: float
    """Generated tokens a second."""
    prompt_tokens_s: float
    kv_hits: float | None = None
    """Part of the prompt tokens that were not computed: cached by the engine, or fetched from the KV store."""
    kv_fetched: float | None = None
    """The part that was fetched."""
    kv_use: float = 0.0
    """Part of the KV cache in use, mean over the replicas."""
    ttft_s: float | None = None
    """Mean time to first token, as the engines see it."""
    itl_s: float | None = None
    """Mean time between two tokens of a request, as the engines see it."""
    rows_s: float = 0.0
    """(token, expert) pairs that the shards computed, a second."""
    busy: float = 0.0
    """Part of the time that the shards' kernels ran, mean over the shards."""
    balancedness: float | None = None
    """Mean shard load over the greatest, mean over the layers, as measured."""


class ShardRate(_Answer):
    """What a shard does now."""

    busy: float = 0.0
    """Part of the time that its kernel runs."""
    rows_s: float = 0.0
    """(token, expert) pairs a second."""


class ReplicaRate(_Answer):
    """What an attention replica does now."""

    tokens_s: float = 0.0
    """Generated tokens a second."""
    kv_hits: float | None = None
    """As in HistorySample."""
    itl_s: float | None = None


class History(_Answer):
    """`GET /mesh/history`: the last 10 minutes, of this controller's time in office."""

    interval_s: float
    """Between two samples."""
    samples: list[HistorySample]
    """The oldest first."""
    shards: Mapping[str, ShardRate] = {}
    """By shard id."""
    attention: Mapping[str, ReplicaRate] = {}
    """By replica id."""


class MeshEvent(_Answer):
    """One event of `GET /mesh/events`."""

    id: int
    """Only grows, over restarts of the controller too."""
    at: float
    """Seconds since 1970."""
    kind: str
    """`office` (a controller took office), `shard_joined`, `shard_serving`, `shard_lost`, `shard_leaving`,
    `shard_gone`, `replica_joined`, `replica_ready`, `replica_lost`, `epoch`, `experts_missing`, `experts_whole`,
    `takeover`, `moves_begun`, `moves_done`, `moves_failed`, `traffic_shifted`, `scale`, `freeze`; later versions may
    have more."""
    text: str
    """A short sentence for people."""
    about: Mapping[str, int | str] = {}
    """Ids and numbers concerned, like `shard`, `index`, `node`, `replica`, `epoch`, `experts`, `moves`."""
