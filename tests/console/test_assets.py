"""The page's files: made from their sources, and served without a key where its data is not."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from expertmesh.platform.access import ADMIN
from expertmesh.platform.console import assets
from tests.access.test_keys import make, write
from tests.console.scripted import ScriptedMesh, scripted

CONSOLE = Path(__file__).parents[2] / "platform" / "console"
SOURCES, BUILT = CONSOLE / "web", CONSOLE / "static"
PATHS = ["/console", "/console/app.css", "/console/app.js", "/console/icon.svg"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_what_is_installed_was_built_from_the_sources() -> None:
    """If it fails: `npm ci && npm run build` in platform/console/web."""
    noted = json.loads((BUILT / "build.json").read_text())
    files = (path for path in SOURCES.rglob("*") if path.is_file() and "node_modules" not in path.parts)
    names = sorted(path.relative_to(SOURCES).as_posix() for path in files)
    lines = (f"{name} {sha256((SOURCES / name).read_bytes())}\n" for name in names)
    assert sha256("".join(lines).encode()) == noted["sources"]
    assert {name: sha256((BUILT / name).read_bytes()) for name in noted["built"]} == noted["built"]
    assert set(noted["built"]) == {asset.name for asset in assets()}


def test_the_page_names_nothing_elsewhere() -> None:
    text = "".join(asset.content.decode() for asset in assets() if asset.name != "icon.svg")
    assert not re.findall(r"""(?:src|href|url|fetch|import)\s*[=(]?\s*["'`(]\s*(?:https?:)?//""", text)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a mesh that asks for keys."""
    keys = write(tmp_path_factory.mktemp("keys") / "keys.json", make("admin", scopes=[ADMIN])[1])
    with scripted(ScriptedMesh(2, 4, 2), keys_file=keys) as url:
        yield url


@pytest.mark.parametrize("path", PATHS)
def test_files_need_no_key_and_are_walled_in(url: str, path: str) -> None:
    answer = httpx.get(url + path)
    assert answer.status_code == 200
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-cache"
    again = httpx.get(url + path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert httpx.head(url + path).headers["etag"] == answer.headers["etag"]


def test_files_are_sent_small_to_those_who_can_read_them(url: str) -> None:
    with httpx.stream("GET", f"{url}/console/app.js", headers={"Accept-Encoding": "gzip"}) as answer:
        small = b"".join(answer.iter_raw())
    whole = httpx.get(f"{url}/console/app.js", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in whole.headers
    assert gzip.decompress(small) == whole.content
    assert len(small) < len(whole.content) / 2


@pytest.mark.parametrize("route", ["status", "placement", "loads", "heat", "history", "events"])
def test_the_data_needs_one(url: str, route: str) -> None:
    assert httpx.get(f"{url}/mesh/{route}").status_code == 401


@pytest.mark.parametrize("path", ["/console/x", "/console/app.js/..", "/console/../mesh/status", "/Console"])
def test_nothing_else_is_there_without_one(url: str, path: str) -> None:
    connection = HTTPConnection(urlsplit(url).netloc, timeout=60)  # unlike httpx it sends paths as they are
    connection.request("GET", path)
    assert connection.getresponse().status == 401
    connection.close()


def test_a_slash_at_the_end_leads_to_the_page(url: str) -> None:
    assert httpx.get(f"{url}/console/", follow_redirects=True).url.path == "/console"
