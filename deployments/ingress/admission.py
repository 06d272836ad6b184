"""What there is no room for is refused before anything of it is read: when there is too much to do, noes must be cheap.

vLLM asks again when it knows how many sequences a request is for.
"""

from __future__ import annotations

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.exceptions import GracefulHTTPError

from expertmesh.deployments.ingress.access_rules import path_of
from expertmesh.deployments.ingress.errors import refusal

_GENERATES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
"""Routes with OpenAI's errors whose requests take an engine's time."""


class Admission:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, check: Callable[[], None]) -> None:
        """check: raises GracefulHTTPError if there is no room for one sequence more."""
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] == "http" and scope["method"] == "POST" and path_of(scope) in _GENERATES:
            try:
                self._check()
            except GracefulHTTPError as error:
                await refusal(error.http_status, error.message)(scope, receive, send)
                return
        await self._app(scope, receive, send)
