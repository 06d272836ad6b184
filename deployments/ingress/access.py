"""The walls in front of every route: sizes, foreign pages, API keys and their limits.

Plain ASGI, so that streams pass through untouched. Answers are in OpenAI's error shape. The body is not read before the
request is admitted.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.deployments.ingress import access_rules as rules
from expertmesh.deployments.ingress.errors import refusal
from expertmesh.deployments.ingress.tenant import current_tenant
from expertmesh.platform.access import ADMIN, Key, KeyFile, Meters
from expertmesh.platform.config.sections import IngressConfig

log = logging.getLogger("expertmesh.access")

_NO_KEYS = (
    "admin routes need an API key, and this mesh has none: set ingress.keys_file, or ask on the machine of an ingress "
    "that listens on loopback"
)


def add_walls(app: FastAPI, config: IngressConfig) -> None:
    """Puts them in front of `app`. Raises ConfigError if the key file can't be used."""
    keys = None if config.keys_file is None else KeyFile(config.keys_file)
    if keys is None and not rules.is_loopback(config.host):
        log.warning("no ingress.keys_file: whoever reaches %s:%d may use the model", config.host, config.port)
    app.add_middleware(
        AccessMiddleware,
        keys=keys,
        meters=Meters(),
        open_admin=rules.is_loopback(config.host),
        origins=frozenset(config.cors_origins),
    )
    app.add_middleware(SizeMiddleware, max_body=config.max_body_mib << 20, max_header=config.max_header_kib << 10)
    if config.cors_origins:  # the outermost, so that pages can read refusals too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )


class SizeMiddleware:
    """Answers 431 and 413 to requests whose headers or body are too large."""

    def __init__(self, app: ASGIApp, max_body: int, max_header: int) -> None:
        """max_body, max_header: bytes."""
        self._app = app
        self._max_body, self._max_header = max_body, max_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if rules.header_bytes(scope) > self._max_header:
            await refusal(431, f"URL and headers are larger than {self._max_header} bytes")(scope, receive, send)
            return
        too_large = refusal(413, f"the body is larger than {self._max_body} bytes")
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced[:20]) > self._max_body:
            await too_large(scope, receive, send)
            return
        body = _Body(receive, send, self._max_body)
        try:
            await self._app(scope, body.receive, body.send)
        except Exception:
            if not body.is_too_large:
                raise
        if body.is_too_large and not body.answered:
            await too_large(scope, receive, send)


class _TooLarge(Exception):
    """The body has more bytes than may come."""


class _Body:
    """Counts a body that did not say how long it is. Once it is too large the application is not heard."""

    def __init__(self, receive: Receive, send: Send, max_bytes: int) -> None:
        self.is_too_large = self.answered = False
        self._receive, self._send = receive, send
        self._left = max_bytes

    async def receive(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.is_too_large = True
            raise _TooLarge
        return message

    async def send(self, message: Message) -> None:
        if self.is_too_large and not self.answered:
            return
        self.answered = True
        await self._send(message)


class AccessMiddleware:
    """Lets a request through if it is no foreign page's and its key has the route's scope and is within its limits."""

    def __init__(
        self, app: ASGIApp, keys: KeyFile | None, meters: Meters, open_admin: bool, origins: Collection[str]
    ) -> None:
        """keys: None where none is asked for; admin routes then answer local requests only, if `open_admin`."""
        self._app = app
        self._keys, self._meters = keys, meters
        self._open_admin, self._origins = open_admin, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says. Web sockets, of which the API has none, are refused."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if rules.is_foreign_page(headers, self._origins):
            await refusal(403, "pages of this origin may not call the API; see ingress.cors_origins")(
                scope, receive, send
            )
            return
        needed = rules.scope_for(rules.path_of(scope))
        if needed is None:
            await self._app(scope, receive, send)
        elif self._keys is not None:
            await self._with_key(needed, headers, scope, receive, send)
        elif needed == ADMIN and not (self._open_admin and rules.is_local(scope, headers)):
            await refusal(403, _NO_KEYS)(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _with_key(self, needed: str, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        assert self._keys is not None
        token = rules.token_of(headers)
        key = None if token is None else self._keys.current().find(token)
        if key is None:
            why = (
                "no API key: send one as `Authorization: Bearer KEY`" if token is None else "this API key is not known"
            )
            await refusal(401, why, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
        elif needed not in key.scopes:
            await refusal(403, f"this API key has not the scope {needed}")(scope, receive, send)
        elif (wait_s := self._meters.enter(key)) > 0:
            retry = {"Retry-After": str(math.ceil(wait_s))}
            await refusal(429, _over(key), retry)(scope, receive, send)
        else:
            tenant = current_tenant.set(key.tenant)
            try:
                await self._app(scope, receive, send)
            finally:
                current_tenant.reset(tenant)
                self._meters.leave(key)


def _over(key: Key) -> str:
    limits = []
    if key.requests_per_minute is not None:
        limits.append(f"{key.requests_per_minute} requests a minute")
    if key.concurrent_requests is not None:
        limits.append(f"{key.concurrent_requests} at once")
    return f"this API key may make {' and '.join(limits)}"
