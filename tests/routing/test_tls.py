"""Certificates and connections with TLS: who gets in, who doesn't, and what each side says about it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from expertmesh.errors import ConfigError, WireError
from expertmesh.routing.transport import Door, Peer, Tls, TlsSettings, answer, connect, listen
from expertmesh.routing.transport.auth import HEAD_BYTES, receive_exactly
from expertmesh.routing.transport.session import TlsSession
from expertmesh.routing.transport.sockets import Address, accepted
from tests.routing.certificates import SERVER_ONLY, Authority, replace, write
from tests.routing.harness import eventually
from tests.routing.middle import middle
from tests.routing.test_transport import Side

SECRET = b"correct horse battery staple"
ME = Peer("shard-7", "rev-1", 16, "float32")
log = logging.getLogger("expertmesh.tests")


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def member(tmp_path: Path, authority: Authority) -> TlsSettings:
    """A shard's certificates."""
    return write(tmp_path / "member", authority)


@pytest.fixture
def other(tmp_path: Path, authority: Authority) -> Tls:
    """An attention replica's."""
    return Tls(write(tmp_path / "other", authority))


# -- files --------------------------------------------------------------------------------------------------------


def encrypted(key: bytes) -> bytes:
    loaded = serialization.load_pem_private_key(key, None)
    algorithm = serialization.BestAvailableEncryption(b"a password")
    return loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, algorithm)


EMPTY = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


Spoil = Callable[[Path, Authority], object]
BROKEN: dict[str, tuple[Spoil, str]] = {
    "no certificate": (
        lambda f, _: (f / "cert.pem").unlink(),
        r"cert_file: can't read .*cert.pem: No such file",
    ),
    "no key": (lambda f, _: (f / "key.pem").unlink(), r"key_file: can't read .*key.pem: No such file"),
    "no authorities": (lambda f, _: (f / "ca.pem").unlink(), r"ca_file: can't read .*ca.pem: No such file"),
    "a folder": (lambda f, _: make_folder(f / "ca.pem"), "ca_file: .* is not a regular file"),
    "an open key": (
        lambda f, _: (f / "key.pem").chmod(0o644),
        r"key_file: .* open to every user \(mode 0644\); mend: chmod 600",
    ),
    "the key of another": (
        lambda f, a: replace(f / "key.pem", a.leaf()[1]),
        "key_file: .* is not the key of the certificate",
    ),
    "an encrypted key": (
        lambda f, _: replace(f / "key.pem", encrypted((f / "key.pem").read_bytes())),
        "key_file: .* is encrypted",
    ),
    "a key for a certificate": (
        lambda f, _: replace(f / "cert.pem", (f / "key.pem").read_bytes()),
        "cert_file: .* holds no PEM block",
    ),
    "no PEM": (lambda f, _: replace(f / "ca.pem", b"\x30\x82" * 50), "ca_file: .* holds no PEM block"),
    "a broken certificate": (
        lambda f, _: replace(f / "cert.pem", EMPTY),
        "cert_file, key_file: .* is not understood",
    ),
    "broken authorities": (lambda f, _: replace(f / "ca.pem", EMPTY), "ca_file: .* is not understood"),
    "another authority": (
        lambda f, _: replace(f / "ca.pem", Authority().pem),
        "cert_file: peers .* would refuse .*",
    ),
    "an expired certificate": (
        lambda f, a: write(f, a, life=timedelta(hours=-1)),
        "cert_file: .* would refuse .*: certificate has expired",
    ),
    "a certificate for servers only": (
        lambda f, a: write(f, a, usage=SERVER_ONLY),
        "cert_file: .* would refuse .*: un.* certificate purpose",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_files_that_can_not_be_used_are_named(member: TlsSettings, authority: Authority, what: str) -> None:
    spoil, says = BROKEN[what]
    Tls(member)
    spoil(Path(member.cert_file).parent, authority)
    with pytest.raises(ConfigError, match=f"^routing.tls.{says}"):
        Tls(member)


def test_the_group_may_read_the_key(member: TlsSettings) -> None:
    """As Kubernetes mounts a Secret for a pod that isn't root."""
    Path(member.key_file).chmod(stat.S_IRUSR | stat.S_IRGRP)
    Tls(member)


def test_new_files_are_taken_and_broken_ones_are_not(
    member: TlsSettings, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(member.cert_file).parent
    tls = Tls(member)
    first = tls.current()
    assert tls.current() is first
    write(folder, authority)
    second = tls.current()
    assert second.fingerprint != first.fingerprint
    whole = (folder / "cert.pem").read_bytes()
    replace(folder / "cert.pem", whole[:200])
    assert tls.current() is second
    assert tls.current() is second
    assert [r.levelname for r in caplog.records if "stay as they were" in r.message] == ["ERROR"], "said once"
    (folder / "cert.pem").unlink()
    assert tls.current() is second
    replace(folder / "cert.pem", whole)
    assert tls.current().fingerprint == second.fingerprint
    assert tls.current() is not second


# -- connections --------------------------------------------------------------------------------------------------


class Shard:
    """A door on a listener, whose members are kept."""

    def __init__(self, tls: Tls | None, secret: bytes = SECRET) -> None:
        self._listener, self.address = listen(Address("tcp", "127.0.0.1", 0))
        self.door = Door(secret, tls, log)
        self.members: list[socket.socket] = []
        self._accepting = Side(self._accept)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.door.greet(accepted(self._listener), ME, self.members.append)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self.door.close()
        for sock in self.members:
            sock.close()


@contextlib.contextmanager
def shard(tls: Tls | None, secret: bytes = SECRET) -> Iterator[Shard]:
    running = Shard(tls, secret)
    try:
        yield running
    finally:
        running.close()


def said(caplog: pytest.LogCaptureFixture, words: str) -> None:
    """Waits until the server has logged so."""
    eventually(lambda: words in caplog.text, f"{words!r} in the log: {caplog.text}")


def test_members_talk_and_nobody_in_between_understands(member: TlsSettings, other: Tls) -> None:
    with shard(Tls(member)) as server, middle(server.address) as spy:
        sock, peer = connect(spy.address, SECRET, 10, other)
        with sock:
            assert peer == ME
            assert not sock.getblocking()
            sock.settimeout(10)
            sock.sendall(b"a question")
            eventually(lambda: bool(server.members), "it is admitted")
            server.members[0].settimeout(10)
            assert receive_exactly(server.members[0], 10) == b"a question"
            server.members[0].sendall(b"an answer")
            assert receive_exactly(sock, 9) == b"an answer"
        assert len(spy.up) > 1000
        assert len(spy.down) > 1000
        for heard in (spy.up, spy.down):
            assert not any(word in heard for word in (b"question", b"answer", b"shard-7", b"rev-1", b"a member"))


def test_unix_sockets_stay_plain(member: TlsSettings, other: Tls) -> None:
    listener, address = listen(Address("unix", f"test-tls-{os.getpid()}"))
    door = Door(SECRET, Tls(member), log)
    members: list[socket.socket] = []
    with listener:
        asking = Side(lambda: connect(address, SECRET, 10, other))
        door.greet(accepted(listener), ME, members.append)
        sock, peer = asking.join().result  # type: ignore[misc]  # of connect
        assert peer == ME
        eventually(lambda: bool(members), "it is admitted")
        assert sock.getpeername() == members[0].getsockname(), "the very socket"
        sock.close()
        members[0].close()
    door.close()


def refused(server: Shard, tls: Tls | None, match: str, secret: bytes = SECRET) -> None:
    """The client hears why, long before its timeout, which is longer than a test may take."""
    with pytest.raises(WireError, match=match):
        connect(server.address, secret, 300, tls)
    assert not server.members


def test_a_client_without_tls_is_refused_and_both_are_told(
    member: TlsSettings, caplog: pytest.LogCaptureFixture
) -> None:
    with shard(Tls(member)) as server:
        refused(server, None, "shard wants TLS, and routing.tls is not set here")
        said(caplog, "peer closed the connection in the TLS handshake; is routing.tls set there?")


def test_a_client_with_tls_refuses_a_server_without_and_both_are_told(
    other: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    with shard(None) as server:
        refused(server, other, "shard has no TLS, and routing.tls is set here")
        said(caplog, "client wants TLS, and routing.tls is not set here")


def test_certificates_of_another_authority_are_refused_on_either_side(
    member: TlsSettings, tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Authority()
    with shard(Tls(member)) as server:
        refused(server, Tls(write(tmp_path / "foreign", foreign)), "TLS: the peer's certificate is refused: ")
        said(caplog, "connection refused: TLS: the peer refused: ")
        gullible = Tls(write(tmp_path / "gullible", foreign, foreign, authority))
        refused(server, gullible, "TLS: the peer refused: .*alert")
        said(caplog, "connection refused: TLS: the peer's certificate is refused: ")


def test_another_secret_is_refused_inside_tls(
    member: TlsSettings, other: Tls, caplog: pytest.LogCaptureFixture
) -> None:
    with shard(Tls(member)) as server:
        refused(server, other, "the cluster secrets differ", b"another secret of sixteen")
        said(caplog, "client does not know the cluster secret")


def test_a_member_in_the_middle_can_not_pass_the_challenge_on(
    member: TlsSettings, other: Tls, tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """Its certificate is the authority's, and it passes on every byte of the challenge, but the key depends on both
    certificates that the ends see."""
    credentials = Tls(write(tmp_path / "mallory", authority)).current()
    listener, address = listen(Address("tcp", "127.0.0.1", 0))

    def pass_on(upstream: Address) -> bytes:
        with accepted(listener) as towards_client, socket.create_connection((upstream.name, upstream.port)) as server:
            offer = receive_exactly(server, HEAD_BYTES)
            towards_client.sendall(offer)
            inner, outer = (
                TlsSession(server, credentials, server=False),
                TlsSession(towards_client, credentials, server=True),
            )
            for session in (inner, outer):
                session.settimeout(20)
                session.handshake()
            room = memoryview(bytearray(4096))
            outer.sendall(bytes(room[: inner.recv_into(room)]))  # the greeting
            proof = receive_exactly(outer, 64)
            inner.sendall(proof)
            return bytes(room[: inner.recv_into(room)])

    with listener, shard(Tls(member)) as server:
        between = Side(lambda: pass_on(server.address))
        with pytest.raises(WireError, match="the cluster secrets differ"):
            connect(address, SECRET, 60, other)
        assert between.join().result == b"", "the shard confirmed nothing"
        said(caplog, "client does not know the cluster secret")
        assert not server.members


def stranger(server: Shard) -> tuple[socket.socket, bytes]:
    """A socket, and the shard's first words."""
    sock = socket.create_connection((server.address.name, server.address.port))
    sock.settimeout(20)
    return sock, receive_exactly(sock, HEAD_BYTES)


def is_closed(sock: socket.socket) -> bool:
    """Whether the server hangs up, now or soon."""
    with contextlib.suppress(ConnectionError):
        while sock.recv(4096):
            pass
    return True


def is_let_in(sock: ssl.SSLSocket) -> bool:
    """Whether the handshake comes to its end and the server goes on."""
    sock.do_handshake()
    return bool(sock.recv(1))


@pytest.mark.parametrize("kind", ["no certificate", "TLS 1.2"])
def test_weaker_tls_is_refused(member: TlsSettings, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if kind == "TLS 1.2":
        context.load_cert_chain(member.cert_file, member.key_file)
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    with shard(Tls(member)) as server:
        sock, _ = stranger(server)
        with context.wrap_socket(sock, do_handshake_on_connect=False) as tls, pytest.raises(ssl.SSLError):
            is_let_in(tls)
        said(caplog, "connection refused: TLS: ")
        assert not server.members


NO_TLS = {
    "http": b"GET / HTTP/1.1\r\n\r\n",
    "zeros": bytes(100),
    "a record too long": b"\x16\x03\x01\xff\xff" + bytes(1 << 16),
    "a hello of 16 MB": b"\x16\x03\x03\x00\x20\x01\xff\xff\xff" + bytes(28),
}


@pytest.mark.parametrize("kind", NO_TLS)
def test_what_is_no_tls_is_hung_up_on(member: TlsSettings, kind: str) -> None:
    with shard(Tls(member)) as server:
        sock, _ = stranger(server)
        with sock:
            with contextlib.suppress(ConnectionError):
                sock.sendall(NO_TLS[kind])
                sock.shutdown(socket.SHUT_WR)
            assert is_closed(sock)
        eventually(lambda: not server.door.waiting, "it is forgotten")


def test_a_client_that_drips_is_given_up_after_the_timeout_for_all_of_it(
    member: TlsSettings, other: Tls, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A handshake that goes on and on, a byte at a time, has no more time than one that stands still."""
    monkeypatch.setattr("expertmesh.routing.transport.door.HANDSHAKE_TIMEOUT_S", 0.5)
    with shard(Tls(member)) as server:
        sock, _ = stranger(server)
        outgoing = ssl.MemoryBIO()
        hello = other.current().client.wrap_bio(ssl.MemoryBIO(), outgoing)
        with pytest.raises(ssl.SSLWantReadError):
            hello.do_handshake()
        with sock, contextlib.suppress(ConnectionError):
            sock.settimeout(0.02)
            for byte in outgoing.read() * 100:
                with contextlib.suppress(TimeoutError):
                    sock.sendall(bytes([byte]))
                    if not sock.recv(1):
                        break
            else:
                raise AssertionError("it was let drip for minutes")
        said(caplog, "connection refused: timed out")


def test_silent_clients_do_not_keep_members_out(member: TlsSettings, other: Tls) -> None:
    """Half-way through TLS, and more than handshakes that run at once: the oldest are given up."""
    with shard(Tls(member)) as server, contextlib.ExitStack() as stack:
        silent = []
        for _ in range(100):
            sock, _ = stranger(server)
            silent.append(stack.enter_context(sock))
            sock.sendall(b"\x16\x03\x01")
        found, _ = connect(server.address, SECRET, 60, other)
        stack.enter_context(found)
        assert is_closed(silent[0])
        eventually(lambda: server.door.waiting <= 64, "no more than run at once")


def test_a_recorded_session_is_refused(member: TlsSettings, other: Tls) -> None:
    with shard(Tls(member)) as server:
        with middle(server.address) as spy:
            sock, _ = connect(spy.address, SECRET, 10, other)
            with sock:
                sock.setblocking(True)
                sock.sendall(b"compute this")
                eventually(lambda: bool(server.members), "it is admitted")
                server.members[0].settimeout(10)
                assert receive_exactly(server.members[0], 12) == b"compute this"
        for _ in range(10):
            again, _ = stranger(server)
            with again:
                with contextlib.suppress(ConnectionError):
                    again.sendall(spy.up)
                assert is_closed(again)
        eventually(lambda: not server.door.waiting, "all are refused")
        assert len(server.members) == 1


def test_a_server_that_is_no_shard_is_told_apart(other: Tls) -> None:
    listener, address = listen(Address("tcp", "127.0.0.1", 0))

    def serve() -> None:
        with accepted(listener) as sock:
            sock.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")

    with listener:
        web = Side(serve)
        with pytest.raises(WireError, match="not an expert shard"):
            connect(address, SECRET, 60, other)
        web.join()


def test_the_plain_handshake_does_not_take_tls_for_a_greeting(member: TlsSettings) -> None:
    with shard(Tls(member)) as server:
        where = (server.address.name, server.address.port)
        with socket.create_connection(where, 20) as sock, pytest.raises(WireError, match="shard wants TLS"):
            answer(sock, SECRET)
