"""What a person asks of a store: how full it is, empty it, are its values sound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

from expertmesh.kv_store.codec import HEADER_BYTES, Verdict, judge
from expertmesh.kv_store.connection import ServerConnection
from expertmesh.kv_store.credentials import provider_of
from expertmesh.kv_store.keys import KEY_PREFIX
from expertmesh.kv_store.settings import StoreSettings
from expertmesh.kv_store.topology import discover

_SCAN_COUNT = "512"


@dataclass(frozen=True, slots=True)
class ServerStats:
    """One server's own numbers; bytes are those that it counts for values, not its process's."""

    endpoint: str
    version: str
    blocks: int
    used_bytes: int
    limit_bytes: int
    """0: none."""
    policy: str
    evicted: int
    expired: int
    by_identity: dict[str, int]
    """Blocks by the hash of what wrote them."""


def _servers(settings: StoreSettings, timeout_s: float, stack: ExitStack) -> Iterator[tuple[str, ServerConnection]]:
    credentials = provider_of(settings)
    endpoints = {settings.endpoint}
    if settings.cluster:
        endpoints = discover([settings.endpoint], settings, credentials, timeout_s).endpoints()
    for endpoint in sorted(endpoints, key=str):
        connection = ServerConnection(endpoint, settings, credentials, timeout_s)
        stack.callback(connection.close)
        yield str(endpoint), connection


def _keys(connection: ServerConnection, prefix: bytes) -> Iterator[list[bytes]]:
    cursor: bytes | None = b"0"
    while cursor is not None:
        reply = cast(list[Any], connection.command("SCAN", cursor, "MATCH", prefix + b"*", "COUNT", _SCAN_COUNT))
        following, keys = reply
        yield keys
        cursor = None if bytes(following) == b"0" else bytes(following)


def _info(connection: ServerConnection) -> dict[str, str]:
    text = cast(bytes, connection.command("INFO")).decode()
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def stats(settings: StoreSettings, timeout_s: float = 10.0) -> list[ServerStats]:
    """The servers' numbers. Takes time in proportion to the number of keys. Raises StoreError."""
    found = []
    with ExitStack() as stack:
        for endpoint, connection in _servers(settings, timeout_s, stack):
            identities: Counter[str] = Counter()
            for keys in _keys(connection, KEY_PREFIX):
                identities.update(key.split(b":")[1].decode("ascii", "replace") for key in keys)
            info = _info(connection)
            found.append(
                ServerStats(
                    endpoint,
                    info.get("valkey_version") or info["redis_version"],
                    identities.total(),
                    int(info["used_memory"]),
                    int(info["maxmemory"]),
                    info["maxmemory_policy"],
                    int(info["evicted_keys"]),
                    int(info["expired_keys"]),
                    dict(identities),
                )
            )
    return found


def flush(settings: StoreSettings, prefix: bytes = KEY_PREFIX, timeout_s: float = 10.0) -> int:
    """Removes blocks, those of one identity by its `Identity.prefix`; nothing else of the server. Returns how many.

    Raises StoreError, ValueError for a prefix that isn't one of blocks.
    """
    if not prefix.startswith(KEY_PREFIX) or any(sign in prefix for sign in b"*?[\\"):
        raise ValueError(f"{prefix!r} is not a prefix of blocks' keys")
    removed = 0
    with ExitStack() as stack:
        for _, connection in _servers(settings, timeout_s, stack):
            for keys in _keys(connection, prefix):
                for key in keys:  # one by one: a cluster's keys are of many slots
                    removed += int(cast(int, connection.command("UNLINK", key)))
    return removed


def verify(settings: StoreSettings, timeout_s: float = 10.0) -> dict[Verdict, int]:
    """Reads every block and counts what they turned out to be, of any identity and tenant. Raises StoreError."""
    verdicts: Counter[Verdict] = Counter(dict.fromkeys(Verdict, 0))
    with ExitStack() as stack:
        for _, connection in _servers(settings, timeout_s, stack):
            for keys in _keys(connection, KEY_PREFIX):
                for key in keys:
                    value = cast(bytes | None, connection.command("GET", key))
                    if value is not None:  # else it expired on the way
                        view = memoryview(value)
                        verdicts[judge(key, view[:HEADER_BYTES], view[HEADER_BYTES:])] += 1
    return dict(verdicts)
