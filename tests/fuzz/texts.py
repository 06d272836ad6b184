"""Targets that are read in Python: handshakes, addresses, configurations, checkpoints, stored values, key files."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path

from expertmesh.errors import CheckpointError, ConfigError, WireError
from expertmesh.kv_store.codec import HEADER_BYTES, Verdict, judge, seal
from expertmesh.platform.access import KeyRing
from expertmesh.platform.checkpoints import open_checkpoint
from expertmesh.platform.config import load_config
from expertmesh.platform.config.markdown import EXAMPLE
from expertmesh.platform.config.source import parse_changes
from expertmesh.routing.transport import Address, Peer, answer, challenge
from expertmesh.routing.transport.auth import TLS_DEMAND, TLS_OFFER
from tests.fuzz.target import Target

_SECRET = b"correct horse battery staple"
_TIMEOUT_S = 20.0


class Handshake(Target):
    """What a stranger sends to a shard (first bit 0) or to an attention replica (1) that expects a handshake."""

    name = "handshake"

    def seeds(self) -> list[bytes]:
        """As a shard and a replica would begin, without the secret."""
        introduction = json.dumps({"shard": "s", "revision": "r", "width": 8, "dtype": "float32"}).encode()
        greeting = b"XMA1" + bytes(32) + struct.pack("<H", len(introduction)) + introduction
        return [
            b"\0" + bytes(64),
            b"\1" + greeting + bytes(32),
            b"\1" + greeting,
            b"\1XMA1",
            b"\0" + greeting,
            b"\0" + TLS_DEMAND,
            b"\1" + TLS_OFFER,
        ]

    def run(self, data: bytes) -> None:
        """Fails unless it is refused, in words."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.settimeout(_TIMEOUT_S)
            theirs.sendall(data[1:])
            theirs.shutdown(socket.SHUT_WR)
            try:
                if data[:1] < b"\1":
                    challenge(ours, _SECRET, Peer("s", "r", 8, "float32"))
                else:
                    answer(ours, _SECRET)
            except WireError:
                return
            raise AssertionError("a stranger was let in")


class Addresses(Target):
    """Where a shard says that it listens."""

    name = "address"

    def seeds(self) -> list[bytes]:
        """One of each family."""
        return [b"unix:@name", b"tcp:127.0.0.1:80", b"tcp:::1:65535", b"tcp:a:0", b"unix:x", b""]

    def run(self, data: bytes) -> None:
        """Fails if what is taken is not written back the same."""
        text = data.decode(errors="surrogateescape")
        try:
            address = Address.parse(text)
        except WireError:
            return
        assert Address.parse(str(address)) == address


class Configuration(Target):
    """A value, as `--set` takes it, and so all that YAML can hold, for one of the sections or the whole."""

    name = "config"

    def seeds(self) -> list[bytes]:
        """The documentation's example, and pieces of YAML that mean something."""
        texts = [EXAMPLE, "a: &x [*x]", "!!bool maybe", "2026-13-45", "{? [a]: b}", "<<: {a: b}", "'\\ud800'", "1e999"]
        texts += ["experts: {shards: 3, redundancy: 2}", "ingress: {cors_origins: ['*'], keys_file: a}", "model: demo"]
        return [text.encode() for text in texts]

    def run(self, data: bytes) -> None:
        """Fails for any error but one that names what is wrong."""
        text = data[:1024].decode(errors="surrogateescape")
        try:
            value = parse_changes([f"x={text}"])["x"]
            config = load_config(value if isinstance(value, dict) else {"experts": value})
        except ConfigError:
            return
        assert load_config(config.model_dump(mode="json")) == config


class Checkpoint(Target):
    """A safetensors file."""

    name = "checkpoint"

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        (scratch / "config.json").write_text("{}")

    def seeds(self) -> list[bytes]:
        """Two tensors, none, and lengths that are not true."""
        tensors = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]},
            "b": {"dtype": "BF16", "shape": [3], "data_offsets": [8, 14]},
        }
        text = json.dumps(tensors).encode()
        whole = struct.pack("<Q", len(text)) + text + bytes(14)
        return [
            whole,
            whole[:-1],
            whole + b"x",
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 2**63),
            b"",
            whole[:40],
        ]

    def run(self, data: bytes) -> None:
        """Fails for any error but CheckpointError, and for a tensor outside the file."""
        (self.scratch / "model.safetensors").write_bytes(data)
        try:
            tensors = open_checkpoint(self.scratch).tensors
        except CheckpointError:
            return
        assert all(8 <= info.offset <= info.offset + info.nbytes <= len(data) for info in tensors.values())


class Stored(Target):
    """A value that a KV store returns for a key."""

    name = "kv"
    _key, _origin, _payload = b"xm1:0123456789abcdef:key", bytes(range(16)), b"block of keys and values" * 20

    def seeds(self) -> list[bytes]:
        """The right value, shortened, and under another identity."""
        right = seal(self._key, self._origin, self._payload) + self._payload
        return [right, right[:-1], right[:HEADER_BYTES], right[:7], seal(self._key, bytes(16), b""), b""]

    def run(self, data: bytes) -> None:
        """Fails if anything but what was stored is sound."""
        verdict = judge(self._key, data[:HEADER_BYTES], data[HEADER_BYTES:], self._origin)
        right = seal(self._key, self._origin, self._payload) + self._payload
        same = (data[:5], data[8:]) == (right[:5], right[8:])  # the three bytes between them say nothing
        assert (verdict is Verdict.SOUND) is same, verdict


class Keys(Target):
    """A key file."""

    name = "keys"

    def seeds(self) -> list[bytes]:
        """Empty, and with one key."""
        key = {"id": "0" * 12, "name": "a", "scopes": ["infer"], "tenant": "a", "sha256": "0" * 64, "created": "2026"}
        return [b"{}", b'{"version": 1, "keys": []}', json.dumps({"version": 1, "keys": [key]}).encode()]

    def run(self, data: bytes) -> None:
        """Fails for any error but ConfigError, and if a ring is not written back the same."""
        try:
            ring = KeyRing.parse(data)
        except ConfigError:
            return
        assert list(KeyRing.parse(ring.dump())) == list(ring)
        assert ring.find("xm-000000000000-" + "A" * 43) is None
