"""From the config's section `kv_store` to the server that it names."""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertmesh.errors import ConfigError, Unavailable
from expertmesh.kv_store.settings import Endpoint, IamLogin, StoreSettings
from expertmesh.kv_store.store import StoreLimits
from expertmesh.kv_store.tier.settings import TierSettings, engine_arguments

if TYPE_CHECKING:
    from expertmesh.platform.config import KVStoreConfig, MeshConfig

REPORT_NAME = "kv_store.json"
"""File in an attention replica's mailbox in which its engine tells what the store did: `counts`, `servers`."""
_SETTINGS_NAME = "kv_store.settings"
_MAX_PASSWORD_BYTES = 4096


def embedded_link(config: MeshConfig) -> Path:
    """Points to the folder of this machine's mesh's embedded server; its port tells meshes apart."""
    return config.model.resolved_cache_dir / f"kv-store-{config.ingress.port}"


def embedded_password(secret: bytes) -> str:
    """Of the embedded server: all that know the cluster's secret know it."""
    return hmac.digest(secret, b"kv_store: embedded server", "sha256").hex()


def block_secret(secret: bytes) -> str:
    """What the keys of blocks are derived from."""
    return hmac.digest(secret, b"kv_store: blocks", "sha256").hex()


def server_of(config: MeshConfig, secret: bytes) -> StoreSettings:
    """The store that the config names. `secret`: the cluster's.

    Raises ConfigError if there is none or a file can't be read, Unavailable if its embedded server isn't running.
    """
    store = config.kv_store
    if store.url == "off":
        raise ConfigError("kv_store.url is off: this mesh has no KV store")
    if store.url == "embedded":
        socket = embedded_link(config).resolve() / "socket"
        if not socket.exists():
            raise Unavailable(
                f"kv_store.url: no embedded KV store runs for a mesh on port {config.ingress.port} of this machine; "
                "`expertmesh serve` starts it with a mesh on one machine, others need the URL of a server"
            )
        return StoreSettings(Endpoint(path=str(socket)), password=embedded_password(secret))
    iam = None if store.iam is None else IamLogin(store.iam.cache_name, store.iam.region, store.iam.serverless)
    password = _password(store.password_file) if store.password_file is not None else ""
    return StoreSettings.from_url(
        store.url, username=store.username or "", password=password, ca_file=store.ca_file, iam=iam
    )


def check_store(config: MeshConfig) -> None:
    """Raises ConfigError if the rest of the config rules the store out."""
    if config.kv_store.url == "off":
        return
    if not config.attention.prefix_caching:
        raise ConfigError("attention.prefix_caching: must be true with a KV store, or set kv_store.url to off")
    if "kv_transfer_config" in config.attention.engine_args:
        raise ConfigError("attention.engine_args.kv_transfer_config: kv_store sets this, or set kv_store.url to off")


def tier_arguments(config: MeshConfig, secret: bytes, weights: str, folder: Path) -> dict[str, Any]:
    """Engine arguments of an attention replica's engine. `folder`: for files of its own, private to this user.

    secret: the cluster's; weights: the checkpoint's revision. Raises ConfigError as `server_of` does.
    """
    settings = TierSettings(
        server_of(config, secret), limits_of(config.kv_store), block_secret(secret), weights, folder / REPORT_NAME
    )
    settings.save(folder / _SETTINGS_NAME)
    return engine_arguments(folder / _SETTINGS_NAME, config.kv_store.host_memory_mib << 20)


def limits_of(store: KVStoreConfig) -> StoreLimits:
    """The config's limits. Half of the host memory may wait to be written, the rest is free for loads."""
    return StoreLimits(
        lookup_timeout_s=store.lookup_timeout_ms / 1000,
        load_timeout_s=store.load_timeout_s,
        write_timeout_s=store.write_timeout_s,
        ttl_s=store.ttl_s,
        max_queued_bytes=(store.host_memory_mib << 20) // 2,
    )


def _password(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_PASSWORD_BYTES + 1)
        password = raw.decode().rstrip("\r\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"kv_store.password_file: can't read {path}: {type(error).__name__}") from None
    if not password or len(raw) > _MAX_PASSWORD_BYTES:
        raise ConfigError(f"kv_store.password_file: {path} must hold 1 to {_MAX_PASSWORD_BYTES} bytes")
    return password
