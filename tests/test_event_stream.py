"""GET /mesh/events, /mesh/heat and /mesh/history over real HTTP, read by httpx and by the SDK."""

from __future__ import annotations

import asyncio
import json
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI

from expertmesh import AsyncClient, Client, ExpertMeshError
from expertmesh.errors import Unavailable
from expertmesh.platform.client import MeshEvent
from expertmesh.platform.client._events import Following
from expertmesh.platform.config import load_config
from tests.support.key_values import Memory
from tests.support.serving import served
from tests.test_client import Ingress, attention_report, shard_report, write_checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    from ray.serve.handle import DeploymentHandle

    from expertmesh.deployments.controller.controller import Controller
    from expertmesh.deployments.controller.events import first_event
    from expertmesh.deployments.ingress.event_stream import event_routes
    from expertmesh.deployments.messages import JoinRequest

START = ["office", "shard_joined", "shard_serving", "epoch", "shard_joined", "shard_serving", "epoch", "experts_whole"]
START += ["replica_joined", "replica_ready"]


def controller(folder: Path, store: Memory) -> Controller:
    """Of two shards and one attention replica, all serving."""
    made = Controller(load_config({"model": folder, "experts": {"shards": 2, "heartbeat_timeout_s": 600}}), store)

    async def fill() -> None:
        for index in range(2):
            lease = await made.join(JoinRequest(f"shard-{index}", "node"))
            assert lease is not None
            await made.heartbeat(shard_report(index, lease.slots))
        await made.report(attention_report())

    asyncio.run(fill())
    return made


@contextmanager
def ingress(first: Controller | None, heartbeat_s: float = 60.0, life_s: float = 600.0) -> Iterator[Ingress]:
    """The admin routes with streams of this pace."""
    made = Ingress(first)  # type: ignore[arg-type]
    made.app.include_router(event_routes(cast("DeploymentHandle[Any]", made), heartbeat_s, life_s))
    with served(made.app) as made.url:
        yield made


@pytest.fixture
def store() -> Memory:
    return Memory()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "tiny")


@pytest.fixture
def first(folder: Path, store: Memory) -> Controller:
    return controller(folder, store)


def fields(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """The messages of a stream of server-sent events, by the standard's rules as far as they are used here."""
    message: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        if line:
            message[name] = value.strip()
        else:
            yield message
            message = {}


def kinds(events: list[dict[str, Any]]) -> list[str]:
    return [event["kind"] for event in events]


def test_a_stream_begins_with_what_is_kept_and_goes_on(first: Controller, store: Memory) -> None:
    with ingress(first) as mesh, httpx.Client(base_url=mesh.url, timeout=60) as http:
        stream = http.stream("GET", "/mesh/events")
        with stream as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-store"
            messages = fields(answer.iter_lines())
            assert "retry" in next(messages)
            told = [next(messages) for _ in START]
            events = [json.loads(message["data"]) for message in told]
            assert kinds(events) == START
            assert [int(message["id"]) for message in told] == [event["id"] for event in events]
            http.post("/mesh/placement/freeze", json={"frozen": True})
            frozen = json.loads(next(messages)["data"])
            assert (frozen["kind"], frozen["about"]) == ("freeze", {"frozen": 1})
            http.post("/mesh/scale", json={"experts": 1})
            assert json.loads(next(messages)["data"])["about"]["by"] == "hand"


def test_a_reader_says_what_it_has_seen(first: Controller) -> None:
    with ingress(first, heartbeat_s=0.01) as mesh, httpx.Client(base_url=mesh.url) as http:
        seen = first_event(1) + 8

        def oldest(**asked: Any) -> int:
            with http.stream("GET", "/mesh/events", timeout=60, **asked) as answer:
                messages = fields(answer.iter_lines())
                return int(next(m["id"] for m in messages if "id" in m))

        assert oldest(params={"after": seen}) == seen + 1
        assert oldest(headers={"Last-Event-ID": str(seen)}) == seen + 1
        assert oldest(params={"after": 0}, headers={"Last-Event-ID": str(seen)}) == seen + 1, "the header is newer"
        assert oldest(params={"after": first_event(9)}) == first_event(1) + 1, "of another mesh"
        for wrong in ({"params": {"after": "x"}}, {"params": {"after": -1}}, {"headers": {"Last-Event-ID": "x"}}):
            assert http.get("/mesh/events", **wrong).status_code == 422


def test_heartbeats_and_a_clean_end_when_the_controller_goes(first: Controller) -> None:
    with ingress(first, heartbeat_s=0.01) as mesh:
        after = {"after": first_event(1) + len(START)}
        with httpx.stream("GET", f"{mesh.url}/mesh/events", params=after, timeout=60) as answer:
            lines = answer.iter_lines()
            assert next(line for line in lines if line.startswith(":")) == ": still here"
            mesh.controller = None
            assert not [line for line in lines if line.startswith("data")]
        gone = httpx.get(f"{mesh.url}/mesh/events", timeout=60)
        assert (gone.status_code, gone.headers["retry-after"]) == (503, "2")


def test_a_reader_of_a_later_term_ends_a_controller_that_is_not_in_office_any_more(
    first: Controller, folder: Path, store: Memory
) -> None:
    with ingress(first) as mesh, httpx.Client(base_url=mesh.url, timeout=60) as http:
        controller(folder, store)
        assert http.get("/mesh/events", params={"after": first_event(2) + 1}).status_code == 503


async def test_waiting_for_events_ends_without_one(folder: Path, store: Memory) -> None:
    made = Controller(load_config({"model": folder}), store)
    (office,) = await made.events(0, 0.0)
    assert office["kind"] == "office"
    assert await made.events(office["id"], 0.0) == []
    waiting = asyncio.create_task(made.events(office["id"], 600.0))
    await asyncio.sleep(0)
    await made.freeze(True)
    assert kinds(await waiting) == ["freeze"]


async def test_heat_and_history_are_what_the_controller_says(first: Controller) -> None:
    first._history.take(first._members, 1.0)
    with ingress(first) as mesh:
        with Client(base_url=mesh.url) as client:
            heat, history = client.mesh.heat(), client.mesh.history()
            assert (heat.layers, heat.experts, heat.rows_a_second) == ([0, 1], 4, [[0.0] * 4] * 2)
            assert heat.hottest(3) == []
            assert [sample.attention for sample in history.samples] == [1]
            assert history.model_dump(mode="json") == await first.history(0.0)
            assert set(history.shards) == {"shard-0", "shard-1"}
            assert client.mesh.history(after=history.samples[-1].at).samples == []
            assert client.mesh.raw("heat") == await first.heat()
        async with AsyncClient(base_url=mesh.url) as client:
            assert (await client.mesh.heat(), await client.mesh.history()) == (heat, history)
        assert httpx.get(f"{mesh.url}/mesh/history", params={"after": "nan"}).status_code == 422


# --- the SDK follows ---


@pytest.fixture(params=["sync", "async"])
def follow(request: pytest.FixtureRequest) -> Any:
    """The events of a mesh by one of the two clients, as an async iterator."""

    async def by_client(url: str, **options: Any) -> AsyncIterator[MeshEvent]:
        with Client(base_url=url, timeout=20) as client:
            events = client.mesh.events(**options)
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event

    async def by_async_client(url: str, **options: Any) -> AsyncIterator[MeshEvent]:
        async with AsyncClient(base_url=url, timeout=20) as client:
            async for event in client.mesh.events(**options):
                yield event

    return by_client if request.param == "sync" else by_async_client


async def test_each_event_once_although_every_stream_ends_at_once(follow: Any, first: Controller) -> None:
    with ingress(first, heartbeat_s=0.01, life_s=0.0) as mesh:
        async with aclosing(follow(mesh.url)) as events:
            told = [await anext(events) for _ in START]
            assert [event.kind for event in told] == START
            async with httpx.AsyncClient(base_url=mesh.url) as http:
                for frozen in (True, False):
                    await http.post("/mesh/placement/freeze", json={"frozen": frozen})
            assert [(await anext(events)).about for _ in range(2)] == [{"frozen": 1}, {"frozen": 0}]
        async with aclosing(follow(mesh.url, after=told[-1].id)) as events:
            assert (await anext(events)).kind == "freeze"


async def test_it_goes_on_with_the_next_controller(follow: Any, first: Controller, folder: Path, store: Memory) -> None:
    with ingress(first, heartbeat_s=0.01) as mesh:
        async with aclosing(follow(mesh.url)) as events:
            told = [await anext(events) for _ in START]
            mesh.controller = None
            waiting = asyncio.ensure_future(anext(events))
            while [path for path, _ in mesh.seen].count("/mesh/events") < 3:  # asked in vain
                await asyncio.sleep(0.01)
            assert not waiting.done()
            mesh.controller = await asyncio.to_thread(controller, folder, store)
            told += [await waiting] + [await anext(events) for _ in START[1:]]
        assert [event.kind for event in told] == START * 2
        assert [event.id for event in told] == sorted({event.id for event in told})


async def test_who_was_never_there_is_not_waited_for(follow: Any) -> None:
    with ingress(None) as mesh, pytest.raises(Unavailable, match="503"):
        await anext(follow(mesh.url))
    with pytest.raises(Unavailable, match="can't be reached"):
        await anext(follow(mesh.url))


async def test_patience_ends(follow: Any, first: Controller) -> None:
    with ingress(first, heartbeat_s=0.01) as mesh:
        async with aclosing(follow(mesh.url, patience_s=0.0)) as events:
            for _ in START:
                await anext(events)
            mesh.controller = None
            with pytest.raises(Unavailable, match="503"):
                await anext(events)


async def test_what_answers_something_else_is_no_ingress(follow: Any) -> None:
    app = FastAPI()
    app.get("/mesh/events")(lambda: "hello")
    with served(app) as url, pytest.raises(ExpertMeshError, match="application/json instead of events"):
        await anext(follow(url))


def test_waits_grow_while_the_mesh_is_away_and_end_with_patience() -> None:
    now, away = [0.0], Unavailable("away")
    following = Following(None, 10.0, lambda: now[0])
    with pytest.raises(Unavailable):
        following.delay_s(away)
    following.answered("url", "text/event-stream; charset=utf-8")
    delays = [following.delay_s(away) for _ in range(7)]
    assert delays == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    following.answered("url", "text/event-stream")
    assert following.delay_s(None) == following.delay_s(away) == 0.25
    now[0] = 10.0
    with pytest.raises(Unavailable):
        following.delay_s(away)
