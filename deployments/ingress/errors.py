"""Errors in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi.responses import JSONResponse

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    409: "Conflict",
    413: "RequestTooLarge",
    429: "RateLimitError",
    431: "RequestTooLarge",
    503: "ServiceUnavailable",
    504: "GatewayTimeout",
}


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer that says no."""
    error = {"message": message, "type": _TYPES[status], "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers)
