"""Where the mesh is and by which key: arguments, then environment, then defaults. URLs are built here only."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from expertmesh.errors import ConfigError

URL_ENV = "EXPERTMESH_URL"
KEY_ENV = "EXPERTMESH_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"

NO_KEY = "none"
"""Sent where there is no key: a mesh without keys ignores it, and OpenAI's client insists on one."""

_API = "/v1"


def api_url(given: object | None) -> str:
    """The OpenAI API's URL, ending in /v1, of a mesh's URL with or without it (`given`, else $EXPERTMESH_URL).

    Raises ConfigError for anything but http(s)://host[:port][/prefix].
    """
    source, text = ("base_url", str(given)) if given is not None else (URL_ENV, os.environ.get(URL_ENV, ""))
    text = text.strip() or DEFAULT_URL
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a bracket that doesn't close
        usable = False
    if "@" in text:  # never repeated: there may be a password in it
        raise ConfigError(f"{source}: a URL with a user or password; give the key as api_key or in {KEY_ENV}")
    if not usable or "?" in text or "#" in text:
        raise ConfigError(f"{source}: {text!r} is no URL of a mesh; allowed: http(s)://host[:port], like {DEFAULT_URL}")
    return root_url(text) + _API


def root_url(api: object) -> str:
    """The URL that OpenAI routes (/v1) and admin routes (/mesh) are below, without a slash at the end."""
    return str(api).rstrip("/").removesuffix(_API).rstrip("/")


def checked_key(given: str | None) -> str:
    """The API key: `given`, else $EXPERTMESH_API_KEY, else a placeholder. Raises ConfigError if no header can hold it.

    The HTTP library would say so with the key in its message.
    """
    source, key = ("api_key", given) if given is not None else (KEY_ENV, os.environ.get(KEY_ENV, ""))
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{source}: holds a space, a line's end or a character that is not ASCII; allowed: the key")
    return key or NO_KEY
