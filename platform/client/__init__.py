"""The client SDK: OpenAI's clients pointed at a mesh, and its admin API as typed values.

Light to import: neither torch, Ray nor vLLM.
"""

from __future__ import annotations

from expertmesh.platform.client._models import (
    AttentionReplica,
    DispatchCounts,
    ExpertShard,
    Heat,
    History,
    HistorySample,
    LoadedBytes,
    Loads,
    MeshEvent,
    MeshStatus,
    Placement,
    PlacementSummary,
    Plan,
    ReplicaLoad,
    ReplicaRate,
    Served,
    ShardRate,
    Wanted,
)
from expertmesh.platform.client._settings import DEFAULT_URL, KEY_ENV, KEY_FILE_ENV, URL_ENV
from expertmesh.platform.client.client import AsyncClient, Client
from expertmesh.platform.client.mesh import AsyncMesh, Mesh, RouteName

__all__ = [
    "DEFAULT_URL",
    "KEY_ENV",
    "KEY_FILE_ENV",
    "URL_ENV",
    "AsyncClient",
    "AsyncMesh",
    "AttentionReplica",
    "Client",
    "DispatchCounts",
    "ExpertShard",
    "Heat",
    "History",
    "HistorySample",
    "LoadedBytes",
    "Loads",
    "Mesh",
    "MeshEvent",
    "MeshStatus",
    "Placement",
    "PlacementSummary",
    "Plan",
    "ReplicaLoad",
    "ReplicaRate",
    "RouteName",
    "Served",
    "ShardRate",
    "Wanted",
]
