"""A shard without Ray: leased experts behind data-plane sockets. The Serve deployment wraps it."""

from __future__ import annotations

import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertmesh.deployments.experts.bank import ExpertBank, Progress
from expertmesh.deployments.experts.memory import available_bytes
from expertmesh.deployments.experts.server import FrameServer, ServerStats
from expertmesh.platform.checkpoints import checkpoint_revision, expert_layout, open_checkpoint
from expertmesh.routing.placement.static import IntArray
from expertmesh.routing.transport import Address, Peer, Tls, listen
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


_ROOM = 1.25
"""Memory to be free for experts that come, as a multiple of their bytes: layers that are built anew exist twice."""
_SWITCH_INTERVAL_S = 5e-4
"""How long the data plane waits at most for Python's lock while experts are loaded."""


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
        tls: Tls | None = None,
    ) -> None:
        """Loads weights: takes seconds. Raises CheckpointError.

        slots: [layers, slots] expert ids, -1 where empty; revision: what it tells dispatchers that it serves, the
        checkpoint's own unless given; tls: what clients from other nodes must use.
        """
        self.shard_id = shard_id or new_shard_id()
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        checkpoint = self._checkpoint = open_checkpoint(settings.folder)
        layout = expert_layout(checkpoint)
        self._expert_bytes = layout.total_expert_bytes // (len(layout.layers) * layout.num_experts)
        begin = time.monotonic()
        self.bank = ExpertBank(checkpoint, layout, slots, settings.dtype, settings.threads)
        self.load_s = time.monotonic() - begin
        """Seconds spent loading so far."""
        listeners = [listen(address) for address in self._wanted(settings)]
        self.addresses: Sequence[str] = tuple(str(address) for _, address in listeners)
        revision = revision or checkpoint_revision(open_checkpoint(settings.folder))  # its samples are no weights read
        me = Peer(self.shard_id, revision, self.bank.width, self.bank.dtype)
        sockets = [sock for sock, _ in listeners]
        self.server = FrameServer(sockets, secret, me, self.bank, settings.limits, settings.max_batch_rows, tls=tls)

    def _wanted(self, settings: ShardSettings) -> list[Address]:
        wanted = []
        if settings.transport in ("auto", "unix"):
            wanted.append(Address("unix", f"expertmesh-{self.shard_id}"))
        if settings.transport in ("auto", "tcp"):
            wanted.append(Address("tcp", settings.bind_host, 0))
        return wanted

    @property
    def bytes_read(self) -> int:
        """Bytes of tensors read from the checkpoint so far."""
        return self._checkpoint.bytes_read

    @property
    def bytes_fetched(self) -> int:
        """Bytes that came over the network for that; 0 from a disk."""
        return self._checkpoint.bytes_fetched

    @property
    def slots(self) -> IntArray:
        """[layers, slots] the experts that it serves now, -1 where a slot is empty."""
        return self.bank.slots

    def load(self, wanted: IntArray, progress: Progress | None = None) -> None:
        """Makes `wanted` [layers, slots] what it serves, while it serves; seconds. See `ExpertBank.load`.

        Raises CheckpointError, and MemoryError if there is no room for what comes; nothing has changed then.
        """
        begin = time.monotonic()
        more = (int((wanted >= 0).sum()) - int((self.bank.slots >= 0).sum())) * self._expert_bytes
        if more > 0 and more * _ROOM > (free := available_bytes()):
            raise MemoryError(f"{more >> 20} MiB of experts do not fit into {free >> 20} MiB that are free")
        try:
            self.bank.load(wanted, progress)
        finally:
            self.load_s += time.monotonic() - begin

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
