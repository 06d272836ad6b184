"""Mutual authentication at connect: an HMAC-SHA256 challenge over the cluster's secret.

    server -> client   "XMA1" | server nonce [32] | length of the introduction u16 | introduction (JSON)
    client -> server   client nonce [32] | HMAC(secret, "client" | server nonce | client nonce | introduction)
    server -> client   HMAC(secret, "server" | client nonce | server nonce | introduction)

Nonces are fresh, so a recorded exchange can't be replayed; the introduction (who the shard is, what it serves)
is covered, so it can't be swapped. The frames that follow are not signed: for networks that aren't trusted,
use TLS below it (`session`).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import struct
import time
from dataclasses import asdict, dataclass
from typing import Protocol

from expertmesh.errors import WireError

_MAGIC = b"XMA1"
_NONCE_BYTES = 32
_MAC_BYTES = 32
_MAX_INTRODUCTION_BYTES = 4096
_LEAST_TIMEOUT_S = 0.001
HEAD_BYTES = len(_MAGIC) + _NONCE_BYTES + 2
_PROOF_BYTES = _NONCE_BYTES + _MAC_BYTES
TLS_OFFER = b"XMT1".ljust(HEAD_BYTES, b"\0")
"""What a server that wants TLS says first, in the place of a greeting's head."""
TLS_DEMAND = b"XMT1".ljust(_PROOF_BYTES, b"\0")
"""What a client that wants TLS answers to a greeting without it, in the place of its proof."""


class Stream(Protocol):
    """What a handshake needs of a socket, or of a TLS session over one."""

    def gettimeout(self) -> float | None:
        """Seconds that are left."""

    def settimeout(self, value: float | None, /) -> None:
        """Seconds from now on."""

    def recv_into(self, buffer: memoryview, /) -> int:
        """Bytes received; 0 if the peer closed."""

    def sendall(self, data: bytes, /) -> None:
        """Sends all of it."""


@dataclass(frozen=True, slots=True)
class Peer:
    """How a shard introduces itself."""

    shard: str
    """The shard's id, new with each process."""
    revision: str
    """Identity of the checkpoint whose experts it serves."""
    width: int
    """Hidden size of the rows that it takes."""
    dtype: str
    """Name of the torch dtype that it computes in, e.g. `float32`."""


def _mac(secret: bytes, role: bytes, *parts: bytes) -> bytes:
    return hmac.new(secret, role + b"".join(parts), hashlib.sha256).digest()


def receive_exactly(sock: Stream, n: int) -> bytes:
    """n bytes from a blocking socket. Raises WireError if the peer closes first.

    The socket's timeout is for all of them, and what is left of it is for the next call: a peer that drips can't
    stretch it. Raises TimeoutError once it is used up.
    """
    data = bytearray(n)
    view = memoryview(data)
    got = 0
    budget = sock.gettimeout()
    deadline = None if budget is None else time.monotonic() + budget
    while got < n:
        k = sock.recv_into(view[got:])
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0 and got + k < n:
                raise TimeoutError("timed out")
            sock.settimeout(max(left, _LEAST_TIMEOUT_S))
        if k == 0:
            raise WireError(f"peer closed the connection after {got} of {n} bytes of the handshake")
        got += k
    return bytes(data)


def challenge(sock: Stream, secret: bytes, me: Peer) -> None:
    """The server's part, on a blocking socket with a timeout. Raises WireError if the client can't prove the secret."""
    introduction = json.dumps(asdict(me)).encode()
    nonce = os.urandom(_NONCE_BYTES)
    sock.sendall(_MAGIC + nonce + struct.pack("<H", len(introduction)) + introduction)
    reply = receive_exactly(sock, _PROOF_BYTES)
    if reply == TLS_DEMAND:
        raise WireError("client wants TLS, and routing.tls is not set here")
    client_nonce, mac = reply[:_NONCE_BYTES], reply[_NONCE_BYTES:]
    if not hmac.compare_digest(mac, _mac(secret, b"client", nonce, client_nonce, introduction)):
        raise WireError("client does not know the cluster secret")
    sock.sendall(_mac(secret, b"server", client_nonce, nonce, introduction))


def answer(sock: Stream, secret: bytes) -> Peer:
    """The client's part, on a blocking socket with a timeout: who is at the other end.

    Raises WireError if the server does not speak this protocol or can't prove the secret.
    """
    head = receive_exactly(sock, HEAD_BYTES)
    if head == TLS_OFFER:
        raise WireError("shard wants TLS, and routing.tls is not set here")
    if not head.startswith(_MAGIC):
        raise WireError("peer is not an expert shard of this version")
    nonce = head[len(_MAGIC) : -2]
    (length,) = struct.unpack("<H", head[-2:])
    if length > _MAX_INTRODUCTION_BYTES:
        raise WireError(f"introduction of {length} bytes; at most {_MAX_INTRODUCTION_BYTES}")
    introduction = receive_exactly(sock, length)
    client_nonce = os.urandom(_NONCE_BYTES)
    sock.sendall(client_nonce + _mac(secret, b"client", nonce, client_nonce, introduction))
    try:
        mac = receive_exactly(sock, _MAC_BYTES)
    except WireError as error:
        raise WireError("shard refused the handshake: the cluster secrets differ") from error
    if not hmac.compare_digest(mac, _mac(secret, b"server", client_nonce, nonce, introduction)):
        raise WireError("shard does not know the cluster secret")
    try:
        return Peer(**json.loads(introduction))
    except (ValueError, TypeError) as error:
        raise WireError(f"shard's introduction is not understood: {error}") from error
