"""What does TLS cost a dispatch?

    python -m benchmarks.tls [--quick]

The round trips of `benchmarks.dispatch` (1, 32 and 128 tokens, hidden 2048, float32, to two shard processes that
compute nothing), over TCP on loopback: plain and with `routing.tls`, in turn in each round, with certificates made for
the run. Last line: one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.dispatch import EXPERTS, HIDDEN, SECRET, SHARDS, TOKENS, TOP_K, Nothing, with_eof
from benchmarks.timing import alternating, median_ratio, median_us
from expertmesh.deployments.experts.server import FrameServer
from expertmesh.routing.dispatch import Dispatcher, DispatchSettings, StaticTable
from expertmesh.routing.placement import Target, build_table, even_slots
from expertmesh.routing.transport import Address, Peer, Tls, TlsSettings, listen
from expertmesh.routing.wire import Limits
from tests.routing.certificates import Authority, write


def _serve_shard(index: int, tls: TlsSettings | None, ready: Connection) -> None:
    torch.set_num_threads(1)
    sock, address = listen(Address("tcp", "127.0.0.1", 0))
    peer = Peer(f"shard-{index}", "none", HIDDEN, "float32")
    server = FrameServer([sock], SECRET, peer, Nothing(), Limits(), tls=None if tls is None else Tls(tls))
    server.start()
    ready.send(str(address))
    with_eof(ready)
    server.stop()


@contextmanager
def dispatcher(tls: TlsSettings | None) -> Iterator[Dispatcher]:
    """A dispatcher over two shard processes, by TCP."""
    context = mp.get_context("fork")
    with ExitStack() as stack:
        targets = {}
        for index in range(SHARDS):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve_shard, args=(index, tls, theirs), daemon=True)
            process.start()
            theirs.close()
            targets[index] = Target(f"shard-{index}", "there", (mine.recv(),))
            stack.callback(process.join)
            stack.callback(process.terminate)
            stack.callback(mine.close)
        table = build_table(1, (0,), EXPERTS, even_slots(1, EXPERTS, SHARDS, 1), targets)
        running = Dispatcher(StaticTable(table), SECRET, DispatchSettings("here", "none", tls=tls))
        stack.callback(running.close)
        yield running


def main() -> None:
    """Measures and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and repeats")
    rounds, repeats = (3, 200) if parser.parse_args().quick else (7, 600)
    torch.set_num_threads(1)
    us: dict[str, dict[str, float]] = {}
    ratio: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="xm-") as folder, ExitStack() as stack, torch.inference_mode():
        tls = write(Path(folder), Authority())
        ways = {name: stack.enter_context(dispatcher(way)) for name, way in {"tcp": None, "tls": tls}.items()}
        for tokens in TOKENS:
            generator = torch.Generator().manual_seed(tokens)
            x = torch.randn(tokens, HIDDEN, generator=generator)
            ids = torch.rand(tokens, EXPERTS, generator=generator).topk(TOP_K).indices.to(torch.int32)
            weights = torch.rand(tokens, TOP_K, generator=generator)

            def measured(way: Dispatcher) -> Callable[[], float]:
                return lambda: median_us(lambda: way(0, x, weights, ids), repeats)  # noqa: B023 (used at once)

            times = alternating({name: measured(way) for name, way in ways.items()}, rounds)
            us[str(tokens)] = {name: round(statistics.median(values), 1) for name, values in times.items()}
            ratio[str(tokens)] = median_ratio(times["tls"], times["tcp"])
            print(f"{tokens} tokens: {us[str(tokens)]} us", flush=True)
    print(json.dumps({"us": us, "tls_vs_tcp": ratio}))


if __name__ == "__main__":
    main()
