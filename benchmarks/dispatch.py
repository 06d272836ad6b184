"""What does a dispatch and combine cost, beside moving the same bytes?

    python -m benchmarks.dispatch [--quick]

Hidden states of 1, 32 and 128 tokens (hidden 2048, float32) go to two shards, each in a process of its own, whose
kernel does nothing: policy, frames, sockets, adding up, nothing else. Beside it in the same rounds, with as many
bytes both ways to and from two processes: a raw echo over unix sockets, a call of two Ray actors, a Ray compiled graph
over two actors. Every token goes to 8 of 64 experts, so nearly every token goes to both shards. Last line: one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from benchmarks.timing import alternating, median_ratio, median_us
from expertmesh.deployments.experts.server import FrameServer
from expertmesh.routing.dispatch import Dispatcher, DispatchSettings, StaticTable
from expertmesh.routing.placement import Target, build_table, even_slots
from expertmesh.routing.transport import Address, Peer, listen
from expertmesh.routing.wire import Limits
from expertmesh.routing.wire.frame import DispatchBody

HIDDEN, EXPERTS, TOP_K, SHARDS = 2048, 64, 8, 2
TOKENS = (1, 32, 128)
SECRET = b"benchmark-secret"


class Nothing:
    """A kernel that does nothing."""

    def __init__(self) -> None:
        self._y = {rows: torch.zeros(rows, HIDDEN) for rows in range(1, max(TOKENS) + 1)}

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As many rows as it was given."""
        return self._y[len(body.x)]


def _serve_shard(index: int, name: str, ready: Connection) -> None:
    torch.set_num_threads(1)
    sock, _ = listen(Address("unix", f"{name}-{index}"))
    peer = Peer(f"shard-{index}", "none", HIDDEN, "float32")
    server = FrameServer([sock], SECRET, peer, Nothing(), Limits())
    server.start()
    ready.send(True)
    with_eof(ready)
    server.stop()


def _serve_echo(sock: socket.socket, sizes: Connection) -> None:
    """Sends back messages of the size that the pipe names, until it names another; 0 ends it."""
    buffer = bytearray(64 << 20)
    while size := sizes.recv():
        view = memoryview(buffer)[:size]
        sizes.send(True)
        while True:
            got = 0
            while got < size:
                got += sock.recv_into(view[got:])
            sock.sendall(view)
            if view[0] == 255:  # the last message of this size
                break


def with_eof(pipe: Connection) -> None:
    """Waits until the other side of a pipe is closed."""
    try:
        pipe.recv()
    except EOFError:
        return


@contextmanager
def dispatcher() -> Iterator[Dispatcher]:
    """A dispatcher over two shard processes."""
    context = mp.get_context("fork")
    name = f"benchmark-{os.getpid()}"
    with ExitStack() as stack:
        for index in range(SHARDS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve_shard, args=(index, name, theirs), daemon=True)
            process.start()
            theirs.close()
            mine.recv()
            stack.callback(process.join)
            stack.callback(process.terminate)
            stack.callback(mine.close)
        targets = {i: Target(f"shard-{i}", "here", (f"unix:@{name}-{i}",)) for i in range(SHARDS)}
        table = build_table(1, (0,), EXPERTS, even_slots(1, EXPERTS, SHARDS, 1), targets)
        running = Dispatcher(StaticTable(table), SECRET, DispatchSettings("here", "none"))
        stack.callback(running.close)
        yield running


@contextmanager
def echo() -> Iterator[Callable[[int], Callable[[], None]]]:
    """A function that makes, for a size in bytes, an action that sends that much to each of two processes and back."""
    context = mp.get_context("fork")
    with ExitStack() as stack:
        socks: list[socket.socket] = []
        pipes: list[Connection] = []
        for _ in range(SHARDS):
            ours, theirs = socket.socketpair(socket.AF_UNIX)
            for sock in (ours, theirs):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            mine, other = context.Pipe()
            process = context.Process(target=_serve_echo, args=(theirs, other), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join)
            stack.callback(process.terminate)
            socks.append(ours)
            pipes.append(mine)

        def of_size(size: int) -> Callable[[], None]:
            for pipe in pipes:
                pipe.send(size)
                pipe.recv()
            message, buffer = bytearray(size), memoryview(bytearray(size))

            def action(last: bool = False) -> None:
                message[0] = 255 if last else 0
                for sock in socks:
                    sock.sendall(message)
                for sock in socks:
                    got = 0
                    while got < size:
                        got += sock.recv_into(buffer[got:])

            action.finish = lambda: action(True)  # type: ignore[attr-defined]
            return action

        yield of_size


@contextmanager
def ray_sides() -> Iterator[Callable[[np.ndarray[Any, Any]], dict[str, Callable[[], object]]]]:
    """A function that makes, for an array, actions that send it to two Ray actors and back."""
    import ray
    from ray.dag import InputNode, MultiOutputNode

    with tempfile.TemporaryDirectory(prefix="xm-") as folder:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=500 << 20,
            _temp_dir=folder,
            logging_level="ERROR",
            log_to_driver=False,
        )

        @ray.remote(num_cpus=1)
        class Actor:
            def echo(self, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
                return array

        actors = [Actor.remote() for _ in range(SHARDS)]
        with InputNode() as given:
            dag = MultiOutputNode([actor.echo.bind(given) for actor in actors])
        graph = dag.experimental_compile(_buffer_size_bytes=16 << 20)

        def of_array(array: np.ndarray[Any, Any]) -> dict[str, Callable[[], object]]:
            return {
                "compiled_graph": lambda: ray.get(graph.execute(array)),
                "actor_call": lambda: ray.get([actor.echo.remote(array) for actor in plain]),
            }

        plain = [Actor.remote() for _ in range(SHARDS)]
        try:
            yield of_array
        finally:
            graph.teardown()
            ray.shutdown()


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and repeats")
    quick = parser.parse_args().quick
    rounds, repeats = (3, 200) if quick else (7, 600)
    torch.set_num_threads(1)
    us: dict[str, dict[str, float]] = {}
    vs_echo: dict[str, float] = {}
    vs_graph: dict[str, float] = {}
    with dispatcher() as dispatch, echo() as echo_of, ray_sides() as ray_of, torch.inference_mode():
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, HIDDEN, generator=generator)
            ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int32)
            weights = torch.rand(tokens, TOP_K, generator=generator)
            raw = echo_of(x.nbytes)
            sides: dict[str, Callable[[], object]] = {
                "dispatch": lambda: dispatch(0, x, weights, ids),  # noqa: B023 (used before the next turn)
                "echo": raw,
                **ray_of(x.numpy()),
            }
            times = alternating(
                {name: lambda action=action: median_us(action, repeats) for name, action in sides.items()}, rounds
            )
            raw.finish()  # type: ignore[attr-defined]
            key = str(tokens)
            us[key] = {name: round(statistics.median(values), 1) for name, values in times.items()}
            vs_echo[key] = median_ratio(times["dispatch"], times["echo"])
            vs_graph[key] = median_ratio(times["dispatch"], times["compiled_graph"])
            print(f"{tokens} tokens: {us[key]} us", flush=True)
    print(json.dumps({"us": us, "vs_echo": vs_echo, "vs_compiled_graph": vs_graph}))


if __name__ == "__main__":
    main()
