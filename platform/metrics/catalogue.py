"""Every series of ExpertMesh, by who reports it. There is no other: what is not here is not recorded.

None is told apart by expert or layer: the loads of each (layer, expert) come from the API (`/mesh/loads`).
"""

from __future__ import annotations

from expertmesh.platform.metrics.series import Kind, Label, Series

C, G, H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM
"""Short, for the tables below."""
APPLICATION = Label("application")
"""On every series: the Serve application, which is the mesh."""
REPLICA, SHARD = Label("replica"), Label("shard")

_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_WHOLE_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

# -- ingress --------------------------------------------------------------------------------------------------------

REQUESTS = Series(
    "expertmesh_requests",
    C,
    "HTTP requests for inference that ended. `invalid`: 4xx; `limited`: 429; `unavailable`: 503; `late`: 504; "
    "`failed`: other 5xx; `cancelled`: the client left before the end.",
    labels=(
        Label("route", ("chat", "completions", "other")),
        Label("outcome", ("ok", "invalid", "limited", "unavailable", "late", "failed", "cancelled")),
    ),
)
SEQUENCES = Series(
    "expertmesh_sequences",
    C,
    "Generations that ended, several for a request with `n`; a stream that breaks after its first token counts here "
    "and is `ok` above.",
    labels=(Label("outcome", ("ok", "limited", "unavailable", "late", "failed", "cancelled")),),
)
IN_PROGRESS = Series("expertmesh_sequences_in_progress", G, "Generations under way at an ingress.", labels=(REPLICA,))
GENERATED_TOKENS = Series("expertmesh_generated_tokens", C, "Tokens that clients were sent.")
TTFT = Series("expertmesh_ttft_seconds", H, "From the request to its first token.", "s", buckets=_LATENCY_S)
ITL = Series(
    "expertmesh_itl_seconds",
    H,
    "Between two tokens of a stream; of many streams a sample, the first 100 of each second at an ingress.",
    "s",
    buckets=_BETWEEN_TOKENS_S,
)
DURATION = Series("expertmesh_sequence_seconds", H, "From the request to its last token.", "s", buckets=_WHOLE_S)
PICKUP = Series(
    "expertmesh_pickup_seconds", H, "From the request until an attention replica took it.", "s", buckets=_LATENCY_S
)
REQUEST_FAILOVERS = Series(
    "expertmesh_request_failovers",
    C,
    "Generations that lost their attention replica. `restart`: before the first token; `resubmit`, `regenerate`: they "
    "went on at another; `none`: they could not.",
    labels=(Label("way", ("restart", "resubmit", "regenerate", "none")),),
)

INGRESS = (
    REQUESTS,
    SEQUENCES,
    IN_PROGRESS,
    GENERATED_TOKENS,
    TTFT,
    ITL,
    DURATION,
    PICKUP,
    REQUEST_FAILOVERS,
)

# -- attention replicas -----------------------------------------------------------------------------------------------

RUNNING = Series("expertmesh_engine_running", G, "Requests in a replica's engine, those that wait too.", "", (REPLICA,))
WAITING = Series("expertmesh_engine_waiting", G, "Requests that wait in a replica's engine.", "", (REPLICA,))
QUEUE = Series("expertmesh_engine_queue_seconds", H, "What requests waited in an engine.", "s", buckets=_LATENCY_S)
PREEMPTIONS = Series("expertmesh_engine_preemptions", C, "Requests put back because the KV cache was full.")
KV_USE = Series("expertmesh_kv_use", G, "Part of a replica's KV cache that is in use.", "0 to 1", (REPLICA,))
PROMPT_TOKENS = Series(
    "expertmesh_prompt_tokens",
    C,
    "Prompt tokens by where their KV came from: `computed`, the replica's own prefix cache (`local`), the KV store or "
    "its blocks in host memory (`store`).",
    labels=(Label("source", ("computed", "local", "store")),),
)

DISPATCHES = Series("expertmesh_dispatches", C, "Layers dispatched: one for each MoE layer and step.")
DISPATCH_PAIRS = Series("expertmesh_dispatch_pairs", C, "(token, expert) pairs dispatched.")
DISPATCH_SECONDS = Series(
    "expertmesh_dispatch_seconds",
    C,
    "Time of dispatches: choosing copies and packing (`route`), sending and waiting (`exchange`), adding up "
    "(`combine`). Waiting for a table that brings a missing expert is not in it.",
    "s",
    (Label("part", ("route", "exchange", "combine")),),
)
DISPATCH_SHARD_SECONDS = Series(
    "expertmesh_dispatch_shard_seconds",
    C,
    "Of `exchange`: what the slowest answer of each dispatch waited at its shard (`queue`) and was computed "
    "(`compute`). The rest is the way there and back.",
    "s",
    (Label("part", ("queue", "compute")),),
)
DISPATCH_FRAMES = Series("expertmesh_dispatch_frames", C, "Frames sent to shards.")
DISPATCH_BYTES = Series(
    "expertmesh_dispatch_bytes",
    C,
    "Bytes of frames and of their answers.",
    "bytes",
    (Label("direction", ("sent", "received")),),
)
DISPATCH_RETRIES = Series("expertmesh_dispatch_retries", C, "Times that a dispatch sent pairs once more.")
DISPATCH_WAITS = Series(
    "expertmesh_dispatch_waits", C, "Times that a dispatch looked for a newer table, since no shard had an expert."
)
DISPATCH_FAILOVERS = Series(
    "expertmesh_dispatch_failovers",
    C,
    "Frames that a shard did not answer, so that their pairs went to other copies: it said no (`refused`), the "
    "connection broke (`broken`), it took too long (`overdue`).",
    labels=(Label("why", ("refused", "broken", "overdue")),),
)
TABLE_EPOCH = Series(
    "expertmesh_table_epoch", G, "Epoch of the routing table that a replica goes by.", labels=(REPLICA,)
)

_LOADS = ("sound", "missing", "truncated", "foreign", "corrupt")
_STATES = ("closed", "half_open", "open")
KV_LOOKUPS = Series(
    "expertmesh_kv_store_lookups", C, "Blocks looked up.", "blocks", (Label("result", ("found", "missing")),)
)
KV_LOADS = Series(
    "expertmesh_kv_store_loads", C, "Blocks read; only sound ones are used.", "blocks", (Label("result", _LOADS),)
)
KV_WRITES = Series(
    "expertmesh_kv_store_writes",
    C,
    "Blocks to be written: `stored`, already `present`, `dropped` since too many waited.",
    "blocks",
    (Label("result", ("stored", "present", "dropped")),),
)
KV_BYTES = Series(
    "expertmesh_kv_store_bytes", C, "Bytes of blocks.", "bytes", (Label("direction", ("loaded", "stored")),)
)
KV_ERRORS = Series(
    "expertmesh_kv_store_errors",
    C,
    "Blocks that a server's trouble cost: not asked (`skipped`), no answer in time, `refused`, connection `broken`.",
    "blocks",
    (Label("why", ("skipped", "timed_out", "refused", "broken")),),
)
KV_GATE = Series(
    "expertmesh_kv_store_gate",
    C,
    "Decisions of the break-even gate on a prefix that was found: `fetch`, or `compute` since that is quicker.",
    labels=(Label("decision", ("fetch", "compute")),),
)
KV_OPENINGS = Series("expertmesh_kv_store_breaker_openings", C, "Times that a server's circuit breaker opened.")
KV_SERVERS = Series(
    "expertmesh_kv_store_servers",
    G,
    "Servers that a replica has asked, by the state of their circuit breaker.",
    labels=(REPLICA, Label("breaker", _STATES)),
)

ENGINES = (RUNNING, WAITING, QUEUE, PREEMPTIONS, KV_USE, PROMPT_TOKENS)
DISPATCH = (
    DISPATCHES,
    DISPATCH_PAIRS,
    DISPATCH_SECONDS,
    DISPATCH_SHARD_SECONDS,
    DISPATCH_FRAMES,
    DISPATCH_BYTES,
    DISPATCH_RETRIES,
    DISPATCH_WAITS,
    DISPATCH_FAILOVERS,
    TABLE_EPOCH,
)
KV_STORE = (KV_LOOKUPS, KV_LOADS, KV_WRITES, KV_BYTES, KV_ERRORS, KV_GATE, KV_OPENINGS, KV_SERVERS)

# -- expert shards ----------------------------------------------------------------------------------------------------

SHARD_FRAMES = Series("expertmesh_shard_frames", C, "Frames answered.")
SHARD_BATCHES = Series("expertmesh_shard_batches", C, "Kernel calls: fewer than frames where frames waited together.")
SHARD_PAIRS = Series("expertmesh_shard_pairs", C, "(token, expert) pairs computed.")
SHARD_SECONDS = Series(
    "expertmesh_shard_seconds",
    C,
    "Time in the kernel (`busy`), and what answered frames waited for it (`waited`).",
    "s",
    (Label("part", ("busy", "waited")),),
)
SHARD_REFUSED = Series("expertmesh_shard_refused_frames", C, "Frames answered with an error.")
SHARD_BUSY = Series("expertmesh_shard_busy", G, "Part of the last seconds in a shard's kernel.", "0 to 1", (SHARD,))
SHARD_RATE = Series("expertmesh_shard_pairs_per_second", G, "Pairs that a shard computed lately.", "1/s", (SHARD,))
SHARD_CONNECTIONS = Series("expertmesh_shard_connections", G, "Connections of dispatchers to a shard.", "", (SHARD,))
SHARD_EXPERTS = Series("expertmesh_shard_experts", G, "Physical experts that a shard serves.", "", (SHARD,))
WEIGHT_BYTES = Series(
    "expertmesh_weight_bytes",
    C,
    "Bytes of experts read from the checkpoint, and of these what came over the network (`fetched`).",
    "bytes",
    (Label("source", ("read", "fetched")),),
)
LOAD_SECONDS = Series("expertmesh_weight_load_seconds", C, "Time that shards spent loading experts.", "s")

SHARDS = (
    SHARD_FRAMES,
    SHARD_BATCHES,
    SHARD_PAIRS,
    SHARD_SECONDS,
    SHARD_REFUSED,
    SHARD_BUSY,
    SHARD_RATE,
    SHARD_CONNECTIONS,
    SHARD_EXPERTS,
    WEIGHT_BYTES,
    LOAD_SECONDS,
)

# -- controller -------------------------------------------------------------------------------------------------------

_SIDES = Label("side", ("attention", "experts"))
_REASONS = ("running", "waiting", "kv_use", "ttft", "busy", "queueing", "bounds", "manual")

HEALTHY = Series("expertmesh_healthy", G, "1 if a replica serves and every expert is served, else 0.")
EPOCH = Series("expertmesh_placement_epoch", G, "Epoch of the placement.")
MISSING = Series("expertmesh_missing_experts", G, "Logical experts, of all layers, that no shard serves.")
UNPLACED = Series("expertmesh_unplaced_copies", G, "Copies of experts that no shard has room for.")
BALANCEDNESS = Series(
    "expertmesh_balancedness",
    G,
    "Mean shard load over the greatest, mean over the layers, that recent loads give with the placement.",
    "0 to 1",
)
FROZEN = Series("expertmesh_placement_frozen", G, "1 if re-placement by itself is switched off, else 0.")
MOVES_RUNNING = Series("expertmesh_moves_in_progress", G, "Moves of experts under way.")
MOVES = Series("expertmesh_moves", C, "Moves that ended.", labels=(Label("outcome", ("done", "abandoned")),))
ADOPTED = Series("expertmesh_adopted_experts", C, "Copies ordered from a shard because a shard died, left or came.")
MEMBERS = Series(
    "expertmesh_members",
    G,
    "Attention replicas and shards that the controller knows. A shard that is `leaving` serves on until others have "
    "its experts.",
    labels=(_SIDES, Label("state", ("ready", "starting", "leaving"))),
)
WANTED = Series("expertmesh_wanted_members", G, "How many there are to be.", labels=(_SIDES,))
LOST = Series("expertmesh_lost_members", C, "Members not heard of in time.", labels=(_SIDES,))
SCALING = Series(
    "expertmesh_scaling_decisions",
    C,
    "Changes of the number of members by what called for them: the signal that was furthest from its aim, the "
    "configured `bounds`, or a person (`manual`).",
    labels=(_SIDES, Label("direction", ("up", "down")), Label("reason", _REASONS)),
)

CONTROLLER = (
    HEALTHY,
    EPOCH,
    MISSING,
    UNPLACED,
    BALANCEDNESS,
    FROZEN,
    MOVES_RUNNING,
    MOVES,
    ADOPTED,
    MEMBERS,
    WANTED,
    LOST,
    SCALING,
)

CATALOGUE: dict[str, tuple[Series, ...]] = {
    "Requests": INGRESS,
    "Engines": ENGINES,
    "Dispatch": DISPATCH,
    "KV store": KV_STORE,
    "Expert shards": SHARDS,
    "Placement, members, scaling": CONTROLLER,
}
"""The chapters of the documentation."""
