"""The document tells of every route, and of what each may answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx
import pytest

from expertmesh import __version__

if TYPE_CHECKING:
    from fastapi import FastAPI

PAGES = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}


def test_it_tells_of_every_route(front: tuple[str, FastAPI]) -> None:
    url, app = front
    document = httpx.get(f"{url}/openapi.json", timeout=60).json()
    assert document["info"]["title"] == "ExpertMesh"
    assert document["info"]["version"] == __version__
    served = {
        (route.path, method.lower())  # type: ignore[attr-defined]
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
        if method != "HEAD"
    }
    told = {(path, method) for path, methods in document["paths"].items() for method in methods}
    assert {(path, method) for path, method in served if path not in PAGES} == told


def test_every_refusal_has_openais_shape_and_none_is_forgotten(front: tuple[str, FastAPI]) -> None:
    paths = front[1].openapi()["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            answers = operation["responses"]
            assert "200" in answers, path
            assert "422" not in answers, f"{method} {path}: vLLM answers what does not validate with 400"
            for code, answer in answers.items():
                if not code.startswith("2"):
                    assert "Error" in str(answer["content"]["application/json"]["schema"]), (path, code)
    assert {"400", "401", "403", "404", "413", "429", "431", "503"} <= set(
        paths["/v1/completions"]["post"]["responses"]
    )
    assert "Retry-After" in paths["/v1/completions"]["post"]["responses"]["503"]["headers"]
    assert set(paths["/mesh/status"]["get"]["responses"]) == {"200", "401", "403", "429", "431", "503"}
    assert "409" in paths["/mesh/scale"]["post"]["responses"]
    assert "401" not in paths["/health"]["get"]["responses"]


@pytest.mark.parametrize("path", ["/mesh/status", "/mesh/placement", "/mesh/placement/plan", "/mesh/loads"])
def test_answers_of_the_mesh_have_a_model(front: tuple[str, FastAPI], path: str) -> None:
    operation = front[1].openapi()["paths"][path]["get"]
    assert "$ref" in operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert operation["summary"]
    assert operation["description"]
