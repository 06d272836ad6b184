"""What the ingress lets through, by real HTTP clients over real sockets."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from expertmesh import Client, ExpertMeshError
from expertmesh.errors import ConfigError, Unavailable
from expertmesh.platform.access import ADMIN, INFER
from expertmesh.platform.access.file import change_keys
from expertmesh.platform.config import IngressConfig
from tests.access.test_keys import make, write
from tests.support.serving import served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    from expertmesh.deployments.ingress import access_rules as rules
    from expertmesh.deployments.ingress.access import add_walls
    from expertmesh.deployments.ingress.tenant import current_tenant, salt_for

QUESTION: Any = [{"role": "user", "content": "who am I?"}]


class Model:
    """Behind the walls: answers with the tenant that it sees, and streams until it is told to end."""

    def __init__(self) -> None:
        self.applied = 0
        self.began = threading.Semaphore(0)
        self.end = threading.Event()

    def app(self) -> FastAPI:
        """Routes as the ingress has them."""
        app = FastAPI()

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Any:
            asked = await request.json()
            if asked.get("stream"):
                return StreamingResponse(self._stream(), media_type="text/event-stream")
            return JSONResponse(_completion("chat.completion", message={"role": "assistant", "content": _tenant()}))

        @app.get("/mesh/status")
        async def status() -> dict[str, bool]:
            return {"here": True}

        @app.post("/mesh/placement/apply")
        async def apply() -> dict[str, bool]:
            self.applied += 1
            return {"done": True}

        @app.get("/health")
        async def health() -> None:
            return None

        return app

    async def _stream(self) -> AsyncIterator[str]:
        yield _event(_tenant())
        self.began.release()
        while not self.end.is_set():
            await asyncio.sleep(0.01)
        yield _event("end")
        yield "data: [DONE]\n\n"


def _tenant() -> str:
    return str(current_tenant.get())


def _event(text: str) -> str:
    return f"data: {json.dumps(_completion('chat.completion.chunk', delta={'content': text}))}\n\n"


def _completion(kind: str, **choice: Any) -> dict[str, Any]:
    choices = [{"index": 0, "finish_reason": None, **choice}]
    return {"id": "1", "object": kind, "created": 1, "model": "demo", "choices": choices}


Serve = Callable[..., str]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def serve(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Serves the model behind walls of a config; gives the URL."""
    for name in ("EXPERTMESH_API_KEY", "EXPERTMESH_API_KEY_FILE", "EXPERTMESH_URL"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as stack:

        def start(**config: Any) -> str:
            app = model.app()
            add_walls(app, IngressConfig(**config))
            return stack.enter_context(served(app))

        yield start
        model.end.set()


def ask(url: str, key: str, **options: Any) -> str:
    """The tenant that a question with this key is answered for."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        answer = client.chat.completions.create(model="demo", messages=QUESTION, **options)
    return str(answer.choices[0].message.content)


def error_of(response: httpx.Response) -> dict[str, Any]:
    """An error as OpenAI writes them."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == response.status_code
    return error


# --- keys ---


def test_openais_client_with_a_key(serve: Serve, tmp_path: Path) -> None:
    token, key = make("a", tenant="blue")
    url = serve(keys_file=write(tmp_path / "keys.json", key))
    assert ask(url, token) == "blue"
    for wrong in ("sk-guess", make("a")[0]):
        with pytest.raises(openai.AuthenticationError, match="this API key is not known") as refused:
            ask(url, wrong)
        assert wrong not in str(refused.value)
        assert refused.value.response.headers["www-authenticate"] == "Bearer"
    other, other_key = make("b")
    change_keys(tmp_path / "keys.json", lambda keys: keys.without("a").with_key(other_key))
    assert ask(url, other) == "b"
    with pytest.raises(openai.AuthenticationError):
        ask(url, token)


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer {}", 200),
        ("bearer {}", 200),
        ("Bearer  {}", 200),
        ("Basic {}", 401),
        ("{}", 401),
        ("Bearer", 401),
        ("", 401),
        ("Bearer {}x", 401),
        ("Bearer \xff", 401),
    ],
)
def test_the_authorization_header(serve: Serve, tmp_path: Path, header: str, status: int) -> None:
    token, key = make()
    url = serve(keys_file=write(tmp_path / "keys.json", key))
    sent = {"Authorization": header.format(token).encode("latin-1")}
    answer = httpx.post(f"{url}/v1/chat/completions", json={}, headers=sent)
    assert answer.status_code == status
    if status == 401:
        assert error_of(answer)["type"] == "AuthenticationError"


def test_anthropics_header(serve: Serve, tmp_path: Path) -> None:
    token, key = make()
    url = serve(keys_file=write(tmp_path / "keys.json", key))
    assert httpx.post(f"{url}/v1/chat/completions", json={}, headers={"x-api-key": token}).status_code == 200
    both = {"x-api-key": token, "Authorization": "Bearer wrong"}
    assert httpx.post(f"{url}/v1/chat/completions", json={}, headers=both).status_code == 401


def test_scopes(serve: Serve, tmp_path: Path, model: Model) -> None:
    (infer, infer_key), (admin, admin_key) = make("user", scopes=[INFER]), make("ops", scopes=[ADMIN])
    url = serve(keys_file=write(tmp_path / "keys.json", infer_key, admin_key))
    with Client(base_url=url, api_key=admin, max_retries=0) as client:
        assert client.mesh.raw("status") == {"here": True}
    with (
        Client(base_url=url, api_key=infer, max_retries=0) as client,
        pytest.raises(ExpertMeshError, match=r"refuses the API key \(HTTP 403\)"),
    ):
        client.mesh.raw("status")
    with pytest.raises(openai.PermissionDeniedError, match="has not the scope infer"):
        ask(url, admin)
    with httpx.Client(base_url=url) as http:
        assert http.post("/mesh/placement/apply").status_code == 401
        assert http.post("/mesh/placement/apply", headers={"Authorization": f"Bearer {infer}"}).status_code == 403
        assert model.applied == 0
        assert http.get("/health").status_code == 200, "probes have no key"
        for path in ("/docs", "/openapi.json", "/nothing", "/health/", "/v1/models", "/mesh", "//mesh/status"):
            assert http.get(path).status_code == 401, path


@pytest.mark.parametrize("way", ["environment", "file"])
def test_the_sdk_takes_the_key_from_the_environment_or_a_file(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    token, key = make(scopes=[ADMIN])
    url = serve(keys_file=write(tmp_path / "keys.json", key))
    if way == "environment":
        monkeypatch.setenv("EXPERTMESH_API_KEY", token)
        monkeypatch.setenv("EXPERTMESH_API_KEY_FILE", "/not/read")
    else:
        (tmp_path / "key").write_text(f"{token}\n")
        monkeypatch.setenv("EXPERTMESH_API_KEY_FILE", str(tmp_path / "key"))
    with Client(base_url=url) as client:
        assert client.mesh.raw("status") == {"here": True}


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "can't read"), (b"two words", "holds a space"), (b"a\nb", "holds a space"), (b"\xff", "not ASCII")],
)
def test_a_key_file_of_a_client_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, said: str
) -> None:
    monkeypatch.delenv("EXPERTMESH_API_KEY", raising=False)
    path = tmp_path / "key"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("EXPERTMESH_API_KEY_FILE", str(path))
    with pytest.raises(ConfigError, match=said) as refused:
        Client()
    assert "two words" not in str(refused.value)


def test_a_key_file_that_can_not_be_used_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't read"):
        add_walls(FastAPI(), IngressConfig(keys_file=tmp_path / "no"))


# --- limits ---


def test_a_streaming_request_counts_until_it_ends_or_its_client_leaves(
    serve: Serve, tmp_path: Path, model: Model
) -> None:
    token, key = make(concurrent_requests=2)
    url = serve(keys_file=write(tmp_path / "keys.json", key))
    with openai.OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0) as client:
        streams = [client.chat.completions.create(model="demo", messages=QUESTION, stream=True) for _ in range(2)]
        assert all(model.began.acquire(timeout=10) for _ in streams)
        with pytest.raises(openai.RateLimitError, match="at once") as refused:
            ask(url, token)
        assert refused.value.response.headers["retry-after"] == "1"
        assert error_of(refused.value.response)["type"] == "RateLimitError"
        streams[0].close()
        patient = {"timeout": 30, "max_retries": 20}
        with openai.OpenAI(base_url=f"{url}/v1", api_key=token, **patient) as again:
            assert again.chat.completions.create(model="demo", messages=QUESTION).choices[0].message.content == "team"
        model.end.set()
        assert [chunk.choices[0].delta.content for chunk in streams[1]] == ["team", "end"]
    assert ask(url, token) == "team"


def test_requests_a_minute_and_when_to_come_back(serve: Serve, tmp_path: Path) -> None:
    token, key = make(requests_per_minute=2, scopes=[ADMIN, INFER])
    url = serve(keys_file=write(tmp_path / "keys.json", key))
    assert [ask(url, token), ask(url, token)] == ["team", "team"]
    with pytest.raises(openai.RateLimitError, match="2 requests a minute") as refused:
        ask(url, token)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 30
    with Client(base_url=url, api_key=token, max_retries=0) as client, pytest.raises(Unavailable) as told:
        client.mesh.raw("status")
    assert told.value.retry_after_s >= 1
    assert httpx.get(f"{url}/health").status_code == 200


# --- without keys ---


def test_without_keys_loopback_is_open(serve: Serve, model: Model) -> None:
    url = serve()
    assert ask(url, "anything") == "None"
    with Client(base_url=url) as client:
        assert client.mesh.raw("status") == {"here": True}
    assert httpx.post(f"{url}/mesh/placement/apply").status_code == 200
    assert model.applied == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "mesh.example.com"])
def test_without_keys_admin_routes_are_closed_where_the_ingress_is_not_on_loopback(serve: Serve, host: str) -> None:
    url = serve(host=host)
    with Client(base_url=url) as client, pytest.raises(ExpertMeshError, match="refuses the API key"):
        client.mesh.raw("status")
    answer = httpx.post(f"{url}/mesh/placement/apply")
    assert "ingress.keys_file" in error_of(answer)["message"]
    assert answer.status_code == 403
    assert ask(url, "anything") == "None"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "[::1"},
        {"Host": ""},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Forwarded": "for=127.0.0.1"},
    ],
)
def test_a_domain_that_points_here_and_a_proxy_are_not_this_machine(
    serve: Serve, model: Model, headers: dict[str, str]
) -> None:
    url = serve()
    assert httpx.post(f"{url}/mesh/placement/apply", headers=headers).status_code == 403
    assert model.applied == 0


def scope_of(client: tuple[str, int] | None = ("127.0.0.1", 5), host: str = "localhost") -> tuple[Scope, Headers]:
    scope: Scope = {"type": "http", "client": client, "headers": [(b"host", host.encode())]}
    return scope, Headers(scope=scope)


@pytest.mark.parametrize(
    "client", [None, ("10.0.0.1", 5), ("localhost.evil.example", 5), ("", 5), ("::ffff:9.9.9.9", 5)]
)
def test_peers_that_are_not_this_machine(client: tuple[str, int] | None) -> None:
    assert not rules.is_local(*scope_of(client))


@pytest.mark.parametrize("host", ["localhost:8000", "LOCALHOST", "127.0.0.1", "127.8.8.8:1", "[::1]:8000"])
@pytest.mark.parametrize("client", ["127.0.0.1", "127.9.9.9", "::1"])
def test_names_of_this_machine(client: str, host: str) -> None:
    assert rules.is_local(*scope_of((client, 5), host))


# --- pages in browsers ---


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1.evil.example", "file://"])
def test_pages_of_other_origins_are_refused_by_default(
    serve: Serve, tmp_path: Path, model: Model, origin: str, keys: bool
) -> None:
    token, key = make(scopes=[ADMIN, INFER])
    url = serve(keys_file=write(tmp_path / "keys.json", key) if keys else None)
    sent = {"Origin": origin, "Authorization": f"Bearer {token}"}
    for answer in (
        httpx.post(f"{url}/mesh/placement/apply", headers=sent),
        httpx.post(f"{url}/v1/chat/completions", json={}, headers=sent),
        httpx.options(f"{url}/v1/chat/completions", headers={**sent, "Access-Control-Request-Method": "POST"}),
    ):
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers
    assert model.applied == 0


def test_pages_of_the_ingress_itself_may_call(serve: Serve) -> None:
    url = serve()
    assert httpx.get(f"{url}/mesh/status", headers={"Origin": url}).status_code == 200


def test_pages_that_are_allowed_may_call_and_read_refusals(serve: Serve, tmp_path: Path) -> None:
    token, key = make()
    page = "https://app.example"
    url = serve(keys_file=write(tmp_path / "keys.json", key), cors_origins=[page])
    asks = {"Origin": page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = httpx.options(f"{url}/v1/chat/completions", headers=asks)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, page)
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    for sent, status in (({"Authorization": f"Bearer {token}"}, 200), ({}, 401)):
        answer = httpx.post(f"{url}/v1/chat/completions", json={}, headers={"Origin": page, **sent})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, page)
    elsewhere = httpx.post(f"{url}/v1/chat/completions", json={}, headers={"Origin": "https://b.example"})
    assert elsewhere.status_code == 403
    assert "access-control-allow-origin" not in elsewhere.headers


# --- sizes ---


def test_a_body_that_is_too_large(serve: Serve) -> None:
    url = f"{serve(max_body_mib=1)}/v1/chat/completions"
    fits = b'{"a": "' + b"x" * ((1 << 20) - 9) + b'"}'
    assert len(fits) == 1 << 20
    assert httpx.post(url, content=fits).status_code == 200
    assert httpx.post(url, content=iter([fits])).status_code == 200
    for content in (fits + b" ", iter([fits, b" "])):  # the second does not say how long it is
        answer = httpx.post(url, content=content)
        assert answer.status_code == 413
        assert "1048576 bytes" in error_of(answer)["message"]


def test_a_body_that_is_announced_too_large_is_not_waited_for(serve: Serve) -> None:
    url = httpx.URL(serve(max_body_mib=1))
    with socket.create_connection((url.host, url.port or 0), timeout=10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n{")
        assert sock.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_request_without_a_key_is_answered_before_its_body_came(serve: Serve, tmp_path: Path) -> None:
    url = httpx.URL(serve(keys_file=write(tmp_path / "keys.json")))
    with socket.create_connection((url.host, url.port or 0), timeout=10) as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{")
        assert sock.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_headers_that_are_too_large(serve: Serve) -> None:
    url = serve(max_header_kib=4)
    assert httpx.get(f"{url}/health", headers={"X-A": "a" * 3500}).status_code == 200
    for answer in (
        httpx.get(f"{url}/health", headers={"X-A": "a" * 4096}),
        httpx.get(f"{url}/health", headers=[("X-A", "a" * 40)] * 100),
        httpx.get(f"{url}/health?{'a' * 4096}"),
    ):
        assert answer.status_code == 431
        assert error_of(answer)["type"] == "RequestTooLarge"


# --- what can't be said by a well-behaved client ---


@given(
    path=st.text(max_size=20) | st.sampled_from(["/mesh/status", "/v1/models", "/health"]),
    root=st.sampled_from(["", "/", "/v1", "/api"]),
    headers=st.lists(
        st.tuples(
            st.sampled_from([b"authorization", b"host", b"origin", b"x-api-key", b"content-length", b"forwarded"]),
            st.binary(max_size=30) | st.sampled_from([b"Bearer ", b"[", b"http://[", b"https://", b"Bearer xm-"]),
        ),
        max_size=6,
    ),
    client=st.none() | st.tuples(st.text(max_size=12), st.integers(0, 65535)),
    keyless=st.booleans(),
)
def test_no_request_passes_without_a_key_or_breaks_the_walls(
    tmp_path_factory: pytest.TempPathFactory,
    path: str,
    root: str,
    headers: list[tuple[bytes, bytes]],
    client: tuple[str, int] | None,
    keyless: bool,
) -> None:
    """Behind them is an application that notes what comes through."""
    passed: list[str] = []
    statuses: list[int] = []

    async def behind(scope: Scope, receive: Receive, send: Send) -> None:
        passed.append(rules.path_of(scope))

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    app = FastAPI()
    keys = None if keyless else write(tmp_path_factory.getbasetemp() / "no-keys.json")
    add_walls(app, IngressConfig(keys_file=keys, host="10.0.0.1"))
    walls: Any = behind
    for layer in reversed(app.user_middleware):
        walls = layer.cls(walls, *layer.args, **layer.kwargs)
    scope = {"type": "http", "method": "GET", "path": path, "root_path": root, "headers": headers, "client": client}
    asyncio.run(walls(scope, receive, send))
    assert len(passed) + len(statuses) == 1
    if passed and passed[0] not in rules.PUBLIC:
        assert keyless, passed
        assert not passed[0].startswith("/mesh/")


@given(a=st.text(max_size=8), b=st.text(max_size=8), asked=st.none() | st.text(max_size=8))
def test_salts_of_tenants_differ(a: str, b: str, asked: str | None) -> None:
    assert (salt_for(a, asked) == salt_for(b, asked)) is (a == b)
    assert salt_for(a, None) != salt_for(a, asked or "")
    assert len(salt_for(a, asked)) == 32
