"""GET /console: the page, and what it loads. No data and no key: see platform/console."""

from __future__ import annotations

import gzip
from collections.abc import Awaitable, Callable

from fastapi import APIRouter, Request, Response

from expertmesh.platform.console import PAGE, POLICY, Asset, assets

PATH = "/console"
_HEADERS = {
    "Cache-Control": "no-cache",  # asked for again each time, and answered 304: a mesh may be upgraded under a page
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Vary": "Accept-Encoding",
    "X-Content-Type-Options": "nosniff",
}


def path_of(asset: Asset) -> str:
    """Where a file of the page is."""
    return PATH if asset.name == PAGE else f"{PATH}/{asset.name}"


def console_routes() -> APIRouter:
    """/console and its assets, from memory."""
    router = APIRouter(include_in_schema=False)
    for asset in assets():
        router.add_api_route(path_of(asset), _route(asset), methods=["GET", "HEAD"])
    return router


def _route(asset: Asset) -> Callable[[Request], Awaitable[Response]]:
    small = gzip.compress(asset.content, mtime=0)

    async def answer(request: Request) -> Response:
        headers = {**_HEADERS, "ETag": asset.etag}
        if request.headers.get("if-none-match") == asset.etag:
            return Response(status_code=304, headers=headers)
        if "gzip" in request.headers.get("accept-encoding", ""):
            return Response(small, media_type=asset.media_type, headers={**headers, "Content-Encoding": "gzip"})
        return Response(asset.content, media_type=asset.media_type, headers=headers)

    return answer
