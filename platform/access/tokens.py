"""The text of an API key: `xm-ID-SECRET`, ID 12 hexadecimal digits, SECRET 256 random bits in base64url.

The id finds the key's record and is no secret. What is stored of the rest is SHA-256. A slow password hash would add
nothing: it makes guessing dear where people choose the words, while 256 random bits can't be guessed at any speed. It
would cost every request milliseconds, and whoever sends wrong keys could use up our processors with it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from typing import NamedTuple

ID_PATTERN = r"[0-9a-f]{12}"
_TOKEN = re.compile(rf"xm-({ID_PATTERN})-[A-Za-z0-9_-]{{43}}")
_SECRET_BYTES = 32
_DOMAIN = b"expertmesh api key 1\0"
"""Hashed in front, so that the digest is no other system's SHA-256 of the same text."""


class NewToken(NamedTuple):
    """A key that was just made. `token` is shown to its owner once and kept nowhere."""

    id: str
    token: str
    digest: str


def new_token() -> NewToken:
    """A random key."""
    key_id = secrets.token_hex(6)
    token = f"xm-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    return NewToken(key_id, token, digest(token))


def digest(token: str) -> str:
    """What is stored of a token: 64 hexadecimal digits."""
    return hashlib.sha256(_DOMAIN + token.encode(errors="surrogatepass")).hexdigest()


def id_of(token: str) -> str | None:
    """The id in a token; None if it has not a token's form."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else match[1]


def matches(token: str, stored: str) -> bool:
    """Whether `stored` is this token's digest, in a time that does not depend on either."""
    return hmac.compare_digest(digest(token), stored)
