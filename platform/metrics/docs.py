"""`python -m expertmesh.platform.metrics.docs > docs/metrics.md` writes the reference of the metrics."""

from __future__ import annotations

import sys
from math import prod

from expertmesh.platform.metrics.catalogue import CATALOGUE
from expertmesh.platform.metrics.series import Kind, Label, Series

_INTRODUCTION = """\
# Metrics

<!-- Generated: python -m expertmesh.platform.metrics.docs > docs/metrics.md -->

A mesh reports these series, and no others, through Ray's own Prometheus exporter, beside those of Ray and Ray Serve.
Where to scrape: [operations](operations.md#metrics-and-alerts). `telemetry.metrics: false` switches them off.

* The set is fixed. No series is told apart by expert or layer: those loads come from `GET /mesh/loads`.
* Every series has the label `application`, the Serve application's name, and Ray's own: `NodeAddress`, `WorkerId` (the
  process), `SessionName`, `Version`, `Component`.
* Counters and histograms begin when the process does; counters with 0 for each set of labels, so that `rate()` of what
  has not happened yet is 0 and not nothing. Sum them over `WorkerId`. Ray keeps those of processes that are gone until
  it ends on that node.
* Gauges with a `replica` or `shard` label go about 20 s after their process.
* A process is looked at every 2 s, and Ray passes values on every 10 s: one that is killed takes its last ones along.
  Of a histogram Ray passes on the buckets only, so `_sum` is made of their middles.
"""

_HEAD = "| series | type | labels | unit | meaning |\n| --- | --- | --- | --- | --- |"

_SUM = """\
In all {fixed} series where each kind of process runs once, a histogram counted by its buckets, a gauge with a member's
id once.
"""


def metrics_markdown() -> str:
    """The whole page: an introduction and a table for each chapter."""
    parts = [_INTRODUCTION]
    for title, chapter in CATALOGUE.items():
        rows = "\n".join(_row(series) for series in chapter)
        parts.append(f"## {title}\n\n{_HEAD}\n{rows}\n")
    fixed = sum(_count(series) for chapter in CATALOGUE.values() for series in chapter)
    parts.append(_SUM.format(fixed=fixed))
    return "\n".join(parts)


def _row(series: Series) -> str:
    labels = ", ".join(_label(label) for label in series.labels)
    return f"| `{series.exported}` | {series.kind} | {labels} | {series.unit} | {series.help} |"


def _label(label: Label) -> str:
    return f"`{label.name}`" if label.is_member else f"`{label.name}`: {', '.join(label.values)}"


def _count(series: Series) -> int:
    parts = len(series.buckets) + 3 if series.kind is Kind.HISTOGRAM else 1
    return parts * prod(len(label.values) for label in series.labels if not label.is_member)


if __name__ == "__main__":
    sys.stdout.write(metrics_markdown())
