"""Which server of a cluster holds which keys."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.credentials import CredentialProvider

from expertmesh.kv_store.connection import ServerConnection
from expertmesh.kv_store.errors import StoreClosed, StoreError, StoreRefused
from expertmesh.kv_store.settings import Endpoint, StoreSettings


@dataclass(frozen=True, slots=True)
class Topology:
    """The master of each slot; None where no server is known to serve it."""

    masters: tuple[Endpoint | None, ...]

    def master_of(self, key: bytes) -> Endpoint | None:
        """The server that holds a key."""
        return self.masters[key_slot(key) % len(self.masters)]

    def endpoints(self) -> set[Endpoint]:
        """All masters."""
        return {endpoint for endpoint in self.masters if endpoint is not None}


def single(endpoint: Endpoint) -> Topology:
    """One server for everything."""
    return Topology((endpoint,))


def moved_to(error: StoreRefused, asked: Endpoint) -> Endpoint | None:
    """The server that a MOVED reply names; None for other replies. An empty host means the one that was asked."""
    words = str(error).split(" ")
    if error.code != "MOVED" or len(words) != 3:
        return None
    host, _, port = words[2].rpartition(":")
    return Endpoint(host.strip("[]") or asked.host, int(port), asked.tls) if port.isdigit() else None


def discover(
    seeds: Iterable[Endpoint], settings: StoreSettings, credentials: CredentialProvider | None, timeout_s: float
) -> Topology:
    """Asks one server after the other for the cluster's slots until one knows them.

    Raises StoreClosed with the last one's reason if none does. Takes up to `timeout_s` a server and step.
    """
    reason = "no server is known"
    for seed in seeds:
        try:
            connection = ServerConnection(seed, settings, credentials, timeout_s)
        except StoreError as error:
            reason = str(error)
            continue
        try:
            return _read_slots(connection.command("CLUSTER", "SLOTS"), seed)
        except StoreError as error:
            reason = f"{seed}: {error}"
        finally:
            connection.close()
    raise StoreClosed(f"the cluster's layout is not known; {reason}")


def _read_slots(reply: object, asked: Endpoint) -> Topology:
    """Reads [[first slot, last slot, [host, port, ...], replicas...], ...]."""
    masters: list[Endpoint | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
    try:
        for first, last, master, *_ in cast(list[list[Any]], reply):
            endpoint = Endpoint((master[0] or b"").decode() or asked.host, int(master[1]), asked.tls)
            for slot in range(first, last + 1):
                masters[slot] = endpoint
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise StoreClosed(f"its list of slots is not understood: {error}") from None
    if not any(masters):
        raise StoreClosed("it serves no slot")
    return Topology(tuple(masters))
