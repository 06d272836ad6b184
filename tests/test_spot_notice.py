"""The spot notice, against a metadata service on this machine."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from expertmesh.platform.autoscaling.spot import InstanceMetadata, Notice


class Service(ThreadingHTTPServer):
    """Hands out tokens and, once `said` is set, a notice."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.said: str | None = None
        self.tokens = 0
        self.broken = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self.server.tokens += 1
        self.answer(200, f"token {self.server.tokens}")

    def do_GET(self) -> None:
        assert self.path == "/latest/meta-data/spot/instance-action"
        if self.headers.get("X-aws-ec2-metadata-token") != f"token {self.server.tokens}":
            self.answer(401, "")
        elif self.server.broken:
            self.answer(500, "")
        elif self.server.said is None:
            self.answer(404, "")
        else:
            self.answer(200, self.server.said)

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as service:
        thread = threading.Thread(target=service.serve_forever)
        thread.start()
        yield service
        service.shutdown()
        thread.join()


async def test_a_notice_is_seen_with_one_token(service: Service) -> None:
    async with InstanceMetadata(service.url) as metadata:
        assert await metadata.notice() is None
        assert await metadata.notice() is None
        service.said = json.dumps({"action": "terminate", "time": "2026-07-01T12:02:00Z"})
        assert await metadata.notice() == Notice("terminate", datetime(2026, 7, 1, 12, 2, tzinfo=UTC))
        assert service.tokens == 1


async def test_a_token_that_is_too_old_is_replaced(service: Service) -> None:
    async with InstanceMetadata(service.url) as metadata:
        assert await metadata.notice() is None
        service.tokens += 1  # the one that was handed out is no good any more
        assert await metadata.notice() is None
        assert service.tokens == 3


async def test_what_is_no_notice_is_an_error(service: Service) -> None:
    async with InstanceMetadata(service.url) as metadata:
        for said in ("[]", '{"action": "stop"}', '{"action": "stop", "time": "soon"}', "{"):
            service.said = said
            with pytest.raises(ValueError):  # noqa: PT011  # of three kinds, all of them ValueError
                await metadata.notice()
        service.broken = True
        with pytest.raises(httpx.HTTPStatusError):
            await metadata.notice()


async def test_a_service_that_is_not_there_is_an_error() -> None:
    async with InstanceMetadata("http://127.0.0.1:9") as metadata:
        with pytest.raises(httpx.ConnectError):
            await metadata.notice()
