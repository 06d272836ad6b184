"""Shards that are overdue, hang while they are connected to, or are gone for good: what a step does about it."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from expertmesh.routing.dispatch import Dispatcher, DispatchSettings, LoadCounters, Mailbox, StaticTable, TableFile
from expertmesh.routing.dispatch.outage import FailedRows
from expertmesh.routing.dispatch.patience import ServiceTimes
from expertmesh.routing.placement import RoutingTable, Target
from expertmesh.routing.transport import Address, listen
from tests.routing.harness import (
    EXPERTS,
    LAYERS,
    NODE,
    REVISION,
    SECRET,
    Mesh,
    RunningServer,
    TorchKernel,
    batch,
    eventually,
    held_by,
)

MakeMesh = Callable[..., Mesh]
LAYER = LAYERS[0]


def is_right(mesh: Mesh, dispatcher: Dispatcher, tokens: int = 20, top_k: int = 3) -> bool:
    """Whether a dispatch gives what the reference gives, bit for bit."""
    x, weights, ids = batch(tokens, top_k)
    return torch.equal(dispatcher(LAYER, x, weights, ids), mesh.experts.dense(LAYER, x, weights, ids))


# -- overdue ------------------------------------------------------------------------------------------------------


def test_an_overdue_frame_is_asked_elsewhere_long_before_the_deadline(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2, 2)
    dispatcher = mesh.dispatcher(frame_deadline_s=300.0, hedge_after_s=0.05)
    for _ in range(3):
        assert is_right(mesh, dispatcher)
    mesh.kernel(0).gate.clear()
    assert is_right(mesh, dispatcher), "the deadline is minutes away: it was not waited for"
    assert mesh.servers[0].shard not in dispatcher._links.by_shard


def test_a_frame_that_only_its_shard_can_answer_gets_the_whole_deadline(make_mesh: MakeMesh) -> None:
    """Of two shards and no second copies none is hedged; nor is one whose experts are only partly elsewhere."""
    mesh = make_mesh(3, 2)
    lonely = mesh.table()
    copies = lonely.copies.copy()
    alone = int(np.flatnonzero((copies[0] == 0).any(axis=1))[0])
    copies[0, alone] = (0, -1)
    table = RoutingTable(1, lonely.layers, lonely.targets, copies)
    dispatcher = mesh.dispatcher(StaticTable(table), frame_deadline_s=60.0, hedge_after_s=0.05)
    for _ in range(3):
        assert is_right(mesh, dispatcher, 30, EXPERTS)
    link = dispatcher._links.by_shard[mesh.servers[0].shard]
    mesh.kernel(0).entered.clear()
    mesh.kernel(0).gate.clear()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(is_right, mesh, dispatcher, 30, EXPERTS)
        assert mesh.kernel(0).entered.wait(20)
        with pytest.raises(TimeoutError):
            answer.result(0.5)
        mesh.kernel(0).gate.set()
        assert answer.result(20)
    assert dispatcher._links.by_shard[mesh.servers[0].shard] is link, "it was late and never given up"


def test_patience_grows_with_what_frames_took() -> None:
    times = ServiceTimes()
    assert times.expected_s("a", 8) is None
    times.observe("a", 8, 0.010)
    assert times.expected_s("a", 9) == pytest.approx(0.010)
    assert times.expected_s("a", 40) == pytest.approx(0.040), "four times the size, four times the time"
    assert times.expected_s("a", 1) == pytest.approx(0.010), "a smaller one takes no longer"
    assert times.expected_s("b", 8) == pytest.approx(0.010), "of a stranger the others tell"
    for _ in range(200):
        times.observe("a", 8, 0.001)
    expected = times.expected_s("a", 8)
    assert expected == pytest.approx(0.001, rel=0.1), "a slow one is forgotten in time"
    times.keep({"b"})
    assert times.expected_s("a", 8) is None


# -- connecting ---------------------------------------------------------------------------------------------------


def test_a_shard_that_hangs_in_its_handshake_holds_up_no_step(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2, 2)
    listener, address = listen(Address("unix", f"test-silent-{uuid.uuid4()}"))
    with listener:
        silent = Target("silent", NODE, (str(address),))
        targets = (silent, mesh.servers[1].target)
        copies = np.tile(np.array([0, 1], dtype=np.int32), (len(LAYERS), EXPERTS, 1))
        mesh.kernel(1).held.update({layer: set(range(EXPERTS)) for layer in LAYERS})
        table = RoutingTable(1, LAYERS, targets, copies)
        dispatcher = mesh.dispatcher(StaticTable(table), connect_timeout_s=300.0)
        for _ in range(5):
            assert is_right(mesh, dispatcher)
        assert set(dispatcher._links.by_shard) == {mesh.servers[1].shard}
        threads = [thread for thread in threading.enumerate() if thread.name == "connecting"]
        assert len(threads) == 1, "one attempt, and no other before it ends"
    mesh.servers[1].stop()


# -- gone for good ------------------------------------------------------------------------------------------------


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox.create()


def test_only_the_rows_of_a_missing_expert_fail_and_only_the_first_waits(make_mesh: MakeMesh, mailbox: Mailbox) -> None:
    mesh = make_mesh(2)
    mailbox.publish(mesh.table(1, ready=[0]))
    failed = FailedRows()
    settings = DispatchSettings(NODE, REVISION, unavailable_timeout_s=0.3)
    loads = LoadCounters(mailbox.loads_path, len(LAYERS), EXPERTS)
    dispatcher = Dispatcher(TableFile(mailbox.table_path), SECRET, settings, loads, failed)
    try:
        x, weights, ids = batch(40, 2)
        held = sorted(held_by(mesh.slots[0], LAYERS)[LAYER])
        right = np.isin(ids.numpy(), held).all(axis=1)
        assert 0 < right.sum() < len(right)
        want = mesh.experts.dense(LAYER, x, weights, ids)

        y = dispatcher(LAYER, x, weights, ids)
        assert torch.equal(y[torch.from_numpy(right)], want[torch.from_numpy(right)])
        rows, why = failed.take()
        assert rows == np.flatnonzero(~right).tolist()
        assert f"layer {LAYER}: no shard serves experts" in why
        waits = loads.as_dict()["waits"]
        assert waits > 0

        dispatcher(LAYER, x, weights, ids)
        assert failed.take()[0] == np.flatnonzero(~right).tolist()
        assert loads.as_dict()["waits"] == waits, "what was given up is waited for no more"

        mailbox.publish(mesh.table(2))
        assert torch.equal(dispatcher(LAYER, x, weights, ids), want)
        assert not failed

        mesh.servers[1].stop()  # lost anew: it is waited for anew
        fresh = RunningServer(TorchKernel(mesh.experts, held_by(mesh.slots[1], LAYERS)))
        mesh.servers[1] = fresh
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(dispatcher, LAYER, x, weights, ids)
            eventually(lambda: loads.as_dict()["waits"] > waits, "it waits")
            mailbox.publish(mesh.table(3))
            assert torch.equal(answer.result(20), want)
    finally:
        dispatcher.close()
        mailbox.close()


def test_a_step_of_which_nothing_is_left(make_mesh: MakeMesh, mailbox: Mailbox) -> None:
    mesh = make_mesh(2)
    failed = FailedRows()
    settings = DispatchSettings(NODE, REVISION, unavailable_timeout_s=0.1)
    dispatcher = Dispatcher(TableFile(mailbox.table_path), SECRET, settings, None, failed)
    try:
        begin = time.monotonic()
        y = dispatcher(LAYER, *batch(5, 2))
        assert time.monotonic() - begin >= 0.1
        assert y.shape == (5, 16)
        assert failed.take()[0] == [0, 1, 2, 3, 4]
        mailbox.publish(mesh.table(1))
        assert is_right(mesh, dispatcher)
    finally:
        dispatcher.close()
        mailbox.close()


def test_shards_in_trouble_are_named_until_they_answer(make_mesh: MakeMesh, mailbox: Mailbox) -> None:
    mesh = make_mesh(2, 2)
    settings = DispatchSettings(NODE, REVISION)
    dispatcher = Dispatcher(StaticTable(mesh.table()), SECRET, settings, tell_trouble=mailbox.tell_trouble)
    try:
        assert is_right(mesh, dispatcher)
        assert mailbox.trouble() == []
        mesh.servers[0].break_connections()
        assert is_right(mesh, dispatcher)
        assert mailbox.trouble() == [mesh.servers[0].shard]
        eventually(lambda: is_right(mesh, dispatcher) and not mailbox.trouble(), "it is connected to again and answers")
    finally:
        dispatcher.close()
        mailbox.close()
