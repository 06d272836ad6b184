"""Where the mesh is and by which key: arguments, then environment, then defaults. URLs are built here only."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from expertmesh.errors import ConfigError

URL_ENV = "EXPERTMESH_URL"
KEY_ENV = "EXPERTMESH_API_KEY"
KEY_FILE_ENV = "EXPERTMESH_API_KEY_FILE"
DEFAULT_URL = "http://127.0.0.1:8000"

NO_KEY = "none"
"""Sent where there is no key: a mesh without keys ignores it, and OpenAI's client insists on one."""

_API = "/v1"
_MAX_KEY_BYTES = 4096


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
    """The API key: `given`, else $EXPERTMESH_API_KEY, else the file $EXPERTMESH_API_KEY_FILE, else a placeholder.

    Raises ConfigError, which never holds the key, if the file can't be read or no header can hold the key: the HTTP
    library would say so with the key in its message.
    """
    source, key = ("api_key", given) if given is not None else _key_of_environment()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{source}: holds a space, a line's end or a character that is not ASCII; allowed: the key")
    return key or NO_KEY


def _key_of_environment() -> tuple[str, str]:
    """Where the key is from, and the key; empty if there is none."""
    key, path = os.environ.get(KEY_ENV, ""), os.environ.get(KEY_FILE_ENV, "")
    if key or not path:
        return KEY_ENV, key
    try:
        with Path(path).expanduser().open("rb") as file:
            raw = file.read(_MAX_KEY_BYTES)
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{KEY_FILE_ENV}: can't read {path}: {reason}") from None
    return KEY_FILE_ENV, raw.decode(errors="replace").rstrip("\r\n")
