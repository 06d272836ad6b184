"""The store of KV blocks that attention replicas share: client, keys, codec, what guards requests, embedded server.

Knows nothing of Ray or HTTP, and but for `tier`, which puts it under vLLM's KV cache, nothing of vLLM.
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
