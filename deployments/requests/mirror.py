"""What an engine's prefix cache holds, and what it saw in the KV store, from vLLM's KV events."""

from __future__ import annotations

import logging
from collections.abc import Iterable, KeysView, Sequence
from typing import Any

from vllm.distributed.kv_events import (
    MEDIUM_GPU,
    MEDIUM_STORAGE,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
)

from expertmesh.deployments.requests.hashes import first_blocks
from expertmesh.routing.requests import Cleared, Event, Lapsed, Offloaded, Removed, StoreContent, Stored
from expertmesh.routing.requests.stream import short_hash

log = logging.getLogger("expertmesh.attention")

_ON_DEVICE = (MEDIUM_GPU, None)
"""vLLM's name for the KV cache itself, on a CPU too."""
_FULL_ATTENTION = ("full_attention", "mla_attention", "sink_full_attention")


class CacheMirror:
    """Follows the KV events of one engine and passes on what routing needs of them.

    Of a hybrid model's KV cache groups it follows one of full attention: a hit needs all of its blocks, where a sliding
    window needs only the last ones. Without such a group it follows the one with the lowest number.

    The router hashes prompts itself. So the first blocks that can be checked are: if the engine's hashes are not what
    the router will compute, the cache passes for empty, and a warning says so.
    """

    def __init__(self) -> None:
        self._copies: dict[int, int] = {}
        """Of each block that is cached: a prompt that found no hit has its blocks computed once more, and kept."""
        self._kinds: dict[int, str | None] = {}
        self._group: int | None = None
        self._store = StoreContent()
        self._checked = False
        self._trusted = True

    @property
    def held(self) -> KeysView[int]:
        """Short hashes of the blocks that are cached now; follows what is applied."""
        return self._copies.keys()

    def __len__(self) -> int:
        """Blocks that are named by `whole`."""
        return len(self._copies) + len(self._store)

    def whole(self) -> list[Event]:
        """What a reader that knows nothing has to be told."""
        told: list[Event] = [Cleared(), Stored(tuple(self._copies))]
        return [*told, Offloaded(tuple(self._store))] if self._store else told

    def apply(self, batch: KVEventBatch) -> list[Event]:
        """What the batch changes, in its order. Nothing once the engine's hashes turned out to be others."""
        changes: list[Event] = self._settle(batch.events)
        for event in batch.events:
            if not self._trusted:
                break
            if isinstance(event, AllBlocksCleared):
                changes += self.forget()
            elif isinstance(event, BlockStored) and self._concerns(event):
                self._check(event)
                changes += self._stored(map(short_hash, event.block_hashes))
            elif isinstance(event, BlockRemoved) and self._concerns(event):
                changes += self._removed(map(short_hash, event.block_hashes))
            elif isinstance(event, BlockStored | BlockRemoved) and self._concerns(event, (MEDIUM_STORAGE,)):
                changes += self._seen_in_store(event)
        return changes if self._trusted else self.forget()

    def forget(self) -> list[Event]:
        """Takes the cache for empty from here on: events were lost, or vLLM emptied it."""
        self._copies.clear()
        return [Cleared()]

    def _settle(self, events: Iterable[Any]) -> list[Event]:
        """Chooses the group to follow; what is known about another one is dropped."""
        for event in events:
            if isinstance(event, BlockStored) and event.medium in _ON_DEVICE:
                self._kinds.setdefault(event.group_idx or 0, event.kv_cache_spec_kind)
        groups = sorted(self._kinds)
        chosen = next((group for group in groups if self._kinds[group] in _FULL_ATTENTION), min(groups, default=None))
        if chosen == self._group:
            return []
        changed, self._group = self._group is not None, chosen
        return self.forget() if changed else []

    def _concerns(self, event: BlockStored | BlockRemoved, media: Sequence[str | None] = _ON_DEVICE) -> bool:
        return event.medium in media and (event.group_idx or 0) == self._group

    def _seen_in_store(self, event: BlockStored | BlockRemoved) -> list[Event]:
        blocks = list(map(short_hash, event.block_hashes))
        if isinstance(event, BlockStored):
            there = self._store.add(blocks)
            return [Offloaded(tuple(there))] if there else []
        gone = self._store.discard(blocks)
        return [Lapsed(tuple(gone))] if gone else []

    def _check(self, event: BlockStored) -> None:
        """Compares the hashes of a prompt's first blocks with what the router would compute."""
        whole = 0 < len(event.block_hashes) * event.block_size == len(event.token_ids)
        if self._checked or not whole or event.parent_block_hash is not None or event.lora_name is not None:
            return
        first, *others = event.extra_keys or [None] * len(event.block_hashes)
        match first:  # events leave out what kind of key it is: a lone text is a salt
            case None:
                keys = None
            case (str() as salt,):
                keys = (("cache_salt", salt),)
            case _:
                return
        if any(others):
            return
        self._checked = True
        if first_blocks(event.token_ids, event.block_size, keys) != list(map(short_hash, event.block_hashes)):
            self._trusted = False
            log.warning("the engine hashes KV blocks in another way than the router: requests go by load only")

    def _stored(self, blocks: Iterable[int]) -> list[Event]:
        new = []
        for block in blocks:
            copies = self._copies.get(block, 0)
            self._copies[block] = copies + 1
            if not copies:
                new.append(block)
        return [Stored(tuple(new))] if new else []

    def _removed(self, blocks: Iterable[int]) -> list[Event]:
        gone = []
        for block in blocks:
            copies = self._copies.get(block, 0)
            if copies == 1:
                del self._copies[block]
                gone.append(block)
            elif copies:
                self._copies[block] = copies - 1
        return [Removed(tuple(gone))] if gone else []
