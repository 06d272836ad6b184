"""When a POST may be sent again: only if no earlier try of it can be generating, or have generated an answer.

OpenAI's client sends every request again after any broken connection, timeout, 408, 409, 429 and 5xx. A generation
whose connection broke, or that a gateway gave up, may well run on, so for a POST that rule pays for the same tokens
twice. Certain are a connection that never opened, and the ingress's 429 and 503 with `Retry-After`: it has not begun,
or has ended without an answer.
"""

from __future__ import annotations

import random
from http import HTTPStatus

from openai import APIConnectionError, APIError, APIStatusError

from expertmesh.platform.client._exchange import retry_after_s

_NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout"}
"""By name: openai's client raises httpx2's errors, or httpx's where it was given such an `http_client`."""
_REFUSED = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_LONGEST_ASKED_S = 120.0
"""A server that asks for more than openai's client would wait gets no second try."""


def is_generating(method: str) -> bool:
    """Whether a request of this HTTP method may start something that must not be started twice."""
    return method.upper() == "POST"


def pause_before_retry(error: APIError, tries: int) -> float | None:
    """Seconds to wait before the POST that failed with `error` is sent again; None if it must not be.

    tries: how often it has been sent, the failed one included.
    """
    grown = min(_FIRST_PAUSE_S * 2 ** (tries - 1), _LONGEST_PAUSE_S) * random.uniform(0.75, 1)
    if isinstance(error, APIConnectionError):
        return grown if _never_sent(error.__cause__) else None
    if isinstance(error, APIStatusError) and error.status_code in _REFUSED:
        asked = retry_after_s(error.response.headers.get("retry-after"))
        return asked if asked is not None and asked <= _LONGEST_ASKED_S else None
    return None


def _never_sent(cause: BaseException | None) -> bool:
    return any(kind.__name__ in _NEVER_SENT for kind in type(cause).__mro__)
