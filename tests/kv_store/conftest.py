"""Servers that the tests of the KV store share or break."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.timing import free_port
from expertmesh.kv_store import Endpoint, Identity, Keyspace, StoreClient, StoreSettings
from tests.kv_store.servers import Server, form_cluster, plain_server, redis_with_tls, write_certificates

PASSWORD = "not-a-word-of-any-message"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A Valkey with a password that a test may break."""
    running = plain_server(tmp_path / "valkey", free_port(), requirepass=PASSWORD)
    running.start()
    yield running
    running.kill()


@pytest.fixture
def settings(server: Server) -> StoreSettings:
    """How `server` is reached."""
    return StoreSettings(Endpoint("127.0.0.1", int(server.config["port"])), password=PASSWORD)


@pytest.fixture
def new_client() -> Iterator[Callable[[StoreSettings], StoreClient]]:
    """Makes clients that are closed in the end."""
    with ExitStack() as stack:

        def made(settings: StoreSettings) -> StoreClient:
            client = StoreClient(settings)
            stack.callback(client.close)
            return client

        yield made


@pytest.fixture
def keyspace() -> Keyspace:
    """Keys of some identity."""
    return Keyspace(Identity("weights", "0.32.0", "float32", "layout", "avx2", 128, 4096), b"a secret of the mesh")


@pytest.fixture(scope="session")
def shared_socket() -> Iterator[Path]:
    """The unix socket of a Valkey without a password that no test breaks."""
    with tempfile.TemporaryDirectory(prefix="xm-") as folder:  # a short path: sockets' have a limit
        path = Path(folder) / "socket"
        running = Server(Path(folder) / "valkey", {"port": "0", "unixsocket": str(path), "maxmemory": "200mb"})
        running.start()
        yield path
        running.kill()


@pytest.fixture
def new_cluster(tmp_path: Path) -> Iterator[Callable[[int, int], tuple[list[Server], list[Server]]]]:
    """Starts a cluster of some masters, and of replicas of the first ones of these: (masters, replicas)."""
    with ExitStack() as stack:

        def started(masters: int, replicas: int) -> tuple[list[Server], list[Server]]:
            members = []
            for i in range(masters + replicas):
                member = plain_server(
                    tmp_path / f"member-{i}",
                    free_port(),
                    **{
                        "cluster-enabled": "yes",
                        "cluster-node-timeout": "500",
                        "cluster-require-full-coverage": "no",
                        "cluster-port": str(free_port()),
                        "cluster-replica-validity-factor": "0",
                    },
                )
                stack.callback(member.kill)
                member.start()
                members.append(member)
            ports = [int(member.config["port"]) for member in members]
            bus = {int(member.config["port"]): int(member.config["cluster-port"]) for member in members}
            form_cluster(ports[:masters], dict(zip(ports[masters:], ports, strict=False)), bus)
            return members[:masters], members[masters:]

        yield started


@pytest.fixture(scope="session")
def tls_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A Redis that speaks TLS only, with an ACL user, and the file of its CA."""
    cache = Path(os.environ.get("EXPERTMESH_CACHE") or "~/.cache/expertmesh").expanduser()
    found = redis_with_tls(cache)
    if isinstance(found, str):
        pytest.skip(found)
    folder = tmp_path_factory.mktemp("tls")
    ca_file = write_certificates(folder)
    config = {
        "bind": "127.0.0.1",
        "port": "0",
        "tls-port": str(free_port()),
        "tls-cert-file": str(folder / "server.pem"),
        "tls-key-file": str(folder / "server.key"),
        "tls-ca-cert-file": str(ca_file),
        "tls-auth-clients": "no",
        "user": f"mesh on >{PASSWORD} ~xm1:* -@all +get +set +exists +ping",
    }
    running = Server(folder / "redis", config, *found)
    running.start()
    yield running, ca_file
    running.kill()
