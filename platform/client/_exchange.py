"""One question to the admin API: its URL, what the answer means, and what a failure means. Nothing here waits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from openai import APIConnectionError, APIStatusError, APITimeoutError
from pydantic import TypeAdapter, ValidationError

from expertmesh.errors import ExpertMeshError, Unavailable
from expertmesh.platform.client._settings import KEY_ENV, root_url

_T = TypeVar("_T")

_PASSING = (429, 502, 503, 504)
"""Overload and gateways' states: worth asking again."""


@dataclass(frozen=True, slots=True)
class Route(Generic[_T]):
    """An admin route and what it answers."""

    name: str
    answer: TypeAdapter[_T]

    @contextmanager
    def asked_at(self, api: object) -> Iterator[str]:
        """Gives the route's URL beside the OpenAI API's; turns failures of asking and `read` inside into our errors.

        Raises Unavailable where asking again may help, else ExpertMeshError; both name the URL.
        """
        root = root_url(api)
        url = f"{root}/mesh/{self.name}"
        try:
            yield url
        except APITimeoutError as error:
            raise Unavailable(f"{url} did not answer in time") from error
        except APIConnectionError as error:
            raise Unavailable(f"{root} can't be reached: {error.__cause__ or error}") from error
        except APIStatusError as error:
            raise _refusal(root, url, error) from error
        except ValidationError as error:
            raise ExpertMeshError(f"{root} is not an ExpertMesh ingress: {url} answered {_mismatch(error)}") from error

    def read(self, text: str) -> _T:
        """The answer's value. Raises ValidationError."""
        return self.answer.validate_json(text)


def _refusal(root: str, url: str, error: APIStatusError) -> ExpertMeshError:
    status = error.status_code
    if status == 404:
        return ExpertMeshError(f"{root} is not an ExpertMesh ingress, or not up yet: {url} answered HTTP 404")
    if status in (401, 403):
        return ExpertMeshError(f"{root} refuses the API key (HTTP {status}); give another as api_key or in {KEY_ENV}")
    message = f"{url} answered HTTP {status}{_detail(error.body)}"
    if status in _PASSING:
        asked = retry_after_s(error.response.headers.get("retry-after"))
        return Unavailable(message) if asked is None else Unavailable(message, asked)
    return ExpertMeshError(message)


def _detail(body: object) -> str:
    """What the server said, in FastAPI's form or OpenAI's."""
    if isinstance(body, dict):
        for key in ("message", "detail"):
            if isinstance(body.get(key), str):
                return f": {body[key]}"
    return ""


def retry_after_s(header: str | None) -> float | None:
    """The seconds of a `Retry-After`; None if there are none."""
    try:
        seconds = float(header or "")
    except ValueError:  # absent, or a date, which only proxies of another kind send
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _mismatch(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False)[0]
    if problem["type"] == "json_invalid":
        return "something that isn't JSON"
    field = ".".join(map(str, problem["loc"]))
    return f"JSON of another kind ({f'{field}: ' if field else ''}{problem['msg']})"
