"""Authenticated byte streams between attention replicas and expert shards."""

from expertmesh.routing.transport.auth import Peer, answer, challenge
from expertmesh.routing.transport.sockets import Address, connect, listen

__all__ = ["Address", "Peer", "answer", "challenge", "connect", "listen"]
