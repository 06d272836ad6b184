"""The console: one page that shows a mesh live. Built from `web/` into `static/`, which is what is installed.

The page holds no data: what it shows comes from the admin routes, which ask for a key (docs/console.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

_TYPES = {
    "index.html": "text/html; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "app.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
}

PAGE = "index.html"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""Content-Security-Policy: nothing from elsewhere, nothing inline, nothing to elsewhere, in nobody's frame."""


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page."""

    name: str
    media_type: str
    content: bytes
    etag: str
    """As HTTP has it: weak, since the bytes may be sent compressed."""


def assets() -> tuple[Asset, ...]:
    """The page and all that it loads. Raises FileNotFoundError if it was installed without them."""
    folder = files(__name__) / "static"
    return tuple(_asset(name, media_type, (folder / name).read_bytes()) for name, media_type in _TYPES.items())


def _asset(name: str, media_type: str, content: bytes) -> Asset:
    return Asset(name, media_type, content, f'W/"{hashlib.sha256(content).hexdigest()[:32]}"')
