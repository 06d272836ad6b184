"""docs/api.md, the admin routes and the SDK say the same."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest
from fastapi import FastAPI

from expertmesh.deployments.ingress.admin import admin_routes
from expertmesh.deployments.ingress.event_stream import event_routes
from expertmesh.deployments.local import LocalMesh
from expertmesh.platform.client import MeshEvent
from expertmesh.platform.client import mesh as sdk
from expertmesh.platform.client._exchange import Route
from tests.docs.blocks import ROOT
from tests.test_client import Ingress, controller, ingress  # noqa: F401

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

STREAMED = ("GET", "/mesh/events")
PAGE = (ROOT / "docs" / "api.md").read_text()
OPENAI, _, ADMIN = PAGE.partition("## The mesh's routes")


def documented(text: str) -> list[tuple[str, str]]:
    """Method and path of each route in the tables of `text`."""
    cells = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    return [(method, path) for cell in cells for method, path in re.findall(r"`([A-Z]+) (/\S+)`", cell)]


@pytest.fixture
def routes(ingress: Ingress) -> set[tuple[str, str]]:  # noqa: F811
    """Method and path of each admin route of the application."""
    app = FastAPI()
    app.include_router(admin_routes(cast("DeploymentHandle[Any]", ingress)))
    app.include_router(event_routes(cast("DeploymentHandle[Any]", ingress)))
    paths = app.openapi()["paths"]
    return {
        (method.upper(), path) for path, methods in paths.items() for method in methods if path.startswith("/mesh/")
    }


def test_every_admin_route_is_documented(routes: set[tuple[str, str]]) -> None:
    assert set(documented(ADMIN)) == routes
    sections = re.findall(r"^### ([A-Z]+) (/\S+)$", ADMIN, re.MULTILINE)
    assert sections == documented(ADMIN)


def test_the_sdk_covers_every_admin_route(routes: set[tuple[str, str]]) -> None:
    known = {route.name for route in vars(sdk).values() if isinstance(route, Route)}
    assert {f"/mesh/{name}" for name in known} == {path for _, path in routes}
    methods = set(re.findall(r"`client\.mesh\.(\w+)\(", ADMIN))
    for client in (sdk.Mesh, sdk.AsyncMesh):
        assert methods == {name for name in vars(client) if not name.startswith("_")} - {"raw"}


def _shape(value: Any) -> Any:
    """The keys, all the way down; of a list those of its first value."""
    if isinstance(value, dict):
        return {key: _shape(inner) for key, inner in value.items() if not key.startswith("shard-")}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_shape(value[0])]
    return type(value).__name__ if isinstance(value, str | bool | list) or value is None else "number"


def test_examples_have_the_fields_that_the_routes_send(ingress: Ingress, routes: set[tuple[str, str]]) -> None:  # noqa: F811
    tried = set()
    for section in re.split(r"^### ", ADMIN, flags=re.MULTILINE)[1:]:
        method, path = section.splitlines()[0].split()
        if (method, path) == STREAMED:
            [event] = re.findall(r"^data: (.*)$", section, re.MULTILINE)
            assert set(json.loads(event)) == set(MeshEvent.model_fields)
            continue
        fences = re.findall(r"^```json( request)?\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
        bodies = [json.loads(text) for request, text in fences if request]
        [answer] = [json.loads(text) for request, text in fences if not request]
        sent = httpx.request(method, ingress.url + path, json=bodies[0] if bodies else None)
        assert sent.status_code == 200, sent.text
        assert _shape(answer) == _shape(sent.json()), path
        tried.add((method, path))
    assert tried == routes - {STREAMED}


@pytest.mark.mesh
def test_the_openai_routes_are_served(demo_mesh: LocalMesh) -> None:
    """A route that is there refuses a method that it hasn't; one that isn't there is not found."""
    found = documented(OPENAI)
    assert ("POST", "/v1/chat/completions") in found
    with httpx.Client(base_url=demo_mesh.url, timeout=60) as http:
        for _, path in [*found, *documented(ADMIN)]:
            assert http.request("PATCH", re.sub(r"\{\w+\}", "x", path)).status_code == 405, path
        assert http.request("PATCH", "/v1/nonsense").status_code == 404
