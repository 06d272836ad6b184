"""Under which keys blocks are stored, and what a value must say it comes from.

    xm1:<identity, 16 hex digits>:<HMAC-SHA256(tenant's key, identity | block hash), 40 hex digits>

A tenant's key is HMAC-SHA256(secret, tenant). So a tenant that knows a prompt, and so its block hash, can neither read
another tenant's block of it nor learn from a hit's timing that it is there, and who reads the store's keys can't tell
which prompts they are of.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache

from expertmesh.errors import ConfigError

KEY_PREFIX = b"xm1:"
LEAST_SECRET_BYTES = 16
ORIGIN_BYTES = 16
_TENANTS = 4096


@dataclass(frozen=True)
class Identity:
    """All that a block of KV cache depends on beside the tokens: blocks of different identities never mix."""

    weights: str
    """Revision of the checkpoint's weights, as its files' hash."""
    vllm_version: str
    dtype: str
    """Of the KV cache."""
    layout: str
    """Of a block in memory, with what it depends on: attention backend, parallel sizes, KV heads."""
    isa: str
    """Instruction set that packs the cache on a CPU, e.g. `amx`; the GPU's architecture otherwise."""
    block_tokens: int
    block_bytes: int

    @cached_property
    def digest(self) -> bytes:
        """32 bytes, the same in every process."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    @property
    def prefix(self) -> bytes:
        """What the keys of all its blocks begin with."""
        return KEY_PREFIX + self.digest[:8].hex().encode() + b":"


class TenantKeys:
    """The keys of one tenant's blocks of one identity."""

    def __init__(self, identity: Identity, tenant_key: bytes) -> None:
        self._identity = identity
        self._tenant_key = tenant_key
        self.origin = hmac.digest(tenant_key, b"origin" + identity.digest, "sha256")[:ORIGIN_BYTES]
        """What each value carries: who wrote it, and what."""

    def key(self, block_hash: bytes) -> bytes:
        """The key of a block. It has no braces, so that a cluster spreads a prompt's blocks over all its servers."""
        name = hmac.digest(self._tenant_key, self._identity.digest + block_hash, "sha256")[:20]
        return self._identity.prefix + name.hex().encode()


class Keyspace:
    """Keys of one identity for all tenants. `secret` is the same in all processes that share blocks.

    Raises ConfigError for a secret of less than 16 bytes.
    """

    def __init__(self, identity: Identity, secret: bytes) -> None:
        if len(secret) < LEAST_SECRET_BYTES:
            raise ConfigError(
                f"the KV store's secret has {len(secret)} bytes; at least {LEAST_SECRET_BYTES} are needed"
            )
        self.identity = identity

        @lru_cache(_TENANTS)
        def of(tenant: str) -> TenantKeys:
            return TenantKeys(identity, hmac.digest(secret, b"tenant" + tenant.encode(), "sha256"))

        self._of = of

    def of(self, tenant: str) -> TenantKeys:
        """The keys of a tenant; the empty name is a tenant as well."""
        return self._of(tenant)
