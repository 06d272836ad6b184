"""Requests that vLLM's renderer trips over are their sender's mistake: 400, and not 500.

vLLM checks a request's form by pydantic, and what is inside free-form messages as it goes, partly by assertions.
Nothing but the request decides whether rendering it fails.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.renderers.online_renderer import OnlineRenderer

from expertmesh.platform.logs import wordless

log = logging.getLogger("expertmesh.ingress")

_TRIPS = (AssertionError, AttributeError, LookupError, RecursionError)
_ENTRIES = ("render_chat", "render_responses", "render_completion", "preprocess_chat", "preprocess_completion")

Render = Callable[..., Awaitable[Any]]


def refuse_what_can_not_be_rendered(renderer: OnlineRenderer) -> None:
    """Makes `renderer`, which is shared by all of vLLM's routes, raise VLLMValidationError where it would trip."""
    for name in _ENTRIES:
        setattr(renderer, name, _refusing(getattr(renderer, name)))


def _refusing(render: Render) -> Render:
    @functools.wraps(render)
    async def refusing(*arguments: Any, **options: Any) -> Any:
        try:
            return await render(*arguments, **options)
        except _TRIPS as error:
            log.info("a request can't be rendered", exc_info=wordless(error))
            raise VLLMValidationError(
                "a message is not understood: is one of its fields missing, or of another type?"
            ) from error

    return refusing
