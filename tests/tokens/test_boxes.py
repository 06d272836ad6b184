"""Inbox and outboxes over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import AsyncGenerator

import pytest
from vllm.v1.engine import EngineCoreOutput

from expertmesh.deployments.member_server import MemberServer
from expertmesh.deployments.source import Source
from expertmesh.deployments.tokens import outbox as outbox_module
from expertmesh.deployments.tokens.inbox import Inbox
from expertmesh.deployments.tokens.link import LinkLost
from expertmesh.deployments.tokens.outbox import Outboxes
from expertmesh.routing.transport import Address

SECRET = b"a secret of the cluster"
WITHIN_S = 20


@contextlib.asynccontextmanager
async def boxes(family: str = "tcp", secret: bytes = SECRET) -> AsyncGenerator[tuple[Inbox, Outboxes]]:
    """An inbox, and a replica's outboxes on the same node."""
    address = Address("tcp", "127.0.0.1", 0) if family == "tcp" else Address("unix", f"expertmesh-test-{id(object())}")
    inbox = Inbox("ingress", "here", SECRET, [address])
    outboxes = Outboxes("here", secret, 5)
    try:
        yield inbox, outboxes
    finally:
        outboxes.close()
        inbox.close()


def token(request_id: str, number: int) -> EngineCoreOutput:
    return EngineCoreOutput(request_id, [number])


class Arrivals:
    """A sink that keeps what comes."""

    def __init__(self, inbox: Inbox, request_id: str) -> None:
        self._queue: asyncio.Queue[list[EngineCoreOutput] | BaseException | None] = asyncio.Queue()
        inbox.expect(request_id, self)

    def took(self, outputs: list[EngineCoreOutput]) -> None:
        self._queue.put_nowait(outputs)

    def ended(self, error: BaseException | None) -> None:
        self._queue.put_nowait(error)

    async def next(self) -> list[EngineCoreOutput] | None:
        """None at the end. Raises the error that it ended with."""
        item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item


async def ids(arrivals: Arrivals) -> list[int]:
    """Of the next outputs."""
    async with asyncio.timeout(WITHIN_S):
        outputs = await arrivals.next()
    assert outputs is not None
    return [number for output in outputs for number in output.new_token_ids]


async def end_of(arrivals: Arrivals) -> None:
    async with asyncio.timeout(WITHIN_S):
        assert await arrivals.next() is None


@pytest.mark.parametrize("family", ["tcp", "unix"])
async def test_each_request_gets_its_own_in_order(family: str) -> None:
    async with boxes(family) as (inbox, outboxes):
        first, second = Arrivals(inbox, "first"), Arrivals(inbox, "second")
        box = await outboxes.to(inbox.source)
        assert await outboxes.to(inbox.source) is box, "one connection for all"
        box.put("first", [])
        assert await ids(first) == []
        for number in range(3):
            box.put("first", [token("first", number)])
            box.put("second", [token("second", 10 + number)])
        box.end("first")
        assert await ids(first) == [0, 1, 2], "what was put in one turn of the loop comes at once"
        assert await ids(second) == [10, 11, 12]
        await end_of(first)
        assert (inbox.expects("first"), inbox.expects("second")) == (False, True)
        box.put("second", [token("second", 13)])
        assert await ids(second) == [13]


async def test_what_nobody_expects_is_dropped() -> None:
    async with boxes() as (inbox, outboxes):
        Arrivals(inbox, "left")
        stays = Arrivals(inbox, "stays")
        box = await outboxes.to(inbox.source)
        box.put("left", [token("left", 1)])
        box.put("stays", [])
        assert await ids(stays) == []
        inbox.forget("left")
        box.put("left", [token("left", 2)])
        box.end("left")
        box.put("stays", [token("stays", 3)])
        assert await ids(stays) == [3]


async def test_a_replica_that_goes_ends_its_requests_and_no_others() -> None:
    async with boxes() as (inbox, outboxes):
        other = Outboxes("here", SECRET, 5)
        lost, kept, over = Arrivals(inbox, "lost"), Arrivals(inbox, "kept"), Arrivals(inbox, "over")
        one, two = await outboxes.to(inbox.source), await other.to(inbox.source)
        one.put("lost", [token("lost", 1)])
        one.put("over", [token("over", 1)])
        one.end("over")
        two.put("kept", [token("kept", 1)])
        assert await ids(lost) == [1]
        assert await ids(over) == [1]
        await end_of(over)
        outboxes.close()
        with pytest.raises(LinkLost):
            await ids(lost)
        assert await ids(kept) == [1]
        two.put("kept", [token("kept", 2)])
        assert await ids(kept) == [2]
        other.close()


async def test_a_replica_notices_that_the_ingress_is_gone_and_comes_back_to_another() -> None:
    async with boxes() as (inbox, outboxes):
        Arrivals(inbox, "a")
        box = await outboxes.to(inbox.source)
        box.put("a", [])
        inbox.close()
        async with asyncio.timeout(WITHIN_S):
            while not box.closed:
                await asyncio.sleep(0.01)
        with pytest.raises(LinkLost):
            box.put("a", [])
        assert not box.pending
        with pytest.raises(LinkLost, match="can't be reached"):
            await outboxes.to(inbox.source)
    async with boxes() as (inbox, _):
        a = Arrivals(inbox, "a")
        again = Outboxes("here", SECRET, 5)
        (await again.to(inbox.source)).put("a", [])
        assert await ids(a) == []
        again.close()


async def test_who_asks_at_once_shares_a_connection_also_after_one_has_ended() -> None:
    async with boxes() as (inbox, outboxes):
        for _ in range(3):
            box, same = await asyncio.gather(outboxes.to(inbox.source), outboxes.to(inbox.source))
            assert box is same
            box._writer.transport.abort()
            async with asyncio.timeout(WITHIN_S):
                while not box.closed:
                    await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        assert (outboxes._running, outboxes._boxes, len(outboxes._turns)) == (set(), {}, 0)


async def test_a_request_that_is_cancelled_while_its_replica_connects_leaves_no_connection() -> None:
    async with boxes() as (inbox, outboxes):
        asking = asyncio.create_task(outboxes.to(inbox.source))
        await asyncio.sleep(0)  # its thread connects
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        came = asyncio.create_task(outboxes.to(inbox.source))
        async with asyncio.timeout(WITHIN_S):
            while len(inbox._server._serving) != 1 or not came.done():
                await asyncio.sleep(0.01)
        assert len(outboxes._running) == 1
    gc.collect()  # warns of a socket that is still open


async def test_an_ingress_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox_module, "_MOST_BEHIND", 100)
    async with boxes() as (inbox, outboxes):
        box = await outboxes.to(inbox.source)
        box.put("a", [token("a", number) for number in range(101)])
        async with asyncio.timeout(WITHIN_S):
            while not box.closed:
                await asyncio.sleep(0.01)


async def test_strangers_are_refused() -> None:
    async with boxes(secret=b"another secret") as (inbox, outboxes):
        with pytest.raises(LinkLost, match="can't be reached"):
            await outboxes.to(inbox.source)
    with pytest.raises(LinkLost, match="can't be reached"):
        await Outboxes("elsewhere", SECRET, 5).to(Source("here", ("unix:@expertmesh-test",)))


async def test_who_speaks_something_else_is_refused() -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    log = logging.getLogger("expertmesh.test")
    server = MemberServer("x", "other-1", SECRET, [Address("tcp", "127.0.0.1", 0)], say_nothing, log)
    try:
        with pytest.raises(LinkLost, match="speaks other-1"):
            await Outboxes("here", SECRET, 5).to(Source("here", server.addresses))
    finally:
        server.close()


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
async def test_a_server_that_closes_while_somebody_comes_keeps_no_socket(turns: int) -> None:
    """Whether its turn has come yet, it is on its way or is being served."""

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)

    server = MemberServer("x", "other-1", SECRET, [], say_nothing, logging.getLogger("expertmesh.test"))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    server._admit(ours)
    for _ in range(turns):
        await asyncio.sleep(0)
    server.close()
    for _ in range(5):
        await asyncio.sleep(0)
    assert ours.fileno() == -1
    theirs.close()


async def test_a_message_that_is_none_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with boxes() as (inbox, outboxes):
        lost = Arrivals(inbox, "lost")
        box = await outboxes.to(inbox.source)
        box.put("lost", [])
        assert await ids(lost) == []
        box._writer.write(b"\0\0\0\5" + b"\0\1" + b"abc")
        with pytest.raises(LinkLost):
            await ids(lost)
        assert "sent what it should not" in caplog.text
