"""Which attention replica takes a request: pure state and arithmetic, the same in production and in replays."""

from expertmesh.routing.requests.choice import Rank, ReplicaChoice
from expertmesh.routing.requests.cost import CostModel
from expertmesh.routing.requests.events import BlockHash, Cleared, Event, EventBatch, Lapsed, Offloaded, Removed, Stored
from expertmesh.routing.requests.prefix_index import PrefixIndex
from expertmesh.routing.requests.store_content import StoreContent

__all__ = [
    "BlockHash",
    "Cleared",
    "CostModel",
    "Event",
    "EventBatch",
    "Lapsed",
    "Offloaded",
    "PrefixIndex",
    "Rank",
    "Removed",
    "ReplicaChoice",
    "StoreContent",
    "Stored",
]
