"""The store of KV blocks that attention replicas share: client, keys, codec, what guards requests, embedded server.

Knows nothing of Ray, HTTP or vLLM. `kv_store.url` accepts only `off` so far: no tier of vLLM uses it yet.
"""

from expertmesh.kv_store.client import StoreClient
from expertmesh.kv_store.embedded import EmbeddedServer
from expertmesh.kv_store.errors import StoreClosed, StoreError, StoreRefused, StoreSkipped, StoreTimeout
from expertmesh.kv_store.keys import Identity, Keyspace
from expertmesh.kv_store.settings import Endpoint, IamLogin, StoreSettings
from expertmesh.kv_store.store import BlockStore, StoreLimits

__all__ = [
    "BlockStore",
    "EmbeddedServer",
    "Endpoint",
    "IamLogin",
    "Identity",
    "Keyspace",
    "StoreClient",
    "StoreClosed",
    "StoreError",
    "StoreLimits",
    "StoreRefused",
    "StoreSettings",
    "StoreSkipped",
    "StoreTimeout",
]
