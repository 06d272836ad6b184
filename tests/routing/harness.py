"""Real shards for the data plane's tests: frame servers on loopback whose kernel is plain torch.

Weights, rows and router weights are small whole numbers and halves, so float32 sums are exact in any order and outputs
can be compared bit for bit, whichever shards took part.

Run as a script it is a shard process of its own: prints its routing target as JSON and serves until it is killed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expertmesh.deployments.experts.server import FrameServer, Kernel, NotHeld
from expertmesh.routing.dispatch import Dispatcher, DispatchSettings, LoadCounters, StaticTable, TableSource
from expertmesh.routing.placement import RoutingTable, Target, build_table, even_slots
from expertmesh.routing.transport import Address, Peer, Tls, TlsSettings, listen
from expertmesh.routing.transport.auth import receive_exactly
from expertmesh.routing.wire import HEADER_BYTES, Header, Limits, dispatch_parts, parse_header
from expertmesh.routing.wire.frame import DispatchBody

SECRET = b"correct horse battery staple"
REVISION = "rev-1"
NODE = "node-1"
LAYERS = (1, 3)
EXPERTS = 8
WIDTH = 16


class ReferenceExperts:
    """Expert e of layer l: x -> relu(x @ W[l, e]), W of whole numbers from -2 to 2. The same in every process."""

    def __init__(self, layers: tuple[int, ...] = LAYERS, experts: int = EXPERTS, width: int = WIDTH) -> None:
        self.layers, self.experts, self.width = layers, experts, width
        generator = torch.Generator().manual_seed(20)
        shape = (len(layers), experts, width, width)
        self._weights = torch.randint(-2, 3, shape, generator=generator).float()

    def one(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        """[N, H] float32."""
        return torch.relu(x.float() @ self._weights[self.layers.index(layer), expert])

    def dense(self, layer: int, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The layer's output in float32 with every expert at hand: [T, H]."""
        out = torch.zeros(x.shape, dtype=torch.float32)
        for k in range(ids.shape[1]):
            for expert in ids[:, k].unique().tolist():
                rows = torch.nonzero(ids[:, k] == expert).flatten()
                out[rows] += weights[rows, k, None] * self.one(layer, expert, x[rows])
        return out


class TorchKernel:
    """Computes the experts that it holds. Tests may close `gate` to make it hang, and read `calls`."""

    def __init__(self, experts: ReferenceExperts, held: Mapping[int, set[int]]) -> None:
        self.experts, self.held = experts, {layer: set(ids) for layer, ids in held.items()}
        self.calls: list[tuple[int, int]] = []
        """(layer, rows) of each call."""
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As `Kernel.compute`."""
        self.calls.append((layer, len(body.x)))
        self.entered.set()
        assert self.gate.wait(60)
        wanted = body.experts.unique().tolist()
        if missing := set(wanted) - self.held.get(layer, set()):
            raise NotHeld(f"experts {sorted(missing)} of layer {layer}")
        y = torch.zeros(body.x.shape, dtype=torch.float32)
        for expert in wanted:
            mine = body.experts == expert
            rows = body.rows[mine].long()
            y.index_add_(0, rows, body.weights[mine, None] * self.experts.one(layer, expert, body.x[rows]))
        return y.to(body.x.dtype)


def held_by(slots: np.ndarray[Any, np.dtype[np.int32]], layers: tuple[int, ...]) -> dict[int, set[int]]:
    """Experts of one shard by layer; slots: [layers, slots]."""
    return {layer: {e for e in row if e >= 0} for layer, row in zip(layers, slots.tolist(), strict=True)}


def _bytes_to_read(sock: socket.socket) -> int:
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.FIONREAD, bytes(4)))[0])


class RunningServer:
    """A frame server with its target, in this process."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        family: str = "unix",
        host: str = "127.0.0.1",
        shard: str | None = None,
        peer: Peer | None = None,
        secret: bytes = SECRET,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        max_batch_rows: int = 8192,
        width: int = WIDTH,
        dtype: str = "float32",
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        tls: TlsSettings | None = None,
    ) -> None:
        self.shard = shard or uuid.uuid4().hex[:12]
        wanted = Address("unix", f"test-{self.shard}") if family == "unix" else Address("tcp", host, 0)
        listener, self.address = listen(wanted)
        self.kernel = kernel
        me = peer or Peer(self.shard, REVISION, width, dtype)
        self.tls = None if tls is None else Tls(tls)
        """For clients as well."""
        self.server = FrameServer([listener], secret, me, kernel, limits, max_batch_rows, clock_ns, self.tls)
        self.server.start()
        self.target = Target(self.shard, NODE, (str(self.address),))

    def break_connections(self) -> None:
        """Cuts every connection, as a crash would, while the kernel may hang."""
        for connection in list(self.server._connections.values()):
            connection.sock.shutdown(socket.SHUT_RDWR)

    def frames_unread(self) -> list[int]:
        """Bytes that wait in the socket of each connection where some do."""
        sizes = [_bytes_to_read(c.sock) for c in list(self.server._connections.values())]
        return [size for size in sizes if size]

    def stop(self) -> None:
        """Ends the server."""
        if isinstance(self.kernel, TorchKernel):
            self.kernel.gate.set()
        self.server.stop()


class Mesh:
    """Shards by an even placement, and dispatchers to them."""

    def __init__(
        self,
        shards: int,
        redundancy: int,
        *,
        family: str = "unix",
        dtype: str = "float32",
        experts: ReferenceExperts | None = None,
        tls: TlsSettings | None = None,
    ) -> None:
        """tls: of the shards; a dispatcher is given its own."""
        self.experts = experts or ReferenceExperts()
        layers = self.experts.layers
        self.slots = even_slots(len(layers), self.experts.experts, shards, redundancy)
        self.servers = [
            RunningServer(
                TorchKernel(self.experts, held_by(self.slots[i], layers)),
                family=family,
                dtype=dtype,
                width=self.experts.width,
                tls=tls,
            )
            for i in range(shards)
        ]
        self.dispatchers: list[Dispatcher] = []

    def kernel(self, index: int) -> TorchKernel:
        """The kernel of one shard."""
        kernel = self.servers[index].kernel
        assert isinstance(kernel, TorchKernel)
        return kernel

    def table(self, epoch: int = 1, ready: Iterable[int] | None = None) -> RoutingTable:
        """The routing table of some shards, all by default."""
        indices = range(len(self.servers)) if ready is None else ready
        targets = {i: self.servers[i].target for i in indices}
        return build_table(epoch, self.experts.layers, self.experts.experts, self.slots, targets)

    def dispatcher(
        self, tables: TableSource | None = None, loads: LoadCounters | None = None, **settings: Any
    ) -> Dispatcher:
        """A dispatcher that `close` closes. It gives a slow shard the whole deadline unless told otherwise."""
        arguments: dict[str, Any] = {"node": NODE, "revision": REVISION, "hedge_after_s": 60.0, **settings}
        dispatcher = Dispatcher(tables or StaticTable(self.table()), SECRET, DispatchSettings(**arguments), loads)
        self.dispatchers.append(dispatcher)
        return dispatcher

    def close(self) -> None:
        """Ends everything."""
        for dispatcher in self.dispatchers:
            dispatcher.close()
        for server in self.servers:
            server.stop()


def batch(
    tokens: int, top_k: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, width: int = WIDTH
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x [T, H], weights [T, k], ids [T, k]) of whole numbers and halves, distinct experts a token."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, (tokens, width), generator=generator).to(dtype)
    weights = torch.randint(1, 5, (tokens, top_k), generator=generator).float() / 2
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    return x, weights, ids


def request_parts(
    x: torch.Tensor, experts: list[int], rows: list[int], *, layer: int = LAYERS[0], frame: int = 1
) -> bytes:
    """A dispatch frame in one piece, every router weight 1."""
    parts = dispatch_parts(
        x,
        np.array(experts, dtype=np.int32),
        np.array(rows, dtype=np.int32),
        np.ones(len(experts), dtype=np.float32),
        layer=layer,
        epoch=0,
        frame=frame,
    )
    return b"".join(bytes(part) for part in parts)


def read_frame(sock: socket.socket, limits: Limits = Limits()) -> tuple[Header, bytearray]:  # noqa: B008 (frozen)
    """The next frame from a blocking socket; WireError if the peer closes it."""
    header = parse_header(receive_exactly(sock, HEADER_BYTES), limits)
    return header, bytearray(receive_exactly(sock, header.body_bytes))


def eventually(condition: Callable[[], bool], what: str, within_s: float = 10.0) -> None:
    """Waits for something that another thread is about to do; fails if it doesn't."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        select.select([], [], [], 0.002)


def data_plane_threads() -> list[str]:
    """Names of the frame servers' threads that are alive."""
    return [t.name for t in threading.enumerate() if t.name.startswith(("data-plane", "handshake"))]


@contextmanager
def started_servers() -> Iterator[list[RunningServer]]:
    """Servers that the block adds are stopped after it, and must not have failed or left anything."""
    servers: list[RunningServer] = []
    yield servers
    for server in servers:
        server.stop()
        assert server.server.failure is None
    assert not data_plane_threads()


@contextmanager
def shard_process(
    held: Mapping[int, set[int]],
    shard: str,
    *,
    host: str | None = None,
    prefix: Sequence[str] = (),
    tls: TlsSettings | None = None,
) -> Iterator[tuple[subprocess.Popen[str], Target]]:
    """A shard in a process of its own, killed at the end if it still runs.

    host: address for TCP, a unix socket unless given; prefix: what the command begins with.
    """
    what = [[layer, sorted(ids)] for layer, ids in held.items()]
    request = json.dumps({"shard": shard, "host": host, "held": what, "tls": tls and asdict(tls)})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*prefix, sys.executable, str(Path(__file__).resolve()), request]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            yield process, Target(told["shard"], told["node"], tuple(told["addresses"]))
        finally:
            process.kill()


class HangingKernel(TorchKernel):
    """Answers for the first layer; for the others it says so and never comes back."""

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As `Kernel.compute`, sometimes."""
        if layer != LAYERS[0]:
            print("computing", flush=True)
            threading.Event().wait()
        return super().compute(layer, body)


def main(request: str) -> None:
    """Serves as a shard until killed."""
    told = json.loads(request)
    kernel = HangingKernel(ReferenceExperts(), {layer: set(ids) for layer, ids in told["held"]})
    where: dict[str, Any] = {"family": "tcp", "host": told["host"]} if told["host"] else {}
    tls = TlsSettings(**told["tls"]) if told["tls"] else None
    print(json.dumps(asdict(RunningServer(kernel, shard=told["shard"], tls=tls, **where).target)), flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(sys.argv[1])
