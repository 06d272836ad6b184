"""What an engine is told about the store: a private file that its arguments name, so that they hold no secret."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from expertmesh.errors import ConfigError
from expertmesh.kv_store.settings import StoreSettings
from expertmesh.kv_store.store import StoreLimits

HASH_ALGORITHM = "sha256_cbor"
"""vLLM's block hashes that are the same in every process."""
_PACKAGE = "expertmesh.kv_store.tier"


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Settings of one engine's tier."""

    server: StoreSettings
    limits: StoreLimits
    secret: str = field(repr=False)
    """What keys and checks of blocks are derived from; the same in all engines that share blocks."""
    weights: str
    """Revision of the checkpoint's weights."""
    report_file: Path | None = None
    """Where the engine writes what the store did (report.py)."""

    def save(self, path: Path) -> None:
        """Writes a new file that only this user can read."""
        path.touch(mode=0o600, exist_ok=False)
        path.write_bytes(TypeAdapter(type(self)).dump_json(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads what `save` wrote. Raises ConfigError, which holds nothing of the file."""
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise ConfigError(f"the KV store's settings {path} can't be used: {type(error).__name__}") from None


def engine_arguments(settings_file: Path, host_bytes: int) -> dict[str, Any]:
    """vLLM engine arguments (JSON values) that put the store under its KV cache.

    host_bytes: host memory of the engine that blocks pass through on their way, which keeps the latest of them.
    """
    tier = {"type": "KVStoreTier", "module_path": f"{_PACKAGE}.manager", "settings_file": str(settings_file)}
    return {
        "prefix_caching_hash_algo": HASH_ALGORITHM,
        "kv_transfer_config": {
            "kv_connector": "KVStoreConnector",
            "kv_connector_module_path": f"{_PACKAGE}.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "spec_name": "KVStoreSpec",
                "spec_module_path": f"{_PACKAGE}.spec",
                "cpu_bytes_to_use": host_bytes,
                "secondary_tiers": [tier],
            },
        },
    }
