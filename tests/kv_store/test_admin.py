"""What the command line asks of a store."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.timing import free_port
from expertmesh.kv_store import Endpoint, Keyspace, StoreClient, StoreClosed, StoreRefused, StoreSettings, admin
from expertmesh.kv_store.codec import Verdict, seal
from tests.kv_store.conftest import PASSWORD
from tests.kv_store.servers import PATIENCE_S, Server, command

NewClient = Callable[[StoreSettings], StoreClient]


def fill(client: StoreClient, keyspace: Keyspace, count: int, tenant: str = "") -> list[bytes]:
    keys = keyspace.of(tenant)
    named = [keys.key(b"%d" % i) for i in range(count)]
    payload = memoryview(os.urandom(1000))
    items = [(key, [memoryview(seal(key, keys.origin, payload)), payload]) for key in named]
    assert all(isinstance(reply, int) for reply in client.set(items, 60, PATIENCE_S))
    return named


@pytest.fixture
def other(keyspace: Keyspace) -> Keyspace:
    return Keyspace(replace(keyspace.identity, dtype="bfloat16"), b"a secret of the mesh")


def test_stats_count_blocks_by_identity(
    settings: StoreSettings, new_client: NewClient, keyspace: Keyspace, other: Keyspace
) -> None:
    client = new_client(settings)
    fill(client, keyspace, 1500)
    fill(client, other, 3)
    command(settings.endpoint.port, "SET", "of somebody else", "x", password=PASSWORD)
    (found,) = admin.stats(settings)
    assert found.endpoint == str(settings.endpoint)
    assert found.version.startswith("9.")
    assert found.blocks == 1503
    assert found.by_identity == {keyspace.identity.digest[:8].hex(): 1500, other.identity.digest[:8].hex(): 3}
    assert found.used_bytes > 1_500_000
    assert (found.limit_bytes, found.policy, found.evicted) == (0, "noeviction", 0)


def test_flush_removes_blocks_of_one_identity_or_all_and_nothing_else(
    settings: StoreSettings, new_client: NewClient, keyspace: Keyspace, other: Keyspace
) -> None:
    client = new_client(settings)
    kept, gone = fill(client, keyspace, 5), fill(client, other, 7)
    command(settings.endpoint.port, "SET", "of somebody else", "x", password=PASSWORD)
    assert admin.flush(settings, other.identity.prefix) == 7
    assert client.exists([*kept, *gone], PATIENCE_S) == [1] * 5 + [None] * 7
    assert admin.flush(settings) == 5
    assert command(settings.endpoint.port, "KEYS", "*", password=PASSWORD) == [b"of somebody else"]


@pytest.mark.parametrize("prefix", [b"", b"xm1", b"xm1:*", b"xm1:[ab]"])
def test_flush_of_what_are_no_blocks_is_refused(settings: StoreSettings, prefix: bytes) -> None:
    with pytest.raises(ValueError, match="not a prefix of blocks' keys"):
        admin.flush(settings, prefix)


def test_verify_finds_what_is_damaged(settings: StoreSettings, new_client: NewClient, keyspace: Keyspace) -> None:
    keys = fill(new_client(settings), keyspace, 10, "a tenant")
    port = settings.endpoint.port
    command(port, "SETRANGE", keys[0], 500, "damage", password=PASSWORD)
    command(port, "SET", keys[1], "short", password=PASSWORD)
    command(port, "SET", keys[2], "x" * 1048, password=PASSWORD)
    assert admin.verify(settings) == {
        Verdict.SOUND: 7,
        Verdict.CORRUPT: 1,
        Verdict.TRUNCATED: 1,
        Verdict.FOREIGN: 1,
    }


def test_all_servers_of_a_cluster_are_asked(
    new_cluster: Callable[[int, int], tuple[list[Server], list[Server]]], new_client: NewClient, keyspace: Keyspace
) -> None:
    masters, _ = new_cluster(3, 0)
    settings = StoreSettings(Endpoint("127.0.0.1", int(masters[0].config["port"])), cluster=True)
    fill(new_client(settings), keyspace, 90)
    found = admin.stats(settings)
    assert len(found) == 3
    assert sum(server.blocks for server in found) == 90
    assert admin.verify(settings)[Verdict.SOUND] == 90
    assert admin.flush(settings) == 90


def test_a_server_that_is_away_or_refuses_is_told(settings: StoreSettings) -> None:
    with pytest.raises(StoreClosed, match="can't be reached"):
        admin.stats(StoreSettings(Endpoint("127.0.0.1", free_port())))
    with pytest.raises(StoreRefused, match="WRONGPASS") as caught:
        admin.stats(replace(settings, password="another-secret"))
    assert "another-secret" not in str(caught.value)
