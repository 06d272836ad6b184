"""KV events as an engine publishes them, by vLLM's own publisher."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventPublisherFactory,
    KVEventBatch,
)
from vllm.v1.engine import EngineCoreRequest

from expertmesh.deployments.requests.hashes import PromptHasher

BLOCK = 16


def request(tokens: Sequence[int], name: str = "r", salt: str | None = None) -> EngineCoreRequest:
    """What the ingress sends for a prompt."""
    return EngineCoreRequest(
        request_id=name,
        prompt_token_ids=list(tokens),
        mm_features=None,
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        arrival_time=0.0,
        lora_request=None,
        cache_salt=salt,
        data_parallel_rank=None,
    )


def stored(tokens: Sequence[int], salt: str | None = None, **changes: Any) -> BlockStored:
    """The event of a prompt whose full blocks of BLOCK tokens were all computed."""
    hashes = list(PromptHasher(BLOCK)(request(tokens, salt=salt)))
    event = BlockStored(
        block_hashes=list(hashes),
        parent_block_hash=None,
        token_ids=list(tokens[: len(hashes) * BLOCK]),
        block_size=BLOCK,
        lora_id=None,
        medium="GPU",
        lora_name=None,
        extra_keys=[None if salt is None else (salt,)] + [None] * (len(hashes) - 1),
        group_idx=0,
        kv_cache_spec_kind="full_attention",
    )
    for name, value in changes.items():
        setattr(event, name, value)
    return event


def removed(hashes: Sequence[int], group: int = 0, medium: str = "GPU") -> BlockRemoved:
    """The event of blocks that made room for others."""
    return BlockRemoved(block_hashes=list(hashes), medium=medium, group_idx=group)


def batch(*events: BlockStored | BlockRemoved | AllBlocksCleared) -> KVEventBatch:
    """What one engine step publishes."""
    return KVEventBatch(ts=time.time(), events=list(events))


class Publisher:
    """The publisher of an engine core's scheduler."""

    def __init__(self, config: KVEventsConfig) -> None:
        self._publisher = EventPublisherFactory.create(config)

    def publish(self, *events: BlockStored | BlockRemoved | AllBlocksCleared) -> None:
        """One step's events."""
        self._publisher.publish(batch(*events))

    def close(self) -> None:
        """Ends its thread."""
        self._publisher.shutdown()
