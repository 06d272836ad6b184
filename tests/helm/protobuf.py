"""Just enough of Kubernetes' protobuf encoding to read the Secrets in which helm keeps its releases."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

MAGIC = b"k8s\0"

# Field numbers of k8s.io/apimachinery and k8s.io/api/core/v1 (generated.proto).
_TYPE_META, _RAW = 1, 2
_KIND = 2
_METADATA, _DATA, _TYPE = 1, 2, 3
_NAME, _NAMESPACE, _LABELS = 1, 3, 11


def read_secret(body: bytes) -> dict[str, Any]:
    """The Secret in `body` as JSON would have it. Raises ValueError if it holds something else."""
    envelope = dict(_fields(body.removeprefix(MAGIC)))
    kind = bytes(dict(_fields(envelope[_TYPE_META]))[_KIND]).decode()
    if kind != "Secret":
        raise ValueError(f"{kind} in protobuf, which only Secrets are read from")
    metadata: dict[str, Any] = {"labels": {}}
    secret: dict[str, Any] = {"apiVersion": "v1", "kind": kind, "metadata": metadata, "data": {}}
    for field, value in _fields(envelope[_RAW]):
        if field == _METADATA:
            _read_metadata(value, metadata)
        elif field == _DATA:
            key, content = _entry(value)
            secret["data"][key] = base64.b64encode(content).decode()
        elif field == _TYPE:
            secret["type"] = value.decode()
    return secret


def _read_metadata(body: bytes, metadata: dict[str, Any]) -> None:
    for field, value in _fields(body):
        if field == _NAME:
            metadata["name"] = value.decode()
        elif field == _NAMESPACE and value:
            metadata["namespace"] = value.decode()
        elif field == _LABELS:
            key, content = _entry(value)
            metadata["labels"][key] = content.decode()


def _entry(body: bytes) -> tuple[str, bytes]:
    """Key and value of a map's entry."""
    fields = dict(_fields(body))
    return fields.get(1, b"").decode(), fields.get(2, b"")


def _fields(body: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of each length-delimited field; numbers in between are skipped."""
    at = 0
    while at < len(body):
        tag, at = _varint(body, at)
        wire = tag & 7
        if wire not in (0, 2):
            raise ValueError(f"wire type {wire}")
        number, at = _varint(body, at)
        if wire == 2:
            yield tag >> 3, body[at : at + number]
            at += number


def _varint(body: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
