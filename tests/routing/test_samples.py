"""Samples of dispatches to real shards, through a real socket, to spans at a real collector."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import torch

from expertmesh.deployments.tracing.engine import DispatchSpans
from expertmesh.deployments.tracing.tracer import Tracing
from expertmesh.platform.config.sections import TelemetryConfig
from expertmesh.platform.logs import Origin
from expertmesh.routing.dispatch import DispatchSettings, SampledDispatcher, Sampler, StaticTable
from expertmesh.routing.dispatch.samples import MAX_SAMPLES, DispatchSample
from expertmesh.routing.wire import HEADER_BYTES
from tests.routing.harness import LAYERS, NODE, REVISION, SECRET, WIDTH, Mesh, batch
from tests.support.otlp import collector

LAYER = LAYERS[0]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
ONE, TWO = (f"00-{TRACE}-{span}-01" for span in ("00f067aa0ba902b7", "00f067aa0ba902b8"))


class Samples:
    """In place of the replica: takes samples as they come."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._engine: socket.socket | None = None

    def take(self) -> list[DispatchSample]:
        """Those that wait; sending is done when `pass_on` returns."""
        if self._engine is None:
            self._engine, _ = self._listener.accept()
            self._engine.setblocking(False)
        taken = []
        while True:
            try:
                taken.append(DispatchSample.of_json(self._engine.recv(1 << 16)))
            except BlockingIOError:
                return taken

    def close(self) -> None:
        """Closes both sockets."""
        self._listener.close()
        if self._engine is not None:
            self._engine.close()


def sampled(mesh: Mesh, sampler: Sampler, **settings: float) -> SampledDispatcher:
    arguments = {"node": NODE, "revision": REVISION, "hedge_after_s": 60.0, **settings}
    dispatcher = SampledDispatcher(
        StaticTable(mesh.table()),
        SECRET,
        DispatchSettings(**arguments),  # type: ignore[arg-type]
        sampler=sampler,
    )
    mesh.dispatchers.append(dispatcher)
    return dispatcher


def test_a_sample_says_what_each_shard_got(make_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    mesh, samples = make_mesh(2, 1), Samples(tmp_path / "s")
    sampler = Sampler(samples.path, 1.0)
    dispatcher = sampled(mesh, sampler)
    x, weights, ids = batch(20, 3)
    expected = mesh.experts.dense(LAYER, x, weights, ids)
    assert torch.equal(dispatcher(LAYER, x, weights, ids), expected), "no traced request: no sample"
    sampler.step([ONE, TWO])
    assert torch.equal(dispatcher(LAYER, x, weights, ids), expected)
    (sample,) = samples.take()
    assert (sample.layer, sample.parent, sample.links) == (LAYER, ONE, (TWO,))
    assert {frame.shard for frame in sample.frames} == {server.shard for server in mesh.servers}
    assert sum(frame.pairs for frame in sample.frames) == ids.numel()
    for frame, server in zip(
        sorted(sample.frames, key=lambda f: f.shard), sorted(mesh.servers, key=lambda s: s.shard), strict=True
    ):
        held = torch.tensor([[e in server.kernel.held[LAYER] for e in row] for row in ids.tolist()])  # type: ignore[attr-defined]
        assert (frame.rows, frame.pairs) == (int(held.any(1).sum()), int(held.sum()))
        assert frame.sent_bytes == HEADER_BYTES + frame.rows * WIDTH * 4 + frame.pairs * 12
        assert (frame.state, frame.retry) == ("answered", 0)
        assert 0 < frame.begin_ns <= frame.end_ns
        assert frame.computed_us > 0
    sampler.close()
    samples.close()


def test_what_a_dead_shard_did_not_answer_is_a_frame_that_failed_and_one_more(
    make_mesh: Callable[..., Mesh], tmp_path: Path
) -> None:
    mesh, samples = make_mesh(2, 2), Samples(tmp_path / "s")
    sampler = Sampler(samples.path, 1.0)
    dispatcher = sampled(mesh, sampler)
    x, weights, ids = batch(20, 3)
    expected = mesh.experts.dense(LAYER, x, weights, ids)
    for _ in range(5):
        assert torch.equal(dispatcher(LAYER, x, weights, ids), expected)
    mesh.servers[0].stop()
    sampler.step([ONE])
    while True:  # until one was sent to it
        assert torch.equal(dispatcher(LAYER, x, weights, ids), expected)
        (sample,) = samples.take()
        if len(sample.frames) > 1 or sample.frames[0].shard == mesh.servers[0].shard:
            break
    lost = [frame for frame in sample.frames if frame.shard == mesh.servers[0].shard]
    again = [frame for frame in sample.frames if frame.retry == 1]
    assert [(frame.state, frame.retry, frame.computed_us) for frame in lost] == [("broken", 0, 0)]
    assert [(frame.shard, frame.state) for frame in again] == [(mesh.servers[1].shard, "answered")]
    sampler.close()
    samples.close()


def test_samples_are_shared_out_over_requests_and_bounded(tmp_path: Path) -> None:
    sampler = Sampler(tmp_path / "none", 1.0)
    assert sampler.choose() is None
    sampler.step([ONE, TWO])
    assert [sampler.choose() for _ in range(4)] == [ONE, TWO, ONE, TWO]
    chosen = [sampler.choose() for _ in range(3 * MAX_SAMPLES)]
    assert (chosen.count(ONE), chosen.count(TWO)) == (MAX_SAMPLES - 2, MAX_SAMPLES - 2)
    draws = iter([0.5, 0.49, 0.0, 0.99])
    half = Sampler(tmp_path / "none", 0.5, lambda: next(draws))
    half.step([ONE])
    assert [half.choose() for _ in range(4)] == [None, ONE, ONE, None]
    never = Sampler(tmp_path / "none", 0.0)
    never.step([ONE])
    assert never.choose() is None


def test_a_replica_that_takes_nothing_holds_up_nobody(tmp_path: Path) -> None:
    away = Sampler(tmp_path / "none", 1.0)
    away.pass_on(LAYER, ONE, [])
    samples = Samples(tmp_path / "s")
    sampler = Sampler(samples.path, 1.0)
    sampler.step([ONE] * 200)
    for layer in range(5000):
        sampler.pass_on(layer, TWO, [])
    taken = samples.take()
    assert 0 < len(taken) < 5000
    assert [sample.layer for sample in taken] == list(range(len(taken))), "the first ones, the rest was dropped"
    samples.close()
    sampler.pass_on(LAYER, ONE, [])
    sampler.close()


async def test_samples_become_spans_under_their_request(make_mesh: Callable[..., Mesh], tmp_path: Path) -> None:
    mesh = make_mesh(2, 1)
    with collector() as traces:
        tracing = Tracing(TelemetryConfig(traces_endpoint=traces.url, traces_sample=0.0), Origin("attention", "r-1"))
        spans = DispatchSpans(tmp_path / "s", tracing.tracer, "r-1")
        spans.start()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as odd:
            odd.connect(str(tmp_path / "s"))
            for message in (b"{", b"[]", b"{}", b'{"links":[],"frames":[{}]}', b"\xff"):
                odd.send(message)
        sampler = Sampler(tmp_path / "s", 1.0)
        sampler.step([ONE, TWO])
        await asyncio.to_thread(sampled(mesh, sampler), LAYER, *batch(20, 3))
        await asyncio.to_thread(traces.wait, lambda: len(traces.spans) == 2)
        for span in traces.spans:
            assert (span.name, span.trace_id, span.parent_id) == ("dispatch", TRACE, ONE.split("-")[2])
            assert (span.service, span.links) == ("expertmesh-attention", [TWO.split("-")[2]])
            assert (span.attributes["expertmesh.layer"], span.attributes["expertmesh.replica.id"]) == (LAYER, "r-1")
            assert span.attributes["expertmesh.dispatch.rows"] > 0
            assert span.end_ns >= span.start_ns
        shards = {span.attributes["expertmesh.shard.id"] for span in traces.spans}
        assert shards == {server.shard for server in mesh.servers}
        sampler.close()
        spans.close()
        tracing.close()
