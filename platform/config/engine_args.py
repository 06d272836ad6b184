"""Which vLLM engine arguments a user may pass through, and which the mesh sets from fields of its own."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from expertmesh.platform.config.fields import problem

OWNED: Mapping[str, str] = MappingProxyType(
    {
        "model": "use model.source",
        "served_model_name": "use model.served_name",
        "dtype": "use model.dtype",
        "max_model_len": "use model.max_model_len",
        "load_format": "the mesh chooses it from experts.mode",
        "worker_cls": "the mesh chooses it from the platform",
        "scheduler_cls": "the mesh's own ends requests whose experts are gone",
        "additional_config": "the mesh fills it in from experts.mode and routing",
        "enforce_eager": "use attention.compile",
        "max_num_seqs": "use attention.max_num_seqs",
        "max_num_batched_tokens": "use attention.max_num_batched_tokens",
        "enable_prefix_caching": "use attention.prefix_caching",
        "prefix_caching_hash_algo": "the mesh needs the one that is the same in every process",
        "kv_events_config": "use routing.requests.policy",
        "kv_cache_memory_bytes": "use attention.kv_cache_gib",
        "tensor_parallel_size": "only 1 is supported so far; for more engines use attention.replicas",
        "pipeline_parallel_size": "only 1 is supported so far; for more engines use attention.replicas",
        "data_parallel_size": "use attention.replicas",
        "enable_expert_parallel": "use experts.mode and experts.shards",
        "enable_eplb": "use experts.redundancy",
    }
)
"""Engine argument -> what to use instead."""


def allowed_engine_argument(key: str) -> str:
    """Return `key` if the user may set it. Raises a validation problem that says what to use instead."""
    if key in OWNED:
        raise problem(f"the mesh sets this engine argument; {OWNED[key]}")
    if not key.isidentifier():
        suggestion = key.lstrip("-").replace("-", "_")
        hint = f"; did you mean {suggestion!r}?" if suggestion.isidentifier() else ""
        raise problem(f"is not the Python name of an engine argument{hint}")
    return key
