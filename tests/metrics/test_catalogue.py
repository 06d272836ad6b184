"""The list of series: bounded, documented, and all that dashboards and rules ask for."""

from __future__ import annotations

import json
import re
from math import prod

import pytest

from expertmesh.platform.metrics import CATALOGUE, Kind, Label, Series
from expertmesh.platform.metrics.catalogue import APPLICATION
from expertmesh.platform.metrics.docs import metrics_markdown
from tests.metrics.charts import CHART, panels, rules
from tests.metrics.prometheus import selectors

SERIES = [series for chapter in CATALOGUE.values() for series in chapter]
BY_NAME = {name: series for series in SERIES for name in series.names}
OURS = [*panels("expertmesh-mesh").values(), *rules().values()]
MATCHER = re.compile(r'(\w+)(=~|=)"([^"]*)"')


def test_the_page_is_current() -> None:
    page = (CHART.parents[1] / "docs" / "metrics.md").read_text()
    assert page == metrics_markdown(), "run: python -m expertmesh.platform.metrics.docs > docs/metrics.md"
    assert all(f"`{series.exported}`" in page for series in SERIES)


def test_names_are_prometheus_names_and_used_once() -> None:
    assert len(BY_NAME) == sum(len(series.names) for series in SERIES)
    for series in SERIES:
        assert re.fullmatch(r"expertmesh_[a-z0-9_]+", series.name)
        assert not series.name.endswith(("_total", "_bucket", "_sum", "_count")), "Ray or Prometheus adds these"
        assert series.help.endswith(".")
        assert (series.unit == "s") is ("seconds" in series.name)
        assert APPLICATION.name not in [label.name for label in series.labels]


def test_no_series_is_told_apart_by_expert_or_layer_and_there_are_few() -> None:
    assert not {"expert", "layer"} & {label.name for series in SERIES for label in series.labels}
    assert all(prod(len(label.values) or 1 for label in series.labels) <= 32 for series in SERIES)


@pytest.mark.parametrize(
    ("kind", "labels", "buckets", "says"),
    [
        (Kind.COUNTER, (Label("shard"),), (), "only a gauge"),
        (Kind.HISTOGRAM, (Label("shard"),), (1.0,), "only a gauge"),
        (Kind.HISTOGRAM, (), (), "has buckets"),
        (Kind.GAUGE, (), (1.0,), "has buckets"),
        (Kind.HISTOGRAM, (), (2.0, 1.0), "ascend"),
        (Kind.HISTOGRAM, (), (1.0, 1.0), "ascend"),
        (Kind.HISTOGRAM, (), (0.0, 1.0), "ascend"),
    ],
)
def test_what_is_not_bounded_or_no_histogram_is_refused(
    kind: Kind, labels: tuple[Label, ...], buckets: tuple[float, ...], says: str
) -> None:
    with pytest.raises(ValueError, match=f"expertmesh_x: .*{says}"):
        Series("expertmesh_x", kind, "X.", labels=labels, buckets=buckets)


def test_all_combinations_of_labels() -> None:
    both = Series("expertmesh_x", Kind.COUNTER, "X.", labels=(Label("a", ("1", "2")), Label("b", ("3", "4"))))
    assert [tuple(labels.values()) for labels in both.combinations()] == [
        ("1", "3"),
        ("1", "4"),
        ("2", "3"),
        ("2", "4"),
    ]
    assert list(Series("expertmesh_x", Kind.COUNTER, "X.").combinations()) == [{}]
    assert list(Series("expertmesh_x", Kind.GAUGE, "X.", labels=(Label("shard"),)).combinations()) == []


@pytest.mark.parametrize("expression", OURS)
def test_dashboards_and_rules_ask_for_what_is_in_the_list(expression: str) -> None:
    """Names, labels and the labels' values; a typing error in a matcher would make a panel empty."""
    for selector in selectors(expression):
        name, _, matchers = selector.partition("{")
        known = {label.name: label.values for label in BY_NAME[name].labels}
        for label, operator, wanted in MATCHER.findall(matchers):
            if label in ("namespace", APPLICATION.name):
                continue
            values = wanted.split("|") if operator == "=~" else [wanted]
            assert set(values) <= set(known[label]), f"{selector}: {label} is one of {known[label]}"


def test_the_dashboard_shows_every_series() -> None:
    shown = {BY_NAME[selector.partition("{")[0]].name for text in OURS for selector in selectors(text)}
    assert shown == {series.name for series in SERIES}


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    board = json.loads((CHART / "dashboards" / "expertmesh-mesh.json").read_text())
    for panel in board["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
