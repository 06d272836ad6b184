"""S3 on this machine: moto's, behind a real HTTP server in a process of its own, and a proxy that counts and breaks.

No request leaves the machine. moto copies an object's whole content for each range of it that is read, so objects here
should be some tens of MB at most.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any, ClassVar
from urllib.parse import urlsplit

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}
"""Environment for whoever asks this S3."""

_AWS = "http://s3.amazonaws.com"
_BLOCK = 64 << 10
_HOP_HEADERS = {"connection", "content-length", "transfer-encoding", "keep-alive", "host", "expect"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client may go away at any time
            super().handle()

    def body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def answer(self, status: int, headers: dict[str, str], length: int) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


class _MotoHandler(_Handler):
    def handle_request(self) -> None:
        from botocore.awsrequest import AWSPreparedRequest  # type: ignore[import-untyped]
        from botocore.compat import HTTPHeaders  # type: ignore[import-untyped]
        from moto.core.botocore_stubber import BotocoreStubber

        headers = HTTPHeaders()
        for name, value in self.headers.items():
            if name.lower() != "host":
                headers[name] = value
        request = AWSPreparedRequest(self.command, f"{_AWS}{self.path}", headers, self.body(), False)
        found = BotocoreStubber().process_request(request)
        status, answered, content = found if found is not None else (404, {}, b"")
        raw = content.encode() if isinstance(content, str) else content
        length = int(answered.get("content-length", 0)) if self.command == "HEAD" else len(raw)
        self.answer(status, {name: str(value) for name, value in answered.items()}, length)
        if self.command != "HEAD":
            self.wfile.write(raw)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815 (http.server's names)


def _serve(pipe: Connection) -> None:
    os.environ.update(CREDENTIALS)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _MotoHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pipe.send(server.server_port)
    with contextlib.suppress(EOFError):
        pipe.recv()


@contextmanager
def s3_service() -> Iterator[str]:
    """An empty S3; yields its URL. Gone after the block, with everything in it."""
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,))
    process.start()
    theirs.close()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        ours.close()
        process.join()


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that the proxy saw."""

    method: str
    path: str
    """`/bucket/key`, without the query."""
    range: str
    """The Range header, empty where there is none."""
    number: int
    """How many requests with the same method, path and range came before it."""
    headers: Mapping[str, str]
    """All of the request's, by names in lower case."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Answer by an error without asking S3."""

    status: int = 503
    code: str = "SlowDown"


@dataclass(frozen=True, slots=True)
class Cut:
    """Pass on this many bytes of the body and close the connection."""

    after: int


@dataclass(frozen=True, slots=True)
class Forget:
    """Leave this header out of the request that is passed on."""

    header: str


Fault = Refuse | Cut | Forget


class Proxy:
    """Between a client and S3: counts the bytes of bodies that it hands out and injects faults."""

    def __init__(self, upstream: str) -> None:
        self.fault: Callable[[Asked], Fault | None] = lambda asked: None
        """Asked for each request; may block, in which case the request waits."""
        self.asked: list[Asked] = []
        self.sent: dict[str, int] = {}
        """Bytes of GET bodies by path."""
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        address = urlsplit(upstream).netloc
        handler = type("_Bound", (_ProxyHandler,), {"proxy": self, "upstream": address})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def opened(self, connection: socket.socket) -> None:
        """Remembers a client's connection."""
        with self._lock:
            self._open.add(connection)

    def closed(self, connection: socket.socket) -> None:
        """Forgets it."""
        with self._lock:
            self._open.discard(connection)

    def note(self, method: str, path: str, headers: Mapping[str, str]) -> Asked:
        """Counts a request."""
        span = headers.get("range", "")
        with self._lock:
            before = sum((a.method, a.path, a.range) == (method, path, span) for a in self.asked)
            self.asked.append(asked := Asked(method, path, span, before, headers))
            return asked

    def count_of(self, asked: Asked) -> int:
        """How many requests with the same method, path and range there were."""
        with self._lock:
            return sum((a.method, a.path, a.range) == (asked.method, asked.path, asked.range) for a in self.asked)

    def count(self, path: str, nbytes: int) -> None:
        """Counts bytes of a body."""
        with self._lock:
            self.sent[path] = self.sent.get(path, 0) + nbytes

    def reset(self) -> None:
        """Forgets what was counted, and the faults."""
        with self._lock:
            self.asked.clear()
            self.sent.clear()
            self.fault = lambda asked: None

    def stop(self) -> None:
        """Stops listening, for good; connections that are open are closed. May be called again."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)


class _ProxyHandler(_Handler):
    proxy: ClassVar[Proxy]
    upstream: ClassVar[str]

    def setup(self) -> None:
        super().setup()
        self.proxy.opened(self.connection)

    def finish(self) -> None:
        self.proxy.closed(self.connection)
        with contextlib.suppress(OSError):
            super().finish()

    def handle_request(self) -> None:
        path = urlsplit(self.path).path
        asked = self.proxy.note(self.command, path, {name.lower(): value for name, value in self.headers.items()})
        body = self.body()
        fault = self.proxy.fault(asked)
        if isinstance(fault, Refuse):
            raw = f"<Error><Code>{fault.code}</Code><Message>injected</Message></Error>".encode()
            self.answer(fault.status, {"Content-Type": "application/xml"}, len(raw))
            if self.command != "HEAD":
                self.wfile.write(raw)
            return
        left_out = {fault.header.lower()} if isinstance(fault, Forget) else set()
        headers = {n: v for n, v in self.headers.items() if n.lower() not in _HOP_HEADERS | left_out}
        connection = HTTPConnection(self.upstream, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, headers)
            self._pass_on(path, connection.getresponse(), fault.after if isinstance(fault, Cut) else None)
        finally:
            connection.close()

    def _pass_on(self, path: str, response: HTTPResponse, after: int | None) -> None:
        length = int(response.getheader("Content-Length") or 0)
        self.answer(response.status, dict(response.getheaders()), length)
        if self.command == "HEAD":
            return
        left = length if after is None else min(after, length)
        while left and (block := response.read(min(left, _BLOCK))):
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(block)
            left -= len(block)
            if self.command == "GET":
                self.proxy.count(path, len(block))
        if after is not None:
            self.wfile.flush()
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815 (http.server's names)


def s3_client(url: str) -> Any:
    """A plain client of the S3 at `url`, to fill it and to look at it."""
    import boto3  # type: ignore[import-untyped]

    return boto3.session.Session().client(
        "s3",
        endpoint_url=url,
        region_name=CREDENTIALS["AWS_DEFAULT_REGION"],
        aws_access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
    )
