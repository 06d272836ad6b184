"""Who may ask for what, as pure functions of a request's ASGI scope."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Literal
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from expertmesh.platform.access import ADMIN, INFER

_CONSOLE = frozenset({"/console", "/console/", "/console/app.js", "/console/app.css", "/console/icon.svg"})
PUBLIC = frozenset({"/health", "/ping"}) | _CONSOLE
"""What load balancers and Kubernetes ask, which have no key; the console's files, which hold no data."""
ADMIN_PATH = "/mesh"
"""Below it are the admin routes."""
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


def path_of(scope: Scope) -> str:
    """The path below the application's root, as routes see it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def scope_for(path: str) -> Literal["infer", "admin"] | None:
    """The scope that a key needs for `path`; None: no key is needed. What nobody has thought of needs one."""
    if path in PUBLIC:
        return None
    return ADMIN if path == ADMIN_PATH or path.startswith(f"{ADMIN_PATH}/") else INFER


def token_of(headers: Headers) -> str | None:
    """The API key as OpenAI's clients send it (`Authorization: Bearer`), or as Anthropic's do (`x-api-key`)."""
    authorization = headers.get("authorization")
    if authorization is None:
        return headers.get("x-api-key")
    scheme, _, token = authorization.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else None


def is_loopback(host: str) -> bool:
    """Whether a host name or address means the machine itself."""
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_local(scope: Scope, headers: Headers) -> bool:
    """Whether the request comes from this machine, by a name of it, and was not passed on by a proxy.

    The name counts because a page in a browser here can be made to call its own domain, resolved to 127.0.0.1.
    """
    client, host = scope.get("client"), _host_of(headers.get("host", ""))
    if not client or host is None or any(name in headers for name in _FORWARDED):
        return False
    return is_loopback(client[0]) and is_loopback(host)


def is_foreign_page(headers: Headers, allowed: Collection[str]) -> bool:
    """Whether a browser sent the request for a page of another origin, and not of one of `allowed`.

    Browsers send some requests for any page and only keep the answer from it; a POST without a body is one.
    """
    origin = headers.get("origin")
    if origin is None or "*" in allowed or origin in allowed:
        return False
    scheme, _, authority = origin.partition("://")
    return scheme not in ("http", "https") or authority.lower() != headers.get("host", "").lower()


def header_bytes(scope: Scope) -> int:
    """Size of URL and headers."""
    url = len(scope.get("raw_path") or scope["path"].encode()) + len(scope.get("query_string", b""))
    return url + sum(len(name) + len(value) for name, value in scope["headers"])


def _host_of(authority: str) -> str | None:
    """The host of `host:port`; None if it can't be read."""
    try:
        return urlsplit(f"//{authority}").hostname
    except ValueError:  # a bracket that doesn't close, and what is no address in brackets
        return None
