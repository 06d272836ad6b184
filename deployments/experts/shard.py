"""A shard without Ray: leased experts behind data-plane sockets. The Serve deployment wraps it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertmesh.deployments.experts.bank import ExpertBank
from expertmesh.deployments.experts.server import FrameServer, ServerStats
from expertmesh.platform.checkpoints import checkpoint_revision, expert_layout, open_checkpoint
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.transport import Address, Peer, listen
from expertmesh.routing.wire import Limits


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """How a shard loads and listens."""

    folder: Path
    """The checkpoint."""
    dtype: str = "auto"
    """vLLM's dtype argument; must be the attention replicas'."""
    threads: int = 1
    """CPU threads of the kernel."""
    transport: str = "auto"
    """`unix`, `tcp`, or `auto` for both."""
    bind_host: str = "127.0.0.1"
    """Address that TCP listens on."""
    limits: Limits = field(default_factory=Limits)
    max_batch_rows: int = 8192


def new_shard_id() -> str:
    """An id that no other process ever has."""
    return uuid.uuid4().hex[:12]


class Shard:
    """Loads the experts of a lease and serves them from `start` to `stop`."""

    def __init__(
        self,
        settings: ShardSettings,
        secret: bytes,
        slots: IntArray,
        shard_id: str | None = None,
        revision: str | None = None,
    ) -> None:
        """Loads weights: takes seconds. Raises CheckpointError.

        slots: [layers, slots] expert ids, -1 where empty; revision: what it tells dispatchers that it serves, the
        checkpoint's own unless given.
        """
        self.shard_id = shard_id or new_shard_id()
        checkpoint = open_checkpoint(settings.folder)
        self.bank = ExpertBank(checkpoint, expert_layout(checkpoint), slots, settings.dtype, settings.threads)
        self.bytes_read = checkpoint.bytes_read
        """Bytes of tensors read from the checkpoint."""
        listeners = [listen(address) for address in self._wanted(settings)]
        self.addresses: Sequence[str] = tuple(str(address) for _, address in listeners)
        me = Peer(self.shard_id, revision or checkpoint_revision(checkpoint), self.bank.width, self.bank.dtype)
        sockets = [sock for sock, _ in listeners]
        self.server = FrameServer(sockets, secret, me, self.bank, settings.limits, settings.max_batch_rows)

    def _wanted(self, settings: ShardSettings) -> list[Address]:
        wanted = []
        if settings.transport in ("auto", "unix"):
            wanted.append(Address("unix", f"expertmesh-{self.shard_id}"))
        if settings.transport in ("auto", "tcp"):
            wanted.append(Address("tcp", settings.bind_host, 0))
        return wanted

    @property
    def stats(self) -> ServerStats:
        """Counters of the data plane."""
        return self.server.stats

    def start(self) -> None:
        """Begins to answer frames."""
        self.server.start()

    def stop(self) -> None:
        """Closes every socket; connected dispatchers go on with other copies."""
        self.server.stop()
        self.bank.close()
