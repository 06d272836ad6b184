"""The SDK sends a generation again only where none can be running: against a server that counts what it started."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest

from expertmesh import AsyncClient, Client

BODY = json.dumps(
    {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "text": "blue", "finish_reason": "stop", "logprobs": None}],
    }
)


def answer(status: str, *headers: str, body: str = "{}") -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Content-Type: application/json", *headers]
    return ("\r\n".join([*head, "Connection: close"]) + "\r\n\r\n" + body).encode()


OK = answer("200 OK", body=BODY)
HALF = OK[:-20]
SILENCE = b""


class Server:
    """Answers each request with the next of `answers`, an empty one by saying nothing until the client is gone."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.started = 0
        """Requests that came whole: what a mesh would generate for."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:  # closed
                return
            with connection:
                self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        request = connection.makefile("rb")
        length = 0
        for line in iter(request.readline, b"\r\n"):
            if not line:
                return
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        request.read(length)
        self.started += 1
        said = self.answers.pop(0)
        connection.sendall(said) if said else request.read()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


Generate = Callable[..., Awaitable[Any]]
PROMPT: dict[str, Any] = {"model": "tiny", "prompt": "The sky is"}


@pytest.fixture(params=["sync", "async"])
def generate(request: pytest.FixtureRequest) -> Generate:
    """One completion through one of the two clients."""

    async def with_client(url: str, stream: bool = False, **options: Any) -> Any:
        with Client(base_url=url, **options) as client:
            return client.completions.create(**PROMPT, stream=stream)

    async def with_async_client(url: str, stream: bool = False, **options: Any) -> Any:
        async with AsyncClient(base_url=url, **options) as client:
            return await client.completions.create(**PROMPT, stream=stream)

    return with_client if request.param == "sync" else with_async_client


MAY_RUN = {
    "broken after the request": (answer("200 OK", body="")[:20], openai.APIConnectionError),
    "broken within the answer": (HALF, openai.APIConnectionError),
    "no answer in time": (SILENCE, openai.APITimeoutError),
    "500": (answer("500 Internal Server Error"), openai.InternalServerError),
    "500 that asks for more": (answer("500 Internal Server Error", "x-should-retry: true"), openai.InternalServerError),
    "502": (answer("502 Bad Gateway"), openai.InternalServerError),
    "504": (answer("504 Gateway Timeout", "Retry-After: 0"), openai.InternalServerError),
    "408": (answer("408 Request Timeout"), openai.APIStatusError),
    "409": (answer("409 Conflict"), openai.ConflictError),
    "503 of some gateway": (answer("503 Service Unavailable"), openai.InternalServerError),
    "503 for too long": (answer("503 Service Unavailable", "Retry-After: 3600"), openai.InternalServerError),
}


@pytest.mark.parametrize(
    ("case", "stream"),
    # A stream whose answer breaks has begun by then, and is the caller's.
    [(case, stream) for case in MAY_RUN for stream in (False, True) if not (stream and MAY_RUN[case][0] is HALF)],
)
async def test_what_may_run_is_not_started_again(generate: Generate, server: Server, case: str, stream: bool) -> None:
    said, error = MAY_RUN[case]
    server.answers = [said, OK, OK]
    with pytest.raises(error):
        await generate(server.url, stream, timeout=0.3 if said is SILENCE else 60)
    assert (server.started, server.answers) == (1, [OK, OK])


@pytest.mark.parametrize("case", ["broken within the answer", "502"])
def test_the_client_beneath_would_start_it_again(server: Server, case: str) -> None:
    """So the server tells one from the other."""
    server.answers = [MAY_RUN[case][0], OK]
    with openai.OpenAI(base_url=server.url, api_key="none") as client:
        assert client.completions.create(**PROMPT).choices[0].text == "blue"
    assert server.started == 2


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
async def test_what_the_mesh_refused_is_asked_again(generate: Generate, server: Server, status: str) -> None:
    refusal = answer(status, "Retry-After: 0.01")
    server.answers = [refusal, refusal, OK]
    assert (await generate(server.url)).choices[0].text == "blue"
    assert server.started == 3
    for retries in (0, 1):
        server.answers = [refusal, refusal, OK]
        with pytest.raises(openai.APIStatusError, match=status[:3]):
            await generate(server.url, max_retries=retries)
        assert len(server.answers) == 3 - 1 - retries


async def test_retries_of_one_request(server: Server) -> None:
    refusal = answer("503 Service Unavailable", "Retry-After: 0.01")
    server.answers = [refusal, OK, refusal, OK]
    with Client(base_url=server.url, max_retries=0) as client:
        client.with_options(max_retries=1).completions.create(**PROMPT)
        with pytest.raises(openai.InternalServerError):
            client.completions.create(**PROMPT)
    assert server.started == 3


@contextmanager
def nobody_listens_at_first() -> Iterator[tuple[str, Callable[[], None]]]:
    """A URL where connections are refused until the function is called; from then on it answers OK, once."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        threads: list[threading.Thread] = []

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(OK)

        def listen() -> None:
            listening.listen()
            threads.append(threading.Thread(target=serve))
            threads[0].start()

        yield f"http://127.0.0.1:{listening.getsockname()[1]}", listen
        for thread in threads:
            thread.join()


class _Tries(httpx2.HTTPTransport):
    """Calls `before_second` before the second request goes out."""

    def __init__(self, before_second: Callable[[], None]) -> None:
        super().__init__()
        self.tries = 0
        self._before_second = before_second

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.tries += 1
        if self.tries == 2:
            self._before_second()
        return super().handle_request(request)


class _AsyncTries(httpx2.AsyncHTTPTransport):
    def __init__(self, before_second: Callable[[], None]) -> None:
        super().__init__()
        self.tries = 0
        self._before_second = before_second

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.tries += 1
        if self.tries == 2:
            self._before_second()
        return await super().handle_async_request(request)


def test_a_connection_that_never_opened_is_tried_again() -> None:
    with nobody_listens_at_first() as (url, listen):
        transport = _Tries(listen)
        with Client(base_url=url, http_client=httpx2.Client(transport=transport)) as client:
            assert client.completions.create(**PROMPT).choices[0].text == "blue"
        assert transport.tries == 2


async def test_a_connection_that_never_opened_is_tried_again_async() -> None:
    with nobody_listens_at_first() as (url, listen):
        transport = _AsyncTries(listen)
        async with AsyncClient(base_url=url, http_client=httpx2.AsyncClient(transport=transport)) as client:
            assert (await client.completions.create(**PROMPT)).choices[0].text == "blue"
        assert transport.tries == 2


async def test_a_refused_connection_is_given_up_in_the_end(generate: Generate) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(openai.APIConnectionError):
        await generate(url, max_retries=1)
