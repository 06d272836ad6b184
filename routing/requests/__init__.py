"""Which attention replica takes a request: pure state and arithmetic, the same in production and in replays."""

from expertmesh.routing.requests.choice import Rank, ReplicaChoice
from expertmesh.routing.requests.cost import CostModel
from expertmesh.routing.requests.events import BlockHash, Cleared, Event, EventBatch, Removed, Stored
from expertmesh.routing.requests.prefix_index import PrefixIndex

__all__ = [
    "BlockHash",
    "Cleared",
    "CostModel",
    "Event",
    "EventBatch",
    "PrefixIndex",
    "Rank",
    "Removed",
    "ReplicaChoice",
    "Stored",
]
