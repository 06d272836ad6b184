"""Requests that people think of and generators don't: each is to be answered, and by no error of the server's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.api.nasty_fields import CHATS, COMPLETIONS, PROMPTS, RESPONSES, SAMPLING, STRUCTURED


@dataclass(frozen=True)
class Nasty:
    """One request."""

    name: str
    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    method: str = "POST"


def nasties(model: str) -> list[Nasty]:
    """All of them; `model` is the one that is served."""
    completion = {"model": model, "prompt": "hello", "max_tokens": 2}
    chat = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
    made = [*_bodies(completion), *_routes()]
    for name, change in {**SAMPLING, **STRUCTURED, **COMPLETIONS}.items():
        made.append(_json(f"completion: {name}", "/v1/completions", completion | change))
    for name, change in {**SAMPLING, **STRUCTURED, **CHATS}.items():
        made.append(_json(f"chat: {name}", "/v1/chat/completions", chat | change))
        if name in CHATS:
            made.append(_json(f"chat, streamed: {name}", "/v1/chat/completions", chat | change | {"stream": True}))
    for name, change in RESPONSES.items():
        made.append(_json(f"response: {name}", "/v1/responses", {"model": model, "input": "hello"} | change))
    for name, change in CHATS.items():
        made.append(_json(f"messages: {name}", "/v1/messages", chat | change))
    for name, prompt in PROMPTS.items():
        made.append(_json(f"prompt: {name}", "/v1/completions", completion | {"prompt": prompt}))
        made.append(_json(f"tokenize: {name}", "/tokenize", {"model": model, "prompt": prompt}))
        made.append(_json(f"detokenize: {name}", "/detokenize", {"model": model, "tokens": prompt}))
        made.append(_json(f"scoring: {name}", "/generative_scoring", {"query": prompt, "items": ["a"], "model": model}))
    return made


def _json(name: str, path: str, body: Any) -> Nasty:
    return Nasty(name, path, json.dumps(body).encode())


def _bodies(completion: dict[str, Any]) -> Iterator[Nasty]:
    """Bodies that are no sound JSON, or sound in an odd way."""
    sound = json.dumps(completion)
    texts: dict[str, bytes] = {
        "empty": b"",
        "null": b"null",
        "a list": b"[]",
        "a number": b"1",
        "a text": b'"x"',
        "half of it": sound[:-5].encode(),
        "rubbish behind it": (sound + "}").encode(),
        "broken UTF-8": sound.replace("hello", "\x00\x01").encode() + b"\xff\xfe",
        "broken UTF-8 in a text": sound.encode().replace(b"hello", b"\xc3\x28\xa0\xa1\xf0\x28\x8c\xbc"),
        "UTF-16": sound.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + sound.encode(),
        "deep lists": b"[" * 100_000 + b"]" * 100_000,
        "deep lists that don't close": b"[" * 1_000_000,
        "a deep field": f'{{"model": "x", "prompt": {"[" * 50_000}{"]" * 50_000}}}'.encode(),
        "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "a field twice": sound[:-1].encode() + b', "max_tokens": 1, "max_tokens": "x"}',
        "20,000 unknown fields": json.dumps({**completion, **{f"f{i}": i for i in range(20_000)}}).encode(),
        "a number of 100,000 digits": sound[:-1].encode() + b', "seed": ' + b"9" * 100_000 + b"}",
        "a float of 100,000 digits": sound[:-1].encode() + b', "temperature": 0.' + b"9" * 100_000 + b"}",
        "an exponent": sound[:-1].encode() + b', "temperature": 1e999999}',
        "NaN": sound[:-1].encode() + b', "temperature": NaN}',
        "minus infinity": sound[:-1].encode() + b', "top_p": -Infinity}',
        "white space": b" " * 1_000_000,
        "zeros": b"\0" * 100_000,
    }
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/messages",
        "/v1/responses",
        "/invocations",
        "/mesh/scale",
    ):
        for name, text in texts.items():
            yield Nasty(f"{path}, body: {name}", path, text)
    for kind in _CONTENT_TYPES:
        for path in ("/v1/completions", "/invocations", "/mesh/placement/freeze"):
            yield Nasty(f"{path}, content type {kind[:40]!r}", path, sound.encode(), {"Content-Type": kind})
    yield Nasty(
        "multipart, broken", "/v1/completions", b"--x\r\n\r\n", {"Content-Type": "multipart/form-data; boundary=x"}
    )
    for number in ("0", "-1", "1" + "0" * 30, "true", '"AUTO"', "1.5", "[]"):
        yield Nasty(f"scale to {number}", "/mesh/scale", f'{{"attention": {number}}}'.encode())
        yield Nasty(f"scale shards to {number}", "/mesh/scale", f'{{"experts": {number}}}'.encode())


def _routes() -> Iterator[Nasty]:
    """Routes that are not served, and methods that they don't have."""
    for path in _NOT_SERVED:
        for method in ("GET", "POST"):
            yield Nasty(f"{method} {path[:40]}", path, b"{}", method=method)
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
        for path in ("/v1/completions", "/v1/models", "/mesh/scale", "/health"):
            yield Nasty(f"{method} {path}", path, b"", method=method)
    for key in ("resp_x", "%00", "x" * 8000, "..%2f..", "\ud800".encode("utf-8", "surrogatepass").hex()):
        yield Nasty(f"response {key[:20]}", f"/v1/responses/{key}?starting_after=-1&stream=true", b"", method="GET")
        yield Nasty(f"cancel response {key[:20]}", f"/v1/responses/{key}/cancel", b"")


_CONTENT_TYPES = [
    "",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/xml",
    "application/json; charset=utf-16",
    "application/json; charset=nothing",
    "\xff",
    "application/json" * 100,
]
_NOT_SERVED = [
    "/v1/embeddings",
    "/pooling",
    "/score",
    "/rerank",
    "/classify",
    "/v1/audio/transcriptions",
    "/nothing",
    "/v1/load_lora_adapter",
    "/sleep",
    "/collective_rpc",
    "/reset_prefix_cache",
    "/server_info",
    "/mesh/nothing",
    "/mesh/../v1/models",
    "/mesh%2fstatus",
    "//mesh/status",
    "/v1/models/" + "x" * 5000,
    "/%00",
    "/%ff%fe",
    "/v1/chat/completions/render",
    "/v1/completions/derender",
    "/inference/v1/generate",
]
