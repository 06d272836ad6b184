"""Where the store is and how one gets in: parsed once, refused where it can't be right."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from expertmesh.errors import ConfigError

DEFAULT_PORT = 6379
_FORMS = "redis://HOST[:PORT], rediss://HOST[:PORT] or unix:///PATH, with ?cluster=true for a cluster"
_LONGEST_UNIX_PATH = 107


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One server: a unix socket (`path`) or a TCP port (`host`, `port`), the latter with TLS or without."""

    host: str = ""
    port: int = 0
    tls: bool = False
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class IamLogin:
    """ElastiCache's IAM authentication: who we are comes from boto3's usual credentials."""

    cache_name: str
    """Id of the replication group, or name of the serverless cache; in lower case, as AWS keeps it."""
    region: str
    serverless: bool = False


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """A store's address and login. `repr` and `str` never show the password."""

    endpoint: Endpoint
    username: str = ""
    password: str = field(default="", repr=False)
    cluster: bool = False
    ca_file: Path | None = None
    """PEM file of the authorities that may sign the server's certificate; None: those of the system."""
    iam: IamLogin | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError for what can't go together."""
        if self.ca_file is not None and not self.endpoint.tls:
            raise ConfigError(f"a CA file is for rediss:// only; the store is {self.endpoint}")
        if self.ca_file is not None and not self.ca_file.is_file():
            raise ConfigError(f"the CA file {str(self.ca_file)!r} is not there")
        if self.cluster and self.endpoint.path:
            raise ConfigError("a cluster can't be reached by a unix socket")
        if self.iam is not None:
            if not self.endpoint.tls:
                raise ConfigError("IAM authentication needs TLS: use rediss://")
            if self.password:
                raise ConfigError("with IAM authentication there is no password")
            if not self.username:
                raise ConfigError("IAM authentication needs the user name of the ElastiCache user")
        if self.username and not self.password and self.iam is None:
            raise ConfigError(f"a password is missing for the user {self.username!r}")

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        username: str = "",
        password: str = "",
        ca_file: Path | None = None,
        iam: IamLogin | None = None,
    ) -> StoreSettings:
        """Reads a URL; a user and password in it count where none are given beside it.

        Raises ConfigError, which never quotes a part of the URL that may hold a secret.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError(f"kv_store.url is not a URL; allowed: {_FORMS}") from None
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        cluster = query.pop("cluster", "false")
        if query:
            raise ConfigError(f"kv_store.url: unknown option {sorted(query)[0]!r}; allowed: cluster")
        if cluster not in ("true", "false"):
            raise ConfigError("kv_store.url: cluster must be true or false")
        if parts.scheme == "unix" and not parts.hostname and 1 < len(parts.path.encode()) <= _LONGEST_UNIX_PATH:
            endpoint = Endpoint(path=unquote(parts.path))
        elif parts.scheme in ("redis", "rediss") and parts.hostname and parts.path in ("", "/", "/0"):
            endpoint = Endpoint(parts.hostname, DEFAULT_PORT if port is None else port, parts.scheme == "rediss")
        else:
            raise ConfigError(f"kv_store.url: a {parts.scheme or 'nameless'} URL of this form; allowed: {_FORMS}")
        return cls(
            endpoint,
            username or unquote(parts.username or ""),
            password or unquote(parts.password or ""),
            cluster == "true",
            ca_file,
            iam,
        )
