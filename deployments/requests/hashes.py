"""The block hashes of prompts, as vLLM's engines compute them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import (
    BlockHash,
    get_request_block_hasher,
    hash_block_tokens,
    init_none_hash,
)
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from expertmesh.routing.requests.stream import short_hash

HASH_ALGORITHM = "sha256_cbor"
"""The engines' `prefix_caching_hash_algo`: of vLLM's, the one whose hashes are the same in every process."""


class PromptHasher:
    """Hashes prompts in blocks of `block_tokens` tokens, by the code that the engine itself runs for a request.

    So everything that tells one block from another counts: the tokens before it, `cache_salt`, LoRA, images.
    """

    def __init__(self, block_tokens: int) -> None:
        init_none_hash(sha256_cbor)
        self.block_tokens = block_tokens
        self._hasher = get_request_block_hasher(block_tokens, sha256_cbor)

    def __call__(self, request: EngineCoreRequest) -> tuple[int, ...]:
        """Short hashes of the prompt's full blocks, the first one first."""
        return tuple(map(short_hash, Request.from_engine_core_request(request, self._hasher).block_hashes))


def first_blocks(tokens: Sequence[int], block_tokens: int, extra_keys: tuple[Any, ...] | None) -> list[int]:
    """Short hashes of the full blocks at the beginning of a prompt; extra_keys: vLLM's, of the first block alone."""
    init_none_hash(sha256_cbor)
    hashes: list[BlockHash] = []
    for begin in range(0, len(tokens) - block_tokens + 1, block_tokens):
        keys = None if hashes else extra_keys
        parent = hashes[-1] if hashes else None
        hashes.append(hash_block_tokens(sha256_cbor, parent, tokens[begin : begin + block_tokens], keys))
    return list(map(short_hash, hashes))
