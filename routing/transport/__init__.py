"""Authenticated byte streams between attention replicas and expert shards, over TLS between nodes where that is set."""

from expertmesh.routing.transport.auth import Peer, answer, challenge
from expertmesh.routing.transport.door import Door
from expertmesh.routing.transport.sockets import Address, connect, listen
from expertmesh.routing.transport.tls import Tls, TlsSettings

__all__ = ["Address", "Door", "Peer", "Tls", "TlsSettings", "answer", "challenge", "connect", "listen"]
