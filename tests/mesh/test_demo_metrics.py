"""Prometheus scrapes a mesh under load: every panel and every rule has data, and the figures are those of the API."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from expertmesh import Client
from expertmesh.deployments.local import LocalMesh
from expertmesh.platform.metrics import CATALOGUE
from tests.mesh.test_demo_api import eventually
from tests.metrics.charts import RULES, panels, rules, sides
from tests.metrics.prometheus import Prometheus, running, scraping, selectors

pytestmark = pytest.mark.mesh

PROMPT = "A sentence that is long enough to fill a block of the KV cache. " * 14
TOKENS = 12
PATIENCE_S = 120
"""Ray passes values on every 10 s, and Prometheus must have seen them twice."""
NOT_HERE = ("ray_node_gpus_", "ray_node_gram_", "autoscaler_")
"""Of Ray's own series, which panels on nodes show: those of GPUs, and of node types that Ray adds and removes."""


def generated(told: Prometheus) -> float:
    return told.value("sum(ray_expertmesh_generated_tokens_total)")


@pytest.fixture(scope="module")
def told(demo_mesh: LocalMesh, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has seen what a few requests did to the mesh."""
    assert demo_mesh.metrics_url is not None
    configuration = scraping([urlsplit(demo_mesh.metrics_url).netloc], RULES)
    with (
        running(tmp_path_factory.mktemp("metrics") / "prometheus", configuration) as server,
        Client(base_url=demo_mesh.url, timeout=300, max_retries=0) as client,
    ):
        assert eventually(lambda: bool(server.query("ray_expertmesh_generated_tokens_total")), PATIENCE_S)
        before = generated(server)

        def ask(number: int) -> None:
            settings: dict[str, Any] = {"model": "demo", "max_tokens": TOKENS, "temperature": 0, "stream": True}
            for _ in client.completions.create(prompt=PROMPT, extra_body={"ignore_eos": True}, **settings):
                pass
            messages = [{"role": "user", "content": str(number)}]
            for _ in client.chat.completions.create(messages=messages, extra_body={"ignore_eos": True}, **settings):
                pass

        ask(0)  # the prefix is cached from then on
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(ask, range(1, 4)))
        wrong = httpx.post(f"{demo_mesh.url}/v1/completions", json={"model": "nobody", "prompt": "hi"}, timeout=60)
        assert wrong.status_code == 404
        assert eventually(lambda: generated(server) >= before + 8 * TOKENS, PATIENCE_S)
        yield server


@pytest.mark.parametrize("board", ["expertmesh-mesh", "expertmesh-serving", "expertmesh-nodes"])
def test_every_expression_of_every_panel_returns_data(told: Prometheus, board: str) -> None:
    expressions = {
        panel: expression
        for panel, expression in panels(board).items()
        if not any(name in expression for name in NOT_HERE)
    }
    assert len(expressions) >= 4
    assert board == "expertmesh-nodes" or len(expressions) == len(panels(board))
    lacking = told.without_data(list(expressions.values()), PATIENCE_S)
    assert {panel: expression for panel, expression in expressions.items() if expression in lacking} == {}


def test_everything_that_an_alert_goes_by_returns_data_and_none_fires(told: Prometheus) -> None:
    asked = [part for expression in rules().values() for part in (*sides(expression), *selectors(expression))]
    assert told.without_data(asked, PATIENCE_S) == []
    assert told.query('ALERTS{alertstate="firing"}') == []


def test_every_series_of_the_catalogue_is_there_and_no_other(told: Prometheus) -> None:
    known = {name for chapter in CATALOGUE.values() for series in chapter for name in series.names}
    found = {each["metric"]["__name__"] for each in told.query('{__name__=~"ray_expertmesh_.*"}')}
    assert found == known
    for series in (series for chapter in CATALOGUE.values() for series in chapter):
        labels = {label.name: set(label.values) for label in series.labels}
        for each in told.query(series.names[0]):
            assert each["metric"]["application"] == "expertmesh"
            assert labels.keys() <= each["metric"].keys()
            assert all(not values or each["metric"][name] in values for name, values in labels.items())


def test_figures_are_those_of_the_api(told: Prometheus, demo_mesh: LocalMesh) -> None:
    with Client(base_url=demo_mesh.url, timeout=60) as client:
        status, loads = client.mesh.status(), client.mesh.loads()
    (replica,) = status.attention
    same = {
        "max(ray_expertmesh_placement_epoch)": status.placement.epoch,
        "max(ray_expertmesh_healthy)": 1,
        'max(ray_expertmesh_members{side="experts",state="ready"})': len(status.shards),
        'max(ray_expertmesh_wanted_members{side="attention"})': 1,
        f'sum(ray_expertmesh_table_epoch{{replica="{replica.replica}"}})': replica.epoch,
        f'sum(ray_expertmesh_shard_experts{{shard="{status.shards[0].shard}"}})': status.shards[0].experts,
    }
    for expression, value in same.items():
        assert eventually(lambda: told.value(expression) == value, PATIENCE_S), expression  # noqa: B023 (used at once)
    # Of this replica's and these shards' processes; what those before them did is counted in others' series.
    dispatches = replica.dispatch.dispatches
    assert eventually(lambda: told.value("max(ray_expertmesh_dispatches_total)") >= dispatches, PATIENCE_S)
    pairs = sum(map(sum, loads.tokens))
    assert eventually(lambda: told.value("sum(ray_expertmesh_dispatch_pairs_total)") >= pairs, PATIENCE_S)
    parts = told.query("sum by (part) (ray_expertmesh_dispatch_seconds_total)")
    seconds = {each["metric"]["part"]: float(each["value"][1]) for each in parts}
    assert min(seconds.values()) > 0
    assert told.value("sum(ray_expertmesh_dispatch_shard_seconds_total)") < seconds["exchange"]
    assert told.value('sum(ray_expertmesh_prompt_tokens_total{source="local"})') > 0, "the prompt was asked twice"
    assert told.value('sum(ray_expertmesh_requests_total{route="completions",outcome="invalid"})') >= 1


def test_a_private_ray_listens_on_loopback_only(demo_mesh: LocalMesh) -> None:
    """But for one port that Ray Serve opens in each of its replicas, see docs/security.md."""
    watched, open_to_all = set(), []
    for process in psutil.Process().children(recursive=True):
        try:
            name = process.name()
            listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        except psutil.NoSuchProcess:
            continue
        if not name.startswith("ray::ServeReplica"):
            watched.add(name)
            open_to_all += [(name, ip) for ip in listening if ip.removeprefix("::ffff:") != "127.0.0.1"]
    assert {"gcs_server", "raylet"} <= watched
    assert open_to_all == []
