"""Which shard holds which expert: pure functions on arrays, and the table that dispatchers read."""

from expertmesh.routing.placement.static import even_slots, slots_per_shard
from expertmesh.routing.placement.table import RoutingTable, Target, build_table

__all__ = ["RoutingTable", "Target", "build_table", "even_slots", "slots_per_shard"]
