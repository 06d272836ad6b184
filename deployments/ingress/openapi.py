"""The ingress' OpenAPI document: vLLM's, told about the mesh, and about what its own walls and routes answer.

vLLM's document says 422 and 500 where it answers 400, leaves out 401, 429 and 503, and gives requests and answers that
its routes read and write by hand no schema.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from expertmesh import __version__
from expertmesh.deployments.ingress import access_rules as rules

_DESCRIPTION = (
    "vLLM's OpenAI API over a mesh of attention replicas and expert shards, and the mesh's own routes below `/mesh`."
)
_ERROR = {
    "title": "Error",
    "description": "OpenAI's error object.",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "The field at fault, where it is one."},
                "code": {"type": "integer", "description": "The HTTP status."},
            },
        }
    },
}
_ANTHROPIC_ERROR = {
    "title": "AnthropicError",
    "description": "Anthropic's error object.",
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
_REFUSALS = {
    "400": "The request can't be understood or can't be done; the message says why.",
    "401": "No API key, or an unknown one.",
    "403": "The API key has not the scope, a page of another origin asks, or an admin route is asked from outside.",
    "404": "No such model, response or route.",
    "409": "Not now, or not with these numbers; the message says why.",
    "413": "The body is larger than `ingress.max_body_mib`.",
    "429": "Over the API key's limits, or as many requests as may are being worked on.",
    "431": "URL and headers are larger than `ingress.max_header_kib`.",
    "500": "Every replica that the request was given to was lost while it ran it.",
    "503": "Nobody is there to answer; try again.",
    "504": "The time that the header X-Request-Timeout gave is up.",
}
_WALLS = ("401", "403", "429", "431")
_RETRIED = ("429", "503")
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "string"}}}
_KEY = {"type": "http", "scheme": "bearer", "description": "An API key, where `ingress.keys_file` is set."}
_INVOCATION = {
    "description": "A request of chat completions or completions, told apart by their fields.",
    "type": "object",
    "required": ["model"],
}


def describe(app: FastAPI) -> None:
    """Makes `app` answer /openapi.json with this document, of the routes that it has when it is first asked."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title="ExpertMesh", version=__version__, description=_DESCRIPTION, routes=app.routes)
    components = document.setdefault("components", {})
    components.setdefault("schemas", {}).update(Error=_ERROR, AnthropicError=_ANTHROPIC_ERROR)
    components["securitySchemes"] = {"key": _KEY}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            _amend(path, method, operation)
    return document


def _amend(path: str, method: str, operation: dict[str, Any]) -> None:
    if path == "/invocations":
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": _INVOCATION}}}
    codes = {*_refusals_of(path, method, operation)}
    kept = {code: answer for code, answer in operation["responses"].items() if code.startswith("2")}
    operation["responses"] = kept | {code: _refusal(code, path) for code in sorted(codes)}
    if rules.scope_for(path) is not None:
        operation["security"] = [{"key": []}, {}]


def _refusals_of(path: str, method: str, operation: dict[str, Any]) -> set[str]:
    """The statuses other than success that an operation may answer with."""
    if path in rules.PUBLIC:
        return {"403", "431", "503"} if path == "/health" else {"403", "431"}
    own = {code for code in operation["responses"] if code in _REFUSALS}
    walls = own | {*_WALLS, "413"} if method == "post" else own | {*_WALLS}
    if path.startswith(rules.ADMIN_PATH):
        return (walls - {"500"}) | {"503"} | ({"400"} if {"requestBody", "parameters"} & operation.keys() else set())
    if method == "post":
        return walls | {"400", "404", "503", "504"}
    return walls | {"400", "404"} if "parameters" in operation else walls - {"500"}


def _refusal(code: str, path: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"$ref": "#/components/schemas/Error"}
    if path.startswith("/v1/messages"):  # the walls in front of it speak OpenAI's
        schema = {"anyOf": [schema, {"$ref": "#/components/schemas/AnthropicError"}]}
    answer: dict[str, Any] = {"description": _REFUSALS[code], "content": {"application/json": {"schema": schema}}}
    return answer | ({"headers": _RETRY_AFTER} if code in _RETRIED else {})
