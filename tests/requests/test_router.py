"""Our Serve router over real replicas: where requests go, and that none of them ever waits for nothing."""

from __future__ import annotations

import inspect
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
from ray.serve._private.request_router.request_router import RequestRouter

from benchmarks.bare import Worker
from tests.requests.serve_host import BLOCK, ROOM, ServeHost

pytestmark = pytest.mark.mesh

LONG_S = 400
_names = count()
_prompts = count(1)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    secret = tmp_path_factory.mktemp("router") / "secret"
    secret.touch(mode=0o600)
    secret.write_text("a secret of the cluster")
    with Worker(ServeHost, 2, str(secret)) as worker:
        yield worker


def prompt(blocks: int = 10) -> range:
    """A prompt that nobody has seen before."""
    begin = next(_prompts) * 10_000
    return range(begin, begin + blocks * BLOCK)


class Sent:
    """A request under way."""

    def __init__(self, host: Worker, tokens: range) -> None:
        self.name = f"r{next(_names)}"
        self._host = host
        host.ask("send", self.name, tokens)

    def where(self, timeout_s: float = LONG_S) -> str | None:
        found = self._host.ask("where", self.name, timeout_s)
        return None if found is None else str(found[0])

    def pid(self) -> int:
        return int(self._host.ask("where", self.name, LONG_S)[1])

    def end(self) -> str:
        (found,) = self._host.ask("end", self.name)
        return str(found[0])


def once(host: Worker, tokens: range) -> str:
    """The replica that a request which is alone goes to."""
    return Sent(host, tokens).end()


def settled(host: Worker, tokens: range) -> str:
    """The one replica that holds the prompt, once the router knows that it does and that nobody is busy."""
    home = once(host, tokens)
    eventually(lambda: host.ask("held", tokens)[home] == len(tokens) // BLOCK and host.ask("in_flight") == 0)
    return home


def eventually(check: Callable[[], bool]) -> None:
    """Returns when `check` comes true; fails if it never does."""
    deadline = time.monotonic() + LONG_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_prompt_goes_where_its_prefix_is(host: Worker) -> None:
    prompts = [prompt() for _ in range(6)]
    homes = [settled(host, tokens) for tokens in prompts]
    assert len(set(homes)) == 2, "new prompts go where less is held"
    for _ in range(2):
        for tokens, home in zip(prompts, homes, strict=True):
            longer = range(tokens.start, tokens.stop + 3 * BLOCK)
            assert once(host, longer) == home


def test_it_tells_what_it_decides_about_requests_that_are_watched(host: Worker) -> None:
    tokens = prompt()
    home = settled(host, tokens)
    host.ask("watch", "watched")
    host.ask("watch", "another")
    host.ask("send", "watched", range(tokens.start, tokens.stop + 3 * BLOCK))
    assert host.ask("end", "watched")[0][0] == home
    assert host.ask("choice", "watched") == (home, 13, 10, 2)
    assert host.ask("choice", "another") == ("", 0, 0, 0)


def test_a_hot_prefix_spreads(host: Worker) -> None:
    hot = prompt()
    settled(host, hot)
    sent = [Sent(host, hot) for _ in range(2 * ROOM)]
    places = [request.where() for request in sent]
    assert {places.count(place) for place in places} == {ROOM}
    for request in sent:
        request.end()


def test_a_full_replica_passes_requests_on_and_a_full_mesh_makes_them_wait_their_turn(host: Worker) -> None:
    tokens = prompt(400)  # so much that no backlog outweighs it
    home = settled(host, tokens)
    at_home = [Sent(host, tokens) for _ in range(ROOM)]
    assert {request.where() for request in at_home} == {home}
    elsewhere = [Sent(host, tokens) for _ in range(ROOM)]
    (other,) = {request.where() for request in elsewhere}
    assert other not in (home, None)
    first, second = Sent(host, tokens), Sent(host, tokens)
    assert first.where(1) is None
    at_home.pop().end()
    assert first.where() == home
    assert second.where(1) is None
    elsewhere.pop().end()
    assert second.where() == other
    for request in (*at_home, *elsewhere, first, second):
        request.end()


def test_a_broken_stream_leaves_the_load(host: Worker) -> None:
    tokens = prompt(400)
    home = settled(host, tokens)
    busy = Sent(host, tokens)
    assert busy.where() == home, "the prefix outweighs the load"
    host.ask("open", f"end feed of {home}")
    eventually(lambda: host.ask("held", tokens)[home] == 0)
    again = Sent(host, tokens)
    assert again.where() != home, "nothing but the load counts"
    others = [Sent(host, tokens) for _ in range(2 * ROOM - 2)]
    assert [request.where() for request in others].count(home) == ROOM - 1, "and it is not left out"
    for request in (busy, again, *others):
        request.end()


def test_a_dead_replica_costs_nobody_else_and_a_new_one_gets_traffic_at_once(host: Worker) -> None:
    tokens = prompt()
    sent = Sent(host, tokens)
    dead = sent.where()
    os.kill(sent.pid(), signal.SIGKILL)
    (survivor,) = {once(host, prompt()) for _ in range(4)} | {once(host, tokens) for _ in range(2)}
    assert survivor != dead
    with pytest.raises(RuntimeError, match="ActorDiedError"):
        sent.end()
    busy = [Sent(host, tokens) for _ in range(ROOM)]
    assert {request.where() for request in busy} == {survivor}
    waiting = Sent(host, tokens)
    assert waiting.where(LONG_S) not in (survivor, None), "Serve's replacement"
    for request in (*busy, waiting):
        request.end()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_choose_replica_for_request", ["self", "pending_request", "is_retry"]),
        ("_probe_queue_lens", ["self", "replicas", "backoff_index"]),
        ("_compute_backoff_s", ["self", "attempt"]),
        ("_record_queue_wait_time", ["self", "pending_request"]),
        ("choose_replicas", ["self", "candidate_replicas", "pending_request"]),
        ("update_replicas", ["self", "replicas"]),
        ("on_replica_actor_died", ["self", "replica_id"]),
        ("on_request_completed", ["self", "replica_id", "internal_request_id"]),
        ("decrement_queue_len_cache", ["self", "replica_id"]),
    ],
)
def test_what_we_need_of_serves_router_is_there(name: str, parameters: list[str]) -> None:
    assert list(inspect.signature(getattr(RequestRouter, name)).parameters) == parameters
