"""The policies' properties, and the dispatcher against real shards: what it adds up must equal a dense reference."""

from __future__ import annotations

import dataclasses
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import ConfigError, Unavailable, WireError
from expertmesh.routing import native
from expertmesh.routing.dispatch import (
    POLICIES,
    Dispatcher,
    DispatchSettings,
    LoadCounters,
    Mailbox,
    Policy,
    StaticTable,
    TableFile,
    create_policy,
)
from expertmesh.routing.dispatch.copies import LayerCopies, TableCopies
from expertmesh.routing.dispatch.split import Counts, Mask
from expertmesh.routing.placement import RoutingTable, Target, build_table, even_slots
from expertmesh.routing.transport import Address, Peer, challenge, listen
from expertmesh.routing.transport.auth import receive_exactly
from expertmesh.routing.transport.sockets import accepted
from expertmesh.routing.wire import HEADER_BYTES, Header, Kind, Limits, combine_parts, parse_header
from expertmesh.routing.wire.frame import DispatchBody
from tests.routing.harness import (
    EXPERTS,
    LAYERS,
    NODE,
    REVISION,
    SECRET,
    WIDTH,
    Mesh,
    ReferenceExperts,
    RunningServer,
    TorchKernel,
    batch,
    eventually,
    held_by,
    shard_process,
)

MakeMesh = Callable[..., Mesh]
LAYER = LAYERS[0]


@pytest.fixture
def loads() -> Iterator[LoadCounters]:
    mailbox = Mailbox.create()
    yield LoadCounters(mailbox.loads_path, len(LAYERS), EXPERTS)
    mailbox.close()


def check(
    mesh: Mesh, dispatcher: Dispatcher, tokens: int = 20, top_k: int = 3, seed: int = 0, layer: int = LAYER
) -> None:
    """One dispatch whose float32 result must be the reference's, bit for bit."""
    x, weights, ids = batch(tokens, top_k, seed=seed)
    y = dispatcher(layer, x, weights, ids)
    assert torch.equal(y, mesh.experts.dense(layer, x, weights, ids))


# -- the policies -------------------------------------------------------------------------------------------------


def policy_for(name: str, copies: Any, targets: int) -> tuple[Policy, LayerCopies]:
    """A policy that knows a table of one layer, and that layer."""
    table = RoutingTable(1, (LAYER,), tuple(Target(str(i), NODE, ()) for i in range(targets)), copies[None])
    policy = create_policy(name)
    policy.use(table)
    return policy, TableCopies(table).layers[LAYER]


@st.composite
def choices(draw: st.DrawFn) -> tuple[Counts, np.ndarray[Any, Any], Mask]:
    """(counts, copies, up) of a random placement, some shards down, some experts nowhere."""
    experts, targets = draw(st.integers(1, 24)), draw(st.integers(0, 6))
    width = draw(st.integers(1, max(1, targets)))
    copies = np.full((experts, width), -1, dtype=np.int32)
    for expert in range(experts):
        held = draw(st.lists(st.integers(0, targets - 1), max_size=width, unique=True)) if targets else []
        copies[expert, : len(held)] = held
    counts = np.array(draw(st.lists(st.integers(0, 50), min_size=experts, max_size=experts)), dtype=np.int64)
    up = np.array(draw(st.lists(st.booleans(), min_size=targets, max_size=targets)), dtype=bool)
    return counts, copies, up


@pytest.mark.parametrize("name", sorted(POLICIES))
@given(choice=choices())
def test_tokens_go_to_shards_that_hold_the_expert_and_are_up(name: str, choice: tuple[Any, Any, Any]) -> None:
    counts, copies, up = choice
    before = [part.copy() for part in choice]
    policy, layer = policy_for(name, copies, len(up))
    shares = policy.shares(layer, counts, up)
    assert shares.shape == layer.copies.shape
    assert (shares >= 0).all()
    usable = (layer.copies >= 0) & np.append(up, False)[layer.copies]
    assert not shares[~usable].any()
    assert shares.sum(axis=1).tolist() == np.where(usable.any(axis=1), counts, 0).tolist()
    assert np.array_equal(shares, policy.shares(layer, counts, up)), "the same step was decided differently"
    assert all(np.array_equal(old, new) for old, new in zip(before, choice, strict=True)), "changed its arguments"


@given(choice=choices())
def test_a_layer_has_a_choice_if_an_expert_has_two_copies(choice: tuple[Any, Any, Any]) -> None:
    _, copies, up = choice
    layer = policy_for("live_cost", copies, len(up))[1]
    held = [[target for target in row if target >= 0] for row in copies.tolist()]
    assert layer.has_choice == any(len(targets) > 1 for targets in held)
    assert [[target for target in row if target >= 0] for row in layer.copies.tolist()] == held
    assert layer.has_choice or layer.copies.shape == (len(copies), 1)


@pytest.mark.parametrize("name", sorted(POLICIES))
@pytest.mark.parametrize(("experts", "shards", "redundancy"), [(16, 4, 2), (16, 4, 4), (12, 3, 2), (128, 8, 2)])
def test_equal_experts_use_all_copies_evenly(name: str, experts: int, shards: int, redundancy: int) -> None:
    slots = even_slots(1, experts, shards, redundancy)
    table = build_table(1, (LAYER,), experts, slots, {i: Target(str(i), NODE, ()) for i in range(shards)})
    policy, layer = policy_for(name, table.copies[0], shards)
    shares = policy.shares(layer, np.full(experts, 5, dtype=np.int64), np.ones(shards, dtype=bool))
    tokens = np.bincount(layer.copies.ravel(), shares.ravel(), minlength=shards)
    assert tokens.tolist() == [5 * experts / shards] * shards


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_a_single_busy_expert_does_not_always_warm_the_same_copy(name: str) -> None:
    table = build_table(1, (LAYER,), 8, even_slots(1, 8, 2, 2), {i: Target(str(i), NODE, ()) for i in range(2)})
    policy, layer = policy_for(name, table.copies[0], 2)
    used = set()
    for expert in range(8):
        counts = np.zeros(8, dtype=np.int64)
        counts[expert] = 1
        used.add(int(layer.copies[policy.shares(layer, counts, np.ones(2, dtype=bool)) > 0][0]))
    assert used == {0, 1}


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"routing.policy: 'random' is not one of live_cost, least_loaded"):
        create_policy("random")


# -- sums ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "redundancy", "family", "dtype"),
    [
        (1, 1, "unix", "float32"),
        (2, 1, "tcp", "float32"),
        (2, 2, "unix", "bfloat16"),
        (3, 1, "unix", "bfloat16"),
        (3, 2, "unix", "float32"),
        (4, 2, "unix", "float32"),
        (4, 2, "tcp", "float16"),
    ],
)
def test_what_comes_back_is_what_dense_experts_give(
    make_mesh: MakeMesh, shards: int, redundancy: int, family: str, dtype: str
) -> None:
    mesh = make_mesh(shards, redundancy, family=family, dtype=dtype)
    dispatcher = mesh.dispatcher(node=NODE if family == "unix" else "another node")
    form: torch.dtype = getattr(torch, dtype)

    @settings(max_examples=25, deadline=None)
    @given(
        tokens=st.integers(1, 300),
        top_k=st.integers(1, EXPERTS),
        layer=st.sampled_from(LAYERS),
        seed=st.integers(0, 999),
    )
    def equal(tokens: int, top_k: int, layer: int, seed: int) -> None:
        x, weights, ids = batch(tokens, top_k, seed=seed, dtype=form)
        given_x = x.clone()
        y = dispatcher(layer, x, weights, ids)
        want = mesh.experts.dense(layer, x, weights, ids)
        assert y.dtype is form
        assert y.shape == x.shape
        assert torch.equal(x, given_x), "the input was written to"
        if form is torch.float32:
            assert torch.equal(y, want)
        else:  # each shard's sum is rounded once, and so is each of their additions
            scale = mesh.experts.dense(layer, x.abs() * 0 + 3, weights, ids).abs().max()  # bound on a partial sum
            error = (y.float() - want).abs().max()
            assert error <= 2 * shards * torch.finfo(form).eps * torch.maximum(scale, want.abs().max())

    equal()


def test_no_tokens_need_no_shard() -> None:
    dispatcher = Dispatcher(StaticTable(empty_table()), SECRET, DispatchSettings(NODE, REVISION))
    y = dispatcher(LAYER, torch.empty(0, WIDTH), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int32))
    assert y.shape == (0, WIDTH)


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_rows_whose_experts_are_all_on_one_shard(make_mesh: MakeMesh, shard: int) -> None:
    mesh = make_mesh(3)
    held = sorted(held_by(mesh.slots[shard], LAYERS)[LAYER])
    x, weights, _ = batch(17, 2)
    ids = torch.tensor([held[:2], held[-2:][::-1]] * 8 + [held[:2]], dtype=torch.int32)
    y = mesh.dispatcher()(LAYER, x, weights, ids)
    assert torch.equal(y, mesh.experts.dense(LAYER, x, weights, ids))
    assert [server.server.stats.frames for server in mesh.servers] == [int(i == shard) for i in range(3)]


def test_inputs_in_other_layouts_and_types(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2)
    x, weights, ids = batch(30, 4)
    odd = torch.stack((x, x), dim=2)[:, :, 0].requires_grad_()
    y = mesh.dispatcher()(LAYER, odd, weights.double()[:, [0, 1, 2, 3]], ids.long().t().contiguous().t())
    assert not odd.is_contiguous()
    assert not y.requires_grad
    assert torch.equal(y, mesh.experts.dense(LAYER, x, weights, ids))


def test_an_output_does_not_change_with_the_next_step(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2)
    dispatcher = mesh.dispatcher()
    for tokens, top_k in ((40, 8), (40, 1), (1, 1)):  # whole rows of one or two shards, and parts
        x, weights, ids = batch(tokens, top_k)
        y = dispatcher(LAYER, x, weights, ids)
        kept = y.clone()
        check(mesh, dispatcher, 50, 8, seed=9)
        check(mesh, dispatcher, 50, 3, seed=8)
        assert torch.equal(y, kept)


def test_the_same_step_gives_the_same_bits_whoever_answers_first(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(3, dtype="bfloat16")
    dispatcher = mesh.dispatcher()
    x, weights, ids = batch(40, 6, dtype=torch.bfloat16)
    weights = weights / 7  # sums that do round
    first = dispatcher(LAYER, x, weights, ids)
    for slow in range(3):
        mesh.kernel(slow).gate.clear()
        mesh.kernel(slow).entered.clear()
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(dispatcher, LAYER, x, weights, ids)
            assert mesh.kernel(slow).entered.wait(10)
            mesh.kernel(slow).gate.set()
            assert torch.equal(again.result(20), first)


def test_frames_of_two_dispatchers_in_one_batch_keep_their_rows(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(1)
    kernel, server = mesh.kernel(0), mesh.servers[0].server
    first, second, third = (mesh.dispatcher() for _ in range(3))
    for dispatcher in (first, second, third):
        check(mesh, dispatcher)
    before = server.stats
    kernel.calls.clear()
    kernel.entered.clear()
    kernel.gate.clear()
    inputs = [batch(tokens, top_k, seed=tokens) for tokens, top_k in ((5, 2), (7, 8), (11, 1))]
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(first, LAYER, *inputs[0])]
        assert kernel.entered.wait(10)
        answers += [pool.submit(d, LAYER, *args) for d, args in ((second, inputs[1]), (third, inputs[2]))]
        eventually(lambda: len(mesh.servers[0].frames_unread()) == 2, "both frames are there")
        kernel.gate.set()
        for args, answer in zip(inputs, answers, strict=True):
            assert torch.equal(answer.result(20), mesh.experts.dense(LAYER, *args))
    assert kernel.calls == [(LAYER, 5), (LAYER, 18)]
    assert (server.stats.frames - before.frames, server.stats.batches - before.batches) == (3, 2)
    assert server.stats.pairs - before.pairs == 5 * 2 + 7 * 8 + 11


class Scale:
    """Expert e multiplies by e + 1: cheap, so that frames may be large."""

    def compute(self, layer: int, body: DispatchBody) -> torch.Tensor:
        """As `Kernel.compute`."""
        factors = torch.zeros(len(body.x)).index_add_(0, body.rows.long(), body.weights * (body.experts + 1))
        return body.x * factors[:, None]


@pytest.fixture(params=["unix", "tcp"])
def scaler(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    """One shard of cheap experts with rows of 8 KB."""
    server = RunningServer(Scale(), family=request.param, width=2048)
    yield server
    server.stop()


def table_of(*targets: Target, epoch: int = 1, experts: int = EXPERTS) -> RoutingTable:
    """Every target holds every expert."""
    ready = dict(enumerate(targets))
    slots = even_slots(len(LAYERS), experts, max(1, len(targets)), max(1, len(targets)))
    return build_table(epoch, LAYERS, experts, slots, ready)


def empty_table(epoch: int = 1) -> RoutingTable:
    return table_of(epoch=epoch)


@contextmanager
def dispatching(*targets: Target, **changes: Any) -> Iterator[Dispatcher]:
    """A dispatcher to targets that each hold every expert."""
    arguments: dict[str, Any] = {"node": NODE, "revision": REVISION, **changes}
    dispatcher = Dispatcher(StaticTable(table_of(*targets)), SECRET, DispatchSettings(**arguments))
    try:
        yield dispatcher
    finally:
        dispatcher.close()


def test_frames_larger_than_any_buffer(scaler: RunningServer) -> None:
    x, weights, ids = batch(4000, 2, width=2048)  # 32 MB there and back
    with dispatching(scaler.target) as dispatcher:
        for rows in (4000, 3, 4000):
            y = dispatcher(LAYER, x[:rows], weights[:rows], ids[:rows])
            assert torch.equal(y, x[:rows] * (weights * (ids + 1)).sum(1)[:rows, None])


# -- shards that go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_a_shard_stopped_between_steps(make_mesh: MakeMesh, loads: LoadCounters, family: str) -> None:
    mesh = make_mesh(3, 2, family=family)
    dispatcher = mesh.dispatcher(loads=loads)
    check(mesh, dispatcher)
    mesh.servers[1].stop()
    begin = time.monotonic()
    check(mesh, dispatcher, 50, 8)
    assert time.monotonic() - begin < 2
    assert loads.as_dict()["waits"] == 0, "there was a copy: nothing to wait for"
    assert loads.as_dict()["retries"] >= 1
    check(mesh, dispatcher, 7, 2)


def test_a_shard_that_breaks_off_while_it_computes(make_mesh: MakeMesh, loads: LoadCounters) -> None:
    mesh = make_mesh(2, 2)
    dispatcher = mesh.dispatcher(loads=loads)
    check(mesh, dispatcher)
    for _ in range(3):
        kernel = mesh.kernel(1)
        kernel.entered.clear()
        kernel.gate.clear()
        x, weights, ids = batch(40, 5)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(dispatcher, LAYER, x, weights, ids)
            assert kernel.entered.wait(10)
            eventually(lambda: has_answered(dispatcher, mesh.servers[0]), "the other shard's answer")
            mesh.servers[1].break_connections()
            assert torch.equal(answer.result(20), mesh.experts.dense(LAYER, x, weights, ids))
        kernel.gate.set()
        forget_failures(dispatcher)
    assert loads.as_dict().items() >= {"retries": 3, "broken": 3, "overdue": 0}.items()


def test_the_parts_of_a_dispatch_are_counted(make_mesh: MakeMesh, loads: LoadCounters) -> None:
    mesh = make_mesh(2, 1)
    dispatcher = mesh.dispatcher(loads=loads)
    begin = time.monotonic_ns()
    for turn in range(1, 6):
        check(mesh, dispatcher, 16, 3)
        took = time.monotonic_ns() - begin
        parts = loads.as_dict()
        assert parts["frames"] == 2 * turn
        assert parts["bytes_sent"] > parts["bytes_received"] > 2 * turn * HEADER_BYTES
        assert min(parts["route_ns"], parts["exchange_ns"], parts["combine_ns"]) > 0
        assert parts["route_ns"] + parts["exchange_ns"] + parts["combine_ns"] <= took


def forget_failures(dispatcher: Dispatcher) -> None:
    """As if every shard had answered since."""
    dispatcher._links.down.clear()
    dispatcher._links.strikes.clear()


def has_answered(dispatcher: Dispatcher, server: RunningServer) -> bool:
    """Whether the frame in flight to a shard was answered."""
    return dispatcher._links.by_shard[server.shard].stream.state == native.ANSWERED


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_answers_that_came_before_the_failure_still_count(make_mesh: MakeMesh, victim: int) -> None:
    """The survivor gets a second frame in the same step; its first answer must not be overwritten by the second."""
    mesh = make_mesh(3, 2)
    dispatcher = mesh.dispatcher()
    check(mesh, dispatcher)
    mesh.kernel(victim).entered.clear()
    mesh.kernel(victim).gate.clear()
    x, weights, ids = batch(60, 8)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(dispatcher, LAYER, x, weights, ids)
        assert mesh.kernel(victim).entered.wait(10)
        others = [server for i, server in enumerate(mesh.servers) if i != victim]
        eventually(lambda: all(has_answered(dispatcher, server) for server in others), "the others' answers")
        mesh.servers[victim].break_connections()
        assert torch.equal(answer.result(20), mesh.experts.dense(LAYER, x, weights, ids))


def test_shard_processes_killed_between_steps_and_in_the_middle_of_one() -> None:
    everything = {layer: set(range(EXPERTS)) for layer in LAYERS}
    experts = ReferenceExperts()
    with ExitStack() as stack:
        started = [stack.enter_context(shard_process(everything, f"process-{i}")) for i in range(2)]
        processes, targets = zip(*started, strict=True)
        survivor = RunningServer(TorchKernel(experts, everything))
        stack.callback(survivor.stop)
        dispatcher = stack.enter_context(dispatching(survivor.target, *targets))
        x, weights, ids = batch(30, 8)

        def right(layer: int) -> bool:
            return torch.equal(dispatcher(layer, x, weights, ids), experts.dense(layer, x, weights, ids))

        assert right(LAYERS[0])
        assert len(dispatcher._links.by_shard) == 3
        processes[0].send_signal(signal.SIGKILL)
        processes[0].wait()
        assert right(LAYERS[0])

        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(right, LAYERS[1])  # the layer in which shard processes hang
            assert processes[1].stdout is not None
            assert processes[1].stdout.readline() == "computing\n"
            processes[1].send_signal(signal.SIGKILL)
            assert answer.result(20)
        assert set(dispatcher._links.by_shard) == {survivor.shard}


def test_a_shard_that_hangs_is_given_up_at_the_deadline(make_mesh: MakeMesh, loads: LoadCounters) -> None:
    mesh = make_mesh(2, 2)
    dispatcher = mesh.dispatcher(loads=loads, frame_deadline_s=0.2)
    check(mesh, dispatcher)
    mesh.kernel(0).gate.clear()
    begin = time.monotonic()
    check(mesh, dispatcher, 50, 8)
    assert 0.19 < time.monotonic() - begin < 2
    begin = time.monotonic()
    check(mesh, dispatcher, 51, 8)
    assert time.monotonic() - begin < 0.19, "a shard that hung a moment ago was asked again"
    assert loads.as_dict().items() >= {"dispatches": 3, "retries": 1, "waits": 0, "overdue": 1, "broken": 0}.items()


def test_a_shard_that_hung_is_left_alone_for_longer_while_others_answer(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2, 2)
    dispatcher = mesh.dispatcher(frame_deadline_s=0.4)
    mesh.kernel(0).gate.clear()
    check(mesh, dispatcher, 50, 8)
    mesh.kernel(0).gate.set()
    hung = mesh.servers[0].shard
    frames = mesh.servers[0].server.stats.frames

    def pass_time(seconds: float) -> None:
        failure = dispatcher._links.down[hung]
        dispatcher._links.down[hung] = dataclasses.replace(failure, at=failure.at - seconds)

    pass_time(0.3)
    check(mesh, dispatcher, 50, 8)
    assert hung not in dispatcher._links.by_shard
    mesh.servers[1].stop()
    check(mesh, dispatcher, 50, 8)  # rather that one than none
    assert hung in dispatcher._links.by_shard
    assert mesh.servers[0].server.stats.frames > frames


def test_shards_that_let_connect_and_say_nothing() -> None:
    """Each attempt takes longer than a shard is left alone: the step must end all the same."""
    with ExitStack() as stack:
        targets = []
        for _ in range(2):
            listener, address = listen(Address("unix", f"test-silent-{uuid.uuid4()}"))
            stack.enter_context(listener)
            targets.append(Target(address.name, NODE, (str(address),)))
        waits = {"connect_timeout_s": 0.3, "unavailable_timeout_s": 0.5}
        dispatcher = stack.enter_context(dispatching(*targets, **waits))
        begin = time.monotonic()
        with pytest.raises(Unavailable, match="broke off the handshake: timed out"):
            dispatcher(LAYER, *batch(3, 8))
        assert time.monotonic() - begin < 3


def test_a_shard_that_answers_an_error_is_passed_over(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2, 2)
    dispatcher = mesh.dispatcher()
    mesh.kernel(1).held[LAYER].clear()
    check(mesh, dispatcher, 50, 8)
    assert mesh.servers[1].server.stats.refused == 1
    check(mesh, dispatcher, 50, 8, layer=LAYERS[1])
    assert len(dispatcher._links.by_shard) == 2, "an error frame is no reason to hang up"


def test_all_copies_hang_until_the_step_gives_up(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2, 2)
    dispatcher = mesh.dispatcher(frame_deadline_s=0.2, connect_timeout_s=0.1, unavailable_timeout_s=0.6)
    for index in range(2):
        mesh.kernel(index).gate.clear()
    begin = time.monotonic()
    with pytest.raises(Unavailable, match=f"layer {LAYER}: no shard serves experts .*timed out"):
        check(mesh, dispatcher)
    assert 0.5 < time.monotonic() - begin < 5
    for index in range(2):
        mesh.kernel(index).gate.set()
    check(mesh, dispatcher)


def test_the_only_copy_comes_back(make_mesh: MakeMesh, loads: LoadCounters) -> None:
    """A broken connection to the only holder: the step waits and asks it again."""
    mesh = make_mesh(1)
    dispatcher = mesh.dispatcher(loads=loads)
    check(mesh, dispatcher)
    mesh.servers[0].break_connections()
    check(mesh, dispatcher, 30, 8)
    assert loads.as_dict()["dispatches"] == 2


def test_a_step_waits_for_a_table_that_brings_the_expert(make_mesh: MakeMesh, loads: LoadCounters) -> None:
    mesh = make_mesh(3)
    mailbox = Mailbox.create()
    try:
        dispatcher = mesh.dispatcher(TableFile(mailbox.table_path), loads)
        x, weights, ids = batch(40, 8)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(dispatcher, LAYER, x, weights, ids)
            eventually(lambda: loads.as_dict()["waits"] > 0, "it waits for the first table")
            mailbox.publish(empty_table(epoch=1))
            mailbox.publish(mesh.table(2, ready=[0, 2]))
            eventually(lambda: mesh.servers[2].server.stats.frames == 1, "those with a copy are computed meanwhile")
            assert not answer.done()
            mailbox.publish(mesh.table(3))
            assert torch.equal(answer.result(20), mesh.experts.dense(LAYER, x, weights, ids))
        assert [s.server.stats.frames for s in mesh.servers] == [1, 1, 1]
        assert loads.tokens[0].tolist() == np.bincount(ids.flatten(), minlength=EXPERTS).tolist()
        assert loads.as_dict()["dispatches"] == 1
    finally:
        mailbox.close()


def test_a_lost_shard_is_replaced_by_a_newer_table(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2)
    mailbox = Mailbox.create()
    try:
        mailbox.publish(mesh.table(1))
        dispatcher = mesh.dispatcher(TableFile(mailbox.table_path))
        check(mesh, dispatcher)
        mesh.servers[1].stop()
        fresh = RunningServer(TorchKernel(mesh.experts, held_by(mesh.slots[1], LAYERS)))
        mesh.servers.append(fresh)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(check, mesh, dispatcher, 40, 8)
            eventually(lambda: bool(dispatcher._links.down), "it noticed")
            targets = {0: mesh.servers[0].target, 1: fresh.target}
            mailbox.publish(build_table(2, LAYERS, EXPERTS, mesh.slots, targets))
            answer.result(20)
        assert fresh.server.stats.frames == 1
    finally:
        mailbox.close()


@pytest.mark.parametrize("published", ["nothing", "no shard", "one shard of two"])
def test_an_expert_that_is_never_placed_fails_the_step_in_time(make_mesh: MakeMesh, published: str) -> None:
    mesh = make_mesh(2)
    mailbox = Mailbox.create()
    try:
        dispatcher = mesh.dispatcher(TableFile(mailbox.table_path), unavailable_timeout_s=0.3)
        missing = list(range(EXPERTS))
        if published == "no shard":
            mailbox.publish(empty_table(epoch=4))
        elif published == "one shard of two":
            mailbox.publish(mesh.table(4, ready=[0]))
            missing = sorted(held_by(mesh.slots[1], LAYERS)[LAYERS[1]])
        begin = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            check(mesh, dispatcher, 10, 8, layer=LAYERS[1])
        assert 0.25 < time.monotonic() - begin < 3
        assert f"layer {LAYERS[1]}: no shard serves experts {missing} after 0.3 s" in str(caught.value)
        assert ("no placement was ever published" if published == "nothing" else "epoch 4") in str(caught.value)
        assert caught.value.retry_after_s > 0
        mailbox.publish(mesh.table(5))
        check(mesh, dispatcher)  # the engine lives on
    finally:
        mailbox.close()


def test_a_layer_that_the_table_does_not_know_is_refused(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(1)
    with pytest.raises(WireError, match=r"layer 2 has no routed experts in the placement; it knows \(1, 3\)"):
        check(mesh, mesh.dispatcher(), layer=2)


@pytest.mark.parametrize(
    ("peer", "says"),
    [
        (Peer("id", "rev-0", WIDTH, "float32"), "shard id with checkpoint rev-0 answers where id with rev-1 should be"),
        (Peer("someone", REVISION, WIDTH, "float32"), "shard someone with checkpoint rev-1 answers where id with"),
        (Peer("id", REVISION, 2 * WIDTH, "float32"), "width 32.*float32.*width 16.*float32"),
        (Peer("id", REVISION, WIDTH, "bfloat16"), "width 16.*bfloat16.*width 16.*float32"),
    ],
)
def test_a_shard_that_is_not_the_one_expected_is_refused(peer: Peer, says: str) -> None:
    kernel = TorchKernel(ReferenceExperts(), {layer: set(range(EXPERTS)) for layer in LAYERS})
    server = RunningServer(kernel, peer=peer)
    try:
        target = Target("id", NODE, server.target.addresses)
        with (
            dispatching(target, unavailable_timeout_s=0.1) as dispatcher,
            pytest.raises(Unavailable, match=says),
        ):
            dispatcher(LAYER, *batch(3, 2))
        assert not kernel.calls, "rows were sent to a shard that was to be refused"
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("transport", "node", "says"),
    [("tcp", NODE, "no way to shard .* by transport 'tcp'"), ("auto", "elsewhere", "no way to shard")],
)
def test_a_shard_that_can_not_be_reached_from_here(make_mesh: MakeMesh, transport: str, node: str, says: str) -> None:
    mesh = make_mesh(1, family="unix")
    dispatcher = mesh.dispatcher(transport=transport, node=node, unavailable_timeout_s=0.05)
    with pytest.raises(Unavailable, match=says):
        check(mesh, dispatcher)


@pytest.mark.parametrize(("tokens", "top_k"), [(65, 1), (1, 8)])
def test_a_step_larger_than_a_frame_is_refused_at_once(make_mesh: MakeMesh, tokens: int, top_k: int) -> None:
    """Shards hang up on such a frame: trying every copy for a minute would not make it smaller."""
    mesh = make_mesh(1)
    dispatcher = mesh.dispatcher(limits=Limits(max_rows=64, max_pairs_per_row=7))
    with pytest.raises(WireError, match=r"allowed: 1 to (64|7)"):
        check(mesh, dispatcher, tokens, top_k)
    assert mesh.servers[0].server.stats.connections == 0


def test_a_step_that_one_shard_can_not_hold_is_sent_to_none(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2)
    dispatcher = mesh.dispatcher(limits=Limits(max_rows=64))
    check(mesh, dispatcher, 30, 3)
    on_first, on_second = (sorted(held_by(mesh.slots[i], LAYERS)[LAYER])[0] for i in range(2))
    x, weights, _ = batch(80, 1)
    ids = torch.full((80, 1), on_second, dtype=torch.int32)
    ids[:10] = on_first
    with pytest.raises(WireError, match="70 rows for one shard; allowed: 1 to 64"):
        dispatcher(LAYER, x, weights, ids)
    check(mesh, dispatcher, 30, 3)
    assert [server.server.stats.frames for server in mesh.servers] == [2, 2]


@pytest.mark.parametrize("wrong", [-1, EXPERTS, 2**31 - 1, -(2**31)])
def test_an_expert_that_the_placement_does_not_know_is_refused(
    make_mesh: MakeMesh, loads: LoadCounters, wrong: int
) -> None:
    mesh = make_mesh(2)
    dispatcher = mesh.dispatcher(loads=loads)
    x, weights, ids = batch(5, 3)
    ids[2, 1] = wrong
    with pytest.raises(
        WireError, match=rf"layer {LAYER}: the router chose expert {wrong}; .* experts 0 to {EXPERTS - 1}"
    ):
        dispatcher(LAYER, x, weights, ids)
    assert not loads.tokens.any()
    check(mesh, dispatcher)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also in a run that a shell has put into the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_step_that_is_interrupted_leaves_no_answer_behind(make_mesh: MakeMesh) -> None:
    """What a signal handler raises while the step waits: the late answers are not taken for the next step's."""
    mesh = make_mesh(2)
    dispatcher = mesh.dispatcher()
    check(mesh, dispatcher)
    mesh.kernel(0).gate.clear()
    mesh.kernel(0).entered.clear()

    def interrupt() -> None:
        assert mesh.kernel(0).entered.wait(10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        check(mesh, dispatcher, 40, 8)
    thread.join(10)
    mesh.kernel(0).gate.set()
    check(mesh, dispatcher, 40, 8, seed=3)


def test_links_to_shards_that_left_the_table_are_closed(make_mesh: MakeMesh) -> None:
    mesh = make_mesh(2, 2)
    mailbox = Mailbox.create()
    try:
        mailbox.publish(mesh.table(1))
        dispatcher = mesh.dispatcher(TableFile(mailbox.table_path))
        check(mesh, dispatcher, 40, 8)
        mailbox.publish(mesh.table(2, ready=[1]))
        check(mesh, dispatcher, 40, 8)
        eventually(lambda: mesh.servers[0].server.stats.connections == 0, "the link is closed")
        assert mesh.servers[1].server.stats.connections == 1
    finally:
        mailbox.close()


def test_loads_are_counted_once_however_often_pairs_are_sent(make_mesh: MakeMesh, loads: LoadCounters) -> None:
    mesh = make_mesh(3, 2)
    dispatcher = mesh.dispatcher(loads=loads, frame_deadline_s=0.2)
    want = np.zeros((len(LAYERS), EXPERTS), dtype=np.int64)

    def step(seed: int, layer: int) -> None:
        check(mesh, dispatcher, 33, 5, seed=seed, layer=layer)
        want[LAYERS.index(layer)] += np.bincount(batch(33, 5, seed=seed)[2].flatten(), minlength=EXPERTS)

    step(1, LAYERS[0])
    mesh.kernel(2).gate.clear()
    step(2, LAYERS[1])  # times out on one
    mesh.kernel(2).gate.set()
    mesh.kernel(0).held[LAYERS[0]].clear()
    forget_failures(dispatcher)
    step(3, LAYERS[0])  # is refused by one
    mesh.servers[1].stop()
    mesh.kernel(0).held[LAYERS[0]].update(range(EXPERTS))
    forget_failures(dispatcher)
    step(4, LAYERS[0])  # loses one
    assert loads.tokens.tolist() == want.tolist()
    assert loads.as_dict()["dispatches"] == 4
    assert loads.as_dict()["retries"] >= 3


# -- shards that misbehave ----------------------------------------------------------------------------------------


@contextmanager
def rogue(answer: Callable[[Header, socket.socket], None]) -> Iterator[Target]:
    """A shard with the secret that answers frames as it likes, one connection after the other."""
    listener, address = listen(Address("unix", f"test-rogue-{uuid.uuid4()}"))
    target = Target("rogue", NODE, (str(address),))

    def serve() -> None:
        while True:
            try:
                sock = accepted(listener)
            except OSError:
                return
            with sock:
                sock.settimeout(10)
                try:
                    challenge(sock, SECRET, Peer("rogue", REVISION, WIDTH, "float32"))
                    while True:
                        header = parse_header(receive_exactly(sock, HEADER_BYTES), Limits())
                        receive_exactly(sock, header.body_bytes)
                        answer(header, sock)
                except (OSError, WireError):
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield target
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        listener.close()
        assert not thread.is_alive()


def combine(header: Header, **changes: Any) -> bytes:
    """An answer of zeros to `header`, with some of its fields changed."""
    fields = {
        "kind": Kind.COMBINE, "dtype": header.dtype, "layer": header.layer, "rows": header.rows, "pairs": 0,
        "width": header.width, "epoch": 1, "frame": header.frame,
    }  # fmt: skip
    answer = Header(**{**fields, **changes})
    return answer.pack() + bytes(answer.body_bytes)


ANSWERS: dict[str, Callable[[Header], bytes]] = {
    "garbage": lambda h: b"HTTP/1.1 200 OK\r\n\r\n" * 10,
    "too few rows": lambda h: combine(h, rows=h.rows - 1),
    "too many rows": lambda h: combine(h, rows=h.rows + 1),
    "another width": lambda h: combine(h, width=h.width // 2),
    "the same bytes in another shape": lambda h: combine(h, rows=h.rows // 2, width=h.width * 2),
    "another dtype": lambda h: combine(h, dtype=2, width=h.width * 2),
    "a dispatch frame": lambda h: combine(h, kind=Kind.DISPATCH, pairs=1),
    "an answer without end": lambda h: combine(h)[:-1],
    "an oversized header": lambda h: Header(Kind.COMBINE, 1, LAYER, 60_000, 0, 60_000, 1, h.frame).pack(),
}


@pytest.mark.parametrize("kind", sorted(ANSWERS))
def test_an_answer_that_does_not_fit_is_never_added(kind: str) -> None:
    experts = ReferenceExperts()
    honest = RunningServer(TorchKernel(experts, {layer: set(range(EXPERTS)) for layer in LAYERS}))
    x, weights, ids = batch(20, 8)
    asked = []

    def answer(header: Header, sock: socket.socket) -> None:
        asked.append(header.frame)
        sock.sendall(ANSWERS[kind](header))

    try:
        with rogue(answer) as target, dispatching(honest.target, target, frame_deadline_s=0.3) as dispatcher:
            y = dispatcher(LAYER, x, weights, ids)
            assert asked, "the rogue was not even asked"
            assert torch.equal(y, experts.dense(LAYER, x, weights, ids))
    finally:
        honest.stop()


def test_a_shard_that_breaks_off_and_one_that_can_not_be_reached_in_one_step() -> None:
    """Of the three copies of each expert the third is left: no pair may be forgotten on the way."""
    experts = ReferenceExperts()
    honest = RunningServer(TorchKernel(experts, {layer: set(range(EXPERTS)) for layer in LAYERS}))
    x, weights, ids = batch(20, 8)
    gone = threading.Event()

    def go(header: Header, sock: socket.socket) -> None:
        sock.shutdown(socket.SHUT_RDWR)
        gone.set()

    silent, address = listen(Address("unix", f"test-silent-{uuid.uuid4()}"))  # the step stays there for 0.3 s
    try:
        with (
            silent,
            rogue(go) as first,
            dispatching(
                first, Target("silent", NODE, (str(address),)), honest.target, connect_timeout_s=0.3
            ) as dispatcher,
        ):
            y = dispatcher(LAYER, x, weights, ids)
            assert gone.is_set()
            assert torch.equal(y, experts.dense(LAYER, x, weights, ids))
    finally:
        honest.stop()


def test_answers_to_frames_that_nobody_waits_for_are_dropped() -> None:
    """Late answers, small and large, before, between and behind the awaited one."""

    def answer(header: Header, sock: socket.socket) -> None:
        y = torch.full((header.rows, header.width), 2.0)
        right = b"".join(bytes(part) for part in combine_parts(header, y, 1))
        stale = combine(header, frame=10**9), combine(header, frame=10**9 + 1, rows=50)
        error = Header(Kind.ERROR, 0, LAYER, 3, 1, 0, 1, 10**9 + 2).pack() + b"bad"
        sock.sendall(stale[0] + error + stale[1] + right + stale[1] + error)

    with rogue(answer) as target, dispatching(target) as dispatcher:
        for tokens in (20, 1, 60, 20):
            y = dispatcher(LAYER, *batch(tokens, 2))
            assert torch.equal(y, torch.full((tokens, WIDTH), 2.0))


def test_a_shard_that_drips_does_not_outlive_its_deadline() -> None:
    """Bytes keep coming, one at a time: the deadline is for the whole answer."""
    experts = ReferenceExperts()
    honest = RunningServer(TorchKernel(experts, {layer: set(range(EXPERTS)) for layer in LAYERS}))
    x, weights, ids = batch(100, 8)

    def answer(header: Header, sock: socket.socket) -> None:
        for byte in combine(header):
            sock.sendall(bytes([byte]))
            soon = time.perf_counter() + 2e-4
            while time.perf_counter() < soon:  # a sleep could take longer and leave the dispatcher a quiet moment
                pass

    try:
        with rogue(answer) as target, dispatching(honest.target, target, frame_deadline_s=0.2) as dispatcher:
            begin = time.monotonic()
            y = dispatcher(LAYER, x, weights, ids)
            assert time.monotonic() - begin < 2  # 6,448 bytes take 1.3 s at the least, and are wrong
            assert torch.equal(y, experts.dense(LAYER, x, weights, ids))
    finally:
        honest.stop()
