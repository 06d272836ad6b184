"""Blocks of KV cache in the store: what a tier under vLLM's offloading connector needs, and nothing of vLLM."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertmesh.errors import ConfigError
from expertmesh.kv_store.channel import Buffers, Reply
from expertmesh.kv_store.client import StoreClient
from expertmesh.kv_store.codec import HEADER_BYTES, Verdict, judge, judge_length, seal
from expertmesh.kv_store.errors import StoreError, StoreRefused, StoreSkipped, StoreTimeout
from expertmesh.kv_store.gate import BreakEvenGate
from expertmesh.kv_store.keys import Keyspace
from expertmesh.kv_store.write_queue import WriteQueue

_log = logging.getLogger(__name__)

_WRITE_BYTES = 8 << 20
"""Written at once, so that reads get their turn on the server."""
_GIVEN_UP = 2.0
"""A fetch that was given up counts as this many times what it was given."""

Block = tuple[bytes, memoryview]
"""A block's hash and its memory: one dimension, format B."""
Heard = Callable[[list[bytes], list[bytes]], None]
"""Gets hashes of blocks that the servers have, and of those that they lack; in any thread."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much time and memory the store may take."""

    lookup_timeout_s: float = 0.1
    load_timeout_s: float = 5.0
    write_timeout_s: float = 5.0
    ttl_s: int = 24 * 3600
    max_queued_bytes: int = 256 << 20
    """Blocks that wait to be written; they keep their host memory from being used for others."""
    write_threads: int = 1

    def __post_init__(self) -> None:
        """Raises ConfigError for a limit that leaves nothing."""
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: {getattr(self, name)} must be more than 0")


@dataclass(frozen=True, slots=True)
class _Write:
    blocks: Sequence[Block]
    tenant: str
    done: Callable[[list[bool]], None]


class BlockStore:
    """Looks blocks up, loads them into memory and stores them. Safe for concurrent use.

    Nothing here raises for what a server does or holds: trouble is a miss, and counted. Memory that is given in belongs
    to the caller again when `load` returns, and for `store` when `done` was called. Does not close the client.
    """

    def __init__(
        self, client: StoreClient, keyspace: Keyspace, limits: StoreLimits | None = None, heard: Heard | None = None
    ) -> None:
        """heard: is told what the servers answer; nothing where they don't."""
        self._heard = heard
        self._client = client
        self._keyspace = keyspace
        self._limits = limits or StoreLimits()
        self._gate = BreakEvenGate()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._told: set[str] = set()
        self._queue: WriteQueue[_Write] = WriteQueue(self._limits.max_queued_bytes)
        self._writers = [
            threading.Thread(target=self._write_all, name=f"kv-store-write-{i}", daemon=True)
            for i in range(self._limits.write_threads)
        ]
        for writer in self._writers:
            writer.start()

    def lookup(self, hashes: Sequence[bytes], tenant: str) -> list[bool]:
        """Whether each block is there, within the lookup timeout."""
        keys = self._keyspace.of(tenant)
        replies = self._client.exists([keys.key(block) for block in hashes], self._limits.lookup_timeout_s)
        found = [reply == 1 for reply in replies]
        self._count(looked_up=len(found), found=sum(found))
        self._hear(hashes, found, replies)
        self._count_errors(replies)
        return found

    def worthwhile(self, tokens: int) -> bool:
        """Whether to fetch a prefix of that many tokens: not if computing it would be quicker."""
        with self._lock:
            answer = self._gate.worthwhile(tokens, time.monotonic())
        self._count(**{"admitted" if answer else "gated": 1})
        return answer

    def computed(self, tokens: int, seconds: float) -> None:
        """Tells what computing a prompt of that many tokens took, from its turn to its first token."""
        with self._lock:
            self._gate.computed(tokens, seconds)

    def load(self, blocks: Sequence[Block], tenant: str, tokens: int) -> list[bool]:
        """Reads blocks, which hold a prefix of that many tokens, into their memory: which of them are sound.

        Takes the load timeout at most, and no longer than computing the prefix would take; the others aren't asked for
        if the first block takes longer than it may (`BreakEvenGate.first_block_s`). The memory of blocks that aren't
        sound may hold anything.
        """
        if not blocks:
            return []
        keys = self._keyspace.of(tenant)
        named = [keys.key(block) for block, _ in blocks]
        headers = [memoryview(bytearray(HEADER_BYTES)) for _ in blocks]
        timeout_s = share_s = self._limits.load_timeout_s
        with self._lock:
            if (budget_s := self._gate.budget_s(tokens)) is not None:
                timeout_s = min(timeout_s, budget_s)
                share_s = self._gate.first_block_s(tokens, len(blocks), timeout_s, self._limits.lookup_timeout_s)
        begin = time.monotonic()
        replies = self._fetch(
            [(key, (header, memory)) for key, header, (_, memory) in zip(named, headers, blocks, strict=True)],
            timeout_s,
            share_s,
        )
        took_s = time.monotonic() - begin
        verdicts = [
            self._verdict(reply, key, keys.origin, header, memory)
            for reply, key, header, (_, memory) in zip(replies, named, headers, blocks, strict=True)
        ]
        sound = [verdict is Verdict.SOUND for verdict in verdicts]
        with self._lock:
            if all(sound):
                self._gate.fetched(tokens, took_s)
            elif any(isinstance(reply, StoreTimeout) for reply in replies):
                self._gate.gave_up(tokens, max(took_s, timeout_s) * _GIVEN_UP)
            self._counts.update(f"load_{verdict.value}" for verdict in verdicts if verdict is not None)
            self._counts["loaded_bytes"] += sum(
                len(memory) for ok, (_, memory) in zip(sound, blocks, strict=True) if ok
            )
        self._count(load_missing=sum(reply is None for reply in replies))
        self._hear([block for block, _ in blocks], sound, replies)
        self._count_errors(replies)
        return sound

    def store(self, blocks: Sequence[Block], tenant: str, done: Callable[[list[bool]], None]) -> bool:
        """Queues blocks to be written; `done`, in another thread, gets which of them are in the store then.

        False if too much waits already: the blocks are dropped and `done` is never called. Never blocks.
        """
        if self._queue.offer(_Write(blocks, tenant, done), sum(len(memory) for _, memory in blocks)):
            return True
        self._count(dropped=len(blocks))
        return False

    def counts(self) -> dict[str, int]:
        """What happened so far, in blocks: looked_up, found; load_sound, load_missing, load_truncated, load_foreign,
        load_corrupt; stored, present (before they were written), dropped; skipped, timed_out, refused, broken (by the
        servers' trouble); and admitted and gated (prefixes, by the gate), loaded_bytes, stored_bytes. What never
        happened is left out."""
        with self._lock:
            return {name: count for name, count in sorted(self._counts.items()) if count}

    def close(self) -> None:
        """Drops what waits to be written and waits for what is being written."""
        for job in self._queue.close():
            self._count(dropped=len(job.blocks))
            job.done([False] * len(job.blocks))
        for writer in self._writers:
            writer.join()

    def _fetch(self, items: list[tuple[bytes, Buffers]], timeout_s: float, share_s: float) -> list[Reply]:
        """The first one alone, within `share_s`: a server that is too slow is found out by it."""
        begin = time.monotonic()
        replies = self._client.get(items[:1], share_s)
        if isinstance(replies[0], StoreTimeout):
            return replies * len(items)
        rest = items[1:]
        return replies + self._client.get(rest, timeout_s - (time.monotonic() - begin)) if rest else replies

    @staticmethod
    def _verdict(reply: Reply, key: bytes, origin: bytes, header: memoryview, memory: memoryview) -> Verdict | None:
        """None if there is no value to judge."""
        if not isinstance(reply, int):
            return None
        if reply != len(header) + len(memory):
            return judge_length(reply, len(memory))
        return judge(key, header, memory, origin)

    def _write_all(self) -> None:
        while (taken := self._queue.take()) is not None:
            job, nbytes = taken
            try:
                job.done(self._write(job))
            except Exception:
                _log.exception("KV store: a finished write could not be reported")
            finally:
                self._queue.release(nbytes)

    def _write(self, job: _Write) -> list[bool]:
        keys = self._keyspace.of(job.tenant)
        named = [keys.key(block) for block, _ in job.blocks]
        there = self._client.exists(named, self._limits.write_timeout_s)
        written = [reply == 1 for reply in there]
        self._count(present=sum(written))
        self._count_errors(there)
        missing = [i for i, reply in enumerate(there) if reply is None]
        while missing:
            some: list[int] = []
            size = 0
            while missing and (not some or size + len(job.blocks[missing[0]][1]) <= _WRITE_BYTES):
                size += len(job.blocks[missing[0]][1])
                some.append(missing.pop(0))
            items = []
            for i in some:
                memory = job.blocks[i][1]
                items.append((named[i], (memoryview(seal(named[i], keys.origin, memory)), memory)))
            replies = self._client.set(items, self._limits.ttl_s, self._limits.write_timeout_s)
            for i, reply in zip(some, replies, strict=True):
                written[i] = isinstance(reply, int)
            stored = [i for i in some if written[i]]
            self._count(stored=len(stored), stored_bytes=sum(len(job.blocks[i][1]) for i in stored))
            self._count_errors(replies)
        self._hear([block for block, _ in job.blocks], written)
        return written

    def _hear(self, hashes: Sequence[bytes], there: Sequence[bool], replies: Sequence[Reply] | None = None) -> None:
        """Of each hash: whether the block is there, and the reply to a question for it, which is None if it lacks."""
        if self._heard is None:
            return
        has = [block for block, ok in zip(hashes, there, strict=True) if ok]
        lacks = [] if replies is None else [b for b, reply in zip(hashes, replies, strict=True) if reply is None]
        if has or lacks:
            self._heard(has, lacks)

    def _count(self, **changes: int) -> None:
        with self._lock:
            self._counts.update(changes)

    def _count_errors(self, replies: Sequence[Reply]) -> None:
        """Counts errors by kind, and logs the first of each kind of message."""
        errors = [reply for reply in replies if isinstance(reply, StoreError)]
        for error in errors:
            kind = {StoreSkipped: "skipped", StoreTimeout: "timed_out", StoreRefused: "refused"}.get(
                type(error), "broken"
            )
            with self._lock:
                self._counts[kind] += 1
                told = kind in self._told
                self._told.add(kind)
            if not told:
                _log.warning("KV store: %s (said once; see its counts)", error)
