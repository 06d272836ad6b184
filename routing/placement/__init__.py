"""Which shard holds which expert: pure functions on arrays, and the table that dispatchers read."""

from expertmesh.routing.placement.balance import balancedness, layer_balancedness
from expertmesh.routing.placement.elastic import adopted, evened, filled, holders, lent, share, surplus
from expertmesh.routing.placement.loaded import loaded_slots
from expertmesh.routing.placement.loads import Loads, Shift
from expertmesh.routing.placement.moves import Move, applied
from expertmesh.routing.placement.rebalance import Limits, plan
from expertmesh.routing.placement.repair import Repair, repair
from expertmesh.routing.placement.static import even_slots, slots_per_shard
from expertmesh.routing.placement.table import RoutingTable, Target, build_table

__all__ = [
    "Limits",
    "Loads",
    "Move",
    "Repair",
    "RoutingTable",
    "Shift",
    "Target",
    "adopted",
    "applied",
    "balancedness",
    "build_table",
    "even_slots",
    "evened",
    "filled",
    "holders",
    "layer_balancedness",
    "lent",
    "loaded_slots",
    "plan",
    "repair",
    "share",
    "slots_per_shard",
    "surplus",
]
