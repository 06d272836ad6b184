"""KV events from vLLM's publisher to the ranking, over real sockets, without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Self

import pytest
from vllm.distributed.kv_events import AllBlocksCleared

from expertmesh.deployments.requests.feed import KVEventFeed, _Reader
from expertmesh.deployments.requests.mirror import CacheMirror
from expertmesh.deployments.requests.ranking import Ranking
from expertmesh.deployments.source import Source
from expertmesh.routing.requests import Cleared, Removed, Stored
from expertmesh.routing.transport import Address, Tls
from tests.requests.publishing import BLOCK, Publisher, batch, removed, request, stored
from tests.routing.certificates import Authority, write

SECRET = b"a secret of the cluster"
PROMPT = range(10 * BLOCK + 5)
OTHER = range(1000, 1000 + 10 * BLOCK)
A_WHILE_S = 60


async def eventually(check: Callable[[], bool]) -> None:
    """Returns when `check` comes true; TimeoutError if it never does."""
    async with asyncio.timeout(A_WHILE_S):
        while not check():
            await asyncio.sleep(0.01)


class Replica:
    """An engine's publisher and a feed, as in an attention replica."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir()
        self.name = name
        self.feed = KVEventFeed(folder)
        self.publisher = Publisher(self.feed.engine_arguments["kv_events_config"])
        self.open()

    async def joined(self) -> Self:
        """When the feed hears the publisher: ZeroMQ drops what is published before."""
        async with asyncio.timeout(A_WHILE_S):
            while not self.feed._mirror.held:
                self.publisher.publish(stored(range(BLOCK)))
                await asyncio.sleep(0.01)
            self.publisher.publish(AllBlocksCleared())
            while self.feed._mirror.held:
                await asyncio.sleep(0.01)
        return self

    def open(self, secret: bytes = SECRET, tls: Tls | None = None) -> None:
        unix = Address("unix", f"test-{uuid.uuid4().hex}")
        self.feed.serve(self.name, secret, [unix, Address("tcp", "127.0.0.1", 0)], BLOCK, tls)

    @property
    def source(self) -> Source:
        return Source("here", self.feed.addresses)

    def close(self) -> None:
        self.publisher.close()
        self.feed.close()


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[tuple[Replica, Replica]]:
    pair = await Replica(tmp_path / "a", "a").joined(), await Replica(tmp_path / "b", "b").joined()
    yield pair
    for replica in pair:
        replica.close()


@contextlib.contextmanager
def ranking_of(*replicas: Replica, here: str = "here") -> Iterator[Ranking]:
    ranking = Ranking(here, SECRET, 5.0)
    ranking.keep({replica.name: replica.source for replica in replicas})
    yield ranking
    ranking.close()


def held(ranking: Ranking, tokens: range = PROMPT) -> dict[str, int]:
    return {rank.replica: rank.held for rank in ranking.rank(ranking.blocks(request(tokens)), {})}


async def test_readers_from_other_nodes_come_over_tls(
    replicas: tuple[Replica, Replica], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a, _ = replicas
    member = write(tmp_path / "tls", Authority())
    a.feed.addresses = ()
    a.open(tls=Tls(member))
    rankings = {
        "same node": Ranking("here", SECRET, 5.0, Tls(member)),
        "over TLS": Ranking("another node", SECRET, 5.0, Tls(member)),
        "plain": Ranking("another node", SECRET, 5.0),
        "no member": Ranking("another node", SECRET, 5.0, Tls(write(tmp_path / "foreign", Authority()))),
    }
    for ranking in rankings.values():
        ranking.keep({"a": a.source})
    hears = [rankings["same node"], rankings["over TLS"]]
    await eventually(lambda: all(ranking.blocks(request(PROMPT)) for ranking in hears))
    a.publisher.publish(stored(PROMPT))
    await eventually(lambda: all(held(ranking) == {"a": 10} for ranking in hears))
    await eventually(lambda: "is routing.tls set there?" in caplog.text)
    await eventually(lambda: "TLS: the peer refused" in caplog.text)
    assert not any(rankings[name].blocks(request(PROMPT)) for name in ("plain", "no member"))
    a.publisher.publish(*(stored(range(i * 8192, (i + 1) * 8192)) for i in range(1, 40)))  # more than buffers hold
    last = range(39 * 8192, 40 * 8192)
    await eventually(lambda: all(held(ranking, last)["a"] == 8192 // BLOCK for ranking in hears))
    for ranking in rankings.values():
        ranking.close()


async def test_silent_strangers_do_not_keep_readers_out(replicas: tuple[Replica, Replica]) -> None:
    """Many more than readers there may be, and than handshakes that run at once."""
    a, _ = replicas
    address = Address.parse(next(text for text in a.feed.addresses if text.startswith("tcp")))
    with contextlib.ExitStack() as stack:
        silent = []
        for _ in range(300):
            _, writer = await asyncio.open_connection(address.name, address.port)
            stack.callback(writer.close)
            silent.append(writer)
        with ranking_of(a, here="another node") as ranking:
            await eventually(lambda: bool(ranking.blocks(request(PROMPT))))


@pytest.mark.parametrize("here", ["here", "another node"])
async def test_what_an_engine_publishes_is_what_requests_are_ranked_by(
    replicas: tuple[Replica, Replica], here: str
) -> None:
    a, b = replicas
    with ranking_of(a, b, here=here) as ranking:
        assert ranking.blocks(request(PROMPT)) == (), "before anybody told the block size"
        await eventually(lambda: len(ranking.blocks(request(PROMPT))) == 10)
        hashes = ranking.blocks(request(PROMPT))
        b.publisher.publish(stored(PROMPT))
        await eventually(lambda: held(ranking) == {"b": 10, "a": 0})
        assert ranking.rank(hashes, {})[0].replica == "b"
        b.publisher.publish(removed(hashes[4:6]))
        await eventually(lambda: held(ranking) == {"b": 4, "a": 0})
        a.publisher.publish(stored(OTHER), stored(PROMPT))
        await eventually(lambda: held(ranking) == {"b": 4, "a": 10})
        a.publisher.publish(AllBlocksCleared(), stored(OTHER))
        await eventually(lambda: held(ranking) == {"b": 4, "a": 0})
        assert held(ranking, OTHER) == {"b": 0, "a": 10}


async def test_one_that_joins_later_gets_all_that_is_held(replicas: tuple[Replica, Replica]) -> None:
    a, _ = replicas
    with ranking_of(a) as first:
        await eventually(lambda: bool(first.blocks(request(PROMPT))))
        a.publisher.publish(stored(PROMPT))
        a.publisher.publish(removed(first.blocks(request(PROMPT))[7:]))
        await eventually(lambda: held(first) == {"a": 7})
        with ranking_of(a) as second:
            await eventually(lambda: held(second) == {"a": 7})


async def test_what_one_replica_saw_in_the_store_counts_for_all(replicas: tuple[Replica, Replica]) -> None:
    def scores(ranking: Ranking) -> dict[str, float]:
        return {rank.replica: rank.score for rank in ranking.rank(ranking.blocks(request(PROMPT)), {})}

    a, b = replicas
    with ranking_of(a, b) as first:
        await eventually(lambda: bool(first.blocks(request(PROMPT))))
        hashes = first.blocks(request(PROMPT))
        a.publisher.publish(stored(PROMPT))
        await eventually(lambda: scores(first) == {"a": 0, "b": 10})
        a.publisher.publish(stored(PROMPT, medium="STORAGE", token_ids=[], block_size=0))
        await eventually(lambda: scores(first) == {"a": 0, "b": 5})
        a.publisher.publish(removed(hashes[4:], medium="STORAGE"))
        await eventually(lambda: scores(first) == {"a": 0, "b": 8})
        with ranking_of(a, b) as second:
            await eventually(lambda: scores(second) == {"a": 0, "b": 8})


async def test_a_broken_stream_leaves_the_load_and_comes_back(
    replicas: tuple[Replica, Replica], tmp_path: Path
) -> None:
    a, b = replicas
    with ranking_of(a, b) as ranking:
        await eventually(lambda: bool(ranking.blocks(request(PROMPT))))
        b.publisher.publish(stored(PROMPT))
        await eventually(lambda: held(ranking) == {"b": 10, "a": 0})
        address = Address.parse(b.feed.addresses[0])
        b.close()
        await eventually(lambda: held(ranking) == {"b": 0, "a": 0})
        blocks = ranking.blocks(request(PROMPT))
        assert ranking.rank(blocks, {"a": 0, "b": 3})[0].replica == "a"
        assert ranking.rank(blocks, {"a": 3, "b": 0})[0].replica == "b", "by load alone, and no replica is left out"
        again = await Replica(tmp_path / "again", "b").joined()
        again.publisher.publish(stored(PROMPT))
        again.feed.serve("b", SECRET, [address], BLOCK)
        await eventually(lambda: held(ranking) == {"b": 10, "a": 0})
        again.close()


async def test_strangers_hear_nothing(replicas: tuple[Replica, Replica], caplog: pytest.LogCaptureFixture) -> None:
    a, _ = replicas
    stranger = Ranking("here", b"some other secret", 5.0)
    stranger.keep({"a": a.source})
    with ranking_of(a) as ranking:
        await eventually(lambda: bool(ranking.blocks(request(PROMPT))))
        a.publisher.publish(stored(PROMPT))
        await eventually(lambda: held(ranking) == {"a": 10})
        await eventually(lambda: "client does not know the cluster secret" in caplog.text)
        assert stranger.blocks(request(PROMPT)) == ()
    stranger.close()


async def test_a_feed_is_not_taken_for_another_replicas(replicas: tuple[Replica, Replica]) -> None:
    _, b = replicas
    ranking = Ranking("here", SECRET, 5.0)
    ranking.keep({"b": b.source, "a": b.source})
    b.publisher.publish(stored(PROMPT))
    await eventually(lambda: held(ranking) == {"b": 10, "a": 0})
    ranking.close()


async def test_missed_batches_are_a_loss(replicas: tuple[Replica, Replica]) -> None:
    a, _ = replicas
    with ranking_of(a) as ranking:
        await eventually(lambda: bool(ranking.blocks(request(PROMPT))))
        a.publisher.publish(stored(PROMPT))
        await eventually(lambda: held(ranking) == {"a": 10})
        next(a.publisher._publisher._seq_gen)  # a batch that ZeroMQ dropped
        a.publisher.publish(stored(OTHER))
        await eventually(lambda: held(ranking, OTHER) == {"a": 10})
        assert held(ranking) == {"a": 0}, "what the missed batch removed isn't known"


def test_a_reader_that_is_behind_gets_the_whole_and_no_more_memory() -> None:
    reader, mirror = _Reader(), CacheMirror()
    seen = stored(range(BLOCK), token_ids=[])
    for i in range(50_000):
        seen.block_hashes = [i]
        reader.push(mirror.apply(batch(seen)), mirror)
        if i >= 100:
            reader.push(mirror.apply(batch(removed([i - 100]))), mirror)
        assert reader._blocks <= len(mirror) + 5000
    left: set[int] = set()
    for event in reader._pending:
        match event:
            case Stored(blocks):
                left.update(b for b in blocks if isinstance(b, int))
            case Removed(blocks):
                left.difference_update(b for b in blocks if isinstance(b, int))
            case Cleared():
                left.clear()
    assert left == mirror.held


def test_of_a_hybrid_models_groups_full_attention_counts() -> None:
    mirror = CacheMirror()
    window = stored(OTHER, group_idx=0, kv_cache_spec_kind="sliding_window")
    full = stored(PROMPT, group_idx=1)
    mirror.apply(batch(window))
    assert len(mirror.held) == 10, "as long as there is nothing better"
    changes = mirror.apply(batch(window, full, removed(full.block_hashes[:3], group=0)))
    assert changes == [Cleared(), Stored(tuple(full.block_hashes))]  # type: ignore[arg-type]
    mirror.apply(batch(removed(full.block_hashes[8:], group=1), removed(full.block_hashes[:2], 1, "CPU")))
    assert mirror.held == set(full.block_hashes[:8])


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_hashes_that_the_router_would_not_find_are_not_passed_on(salt: str | None) -> None:
    wrong = stored(PROMPT, salt)
    wrong.block_hashes = [block ^ 1 for block in wrong.block_hashes if isinstance(block, int)]
    for events, kept in (([stored(PROMPT, salt), wrong], 20), ([wrong, stored(PROMPT, salt)], 0)):
        mirror = CacheMirror()
        for event in events:
            mirror.apply(batch(event))
        assert len(mirror.held) == kept


def test_what_cant_be_checked_is_believed_until_something_can() -> None:
    mirror = CacheMirror()
    mirror.apply(batch(stored(PROMPT, lora_name="adapter"), stored(OTHER, parent_block_hash=5)))
    assert len(mirror.held) == 20
    wrong = stored(range(64))
    wrong.block_hashes = [1, 2, 3, 4]
    assert mirror.apply(batch(wrong)) == [Cleared()]


def test_salts_part_equal_prompts() -> None:
    hashes = [stored(PROMPT, salt).block_hashes for salt in (None, "a", "b")]
    assert len({block for blocks in hashes for block in blocks}) == 30


def test_a_block_is_held_as_long_as_there_is_a_copy_of_it() -> None:
    mirror, event = CacheMirror(), stored(PROMPT)
    once = tuple(event.block_hashes)
    assert mirror.apply(batch(event, event)) == [Stored(once)]
    assert mirror.apply(batch(removed(once[:4]))) == []
    assert mirror.apply(batch(removed(once))) == [Removed(once[:4])]
    assert mirror.held == set(once[4:])
    assert mirror.apply(batch(removed([12345]))) == []
