"""What an answer of the API may be: no error of the server's, errors in one shape, streams that end as they should."""

from __future__ import annotations

import json
from typing import Any

KNOWN_STATUSES = {200, 400, 401, 403, 404, 405, 409, 413, 422, 429, 431}


def fault(status: int, content_type: str, body: bytes) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if status >= 500:
        return f"status {status}: {body[:500]!r}"
    if status not in KNOWN_STATUSES:
        return f"status {status}, of which nobody has thought: {body[:500]!r}"
    if status != 200:
        return _fault_of_error(status, body)
    if content_type.startswith("text/event-stream"):
        return _fault_of_stream(body)
    if body:
        try:
            _strictly(body)
        except ValueError as error:
            return f"an answer that is no JSON: {error}: {body[:200]!r}"
    return None


def _fault_of_error(status: int, body: bytes) -> str | None:
    try:
        error: Any = _strictly(body)["error"]
        right = isinstance(error["message"], str) and error["message"] and isinstance(error["type"], str)
    except (ValueError, KeyError, TypeError) as wrong:
        return f"status {status} without an error object ({wrong!r}): {body[:500]!r}"
    if not right or error.get("code", status) != status:
        return f"status {status} with another error: {error}"
    if len(body) > 64 << 10:
        return f"an error of {len(body)} bytes"
    return None


def _fault_of_stream(body: bytes) -> str | None:
    for line in body.splitlines():
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            continue
        event = _strictly(line.removeprefix(b"data: "))
        error = event.get("error") if isinstance(event, dict) else None
        if isinstance(error, dict) and error.get("code", 0) >= 500:
            return f"an error of the server's in a stream: {error}"
    return None


def _strictly(text: bytes) -> Any:
    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=no_constant)
