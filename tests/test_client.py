"""The client SDK and `expertmesh status`, against the controller's own JSON over HTTP on loopback."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import openai
import pytest
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import ValidationError
from safetensors.numpy import save_file
from typer.testing import CliRunner

import expertmesh
from expertmesh import AsyncClient, Client, ExpertMeshError, MeshStatus
from expertmesh.errors import ConfigError, Unavailable
from expertmesh.platform.cli import app as cli
from expertmesh.platform.client import Loads, Placement, Wanted
from expertmesh.platform.config import load_config
from expertmesh.routing.placement import Target
from expertmesh.routing.placement.static import IntArray
from tests.support.key_values import Memory
from tests.support.serving import served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # Ray uses pydantic in a way that pydantic gives up
    from ray.serve.handle import DeploymentHandle

    from expertmesh.deployments.attention.tally import Tally
    from expertmesh.deployments.controller.controller import Controller
    from expertmesh.deployments.experts.server import ServerStats
    from expertmesh.deployments.ingress.admin import admin_routes
    from expertmesh.deployments.messages import AttentionReport, JoinRequest, ShardReport

LAYERS, EXPERTS = (0, 1), 4
NODE = "c0ffee" + "5" * 50
KEY = "sk-of-a-test"
# A shell's background jobs ignore Ctrl-C, and so would their children.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
RUN = [sys.executable, "-c", CTRL_C + "from expertmesh.platform.cli import main; main()"]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("EXPERTMESH_", "OPENAI_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "160")


# --- a mesh without engines: the real controller behind the real admin routes ---


def write_checkpoint(folder: Path) -> Path:
    """Two MoE layers of four experts, with just enough of a model for the controller."""
    weight = np.zeros((8, 8), dtype=np.float32)
    stem = "model.layers.{}.mlp.experts.{}.{}_proj.weight"
    names = [stem.format(n, e, kind) for n in LAYERS for e in range(EXPERTS) for kind in ("gate", "up", "down")]
    names += [f"model.layers.{n}.mlp.gate.weight" for n in LAYERS]
    folder.mkdir(exist_ok=True)
    save_file(dict.fromkeys(names, weight), folder / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "num_hidden_layers": len(LAYERS)}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def shard_report(index: int, held: IntArray) -> ShardReport:
    stats = asdict(ServerStats(frames=9, batches=7, pairs=1234 + index, busy_s=2.5, refused=1, connections=2))
    target = Target(f"shard-{index}", NODE, (f"tcp://127.0.0.1:{9000 + index}",))
    return ShardReport(target.shard, target, held, stats={**stats, "bytes_read": 6144})


def attention_report() -> AttentionReport:
    loads = np.arange(len(LAYERS) * EXPERTS, dtype=np.int64).reshape(len(LAYERS), EXPERTS)
    loaded = {"bytes_read": 1_500_000, "tensors_read": 2, "tensors_skipped": 24, "seconds": 0.5}
    load = {"waiting": 2, "kv_use": 0.25, "ttft_s": 0.125}
    served = Tally(requests=3, prompt_tokens=90, cached_tokens=30, tokens=60, ttft_s=0.375, intervals=57, itl_s=2.5)
    dispatch = {"dispatches": 77, "retries": 3, "waits": 1}
    stats = {"dispatch": dispatch, "loaded": loaded, "load": load, "served": served.as_dict()}
    return AttentionReport("attn-0", NODE, True, 2, 5, loads, stats)


class Ingress:
    """The application that `Ingress` serves, without vLLM's routes; counts what it is asked."""

    def __init__(self, controller: Controller) -> None:
        self.controller: Controller | None = controller
        self.url = ""
        self.seen: list[tuple[str, str | None]] = []
        """Path and Authorization of each request."""
        self.failures = 0
        """How many more requests get a 503."""
        self.app = FastAPI()
        self.app.include_router(admin_routes(cast("DeploymentHandle[Any]", self)))
        self.app.middleware("http")(self._observe)
        self.app.get("/v1/models")(lambda: {"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def __getattr__(self, method: str) -> Any:
        """`.method.remote()` as of a Serve handle, which is all that the admin routes know of it."""
        return SimpleNamespace(remote=getattr(self.controller, method))

    async def _observe(self, request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        self.seen.append((request.url.path, request.headers.get("authorization")))
        if self.failures:
            self.failures -= 1
            return Response(status_code=503, headers={"Retry-After": "0.01"})
        return await answer(request)


@pytest.fixture
def controller(tmp_path: Path) -> Controller:
    """Of two shards and one attention replica, all serving."""
    model = write_checkpoint(tmp_path / "tiny")
    controller = Controller(
        load_config({"model": model, "experts": {"shards": 2, "heartbeat_timeout_s": 600}}), Memory()
    )

    async def fill() -> None:
        for index in range(2):
            lease = await controller.join(JoinRequest(f"shard-{index}", NODE))
            assert lease is not None
            await controller.heartbeat(shard_report(index, lease.slots))
        await controller.report(attention_report())

    asyncio.run(fill())
    return controller


@pytest.fixture
def ingress(controller: Controller) -> Iterator[Ingress]:
    ingress = Ingress(controller)
    with served(ingress.app) as ingress.url:
        yield ingress


@pytest.fixture(scope="module")
def strangers() -> Iterator[str]:
    """URL of a server that is no ingress; the first part of a path says which kind of none."""
    app = FastAPI()
    error = {"message": "no engine is left", "type": "Service Unavailable", "code": 503}
    answers = {
        "page": HTMLResponse("<html>hello</html>"),
        "list": JSONResponse([1, 2]),
        "other": JSONResponse({"model": "x", "health": "ok"}),
        "key": JSONResponse({"detail": "no"}, 401),
        "bug": JSONResponse({"detail": "boom"}, 500),
        "gateway": HTMLResponse("<html>bad gateway</html>", 502),
        "vllm": JSONResponse({"error": error}, 503, {"Retry-After": "7.5"}),
        "odd": JSONResponse({"detail": "later"}, 503, {"Retry-After": "nan"}),
    }
    app.get("/{kind}/mesh/{route}")(lambda kind, route: answers[kind])
    with served(app) as url:
        yield url


Ask = Callable[..., Awaitable[Any]]


@pytest.fixture(params=["sync", "async"])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Asks one admin route through one of the two clients."""

    async def with_client(url: str | None, route: str, *arguments: Any, **options: Any) -> Any:
        with Client(base_url=url, **options) as client:
            return getattr(client.mesh, route)(*arguments)

    async def with_async_client(url: str | None, route: str, *arguments: Any, **options: Any) -> Any:
        async with AsyncClient(base_url=url, **options) as client:
            return await getattr(client.mesh, route)(*arguments)

    return with_client if request.param == "sync" else with_async_client


def without_clock(status: dict[str, Any]) -> dict[str, Any]:
    for member in (*status["attention"], *status["shards"]):
        assert member.pop("seen_s") >= 0
    return status


# --- what the mesh answers ---


async def test_status_has_every_field_that_the_controller_sends(ask: Ask, ingress: Ingress) -> None:
    assert ingress.controller is not None
    sent = without_clock(await ingress.controller.status())
    status = await ask(ingress.url, "status")
    assert isinstance(status, MeshStatus)
    assert without_clock(status.model_dump(mode="json")) == sent
    assert without_clock(await ask(ingress.url, "raw", "status")) == sent
    assert status.ok
    assert status.placement.missing_experts == 0
    assert [shard.pairs for shard in status.shards] == [1234, 1235]
    assert status.attention[0].dispatch.retries == 3


async def test_placement_and_loads(ask: Ask, ingress: Ingress) -> None:
    assert ingress.controller is not None
    placement, loads = await ask(ingress.url, "placement"), await ask(ingress.url, "loads")
    assert isinstance(placement, Placement)
    assert isinstance(loads, Loads)
    assert placement.model_dump(mode="json") == json.loads(json.dumps(await ingress.controller.placement()))
    assert loads.model_dump() == await ingress.controller.loads()
    assert loads.tokens == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(placement.holders(1, e)[0] for e in range(EXPERTS)) == ["shard-0"] * 2 + ["shard-1"] * 2
    with pytest.raises(ValueError, match=r"layer 7 has no routed experts; allowed: \[0, 1\]"):
        placement.holders(7, 0)
    with pytest.raises(ValueError, match="no expert 4; allowed: 0 to 3"):
        placement.holders(0, EXPERTS)


async def test_a_plan_is_made_and_nothing_of_it_carried_out(ask: Ask, ingress: Ingress) -> None:
    before = await ask(ingress.url, "placement")
    plan = await ask(ingress.url, "plan")
    assert plan == await ask(ingress.url, "plan"), "asking changes nothing"
    assert (plan.moves, 0 < plan.balancedness <= 1) == ([], True)
    assert await ask(ingress.url, "placement") == before


async def test_experts_are_frozen_and_let_go(ask: Ask, ingress: Ingress) -> None:
    await ask(ingress.url, "freeze")
    assert (await ask(ingress.url, "placement")).frozen
    assert (await ask(ingress.url, "status")).placement.frozen
    await ask(ingress.url, "freeze", False)
    assert not (await ask(ingress.url, "placement")).frozen


async def test_applying_where_experts_stay_is_refused_in_words(ask: Ask, tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "fixed")
    fixed = Controller(load_config({"model": model, "routing": {"rebalance": {"enabled": False}}}), Memory())
    ingress = Ingress(fixed)
    with served(ingress.app) as url:
        with pytest.raises(ExpertMeshError, match=r"409: routing\.rebalance\.enabled is false"):
            await ask(url, "apply")
        wrong = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with wrong, pytest.raises(openai.UnprocessableEntityError) as refused:
            wrong.post(f"{url}/mesh/placement/freeze", cast_to=str, body={"frozen": "yes"})
        assert "frozen" in refused.value.response.text


def test_placement_commands(ingress: Ingress) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["placement", *arguments, "--url", ingress.url])
        assert result.exit_code == 0, result.output
        return result.output

    assert "shard 1 (shard-1)\n  layer 0: 1 3" in run("show")
    assert json.loads(run("show", "--json"))["experts"] == EXPERTS
    assert run("plan") == "balancedness 0.833\nno move would pay\n"
    assert json.loads(run("apply", "--json"))["moves"] == []
    assert run("freeze") == "experts stay where they are\n"
    assert ", frozen" in run("show")
    assert run("freeze", "--off") == "experts are moved as traffic moves\n"
    gone = CliRunner().invoke(cli, ["placement", "show", "--url", "http://127.0.0.1:9"])
    assert (gone.exit_code, gone.output.startswith("error: ")) == (1, True)


async def test_a_shard_that_left(ask: Ask, controller: Controller, ingress: Ingress) -> None:
    await controller.leave("shard-1")
    status, placement = await ask(ingress.url, "status"), await ask(ingress.url, "placement")
    assert (status.ok, status.health, status.placement.redundancy) == (False, "degraded", 0)
    assert status.placement.missing_experts == 4
    assert {tuple(placement.holders(0, e)) for e in range(EXPERTS)} == {("shard-0",)}, "it is to take them over"


async def test_scaling(ask: Ask, ingress: Ingress) -> None:
    assert (await ask(ingress.url, "scale", 2, 3)).model_dump() == {"attention": 2, "experts": 3}
    assert (await ask(ingress.url, "status")).wanted == Wanted(attention=2, experts=3)
    with pytest.raises(ExpertMeshError, match="409: experts: 5; allowed: 1"):
        await ask(ingress.url, "scale", None, 5)
    with pytest.raises(ExpertMeshError, match="422"):
        await ask(ingress.url, "scale", 0)
    assert (await ask(ingress.url, "scale", None, "auto")).model_dump() == {"attention": 2, "experts": 2}


def test_scale_command(ingress: Ingress) -> None:
    def run(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["scale", *arguments, "--url", ingress.url])

    assert run("attention=2", "experts=4").output.split() == ["attention:", "2", "experts:", "4"]
    assert run("experts=auto").output.split() == ["attention:", "2", "experts:", "2"]
    for wrong in (["experts"], ["experts=-1"], ["experts=2", "experts=3"], ["ingress=2"], ["experts=many"]):
        result = run(*wrong)
        assert result.exit_code == 2
        assert "allowed" in result.output


async def test_a_mesh_that_still_loads(controller: Controller) -> None:
    await controller.leave("shard-1")
    await controller.join(JoinRequest("shard-2", NODE))
    await controller.report(AttentionReport("attn-0", NODE, False, 0, 0, None))
    status = MeshStatus.model_validate(await controller.status())
    assert status.health == "starting"
    assert [(s.ready, s.addresses == [], s.bytes_read) for s in status.shards] == [
        (True, False, 6144),
        (False, True, 0),
    ]
    assert (status.attention[0].loaded, status.attention[0].dispatch.dispatches) == (None, 0)


async def test_values_are_frozen_and_ignore_what_newer_servers_send(controller: Controller) -> None:
    sent = await controller.status()
    sent["brand_new"] = sent["placement"]["brand_new"] = 1
    status = MeshStatus.model_validate(sent)
    assert not hasattr(status, "brand_new")
    with pytest.raises(ValidationError, match="frozen"):
        status.health = "fine"  # type: ignore[misc]


# --- where to, with which key ---


@pytest.mark.parametrize(
    ("given", "api"),
    [
        (None, "http://127.0.0.1:8000/v1/"),
        ("http://mesh:8080", "http://mesh:8080/v1/"),
        ("http://mesh/", "http://mesh/v1/"),
        ("https://mesh/v1", "https://mesh/v1/"),
        ("https://mesh/v1/", "https://mesh/v1/"),
        ("http://[::1]:8000/team/a", "http://[::1]:8000/team/a/v1/"),
        ("http://mesh/team/v1/", "http://mesh/team/v1/"),
    ],
)
@pytest.mark.parametrize("kind", [Client, AsyncClient])
def test_urls(monkeypatch: pytest.MonkeyPatch, kind: type[Client], given: str | None, api: str) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1")
    assert str(kind(base_url=given).base_url) == api
    monkeypatch.setenv("EXPERTMESH_URL", given or "")
    assert str(kind().base_url) == api
    assert str(kind(base_url="http://argument").base_url) == "http://argument/v1/"


@pytest.mark.parametrize(
    "url", ["mesh:8000", "ftp://mesh", "http://", "http://m:x", "http://m/v1?a=1", "http://m:99999"]
)
def test_refused_urls(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    with pytest.raises(ConfigError, match=r"^base_url: .* is no URL of a mesh; allowed: http"):
        Client(base_url=url)
    monkeypatch.setenv("EXPERTMESH_URL", url)
    with pytest.raises(ConfigError, match=r"^EXPERTMESH_URL: "):
        AsyncClient()


def test_secrets_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="EXPERTMESH_API_KEY") as caught:
        Client(base_url="http://me:hunter2@mesh")
    assert "hunter2" not in str(caught.value)
    for key in ("hunter2\n", "hunter 2", "hünter2"):
        with pytest.raises(ConfigError, match=r"^api_key: "):
            Client(api_key=key)
        monkeypatch.setenv("EXPERTMESH_API_KEY", key)
        with pytest.raises(ConfigError, match=r"^EXPERTMESH_API_KEY: ") as caught:
            Client()
        assert "nter" not in str(caught.value)


async def test_admin_routes_get_the_same_key(ask: Ask, ingress: Ingress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-for-openai-only")
    monkeypatch.setenv("OPENAI_ADMIN_KEY", "sk-for-openai-only")
    await ask(ingress.url, "status")
    await ask(ingress.url, "status", api_key=KEY)
    monkeypatch.setenv("EXPERTMESH_API_KEY", KEY)
    monkeypatch.setenv("EXPERTMESH_URL", f"{ingress.url}/v1")
    await ask(None, "status")
    assert ingress.seen == [("/mesh/status", f"Bearer {key}") for key in ("none", KEY, KEY)]


async def test_openai_routes_are_beside_the_admin_routes(ingress: Ingress) -> None:
    with Client(base_url=ingress.url, api_key=KEY) as client:
        assert isinstance(client, openai.OpenAI)
        assert [model.id for model in client.models.list()] == ["tiny"]
        other = client.with_options(timeout=5, max_retries=0)
        assert isinstance(other, Client)
        assert other.mesh.status().model == "tiny"
    async with AsyncClient(base_url=ingress.url, api_key=KEY) as client:
        assert isinstance(client, openai.AsyncOpenAI)
        assert [model.id async for model in client.models.list()] == ["tiny"]
        assert (await client.copy(timeout=5).mesh.status()).model == "tiny"
    assert ingress.seen == [(path, f"Bearer {KEY}") for path in ("/v1/models", "/mesh/status")] * 2


async def test_a_key_may_be_a_function(ingress: Ingress) -> None:
    async def give() -> str:
        return KEY

    with Client(base_url=ingress.url, api_key=lambda: KEY) as client:
        client.mesh.status()
    async with AsyncClient(base_url=ingress.url, api_key=give) as async_client:
        await async_client.mesh.status()
    assert ingress.seen == [("/mesh/status", f"Bearer {KEY}")] * 2


# --- failures ---


async def test_nobody_listens(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(Unavailable, match=f"^{url} can't be reached: .*(refused|failed)"):
        await ask(url, "status", max_retries=0)


async def test_nobody_answers(ask: Ask) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unavailable, match=f"^{url}/mesh/loads did not answer in time$"):
            await ask(url, "loads", max_retries=0, timeout=0.2)


async def test_the_controller_is_away(ask: Ask, ingress: Ingress) -> None:
    ingress.controller = None
    with pytest.raises(Unavailable, match=f"^{ingress.url}/mesh/placement answered HTTP 503: the mesh's con") as caught:
        await ask(ingress.url, "placement", max_retries=0)
    assert caught.value.retry_after_s == 2.0


async def test_it_is_asked_again_as_the_openai_client_would(ask: Ask, ingress: Ingress) -> None:
    ingress.failures = 2
    assert (await ask(ingress.url, "status")).ok
    ingress.failures = 2
    with pytest.raises(Unavailable) as caught:
        await ask(ingress.url, "status", max_retries=1)
    assert caught.value.retry_after_s == 0.01
    assert len(ingress.seen) == 3 + 2


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("", r"URL is not an ExpertMesh ingress, or not up yet: URL/mesh/status answered HTTP 404$"),
        ("/page", r"URL is not an ExpertMesh ingress: URL/mesh/status answered something that isn't JSON$"),
        ("/list", r"URL is not an ExpertMesh ingress: URL/mesh/status answered JSON of another kind \(Input should be"),
        ("/other", r"URL is not an ExpertMesh ingress: .* another kind \(mode: Field required\)$"),
        ("/key", r"URL refuses the API key \(HTTP 401\); give another as api_key or in EXPERTMESH_API_KEY$"),
        ("/bug", r"URL/mesh/status answered HTTP 500: boom$"),
    ],
)
async def test_what_is_no_ingress(ask: Ask, strangers: str, kind: str, message: str) -> None:
    with pytest.raises(ExpertMeshError, match="^" + message.replace("URL", strangers + kind)) as caught:
        await ask(strangers + kind, "status", max_retries=0)
    assert not isinstance(caught.value, Unavailable)


@pytest.mark.parametrize(
    ("kind", "message", "retry_after_s"),
    [("vllm", "503: no engine is left", 7.5), ("odd", "503: later", 1.0), ("gateway", "502", 1.0)],
)
async def test_what_may_pass(ask: Ask, strangers: str, kind: str, message: str, retry_after_s: float) -> None:
    with pytest.raises(Unavailable, match=f"/{kind}/mesh/status answered HTTP {message}$") as caught:
        await ask(f"{strangers}/{kind}", "status", max_retries=0)
    assert caught.value.retry_after_s == retry_after_s


# --- the package ---

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is not for clients")

sys.meta_path.insert(0, Block())
"""


def run(code: str, *blocked: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCK.format(blocked=blocked) + code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_clients_need_no_engine() -> None:
    code = """
from expertmesh import AsyncClient, AsyncMesh, Client, Mesh
from expertmesh.platform.cli import app
print(isinstance(Client().mesh, Mesh), isinstance(AsyncClient().mesh, AsyncMesh), callable(app))
"""
    assert run(code, "torch", "ray", "vllm", "numpy", "fastapi") == "True True True\n"


def test_the_package_itself_costs_nothing() -> None:
    run(
        "import expertmesh; print(expertmesh.__version__, dir(expertmesh))",
        "openai",
        "httpx",
        "pydantic",
        "importlib.metadata",
    )


def test_names() -> None:
    assert expertmesh.__version__ == importlib.metadata.version("expertmesh")
    for name in expertmesh.__all__:
        assert name in dir(expertmesh)
        assert getattr(expertmesh, name) is not None
    assert issubclass(Unavailable, expertmesh.ExpertMeshError)
    with pytest.raises(AttributeError, match="'expertmesh' has no attribute 'Mash'"):
        expertmesh.Mash  # noqa: B018


# --- the command line ---


def test_status_command(ingress: Ingress, controller: Controller) -> None:
    result = CliRunner().invoke(cli, ["status", "--url", ingress.url])
    assert result.exit_code == 0, result.output
    rows = [re.split(" {2,}", line.strip()) for line in result.stdout.splitlines()]
    assert ["attn-0", "c0ffee55", "yes", "2", "5", "77", "3", "1.5 MB"] in [row[:8] for row in rows]
    for index in range(2):
        shard = [f"shard-{index}", str(index), "c0ffee55", "yes", "4", str(1234 + index), "2.5 s", "6.1 kB"]
        assert shard in [row[:8] for row in rows]
    words = [line.split() for line in result.stdout.splitlines()]
    for expected in ("health ok", "placement epoch 1000002", "redundancy 1", "missing experts 0"):
        assert expected.split() in words
    assert ["model", "tiny"] in [line[:2] for line in words]

    asyncio.run(controller.leave("shard-1"))
    result = CliRunner().invoke(cli, ["status"], env={"EXPERTMESH_URL": ingress.url})
    assert result.exit_code == 3
    assert {"degraded", "missing"} <= set(result.stdout.split())
    assert "shard-1" not in result.stdout


def test_status_command_as_json(ingress: Ingress, controller: Controller) -> None:
    asyncio.run(controller.leave("shard-0"))
    result = CliRunner().invoke(cli, ["status", "--json", "--url", f"{ingress.url}/v1"])
    assert result.exit_code == 3
    assert without_clock(json.loads(result.stdout)) == without_clock(asyncio.run(controller.status()))


def test_status_command_without_a_mesh(ingress: Ingress) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    result = CliRunner().invoke(cli, ["status", "--url", url])
    assert (result.exit_code, result.stdout) == (1, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: {url} can't be reached: ")
    assert line.endswith("; is it running? start it with `expertmesh serve`")

    ingress.controller = None
    result = CliRunner().invoke(cli, ["status", "--url", ingress.url])
    assert result.exit_code == 1
    assert (
        result.stderr == f"error: {ingress.url}/mesh/status answered HTTP 503: the mesh's controller does not answer\n"
    )


def test_status_command_watches(ingress: Ingress, controller: Controller) -> None:
    command = [*RUN, "status", "--json", "--watch", "--url", ingress.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None

        def seen(health: str) -> dict[str, Any]:
            for line in watching.stdout or ():
                look: dict[str, Any] = json.loads(line)
                if look["health"] == health:
                    return look
            raise AssertionError(f"it ended without {health}")

        seen("ok")
        ingress.controller = None
        assert "HTTP 503" in seen("unreachable")["error"]
        ingress.controller = controller
        seen("ok")
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate()
    assert (watching.returncode, errors) == (0, "")


@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("nonsense", 2, "error: --url: 'nonsense' is no URL"),
        ("/page", 1, "error: URL/page is not an ExpertMesh ingress"),
        ("/key", 1, "error: URL/key refuses the API key (HTTP 401); give another"),
    ],
)
def test_errors_end_the_command_without_a_traceback(strangers: str, url: str, code: int, message: str) -> None:
    url = strangers + url if url.startswith("/") else url
    done = subprocess.run([*RUN, "status", "--url", url], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(message.replace("URL", strangers) if "URL/" in message else message)
    assert len(done.stderr.splitlines()) == 1


def test_version_command() -> None:
    result = CliRunner().invoke(cli, ["version"])
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == f"expertmesh {expertmesh.__version__}"
    assert f"openai {openai.__version__}" in result.stdout
