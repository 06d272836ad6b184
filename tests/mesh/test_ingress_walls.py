"""The ingress' walls behind Ray Serve's own proxy, on a mesh without keys that listens on loopback."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from expertmesh.deployments.local import LocalMesh

pytestmark = pytest.mark.mesh

COMPLETION = {"model": "demo", "prompt": "hello", "max_tokens": 2}


@pytest.fixture
def http(demo_mesh: LocalMesh) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=demo_mesh.url, timeout=120) as http:
        yield http


def test_this_machine_may_use_the_admin_routes(http: httpx.Client) -> None:
    assert http.get("/mesh/status").status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a page's own domain that resolves to 127.0.0.1
        {"X-Forwarded-For": "192.0.2.1"},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
    ],
)
def test_pages_and_proxies_may_not(http: httpx.Client, headers: dict[str, str]) -> None:
    before = http.get("/mesh/placement").json()["frozen"]
    answer = http.post("/mesh/placement/freeze", json={"frozen": not before}, headers=headers)
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == 403
    assert "access-control-allow-origin" not in answer.headers
    assert http.get("/mesh/placement").json()["frozen"] is before


def test_no_page_is_told_that_it_may_call(http: httpx.Client) -> None:
    asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    answer = http.options("/v1/completions", headers=asks)
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers


def test_a_body_and_headers_that_are_too_large(http: httpx.Client) -> None:
    large = b'{"model": "demo", "prompt": "' + b"x" * (33 << 20) + b'"}'
    answer = http.post("/v1/completions", content=large, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413, answer.text[:300]
    assert http.get("/v1/models", headers={"X-A": "a" * 40_000}).status_code == 431
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_body_that_never_comes_holds_up_nobody(http: httpx.Client) -> None:
    url = http.base_url
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    stalled = [socket.create_connection((url.host, url.port or 0), timeout=60) for _ in range(20)]
    try:
        for sock in stalled:
            sock.sendall(head + b'Content-Length: 1000\r\n\r\n{"model"')
        assert http.post("/v1/completions", json=COMPLETION).status_code == 200
    finally:
        for sock in stalled:
            sock.close()
    assert http.post("/v1/completions", json=COMPLETION).status_code == 200
