"""Bulk reads and writes on a store of one server or many."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from expertmesh.kv_store.channel import Buffers, Channel, Reply
from expertmesh.kv_store.credentials import provider_of
from expertmesh.kv_store.errors import StoreClosed, StoreError, StoreRefused, StoreSkipped
from expertmesh.kv_store.node import Node
from expertmesh.kv_store.settings import Endpoint, StoreSettings
from expertmesh.kv_store.topology import Topology, discover, moved_to, single

_PROBE_TIMEOUT_S = 1.0
_RETRY_S = 1.0
_IDLE_S = 60.0
"""The cluster's layout is asked for this often even if nothing went wrong."""
_FAN_OUT = 16
"""Servers that one batch talks to at once; more wait for each other."""


_Work = Callable[[Channel, list[int], float], list[Reply]]
"""Does the items of these positions by the deadline."""


@dataclass(frozen=True, slots=True)
class NodeHealth:
    """A server as the client sees it."""

    endpoint: str
    state: str
    """closed, open or half_open, of its circuit breaker."""
    opened: int
    """How often the breaker opened."""


class StoreClient:
    """Never raises for a server: each item of a batch has a reply of its own, and a StoreError is one of them.

    Each batch takes its timeout at most: what a server hasn't done by then is a StoreTimeout. A server that failed
    isn't asked again before a background thread found it answering. Of a cluster, servers are asked at the same time,
    MOVED is followed at once, and a failover as soon as a server tells of it; a key whose slot is just being moved
    (ASK) is a refusal, as a cache can be without it. Safe for concurrent use.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        self._credentials = provider_of(settings)
        self._lock = threading.Lock()
        self._nodes: dict[Endpoint, Node] = {}
        self._topology = single(settings.endpoint)
        self._known = not settings.cluster
        self._fan_out = ThreadPoolExecutor(_FAN_OUT, "kv-store-client") if settings.cluster else None
        self._wake = threading.Event()
        self._closing = False
        if settings.cluster:
            self._discover()
        self._care = threading.Thread(target=self._take_care, name="kv-store-care", daemon=True)
        self._care.start()

    def get(self, items: Sequence[tuple[bytes, Buffers]], timeout_s: float) -> list[Reply]:
        """Reads values into the buffers of (key, buffers); see `Channel.get`."""
        return self._batch(
            [key for key, _ in items],
            lambda channel, chosen, deadline: channel.get([items[i] for i in chosen], deadline),
            timeout_s,
            patient=True,
        )

    def set(self, items: Sequence[tuple[bytes, Buffers]], ttl_s: int, timeout_s: float) -> list[Reply]:
        """Writes the buffers of (key, buffers) for `ttl_s` seconds; see `Channel.set`."""
        return self._batch(
            [key for key, _ in items],
            lambda channel, chosen, deadline: channel.set([items[i] for i in chosen], ttl_s, deadline),
            timeout_s,
            patient=True,
        )

    def exists(self, keys: Sequence[bytes], timeout_s: float) -> list[Reply]:
        """1 for each key that is there, else None."""
        return self._batch(
            keys,
            lambda channel, chosen, deadline: channel.exists([keys[i] for i in chosen], deadline),
            timeout_s,
            patient=False,
        )

    def health(self) -> list[NodeHealth]:
        """The servers that were asked so far, by address."""
        with self._lock:
            nodes = sorted(self._nodes.values(), key=lambda node: str(node.endpoint))
        return [NodeHealth(str(node.endpoint), node.state.value, node.opened) for node in nodes]

    def close(self) -> None:
        """Ends the background thread and closes all connections; batches under way end first."""
        self._closing = True
        self._wake.set()
        self._care.join()
        if self._fan_out is not None:
            self._fan_out.shutdown()
        with self._lock:
            nodes = list(self._nodes.values())
        for node in nodes:
            node.close()

    def _batch(self, keys: Sequence[bytes], work: _Work, timeout_s: float, patient: bool) -> list[Reply]:
        deadline = time.monotonic() + timeout_s
        replies: list[Reply] = [StoreClosed("no server is known for the key")] * len(keys)
        by_master: dict[Endpoint, list[int]] = {}
        topology = self._topology
        for i, key in enumerate(keys):
            master = topology.master_of(key) if self._known else None
            if master is not None:
                by_master.setdefault(master, []).append(i)
        moved: dict[Endpoint, list[int]] = {}
        for master, chosen, answers in self._ask(by_master, work, deadline, patient):
            for i, answer in zip(chosen, answers, strict=True):
                replies[i] = answer
                target = moved_to(answer, master) if isinstance(answer, StoreRefused) else None
                if target is not None:
                    moved.setdefault(target, []).append(i)
        if moved:
            self._wake.set()
            for _, chosen, answers in self._ask(moved, work, deadline, patient):
                for i, answer in zip(chosen, answers, strict=True):
                    replies[i] = answer
        return replies

    def _ask(
        self,
        parts: dict[Endpoint, list[int]],
        work: _Work,
        deadline: float,
        patient: bool,
    ) -> list[tuple[Endpoint, list[int], list[Reply]]]:
        def ask(endpoint: Endpoint, chosen: list[int]) -> list[Reply]:
            node = self._node(endpoint)
            try:
                answers = node.run(lambda channel: work(channel, chosen, deadline), deadline, patient)
            except StoreError as error:
                if not isinstance(error, StoreSkipped):
                    self._wake.set()
                return [error] * len(chosen)
            if node.refused([answer for answer in answers if isinstance(answer, StoreRefused)]):
                self._wake.set()
            return answers

        if self._fan_out is None or len(parts) < 2:
            return [(endpoint, chosen, ask(endpoint, chosen)) for endpoint, chosen in parts.items()]
        futures = [self._fan_out.submit(ask, endpoint, chosen) for endpoint, chosen in parts.items()]
        return [(*part, future.result()) for part, future in zip(parts.items(), futures, strict=True)]

    def _node(self, endpoint: Endpoint) -> Node:
        with self._lock:
            if endpoint not in self._nodes:
                self._nodes[endpoint] = Node(endpoint, self._settings, self._credentials)
            return self._nodes[endpoint]

    def _discover(self) -> None:
        """Asks all that may know for the cluster's layout, and forgets servers that are no part of it."""
        with self._lock:
            known = [node.endpoint for node in self._nodes.values() if node.probe_in_s() is None]
            seeds = dict.fromkeys([*known, self._settings.endpoint, *self._topology.endpoints()])
        try:
            topology: Topology = discover(seeds, self._settings, self._credentials, _PROBE_TIMEOUT_S)
        except StoreClosed:
            return
        with self._lock:
            self._topology, self._known = topology, True
            gone = [self._nodes.pop(endpoint) for endpoint in self._nodes.keys() - topology.endpoints()]
        for node in gone:
            node.close()

    def _take_care(self) -> None:
        """Probes servers that failed and follows the cluster's layout, until the client is closed."""
        while not self._closing:
            self._wake.wait(self._pause_s())
            self._wake.clear()
            if self._closing:
                return
            if self._settings.cluster:
                self._discover()
            with self._lock:
                nodes = list(self._nodes.values())
            for node in nodes:
                node.probe(_PROBE_TIMEOUT_S)

    def _pause_s(self) -> float:
        with self._lock:
            due = [wait for node in self._nodes.values() if (wait := node.probe_in_s()) is not None]
        if not self._known or (due and self._settings.cluster):  # a failover may be under way
            due.append(_RETRY_S)
        return min(due, default=_IDLE_S)
