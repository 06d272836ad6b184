"""Binds series to Ray's metrics, which its agent on each node hands to Prometheus."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.util import metrics

from expertmesh.platform.config import MeshConfig
from expertmesh.platform.metrics import Kind, Series
from expertmesh.platform.metrics.catalogue import APPLICATION

log = logging.getLogger("expertmesh.telemetry")

PUBLISH_S = 2.0
"""Between two looks at what parts count themselves. Ray passes values on every 10 s and forgets gauges after 20."""


class Recorder(ABC):
    """Records values of the series that it was made for. Labels are given by name, all of the series'."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    @abstractmethod
    def count(self, series: Series, amount: float = 1, **labels: str) -> None:
        """Adds to a counter."""

    @abstractmethod
    def observe(self, series: Series, value: float, **labels: str) -> None:
        """Adds an observation to a histogram."""

    @abstractmethod
    def set(self, series: Series, value: float, **labels: str) -> None:
        """Sets a gauge. To be repeated within 10 s, or it is forgotten."""

    def count_to(self, series: Series, total: float, **labels: str) -> None:
        """Adds to a counter what `total`, a count that somebody keeps, has grown by since the last time.

        A total that is lower than it was is that of a part that began anew.
        """
        key = (series.name, frozenset(labels.items()))
        before = self._totals.get(key, 0)
        self._totals[key] = total
        grown = total - before if total >= before else total
        if grown > 0:
            self.count(series, grown, **labels)


class SilentRecorder(Recorder):
    """Records nothing."""

    def count(self, series: Series, amount: float = 1, **labels: str) -> None:
        """Does nothing."""

    def observe(self, series: Series, value: float, **labels: str) -> None:
        """Does nothing."""

    def set(self, series: Series, value: float, **labels: str) -> None:
        """Does nothing."""


class RayRecorder(Recorder):
    """Records through `ray.util.metrics`. Not Serve's: its replica label would multiply counters for ever."""

    def __init__(self, series: Iterable[Series], application: str) -> None:
        """Makes the series known, counters with 0."""
        super().__init__()
        self._application = {APPLICATION.name: application}
        self._counters: dict[str, metrics.Counter] = {}
        self._gauges: dict[str, metrics.Gauge] = {}
        self._histograms: dict[str, metrics.Histogram] = {}
        for each in series:
            keys = (APPLICATION.name, *(label.name for label in each.labels))
            if each.kind is Kind.GAUGE:
                self._gauges[each.name] = metrics.Gauge(each.name, each.help, keys)
            elif each.kind is Kind.HISTOGRAM:
                self._histograms[each.name] = metrics.Histogram(each.name, each.help, list(each.buckets), keys)
            else:
                counter = self._counters[each.name] = metrics.Counter(each.name, each.help, keys)
                for labels in each.combinations():
                    # `inc` refuses 0, and a counter that is not there yet has no rate.
                    counter._record(0.0, {**self._application, **labels})

    def count(self, series: Series, amount: float = 1, **labels: str) -> None:
        """Adds to a counter."""
        self._counters[series.name].inc(amount, {**self._application, **labels})

    def observe(self, series: Series, value: float, **labels: str) -> None:
        """Adds an observation to a histogram."""
        self._histograms[series.name].observe(value, {**self._application, **labels})

    def set(self, series: Series, value: float, **labels: str) -> None:
        """Sets a gauge."""
        self._gauges[series.name].set(value, {**self._application, **labels})


def recorder_for(config: MeshConfig, *chapters: Iterable[Series]) -> Recorder:
    """The recorder of a Serve replica; a silent one where metrics are switched off, or this is no replica."""
    if not config.telemetry.metrics:
        return SilentRecorder()
    try:
        application = serve.get_replica_context().app_name
    except RayServeException:
        return SilentRecorder()
    return RayRecorder([series for chapter in chapters for series in chapter], application)


async def publish_forever(publish: Callable[[], None]) -> None:
    """Calls `publish` every PUBLISH_S seconds. What it raises is logged, once a kind: nobody ends for metrics."""
    told: set[str] = set()
    while True:
        try:
            publish()
        except Exception as error:
            if type(error).__name__ not in told:
                told.add(type(error).__name__)
                log.exception("metrics could not be published (said once)")
        await asyncio.sleep(PUBLISH_S)
