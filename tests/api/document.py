"""What the fuzzer is told of the API: its OpenAPI document, whole, or cut into slices that it goes deep with.

Made up whole, most requests are wrong in some field that says no before the others are looked at, and a request with a
hundred fields takes seconds to make up. A slice is one operation with what it requires pinned to sound values, and a
few of its other fields free.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

_MESSAGES = [[{"role": "user", "content": "hello"}]]
_PINNED: dict[str, list[Any]] = {
    "messages": _MESSAGES,
    "input": ["hello"],
    "prompt": ["hello", [1, 2, 3]],
    "tokens": [[1, 2, 3]],
    "max_tokens": [3],
    "query": ["hello"],
    "items": [["a", "b"]],
    "label_token_ids": [[1, 2]],
}
"""Values that requests are otherwise sound with, by field."""
_FREE = 3
"""Fields of a slice."""

Document = dict[str, Any]


def whole(document: Document, model: str) -> Document:
    """The document with `model` as the only one that may be asked for: else most answers were 404."""
    document = copy.deepcopy(document)
    for schema in document["components"]["schemas"].values():
        if "model" in schema.get("properties", {}):
            schema["properties"]["model"] = {"enum": [model]}
    return document


def slices(document: Document, model: str) -> Iterator[Document]:
    """One document a slice."""
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for schema in _bodies(document, operation):
                for body in _cut(schema, model, batch=path.endswith("/batch")):
                    sliced = copy.deepcopy(operation)
                    sliced["requestBody"]["content"] = {"application/json": {"schema": body}}
                    yield {**document, "paths": {path: {method: sliced}}}


def _bodies(document: Document, operation: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schemas, without references on their top, that its body may have."""
    content = operation.get("requestBody", {}).get("content", {})
    schema = content.get("application/json", {}).get("schema", {})
    for one in schema.get("anyOf", [schema]):
        name = one.get("$ref", "").rpartition("/")[2]
        found = document["components"]["schemas"][name] if name else one
        if "properties" in found:
            yield found


def _cut(schema: dict[str, Any], model: str, batch: bool) -> Iterator[dict[str, Any]]:
    properties, required = schema["properties"], schema.get("required", [])
    pins = {**_PINNED, "model": [model], **({"messages": [_MESSAGES]} if batch else {})}
    pinned = {name: {"enum": pins[name]} for name in properties if name in pins}
    free = [name for name in properties if name not in ("model",)]
    for at in range(0, len(free), _FREE):
        chosen = free[at : at + _FREE]
        fields = pinned | {name: properties[name] for name in chosen}
        needed = [*dict.fromkeys([*required, *pinned, *chosen])]
        fields |= {name: properties[name] for name in needed if name not in fields}
        yield {"type": "object", "properties": fields, "required": needed}
