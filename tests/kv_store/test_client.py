"""The client against servers that hang, die, come back, move their slots and fail over."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.timing import free_port
from expertmesh.kv_store import (
    Endpoint,
    StoreClient,
    StoreClosed,
    StoreError,
    StoreRefused,
    StoreSettings,
    StoreSkipped,
    StoreTimeout,
)
from expertmesh.kv_store.channel import Reply
from expertmesh.kv_store.topology import moved_to
from tests.kv_store.conftest import PASSWORD
from tests.kv_store.servers import PATIENCE_S, Server, command, node_id, until

NewClient = Callable[[StoreSettings], StoreClient]
NewCluster = Callable[[int, int], tuple[list[Server], list[Server]]]
SHORT_S = 0.1


def put(client: StoreClient, values: dict[bytes, bytes]) -> list[Reply]:
    return client.set([(key, [memoryview(value)]) for key, value in values.items()], 60, PATIENCE_S)


def fetched(client: StoreClient, keys: list[bytes], size: int, timeout_s: float = PATIENCE_S) -> list[bytes | Reply]:
    """The values; else the replies."""
    memory = [memoryview(bytearray(size)) for _ in keys]
    replies = client.get([(key, [view]) for key, view in zip(keys, memory, strict=True)], timeout_s)
    return [bytes(view) if reply == size else reply for view, reply in zip(memory, replies, strict=True)]


def kinds(replies: list[Reply]) -> set[type]:
    return {type(reply) for reply in replies}


def test_values_and_their_absence(settings: StoreSettings, new_client: NewClient) -> None:
    client = new_client(settings)
    values = {b"key %d" % i: os.urandom(1000) for i in range(100)}
    assert put(client, values) == [1000] * 100
    assert fetched(client, [*values, b"absent"], 1000) == [*values.values(), None]
    assert client.exists([b"absent", b"key 5"], PATIENCE_S) == [None, 1]
    assert [(node.state, node.opened) for node in client.health()] == [("closed", 0)]


def test_an_empty_batch_asks_nobody(settings: StoreSettings, new_client: NewClient) -> None:
    client = new_client(settings)
    assert client.get([], PATIENCE_S) == client.set([], 60, PATIENCE_S) == client.exists([], PATIENCE_S) == []
    assert client.health() == []


def test_a_hung_server_costs_one_timeout_and_is_found_again(
    server: Server, settings: StoreSettings, new_client: NewClient
) -> None:
    client = new_client(settings)
    put(client, {b"a": b"1"})
    server.pause()
    assert kinds(client.exists([b"a", b"b"], SHORT_S)) == {StoreTimeout}
    assert kinds(client.exists([b"a"], PATIENCE_S)) == {StoreSkipped}
    assert fetched(client, [b"a"], 1)[0].__class__ is StoreSkipped
    assert kinds(put(client, {b"a": b"2"})) == {StoreSkipped}
    server.resume()
    until(lambda: client.health()[0].state == "closed", "breaker closed")
    assert fetched(client, [b"a"], 1) == [b"1"]
    assert client.health()[0].opened == 1


def test_a_server_that_never_was_there_and_then_is(
    server: Server, settings: StoreSettings, new_client: NewClient
) -> None:
    server.kill()
    client = new_client(settings)
    assert kinds(client.exists([b"a"], PATIENCE_S)) == {StoreClosed}
    assert kinds(client.exists([b"a"], PATIENCE_S)) == {StoreSkipped}
    server.start()
    until(lambda: client.exists([b"a"], PATIENCE_S) == [None], "server found")


def test_a_restart_between_two_batches_is_not_noticed(
    server: Server, settings: StoreSettings, new_client: NewClient
) -> None:
    client = new_client(settings)
    put(client, {b"a": b"1"})
    server.kill()
    server.start()
    assert fetched(client, [b"a"], 1) == [None]
    assert put(client, {b"a": b"2"}) == [1]
    assert client.health()[0].opened == 0


def test_a_server_that_is_only_slow_is_asked_again_for_values_and_left_alone_for_lookups(
    new_client: NewClient,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = new_client(StoreSettings(Endpoint("127.0.0.1", listener.getsockname()[1])))
        memory = [memoryview(bytearray(5))]

        def serve(reply: bytes) -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                peer.sendall(reply)
                peer.recv(1000)

        for reply, ask, opened in (
            (b"$5\r\nab", lambda: client.get([(b"a", memory)], 0.3), 0),
            (b":1\r\n", lambda: client.exists([b"a", b"b"], 0.3), 1),
        ):
            peer = threading.Thread(target=serve, args=(reply,))
            peer.start()
            assert kinds(ask()) == {StoreTimeout}
            peer.join()
            assert client.health()[0].opened == opened


def test_a_full_server_refuses_writes_and_still_answers_reads(
    server: Server, settings: StoreSettings, new_client: NewClient
) -> None:
    port = settings.endpoint.port
    client = new_client(settings)
    put(client, {b"a": b"1"})
    command(port, "CONFIG", "SET", "maxmemory", "1", password=PASSWORD)
    replies = put(client, {b"b": b"2", b"c": b"3"})
    assert [reply.code for reply in replies if isinstance(reply, StoreRefused)] == ["OOM", "OOM"]
    assert fetched(client, [b"a", b"b"], 1) == [b"1", None]
    assert client.health()[0].opened == 0


def test_a_wrong_password_is_refused_once_and_never_shown(
    settings: StoreSettings, new_client: NewClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    wrong = replace(settings, password="another-word-of-no-message")
    client = new_client(wrong)
    (reply,) = client.exists([b"a"], PATIENCE_S)
    assert isinstance(reply, StoreRefused)
    assert reply.code == "WRONGPASS"
    assert kinds(client.exists([b"a"], PATIENCE_S)) == {StoreSkipped}
    for text in (str(reply), repr(reply), repr(client), repr(wrong), str(wrong), repr(client.health()), caplog.text):
        assert wrong.password not in text


def test_a_missing_password_leaves_the_server_alone(settings: StoreSettings, new_client: NewClient) -> None:
    client = new_client(replace(settings, password=""))
    (reply,) = client.exists([b"a"], PATIENCE_S)
    assert isinstance(reply, StoreRefused)
    assert reply.code == "NOAUTH"
    assert kinds(client.exists([b"a"], PATIENCE_S)) == {StoreSkipped}


def cluster_settings(member: Server) -> StoreSettings:
    return StoreSettings(Endpoint("127.0.0.1", int(member.config["port"])), cluster=True)


def test_a_cluster_of_three_of_which_one_is_killed(new_cluster: NewCluster, new_client: NewClient) -> None:
    masters, _ = new_cluster(3, 0)
    client = new_client(cluster_settings(masters[0]))
    values = {b"key %d" % i: os.urandom(500) for i in range(300)}
    assert put(client, values) == [500] * 300
    assert fetched(client, list(values), 500) == list(values.values())
    sizes = [command(int(master.config["port"]), "DBSIZE") for master in masters]
    assert sum(sizes) == 300
    assert min(sizes) > 50, "each master has its part"

    masters[0].kill()  # the one that the client was told of
    got = fetched(client, list(values), 500)
    kept = [value for value in got if isinstance(value, bytes)]
    assert len(kept) == 300 - sizes[0]
    assert all(value == original for value, original in zip(got, values.values(), strict=True) if value in kept)
    assert {type(value) for value in got if not isinstance(value, bytes)} == {StoreClosed}
    again = fetched(client, list(values), 500)
    assert {type(value) for value in again if not isinstance(value, bytes)} <= {StoreSkipped, StoreClosed, StoreRefused}
    assert [value for value in again if isinstance(value, bytes)] == kept


def test_a_failover_is_followed(new_cluster: NewCluster, new_client: NewClient) -> None:
    masters, (replica,) = new_cluster(3, 1)
    client = new_client(cluster_settings(masters[1]))
    values = {b"key %d" % i: os.urandom(100) for i in range(100)}
    put(client, values)
    port = int(masters[0].config["port"])
    until(lambda: command(port, "WAIT", 1, 1000) == 1, "replica has all")
    masters[0].kill()
    until(lambda: fetched(client, list(values), 100) == list(values.values()), "replica serves its master's keys")
    assert str(Endpoint("127.0.0.1", int(replica.config["port"]))) in {node.endpoint for node in client.health()}
    assert put(client, values) == [100] * 100


def test_a_moved_slot_is_found_within_the_same_batch(new_cluster: NewCluster, new_client: NewClient) -> None:
    masters, _ = new_cluster(3, 0)
    client = new_client(cluster_settings(masters[0]))
    ports = [int(master.config["port"]) for master in masters]
    slot = command(ports[0], "CLUSTER", "KEYSLOT", "key")
    owner = ports[3 * slot // 16384]
    target = next(port for port in ports if port != owner)
    command(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", node_id(owner))
    command(owner, "CLUSTER", "SETSLOT", slot, "MIGRATING", node_id(target))
    for port in (target, *ports):
        command(port, "CLUSTER", "SETSLOT", slot, "NODE", node_id(target))
    assert put(client, {b"key": b"1"}) == [1]
    assert fetched(client, [b"key"], 1) == [b"1"]
    assert command(target, "EXISTS", "key") == 1


def test_a_cluster_that_is_away_at_the_start(new_cluster: NewCluster, new_client: NewClient) -> None:
    (only,), _ = new_cluster(1, 0)
    only.kill()
    client = new_client(cluster_settings(only))
    (reply,) = client.exists([b"a"], PATIENCE_S)
    assert isinstance(reply, StoreClosed)
    only.start()
    until(lambda: client.exists([b"a"], PATIENCE_S) == [None], "cluster found")


def test_a_server_that_is_no_cluster(settings: StoreSettings, new_client: NewClient) -> None:
    client = new_client(replace(settings, cluster=True))
    assert kinds(client.exists([b"a"], PATIENCE_S)) == {StoreClosed}


@pytest.mark.parametrize(
    ("reply", "endpoint"),
    [
        ("MOVED 3999 127.0.0.1:6381", Endpoint("127.0.0.1", 6381, True)),
        ("MOVED 3999 [::1]:6381", Endpoint("::1", 6381, True)),
        ("MOVED 3999 :6381", Endpoint("asked", 6381, True)),
        ("MOVED 3999", None),
        ("MOVED 3999 host:", None),
        ("ASK 3999 127.0.0.1:6381", None),
        ("OOM", None),
    ],
)
def test_where_a_slot_moved_to(reply: str, endpoint: Endpoint | None) -> None:
    assert moved_to(StoreRefused(reply), Endpoint("asked", 1, True)) == endpoint


def test_nothing_listens_on_a_free_port(new_client: NewClient) -> None:
    client = new_client(StoreSettings(Endpoint("127.0.0.1", free_port())))
    (reply,) = client.exists([b"a"], PATIENCE_S)
    assert isinstance(reply, StoreClosed)
    assert "can't be reached" in str(reply)


def test_errors_survive_pickling() -> None:
    for error in (StoreTimeout("late", True), StoreRefused("OOM full"), StoreClosed("gone"), StoreSkipped("later")):
        read = pickle.loads(pickle.dumps(error))
        assert type(read) is type(error)
        assert str(read) == str(error)
        assert isinstance(read, StoreError)
        assert read.__dict__ == error.__dict__
