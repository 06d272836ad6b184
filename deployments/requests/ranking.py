"""The state that requests are routed by: the ranking's, kept in step with Serve's replicas and their KV events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from vllm.v1.engine import EngineCoreRequest

from expertmesh.deployments.requests.follower import Follower
from expertmesh.deployments.requests.hashes import PromptHasher
from expertmesh.deployments.source import Source
from expertmesh.routing.requests import Event, EventBatch, Rank, ReplicaChoice
from expertmesh.routing.transport import Tls


class Ranking:
    """A ReplicaChoice that knows the attention replicas that there are. Owned by one event loop.

    Replicas are ranked by load and prefix while their KV events come in, and by load while they don't.
    """

    def __init__(self, here: str, secret: bytes, connect_timeout_s: float, tls: Tls | None = None) -> None:
        """here: this node's id; secret: the cluster's; tls: what other nodes are reached with."""
        self._here = here
        self._secret = secret
        self._connect_timeout_s = connect_timeout_s
        self._tls = tls
        self._choice = ReplicaChoice()
        self._followers: dict[str, Follower | None] = {}
        self._sequences: dict[str, int] = {}
        self._block_tokens: dict[str, int] = {}
        self._hasher: PromptHasher | None = None

    def keep(self, sources: Mapping[str, Source | None]) -> None:
        """Makes these the replicas: id -> where its events are. Those that are new take requests from now on."""
        for replica in self._followers.keys() - sources.keys():
            follower = self._followers.pop(replica)
            if follower is not None:
                follower.stop()
            self._choice.remove(replica)
            self._block_tokens.pop(replica, None)
        for replica in sources.keys() - self._followers.keys():
            source = sources[replica]
            self._choice.add(replica)
            self._choice.lose(replica)
            self._sequences[replica] = 0
            self._followers[replica] = (
                None
                if source is None
                else Follower(replica, source, self._here, self._secret, self._connect_timeout_s, self, self._tls)
            )
        self._agree()

    def close(self) -> None:
        """Ends the streams."""
        self.keep({})

    def opened(self, replica: str, block_tokens: int) -> None:
        """Implements Reader."""
        self._block_tokens[replica] = block_tokens
        self._agree()

    def told(self, replica: str, events: Sequence[Event]) -> None:
        """Implements Reader."""
        self._choice.apply(replica, EventBatch(self._sequences[replica], tuple(events)))
        self._sequences[replica] += 1

    def lost(self, replica: str) -> None:
        """Implements Reader."""
        self._choice.lose(replica)

    def blocks(self, request: object) -> tuple[int, ...]:
        """The request's blocks; none for what is no request for tokens, or before any replica told its block size."""
        if self._hasher is None or not isinstance(request, EngineCoreRequest):
            return ()
        return self._hasher(request)

    def rank(self, blocks: Sequence[int], in_flight: Mapping[str, int]) -> tuple[Rank, ...]:
        """The replicas, the best first. in_flight: requests that each says it has, where that is known."""
        for replica in self._followers:
            self._choice.observe(replica, in_flight.get(replica, 0))
        return self._choice.rank(blocks)

    def routed(self, request: str, replica: str, blocks: Sequence[int]) -> None:
        """The request is sent to that replica; again, if the replica refused it before."""
        self.finished(request, replica)
        self._choice.routed(_key(request, replica), replica, blocks)

    def finished(self, request: str, replica: str) -> None:
        """The request is over at that replica, whatever way."""
        self._choice.finished(_key(request, replica))

    def _agree(self) -> None:
        """Hashes prompts in the blocks that most replicas have. Others never match, and so are ranked by load."""
        sizes = Counter(self._block_tokens.values()).most_common(1)
        if sizes and (self._hasher is None or self._hasher.block_tokens != sizes[0][0]):
            self._hasher = PromptHasher(sizes[0][0])


def _key(request: str, replica: str) -> str:
    """A request that is refused by one replica and taken by another is ended at the first one late."""
    return f"{request}@{replica}"
