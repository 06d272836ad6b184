"""ExpertMesh: Mixture-of-Experts serving on Ray, attention and experts in separate, independently elastic deployments.

>>> import expertmesh
>>> client = expertmesh.Client()  # an openai.OpenAI for the mesh at $EXPERTMESH_URL, else http://127.0.0.1:8000
>>> client.mesh.status().health  # doctest: +SKIP
'ok'

The SDK's names are imported when they are first used, so that `import expertmesh` costs next to nothing: every replica
and engine process does it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from expertmesh.errors import ExpertMeshError

if TYPE_CHECKING:
    from expertmesh.platform.client import AsyncClient, AsyncMesh, Client, Loads, Mesh, MeshStatus, Placement

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncMesh",
    "Client",
    "ExpertMeshError",
    "Loads",
    "Mesh",
    "MeshStatus",
    "Placement",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module("expertmesh.platform.client"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
