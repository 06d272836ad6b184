"""Blocks in a real server: what is stored is found again, and everything else is a miss that is counted."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from expertmesh.errors import ConfigError
from expertmesh.kv_store import BlockStore, Keyspace, StoreClient, StoreLimits, StoreSettings
from expertmesh.kv_store.codec import HEADER_BYTES
from tests.kv_store.conftest import PASSWORD
from tests.kv_store.servers import PATIENCE_S, Server, command

BYTES = 4096
PATIENT = StoreLimits(lookup_timeout_s=PATIENCE_S, load_timeout_s=PATIENCE_S, write_timeout_s=PATIENCE_S)
NewStore = Callable[..., BlockStore]


@pytest.fixture
def new_store(settings: StoreSettings, keyspace: Keyspace) -> Iterator[NewStore]:
    """Makes stores on the server, each with a client of its own as in another process."""
    with ExitStack() as stack:

        def made(keys: Keyspace = keyspace, limits: StoreLimits = PATIENT, **more: Any) -> BlockStore:
            client = StoreClient(settings)
            stack.callback(client.close)
            store = BlockStore(client, keys, limits, **more)
            stack.callback(store.close)
            return store

        yield made


def blocks_of(count: int) -> dict[bytes, bytes]:
    return {b"hash %d" % i: os.urandom(BYTES) for i in range(count)}


def stored(store: BlockStore, blocks: dict[bytes, bytes], tenant: str = "") -> list[bool]:
    """Stores and waits for it."""
    results: queue.SimpleQueue[list[bool]] = queue.SimpleQueue()
    assert store.store([(name, memoryview(value)) for name, value in blocks.items()], tenant, results.put)
    return results.get(timeout=PATIENCE_S)


def loaded(store: BlockStore, names: list[bytes], tenant: str = "", size: int = BYTES) -> list[bytes | None]:
    """The sound ones."""
    memory = [memoryview(bytearray(size)) for _ in names]
    sound = store.load(list(zip(names, memory, strict=True)), tenant, 128 * len(names))
    return [bytes(view) if ok else None for ok, view in zip(sound, memory, strict=True)]


def on(settings: StoreSettings, *words: Any) -> Any:
    """What the server says to a command of somebody else."""
    return command(settings.endpoint.port, *words, password=PASSWORD)


def test_a_second_store_finds_what_the_first_one_wrote(new_store: NewStore) -> None:
    first, second, blocks = new_store(), new_store(), blocks_of(20)
    assert stored(first, blocks) == [True] * 20
    assert second.lookup([*blocks, b"other"], "") == [True] * 20 + [False]
    assert loaded(second, [*blocks, b"other"]) == [*blocks.values(), None]
    assert first.counts() == {"stored": 20, "stored_bytes": 20 * BYTES}
    assert second.counts() == {
        "looked_up": 21,
        "found": 20,
        "load_sound": 20,
        "load_missing": 1,
        "loaded_bytes": 20 * BYTES,
    }


def test_what_the_server_has_and_has_not_is_told(new_store: NewStore, settings: StoreSettings, server: Server) -> None:
    heard: list[tuple[list[bytes], list[bytes]]] = []
    store = new_store(heard=lambda there, gone: heard.append((there, gone)))
    blocks = blocks_of(2)
    names = list(blocks)
    stored(store, blocks)
    store.lookup([*names, b"other"], "")
    loaded(store, names)
    assert heard == [(names, []), (names, [b"other"]), (names, [])]
    heard.clear()
    on(settings, "FLUSHALL")
    loaded(store, names)
    assert heard == [([], names)]
    heard.clear()
    server.kill()
    assert store.lookup(names, "") == [False, False]
    assert heard == [], "no answer is none"


def test_what_is_there_is_not_written_again(new_store: NewStore) -> None:
    store, blocks = new_store(), blocks_of(5)
    stored(store, blocks)
    assert stored(store, {**blocks, b"new": b"x" * BYTES}) == [True] * 6
    assert store.counts() == {"stored": 6, "stored_bytes": 6 * BYTES, "present": 5}


def test_every_key_expires(new_store: NewStore, settings: StoreSettings) -> None:
    stored(new_store(limits=replace(PATIENT, ttl_s=50)), blocks_of(10))
    keys = on(settings, "KEYS", "*")
    assert len(keys) == 10
    assert {on(settings, "TTL", key) for key in keys} <= {49, 50}


def test_tenants_do_not_see_each_other(new_store: NewStore) -> None:
    store, blocks = new_store(), blocks_of(3)
    stored(store, blocks, "a")
    assert store.lookup(list(blocks), "b") == store.lookup(list(blocks), "") == [False] * 3
    assert loaded(store, list(blocks), "b") == [None] * 3
    assert stored(store, blocks, "b") == [True] * 3
    assert "present" not in store.counts(), "not even a write is quicker because another tenant has the block"
    assert store.lookup(list(blocks), "a") == [True] * 3


def test_another_identity_or_secret_sees_nothing(new_store: NewStore, keyspace: Keyspace) -> None:
    blocks = blocks_of(3)
    stored(new_store(), blocks)
    other = Keyspace(replace(keyspace.identity, isa="amx"), b"a secret of the mesh")
    assert new_store(other).lookup(list(blocks), "") == [False] * 3
    assert new_store(Keyspace(keyspace.identity, b"some other secret")).lookup(list(blocks), "") == [False] * 3


def test_damaged_and_foreign_values_are_misses_and_counted(
    new_store: NewStore, settings: StoreSettings, keyspace: Keyspace
) -> None:
    store, blocks = new_store(), blocks_of(7)
    stored(store, blocks)
    keys = [keyspace.of("").key(name) for name in blocks]
    on(settings, "SETRANGE", keys[0], HEADER_BYTES + 100, "corrupt")
    on(settings, "SETRANGE", keys[1], HEADER_BYTES - 1, b"\0\1\2")
    on(settings, "SET", keys[2], on(settings, "GET", keys[2])[:-1])
    on(settings, "SET", keys[3], b"")
    on(settings, "SET", keys[4], b"x" * (HEADER_BYTES + BYTES))
    on(settings, "SET", keys[5], on(settings, "GET", keys[6]))
    assert loaded(store, list(blocks)) == [None] * 6 + [blocks[b"hash 6"]]
    counts = store.counts()
    assert [counts[f"load_{kind}"] for kind in ("corrupt", "truncated", "foreign", "sound")] == [3, 2, 1, 1]


def test_a_value_of_another_type_is_a_refusal(new_store: NewStore, settings: StoreSettings, keyspace: Keyspace) -> None:
    store = new_store()
    on(settings, "LPUSH", keyspace.of("").key(b"list"), "x")
    assert loaded(store, [b"list"]) == [None]
    assert store.counts() == {"refused": 1}


def test_a_hung_server_is_a_miss_and_costs_one_timeout(server: Server, new_store: NewStore) -> None:
    store, blocks = new_store(limits=replace(PATIENT, lookup_timeout_s=0.1)), blocks_of(2)
    stored(store, blocks)
    server.pause()
    assert store.lookup(list(blocks), "") == [False, False]
    assert store.lookup(list(blocks), "") == [False, False]
    assert loaded(store, list(blocks)) == [None, None]
    assert stored(store, blocks) == [False, False]
    counts = store.counts()
    assert counts["timed_out"] == 2, "the first lookup"
    assert counts["skipped"] == 6
    server.resume()


def test_a_first_block_that_is_late_ends_the_load_and_closes_the_gate(server: Server, new_store: NewStore) -> None:
    store, blocks = new_store(), blocks_of(4)
    stored(store, blocks)
    assert loaded(store, list(blocks)) == list(blocks.values())
    store.computed(128 * 4, PATIENCE_S)
    impatient = new_store(limits=replace(PATIENT, lookup_timeout_s=0.1))
    impatient.computed(128 * 4, 0.4)
    server.pause()
    assert loaded(impatient, list(blocks)) == [None] * 4
    server.resume()
    counts = impatient.counts()
    assert (counts["timed_out"], counts.get("skipped", 0)) == (4, 0), "the others would have been skipped"
    assert not impatient.worthwhile(128 * 4)
    assert store.worthwhile(128 * 4)


def test_a_dead_server_is_a_miss(server: Server, new_store: NewStore) -> None:
    store, blocks = new_store(), blocks_of(2)
    stored(store, blocks)
    server.kill()
    assert loaded(store, list(blocks)) == [None, None]
    assert stored(store, blocks) == [False, False]
    counts = store.counts()
    assert (counts["broken"], counts["skipped"]) == (1, 3)


def test_a_full_server_refuses_and_reads_go_on(new_store: NewStore, settings: StoreSettings) -> None:
    store, blocks = new_store(), blocks_of(2)
    stored(store, blocks)
    on(settings, "CONFIG", "SET", "maxmemory", "1")
    assert stored(store, {b"new": b"x" * BYTES}) == [False]
    assert loaded(store, list(blocks)) == list(blocks.values())
    assert store.counts()["refused"] == 1


def test_writes_beyond_the_bound_are_dropped(server: Server, new_store: NewStore) -> None:
    store = new_store(limits=replace(PATIENT, max_queued_bytes=3 * BYTES))
    done: queue.SimpleQueue[list[bool]] = queue.SimpleQueue()
    server.pause()
    accepted = [store.store([(b"%d" % i, memoryview(bytes(BYTES)))], "", done.put) for i in range(5)]
    assert accepted == [True, True, True, False, False]
    assert store.counts()["dropped"] == 2
    server.resume()
    assert [done.get(timeout=PATIENCE_S) for _ in range(3)] == [[True]] * 3
    assert stored(store, {b"later": bytes(BYTES)}) == [True]


def test_closing_reports_what_is_not_written_any_more(server: Server, new_store: NewStore) -> None:
    store = new_store(limits=replace(PATIENT, write_timeout_s=0.2))
    done: list[list[bool]] = []
    server.pause()
    for i in range(5):
        store.store([(b"%d" % i, memoryview(bytes(BYTES)))], "", done.append)
    store.close()
    assert done == [[False]] * 5
    assert not store.store([(b"late", memoryview(bytes(BYTES)))], "", done.append)
    server.resume()


def test_a_large_job_is_written_in_parts(new_store: NewStore) -> None:
    store = new_store()
    blocks = {b"%d" % i: os.urandom(3 << 20) for i in range(7)}
    assert stored(store, blocks) == [True] * 7
    assert loaded(store, list(blocks), size=3 << 20) == list(blocks.values())


def test_a_report_that_fails_does_not_end_the_writer(new_store: NewStore, caplog: pytest.LogCaptureFixture) -> None:
    store = new_store()

    def failing(_: list[bool]) -> None:
        raise RuntimeError("of the caller's making")

    store.store([(b"a", memoryview(bytes(BYTES)))], "", failing)
    assert stored(store, {b"b": bytes(BYTES)}) == [True]
    assert "of the caller's making" in caplog.text


def test_a_store_that_is_slower_than_computing_is_left_out(new_store: NewStore) -> None:
    store, blocks = new_store(), blocks_of(4)
    stored(store, blocks)
    assert store.worthwhile(512)
    assert loaded(store, list(blocks)) == list(blocks.values())
    assert store.worthwhile(512), "computing was never measured"
    store.computed(512, 1e-9)
    assert not store.worthwhile(512)
    assert store.counts()["gated"] == 1


def test_a_load_is_given_up_when_computing_would_have_been_quicker(server: Server, new_store: NewStore) -> None:
    store, blocks = new_store(), blocks_of(4)
    stored(store, blocks)
    store.computed(512, 0.05)
    server.pause()
    assert loaded(store, list(blocks)) == [None] * 4
    server.resume()
    assert store.counts()["timed_out"] == 4
    assert not store.worthwhile(512)


def test_nothing_to_do_is_done(new_store: NewStore) -> None:
    store = new_store()
    assert store.load([], "", 0) == []
    assert store.lookup([], "") == []
    assert stored(store, {}) == []
    assert store.counts() == {}


@pytest.mark.parametrize("name", ["lookup_timeout_s", "ttl_s", "max_queued_bytes", "write_threads"])
def test_limits_that_leave_nothing_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: 0 must be more than 0"):
        replace(StoreLimits(), **{name: 0})
