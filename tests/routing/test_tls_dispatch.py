"""Dispatches over TLS between real processes and threads: right to the bit, through harm and through rotation."""

from __future__ import annotations

import dataclasses
import logging
import select
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch

from expertmesh.errors import Unavailable
from expertmesh.routing.dispatch import Dispatcher, LoadCounters, StaticTable
from expertmesh.routing.placement import Target, build_table
from expertmesh.routing.transport import TlsSettings
from expertmesh.routing.transport.tls import load
from tests.routing.certificates import Authority, replace, write
from tests.routing.harness import (
    EXPERTS,
    LAYERS,
    NODE,
    Mesh,
    ReferenceExperts,
    RunningServer,
    TorchKernel,
    batch,
    eventually,
    shard_process,
)
from tests.routing.middle import Middle, middle
from tests.routing.test_dispatch import Scale, dispatching

MakeMesh = Callable[..., Mesh]
LAYER = LAYERS[0]
EVERYTHING = {layer: set(range(EXPERTS)) for layer in LAYERS}


@pytest.fixture
def member(tmp_path: Path) -> TlsSettings:
    return write(tmp_path / "member", Authority())


@pytest.fixture
def loads(tmp_path: Path) -> LoadCounters:
    return LoadCounters(tmp_path / "loads", len(LAYERS), EXPERTS)


def is_right(mesh: Mesh, dispatcher: Dispatcher, tokens: int = 20, top_k: int = 3) -> bool:
    """Whether a dispatch gives what the reference gives, bit for bit."""
    x, weights, ids = batch(tokens, top_k)
    return torch.equal(dispatcher(LAYER, x, weights, ids), mesh.experts.dense(LAYER, x, weights, ids))


def relays() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "tls-relay"]


@pytest.mark.parametrize("tokens", [1, 32, 128])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_comes_back_is_what_comes_back_in_the_clear(
    make_mesh: MakeMesh, member: TlsSettings, tokens: int, dtype: str
) -> None:
    mesh = make_mesh(3, 2, family="tcp", dtype=dtype, tls=member)
    plain = make_mesh(3, 2, family="tcp", dtype=dtype)
    x, weights, ids = batch(tokens, 4, dtype=getattr(torch, dtype))
    for layer in LAYERS:
        over_tls = mesh.dispatcher(tls=member)(layer, x, weights, ids)
        assert torch.equal(over_tls, plain.dispatcher()(layer, x, weights, ids))


def test_frames_larger_than_all_buffers_both_ways_at_once(member: TlsSettings) -> None:
    """32 MB a frame, of two dispatchers: relays, socket pairs and TCP hold far less."""
    server = RunningServer(Scale(), family="tcp", width=2048, tls=member)
    with ExitStack() as stack:
        stack.callback(server.stop)
        dispatchers = [stack.enter_context(dispatching(server.target, tls=member)) for _ in range(2)]
        x, weights, ids = batch(4000, 2, width=2048)
        want = x * (weights * (ids + 1)).sum(1)[:, None]
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(dispatcher, LAYER, x, weights, ids) for dispatcher in dispatchers]
            assert all(torch.equal(answer.result(60), want) for answer in answers)


def test_no_thread_and_no_descriptor_is_left(make_mesh: MakeMesh, member: TlsSettings) -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    eventually(lambda: not relays(), "relays of other tests end")
    before = open_files()
    mesh = make_mesh(2, 2, family="tcp", tls=member)
    dispatcher = mesh.dispatcher(tls=member)
    assert is_right(mesh, dispatcher)
    assert relays() == ["tls-relay"], "one for both ends of all connections"
    mesh.close()
    eventually(lambda: not relays(), "the relay ends with the last connection")
    eventually(lambda: open_files() <= before, "all is closed")


# -- harm ---------------------------------------------------------------------------------------------------------


@contextmanager
def one_behind_a_middle(
    make_mesh: MakeMesh, member: TlsSettings, loads: LoadCounters, **settings: float
) -> Iterator[tuple[Mesh, Dispatcher, Middle]]:
    """Two shards that hold everything, the first behind somebody in the middle."""
    mesh = make_mesh(2, 2, family="tcp", tls=member)
    with middle(mesh.servers[0].address) as harm:
        targets = {
            0: Target(mesh.servers[0].shard, NODE, (str(harm.address),)),
            1: mesh.servers[1].target,
        }
        table = build_table(1, LAYERS, EXPERTS, mesh.slots, targets)
        dispatcher = mesh.dispatcher(StaticTable(table), loads, tls=member, **settings)

        def connected() -> bool:
            return is_right(mesh, dispatcher, 40, 8) and len(dispatcher._links.by_shard) == 2

        eventually(connected, "both are connected, at whatever pace")
        loads.events[:] = 0
        yield mesh, dispatcher, harm
        dispatcher.close()


def test_a_corrupted_record_costs_the_connection_and_no_answer(
    make_mesh: MakeMesh, member: TlsSettings, loads: LoadCounters, caplog: pytest.LogCaptureFixture
) -> None:
    with one_behind_a_middle(make_mesh, member, loads) as (mesh, dispatcher, harm):
        harm.flip_a_bit()
        assert is_right(mesh, dispatcher, 41, 8)
        assert loads.as_dict()["retries"] == 1
        assert set(dispatcher._links.by_shard) == {mesh.servers[1].shard}
        eventually(
            lambda: "a TLS connection is broken off: [SSL: DECRYPTION_FAILED_OR_BAD_RECORD_MAC]" in caplog.text, "said"
        )
        eventually(lambda: mesh.servers[0].server.stats.connections == 0, "the shard sees it, too")


def test_a_connection_that_is_cut_in_the_middle_of_a_step_is_seen_at_once(
    make_mesh: MakeMesh, member: TlsSettings, loads: LoadCounters
) -> None:
    """With deadlines of minutes."""
    settings = {"frame_deadline_s": 300.0, "hedge_after_s": 300.0}
    with one_behind_a_middle(make_mesh, member, loads, **settings) as (mesh, dispatcher, harm):
        mesh.kernel(0).entered.clear()
        mesh.kernel(0).gate.clear()
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(is_right, mesh, dispatcher, 41, 8)
            assert mesh.kernel(0).entered.wait(20)
            harm.cut()
            assert answer.result(60)
        assert loads.as_dict()["retries"] == 1
        mesh.kernel(0).gate.set()
        eventually(lambda: mesh.servers[0].server.stats.connections == 0, "the shard sees it, too")


def test_a_network_that_passes_on_nothing_is_overdue(
    make_mesh: MakeMesh, member: TlsSettings, loads: LoadCounters
) -> None:
    with one_behind_a_middle(make_mesh, member, loads, frame_deadline_s=300.0, hedge_after_s=0.2) as (
        mesh,
        dispatcher,
        harm,
    ):
        for _ in range(3):
            assert is_right(mesh, dispatcher, 40, 8)
        harm.hold()
        assert is_right(mesh, dispatcher, 41, 8), "long before the deadline"
        assert set(dispatcher._links.by_shard) == {mesh.servers[1].shard}


def test_shard_processes_killed_between_steps_and_in_the_middle_of_one(member: TlsSettings) -> None:
    experts = ReferenceExperts()
    with ExitStack() as stack:
        started = [
            stack.enter_context(shard_process(EVERYTHING, f"process-{i}", host="127.0.0.1", tls=member))
            for i in range(2)
        ]
        processes, targets = zip(*started, strict=True)
        survivor = RunningServer(TorchKernel(experts, EVERYTHING), family="tcp", tls=member)
        stack.callback(survivor.stop)
        settings = {"policy": "least_loaded", "frame_deadline_s": 300.0, "hedge_after_s": 300.0}
        dispatcher = stack.enter_context(dispatching(survivor.target, *targets, tls=member, **settings))
        x, weights, ids = batch(30, 8)

        def right(layer: int) -> bool:
            return torch.equal(dispatcher(layer, x, weights, ids), experts.dense(layer, x, weights, ids))

        eventually(lambda: right(LAYERS[0]) and len(dispatcher._links.by_shard) == 3, "all are connected", 60)
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert right(LAYERS[0])
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(right, LAYERS[1])  # the layer in which shard processes hang
            said = processes[1].stdout
            assert said is not None
            assert select.select([said], [], [], 60)[0], "it got a part of the step"
            assert said.readline() == "computing\n"
            processes[1].send_signal(signal.SIGKILL)
            assert answer.result(60)
        assert set(dispatcher._links.by_shard) == {survivor.shard}


def test_shards_without_tls_are_passed_over_and_named(make_mesh: MakeMesh, member: TlsSettings) -> None:
    mesh = make_mesh(1, 1, family="tcp")
    with pytest.raises(Unavailable, match=r"shard has no TLS, and routing\.tls is set here"):
        is_right(mesh, mesh.dispatcher(tls=member, unavailable_timeout_s=0.5))
    mesh = make_mesh(1, 1, family="tcp", tls=member)
    with pytest.raises(Unavailable, match=r"shard wants TLS, and routing\.tls is not set here"):
        is_right(mesh, mesh.dispatcher(unavailable_timeout_s=0.5))


# -- rotation -----------------------------------------------------------------------------------------------------


class Traffic:
    """Dispatches without a pause from several threads, each of which must be right, and the newest links."""

    def __init__(self, mesh: Mesh, dispatchers: list[Dispatcher]) -> None:
        self._mesh, self._dispatchers = mesh, dispatchers
        self._stop = threading.Event()
        self.dispatched = 0
        self._pool = ThreadPoolExecutor(len(dispatchers))
        self._runs = [self._pool.submit(self._run, dispatcher) for dispatcher in dispatchers]

    def _run(self, dispatcher: Dispatcher) -> None:
        while not self._stop.is_set():
            assert is_right(self._mesh, dispatcher, 20, 8)
            self.dispatched += 1

    def links(self) -> set[object]:
        return {link for dispatcher in self._dispatchers for link in dispatcher._links.by_shard.values()}

    def renewed(self) -> None:
        """Waits until every link is another one, and a few dispatches have gone over them."""
        before = self.links()

        def over() -> bool:
            for run in self._runs:
                assert not run.done(), run.result()
            return not before & self.links()

        eventually(over, "every connection is opened anew", 60)
        seen = self.dispatched
        eventually(lambda: self.dispatched > seen + 10, "dispatches go on", 60)

    def stop(self) -> None:
        """Raises what went wrong."""
        self._stop.set()
        for run in self._runs:
            run.result(60)
        self._pool.shutdown()


def test_leaf_and_authority_are_rotated_while_dispatches_run(
    make_mesh: MakeMesh, tmp_path: Path, loads: LoadCounters, caplog: pytest.LogCaptureFixture
) -> None:
    """As an operator would: new leaves; then a second authority, trusted by all; leaves by it; the first is gone."""
    caplog.set_level(logging.INFO, "expertmesh")
    old, new = Authority(), Authority()
    shards, attention = tmp_path / "shards", tmp_path / "attention"
    mesh = make_mesh(3, 2, family="tcp", tls=write(shards, old))
    settings = replace_renewal(write(attention, old), 0.05)
    dispatchers = [mesh.dispatcher(loads=loads, tls=settings) for _ in range(2)]
    traffic = Traffic(mesh, dispatchers)
    eventually(lambda: len(traffic.links()) == 6, "all are connected", 60)
    before = loads.as_dict()  # a step may have gone elsewhere while it waited for a handshake
    steps: list[tuple[Authority, tuple[Authority, ...]]] = [
        (old, (old,)), (old, (old, new)), (new, (old, new)), (new, (new,)),
    ]  # fmt: skip
    fingerprints = set()
    for signer, trusted in steps:
        for folder in (shards, attention):
            write(folder, signer, *trusted)
        traffic.renewed()
        fingerprints.add(load(settings).fingerprint)
        for dispatcher in dispatchers:
            tls = dispatcher._links._tls
            assert tls is not None
            assert tls.current().fingerprint == load(settings).fingerprint, "the newest is in force"
    traffic.stop()
    assert len(fingerprints) == 4
    after = loads.as_dict()
    assert (after["retries"], after["waits"]) == (before["retries"], before["waits"])
    assert after["dispatches"] == traffic.dispatched
    with pytest.raises(Unavailable, match="TLS: the peer"):  # whom the first authority signed is out
        is_right(mesh, mesh.dispatcher(tls=write(tmp_path / "late", old, old, new), unavailable_timeout_s=0.5))


def test_broken_new_files_leave_the_old_ones_in_force(
    make_mesh: MakeMesh, tmp_path: Path, loads: LoadCounters, caplog: pytest.LogCaptureFixture
) -> None:
    authority = Authority()
    shards = tmp_path / "shards"
    mesh = make_mesh(2, 2, family="tcp", tls=write(shards, authority))
    settings = replace_renewal(write(tmp_path / "attention", authority), 0.05)
    traffic = Traffic(mesh, [mesh.dispatcher(loads=loads, tls=settings)])
    eventually(lambda: len(traffic.links()) == 2, "all are connected", 60)
    before = loads.as_dict()
    replace(shards / "cert.pem", b"-----BEGIN CERTIFICATE-----\nhalf of")
    traffic.renewed()
    eventually(lambda: "the TLS certificates stay as they were: routing.tls.cert_file" in caplog.text, "said")
    (shards / "key.pem").unlink()
    traffic.renewed()
    traffic.stop()
    after = loads.as_dict()
    assert (after["retries"], after["waits"]) == (before["retries"], before["waits"])


def test_a_renewal_that_fails_leaves_the_connection_that_works(
    make_mesh: MakeMesh, tmp_path: Path, loads: LoadCounters, caplog: pytest.LogCaptureFixture
) -> None:
    authority, foreign = Authority(), Authority()
    mesh = make_mesh(1, 1, family="tcp", tls=write(tmp_path / "shards", authority))
    settings = replace_renewal(write(tmp_path / "attention", authority), 0.2)
    dispatcher = mesh.dispatcher(loads=loads, tls=settings)
    assert is_right(mesh, dispatcher)
    (link,) = dispatcher._links.by_shard.values()
    before = loads.as_dict()
    write(tmp_path / "attention", foreign)
    words = f"the connection to shard {link.shard} is not renewed: "

    def said() -> bool:
        assert is_right(mesh, dispatcher)
        return words in caplog.text

    eventually(said, words)
    assert list(dispatcher._links.by_shard.values()) == [link]
    assert loads.as_dict()["retries"] == before["retries"]


def replace_renewal(settings: TlsSettings, renew_after_s: float) -> TlsSettings:
    return dataclasses.replace(settings, renew_after_s=renew_after_s)
