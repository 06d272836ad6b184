"""The request router that Ray Serve runs wherever the attention deployment is called from.

Serve copies this module's class to the caller by value: it holds what depends on Serve's router and nothing else.

Serve's own way of routing (tasks that serve any pending request) is left out: with a ranking by request it waits for
ever when the preferred replica is full (Ray 2.58). Here each request chooses for itself, in the order of arrival.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import (  # type: ignore[attr-defined]  # Ray doesn't say that it exports them
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from expertmesh.deployments.requests.ranking import Ranking
from expertmesh.deployments.requests.settings import source_of
from expertmesh.deployments.requests.watched import tell, watched
from expertmesh.deployments.runtime import mesh_secret, mesh_tls, node_id
from expertmesh.platform.config import load_config
from expertmesh.routing.requests import Rank


class PrefixRouter(RequestRouter):
    """Sends a request to the replica with the least backlog and the least of its prompt to compute."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Called by Serve. kwargs: `mesh`, the configuration as a mapping, since Serve wants JSON."""
        config = load_config(kwargs["mesh"])
        self._ranking = Ranking(node_id(), mesh_secret(config), config.routing.connect_timeout_s, mesh_tls(config))
        self._turn = asyncio.Lock()
        self._room = asyncio.Event()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Called by Serve with the replicas that there are."""
        super().update_replicas(replicas)
        self._keep()
        self._room.set()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a replica can't be reached any more."""
        super().on_replica_actor_died(replica_id)
        self._keep()

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request is over, refused or failed."""
        self._ranking.finished(internal_request_id, replica_id.unique_id)
        self._room.set()

    def decrement_queue_len_cache(self, replica_id: ReplicaID) -> None:
        """Called by Serve when a replica has room again."""
        super().decrement_queue_len_cache(replica_id)
        self._room.set()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """All candidates in the order of the ranking, each a rank of its own."""
        blocks = () if pending_request is None else self._blocks(pending_request)
        candidates = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        return [[candidates[name]] for name in self._ranked(blocks) if name in candidates]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """The best replica that has room. Waits until there is one; who waits longest is first.

        A replica whose number of requests isn't known is taken to have room: it refuses if it has not.
        """
        blocks = self._blocks(pending_request)
        attempt = 0
        async with self._turn:
            self._room.clear()
            while (replica := self._best_with_room(blocks)) is None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._room.wait(), self._compute_backoff_s(attempt))
                self._room.clear()
                await self._probe_queue_lens(self._replicas_list, attempt)  # requests of others end there, too
                attempt += 1
        if (choice := watched(pending_request.args)) is not None:
            tell(choice, replica.replica_id.unique_id, len(blocks), self._ranks(blocks))
        self._ranking.routed(pending_request.metadata.internal_request_id, replica.replica_id.unique_id, blocks)
        self._record_queue_wait_time(pending_request)
        return replica

    def _best_with_room(self, blocks: Sequence[int]) -> RunningReplica | None:
        replicas = {replica.replica_id.unique_id: replica for replica in self._replicas_list}
        for name in self._ranked(blocks):
            replica = replicas[name]
            requests = self.replica_queue_len_cache.get(replica.replica_id)
            if requests is None or requests < replica.max_ongoing_requests:
                return replica
        return None

    def _ranked(self, blocks: Sequence[int]) -> list[str]:
        return [rank.replica for rank in self._ranks(blocks)]

    def _ranks(self, blocks: Sequence[int]) -> tuple[Rank, ...]:
        known = ((replica.unique_id, self.replica_queue_len_cache.get(replica)) for replica in self._replicas)
        in_flight = {name: requests for name, requests in known if requests is not None}
        return self._ranking.rank(blocks, in_flight)

    def _blocks(self, pending_request: PendingRequest) -> tuple[int, ...]:
        return self._ranking.blocks(pending_request.args[0] if pending_request.args else None)

    def _keep(self) -> None:
        replicas = self._replicas.values()
        self._ranking.keep({r.replica_id.unique_id: source_of(r.replica_metadata) for r in replicas})
