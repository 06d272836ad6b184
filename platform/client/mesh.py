"""The admin API, sync and async: the two differ in nothing but the awaiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal, TypeVar

from openai import AsyncOpenAI, OpenAI
from pydantic import TypeAdapter

from expertmesh.errors import Unavailable
from expertmesh.platform.client._events import AsyncEventStream, EventStream, Following
from expertmesh.platform.client._exchange import Route
from expertmesh.platform.client._models import Heat, History, Loads, MeshEvent, MeshStatus, Placement, Plan, Wanted

_T = TypeVar("_T")

Number = int | Literal["auto"]
RouteName = Literal["status", "placement", "loads", "heat", "history"]

_STATUS = Route("status", TypeAdapter(MeshStatus))
_PLACEMENT = Route("placement", TypeAdapter(Placement))
_LOADS = Route("loads", TypeAdapter(Loads))
_PLAN = Route("placement/plan", TypeAdapter(Plan))
_APPLY = Route("placement/apply", TypeAdapter(Plan))
_FREEZE = Route("placement/freeze", TypeAdapter(dict[str, bool]))
_SCALE = Route("scale", TypeAdapter(Wanted))
_HEAT = Route("heat", TypeAdapter(Heat))
_HISTORY = Route("history", TypeAdapter(History))
_EVENTS = Route("events", TypeAdapter(MeshEvent))
_ANY_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])


class Mesh:
    """The admin API, over an OpenAI client's connections, key, timeout and retries.

    Every method raises Unavailable if the mesh can't be reached or its controller is away, and ExpertMeshError if
    what answers is no ExpertMesh ingress or refuses the key.
    """

    def __init__(self, client: OpenAI) -> None:
        self._client = client

    def status(self) -> MeshStatus:
        """Health, replicas, shards, and the placement in figures."""
        return self._ask(_STATUS)

    def placement(self) -> Placement:
        """Which physical experts are where."""
        return self._ask(_PLACEMENT)

    def loads(self) -> Loads:
        """Tokens dispatched to each expert."""
        return self._ask(_LOADS)

    def heat(self) -> Heat:
        """What each expert has to do now."""
        return self._ask(_HEAT)

    def history(self, after: float = 0.0) -> History:
        """The mesh's figures over the last 10 minutes, or from `after` (seconds since 1970) on."""
        return self._ask(_HISTORY, {"after": after})

    def events(
        self, after: int | None = None, *, follow: bool = True, patience_s: float | None = None
    ) -> Iterator[MeshEvent]:
        """What happens in the mesh, each event once: those that are kept and younger than `after`, then, unless
        `follow` is false, each as it comes.

        It asks again by itself when the connection breaks or the controller is away; events that are forgotten
        meanwhile (the newest 1,000 are kept, by the controller in office) are missed. It goes on until the caller
        stops. Raises Unavailable if the mesh can't be reached at first, or for `patience_s` seconds later on; None
        waits for ever.
        """
        following = Following(after, patience_s, follow=follow)
        while True:
            failure: Unavailable | None = None
            try:
                with _EVENTS.asked_at(self._client.base_url) as url:
                    options = following.options(self._client.timeout)
                    stream = self._client.get(url, cast_to=str, options=options, stream=True, stream_cls=EventStream)
                    with stream:
                        following.answered(url, stream.response.headers.get("content-type", ""))
                        for data in stream:
                            yield following.take(_EVENTS.read(data))
            except Unavailable as error:
                failure = error
            if failure is None and not follow:
                return
            time.sleep(following.delay_s(failure))

    def plan(self) -> Plan:
        """The moves of experts that would pay now; nothing is carried out."""
        return self._ask(_PLAN)

    def apply(self) -> Plan:
        """Plans now and begins to carry it out. Raises ExpertMeshError while another plan is being carried out."""
        return self._tell(_APPLY)

    def freeze(self, frozen: bool = True) -> None:
        """Stops re-placement by itself, or starts it again."""
        self._tell(_FREEZE, {"frozen": frozen})

    def scale(self, attention: Number | None = None, experts: Number | None = None) -> Wanted:
        """Sets how many replicas there are to be, "auto" for autoscaling or the configuration; None changes nothing.

        Returns at once: `status` shows who has come and gone. Raises ExpertMeshError for a number that can't be.
        """
        return self._tell(_SCALE, {"attention": attention, "experts": experts})

    def raw(self, route: RouteName) -> dict[str, Any]:
        """The JSON as the mesh sent it, with fields that this version doesn't know."""
        return self._ask(Route(route, _ANY_OBJECT))

    def _ask(self, route: Route[_T], query: Mapping[str, object] | None = None) -> _T:
        with route.asked_at(self._client.base_url) as url:
            return route.read(self._client.get(url, cast_to=str, options={"params": query or {}}))

    def _tell(self, route: Route[_T], body: Mapping[str, object] | None = None) -> _T:
        with route.asked_at(self._client.base_url) as url:
            return route.read(self._client.post(url, cast_to=str, body=body))


class AsyncMesh:
    """`Mesh` for asyncio."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client

    async def status(self) -> MeshStatus:
        """Health, replicas, shards, and the placement in figures."""
        return await self._ask(_STATUS)

    async def placement(self) -> Placement:
        """Which physical experts are where."""
        return await self._ask(_PLACEMENT)

    async def loads(self) -> Loads:
        """Tokens dispatched to each expert."""
        return await self._ask(_LOADS)

    async def heat(self) -> Heat:
        """What each expert has to do now."""
        return await self._ask(_HEAT)

    async def history(self, after: float = 0.0) -> History:
        """The mesh's figures over the last 10 minutes, or from `after` (seconds since 1970) on."""
        return await self._ask(_HISTORY, {"after": after})

    async def events(
        self, after: int | None = None, *, follow: bool = True, patience_s: float | None = None
    ) -> AsyncIterator[MeshEvent]:
        """What happens in the mesh, each event once: those that are kept and younger than `after`, then, unless
        `follow` is false, each as it comes.

        It asks again by itself when the connection breaks or the controller is away; events that are forgotten
        meanwhile (the newest 1,000 are kept, by the controller in office) are missed. It goes on until the caller
        stops. Raises Unavailable if the mesh can't be reached at first, or for `patience_s` seconds later on; None
        waits for ever.
        """
        following = Following(after, patience_s, follow=follow)
        while True:
            failure: Unavailable | None = None
            try:
                with _EVENTS.asked_at(self._client.base_url) as url:
                    options = following.options(self._client.timeout)
                    stream = await self._client.get(
                        url, cast_to=str, options=options, stream=True, stream_cls=AsyncEventStream
                    )
                    async with stream:
                        following.answered(url, stream.response.headers.get("content-type", ""))
                        async for data in stream:
                            yield following.take(_EVENTS.read(data))
            except Unavailable as error:
                failure = error
            if failure is None and not follow:
                return
            await asyncio.sleep(following.delay_s(failure))

    async def plan(self) -> Plan:
        """The moves of experts that would pay now; nothing is carried out."""
        return await self._ask(_PLAN)

    async def apply(self) -> Plan:
        """Plans now and begins to carry it out. Raises ExpertMeshError while another plan is being carried out."""
        return await self._tell(_APPLY)

    async def freeze(self, frozen: bool = True) -> None:
        """Stops re-placement by itself, or starts it again."""
        await self._tell(_FREEZE, {"frozen": frozen})

    async def scale(self, attention: Number | None = None, experts: Number | None = None) -> Wanted:
        """Sets how many replicas there are to be, "auto" for autoscaling or the configuration; None changes nothing.

        Returns at once: `status` shows who has come and gone. Raises ExpertMeshError for a number that can't be.
        """
        return await self._tell(_SCALE, {"attention": attention, "experts": experts})

    async def raw(self, route: RouteName) -> dict[str, Any]:
        """The JSON as the mesh sent it, with fields that this version doesn't know."""
        return await self._ask(Route(route, _ANY_OBJECT))

    async def _ask(self, route: Route[_T], query: Mapping[str, object] | None = None) -> _T:
        with route.asked_at(self._client.base_url) as url:
            return route.read(await self._client.get(url, cast_to=str, options={"params": query or {}}))

    async def _tell(self, route: Route[_T], body: Mapping[str, object] | None = None) -> _T:
        with route.asked_at(self._client.base_url) as url:
            return route.read(await self._client.post(url, cast_to=str, body=body))
