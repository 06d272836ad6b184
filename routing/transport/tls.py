"""Certificates of the data plane: checked before they are used, read again when their files change.

Both ends show a certificate that one of the authorities in `ca_file` has signed; TLS 1.3 and nothing else. Names in
certificates are not looked at: whom the cluster's authority signed is a member, wherever it runs.
"""

from __future__ import annotations

import hashlib
import logging
import os
import ssl
import stat
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from expertmesh.errors import ConfigError

log = logging.getLogger("expertmesh.tls")

_MAX_FILE_BYTES = 1 << 20
_RETRY_S = 5.0
"""Between two attempts to use files that can't be used: a certificate may only become valid with time."""
_MAX_FLIGHTS = 8
"""Of a handshake in memory: TLS 1.3 takes three."""

_Version = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class TlsSettings:
    """The config's section `routing.tls`. JSON as a dict: `asdict` there, `TlsSettings(**values)` back."""

    cert_file: str
    """PEM: this side's certificate, the authorities between it and one of `ca_file` behind it."""
    key_file: str
    """PEM: its private key, closed to other users."""
    ca_file: str
    """PEM: the authorities whose certificates peers may have; several while one replaces another."""
    renew_after_s: float = 3600.0
    """Age at which a dispatcher opens a new connection in the place of one that it has."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one reading of the files gave."""

    server: ssl.SSLContext
    client: ssl.SSLContext
    fingerprint: bytes
    """SHA-256 of this side's certificate."""


class Tls:
    """Credentials that follow their files. For any thread."""

    def __init__(self, settings: TlsSettings) -> None:
        """Raises ConfigError if a file can't be read, the key is open to other users or not the certificate's, or the
        certificate would be refused by a peer with the same `ca_file`."""
        self.settings = settings
        self._lock = threading.Lock()
        self._seen = self._version()
        self._failed = False
        self._look_at = 0.0
        self._credentials = load(settings)

    def current(self) -> Credentials:
        """For a connection that begins now: of the files as they are, or as they last could be used."""
        with self._lock:
            seen = self._version()
            if seen != self._seen or (self._failed and time.monotonic() >= self._look_at):
                self._reload(seen)
            return self._credentials

    def _reload(self, seen: _Version) -> None:
        news = seen != self._seen
        self._seen = seen
        try:
            self._credentials = load(self.settings)
            self._failed = False
            log.info("new TLS certificates are in force, from %s", self.settings.cert_file)
        except ConfigError as error:
            self._failed = True
            self._look_at = time.monotonic() + _RETRY_S
            if news:
                log.error("the TLS certificates stay as they were: %s", error)

    def _version(self) -> _Version:
        settings = self.settings
        return tuple(_version_of(path) for path in (settings.cert_file, settings.key_file, settings.ca_file))


def _version_of(path: str) -> tuple[int, ...]:
    try:
        status = os.stat(path)  # noqa: PTH116 (at each connection)
    except OSError:
        return ()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def load(settings: TlsSettings) -> Credentials:
    """Reads the files and tries them in a handshake with themselves. Raises ConfigError, naming the field."""
    authorities = _text(settings.ca_file, "ca_file", "CERTIFICATE-----")
    _text(settings.cert_file, "cert_file", "CERTIFICATE-----")
    _text(settings.key_file, "key_file", "PRIVATE KEY-----", secret=True)
    server = _context(ssl.PROTOCOL_TLS_SERVER, settings, authorities)
    server.num_tickets = 0  # nobody resumes
    client = _context(ssl.PROTOCOL_TLS_CLIENT, settings, authorities)
    try:
        certificate = _shown(server, client)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"routing.tls.cert_file: peers with the same ca_file would refuse {settings.cert_file}: "
            f"{error.verify_message}"
        ) from None
    except ssl.SSLError as error:
        raise ConfigError(f"routing.tls.cert_file: {settings.cert_file} can't be used: {error}") from None
    return Credentials(server, client, hashlib.sha256(certificate).digest())


def _text(path: str, field: str, marker: str, *, secret: bool = False) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe must not hold this up
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"routing.tls.{field}: can't read {path}: {reason}") from None
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(f"routing.tls.{field}: {path} is not a regular file")
        if secret and mode & stat.S_IRWXO:  # the group may read, as in a Secret that Kubernetes mounts
            raise ConfigError(
                f"routing.tls.{field}: {path} is open to every user (mode {stat.S_IMODE(mode):04o}); "
                f"mend: chmod 600 {path}"
            )
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            raw = file.read(_MAX_FILE_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(raw) > _MAX_FILE_BYTES or marker.encode() not in raw:
        raise ConfigError(f"routing.tls.{field}: {path} holds no PEM block whose first line ends with {marker}")
    return raw.decode("ascii", errors="ignore")  # comments between the blocks may be in any script


def _context(protocol: ssl._SSLMethod, settings: TlsSettings, authorities: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(cadata=authorities)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(f"routing.tls.ca_file: {settings.ca_file} is not understood: {error}") from None

    def encrypted() -> NoReturn:
        raise ConfigError(f"routing.tls.key_file: {settings.key_file} is encrypted; a plain key is needed")

    try:
        context.load_cert_chain(settings.cert_file, settings.key_file, password=encrypted)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"routing.tls.key_file: {settings.key_file} is not the key of the certificate in {settings.cert_file}"
            ) from None
        raise ConfigError(
            f"routing.tls.cert_file, key_file: {settings.cert_file} or {settings.key_file} is not understood: {error}"
        ) from None
    except OSError as error:
        raise ConfigError(f"routing.tls.cert_file, key_file: {error}") from None
    return context


def _shown(server: ssl.SSLContext, client: ssl.SSLContext) -> bytes:
    """The certificate, DER, that both show each other in a handshake in memory. Raises SSLError if one refuses."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = client.wrap_bio(down, up)
    answering = server.wrap_bio(up, down, server_side=True)
    todo: list[Callable[[], None]] = [asking.do_handshake, answering.do_handshake]
    for _ in range(_MAX_FLIGHTS):
        for side in list(todo):
            with suppress(ssl.SSLWantReadError):
                side()
                todo.remove(side)
    shown = answering.getpeercert(binary_form=True)
    assert not todo, "a handshake in memory ends"
    assert shown is not None, "a certificate is required"
    return shown
