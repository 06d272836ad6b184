"""vLLM's error handling, where a request can make it fail, stall, or answer in another shape than OpenAI's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from vllm.entrypoints.anthropic import serving as anthropic
from vllm.entrypoints.serve.exception_handling import error_response
from vllm.entrypoints.serve.exception_handling.handlers import http, validation

from expertmesh.deployments.ingress.errors import refusal

_MOST_CHARACTERS = 2000


def mend_error_handling(app: FastAPI) -> None:
    """Errors of `app` are short and in OpenAI's shape, the framework's (404, 405, a body that is no JSON) included."""
    modules: list[Any] = [error_response, http, validation, anthropic]
    for module in modules:
        module.sanitize_message = _short(module.sanitize_message)
    shaped: Any = http.http_exception_handler
    app.add_exception_handler(HTTPException, shaped)
    app.add_exception_handler(RecursionError, _nested_too_deeply)


def _short(sanitize: Callable[[str], str]) -> Callable[[str], str]:
    """`sanitize` for the beginning of a message only.

    Messages quote what was sent, and vLLM's expression for file paths takes the square of their length: a model name of
    a megabyte of slashes stopped the whole process for minutes.
    """
    if isinstance(sanitize, functools.partial):  # another application of this process has done it
        return sanitize
    return functools.partial(_sanitized, sanitize)


def _sanitized(sanitize: Callable[[str], str], message: str) -> str:
    cut = (
        message if len(message) <= _MOST_CHARACTERS else f"{message[:_MOST_CHARACTERS]}... [{len(message)} characters]"
    )
    return sanitize(cut)


async def _nested_too_deeply(request: Request, error: Exception) -> JSONResponse:
    return refusal(400, "the request is nested too deeply")
