"""A worker's status as Prometheus metrics, for ``/metrics``. Pure: `Status` → text.

Counts are of this process, since its start. No label names a workspace: their truth is the ledger.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from schemas.answers import Status
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS

PREFIX = "creditstream"

Values = Mapping[Any, float]
"""Values of the labels, in their order → value."""


def exposition(status: Status) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_StatusCollector(status))
    return generate_latest(registry)


class _StatusCollector(Collector):
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        status = self._status
        yield _gauge("ready", "1 when every assigned partition is metered.", {(): status.ready})
        yield _gauge("info", "The version that runs.", {(status.version,): 1}, "version")
        yield _gauge("uptime_seconds", "Since the process started.", {(): status.uptime_s})
        yield _gauge(
            "duplicate_filter_bytes", "Memory of the filters of run and event ids.", {(): status.duplicate_filter_bytes}
        )
        yield from self._of_units()
        yield _counter(
            "ledger_rows", "Rows written into the ledger.",
            {tuple(name.split("/")): number for name, number in status.written.items()}, "kind", "reason",
        )  # fmt: skip
        told = dict(status.told)
        yield _counter("states", "Limit states handed to Kafka.", {(): told.pop("states", 0)})
        yield _counter("alerts", "Limit alerts handed to Kafka.", {(kind,): n for kind, n in told.items()}, "kind")

    def _of_units(self) -> Iterable[Metric]:
        units = [((str(unit.partition),), unit) for unit in self._status.units]
        yield _gauge(
            "incident", "1 while an incident pauses the partition.", {at: unit.incident != "" for at, unit in units},
            "partition",
        )  # fmt: skip
        yield _gauge(
            "unwritten_rows", "Rated, and not yet read back from the ledger.",
            {at: unit.rows_unwritten for at, unit in units}, "partition",
        )  # fmt: skip
        yield _gauge("accounts", "Workspaces in memory.", {at: unit.balances for at, unit in units}, "partition")
        marks = {(CELL_RUNS, *at): unit.mark for at, unit in units} | {
            (ACCOUNT_EVENTS, *at): unit.event_mark for at, unit in units
        }
        lags = {(CELL_RUNS, *at): unit.lag for at, unit in units} | {
            (ACCOUNT_EVENTS, *at): unit.event_lag for at, unit in units
        }
        known = {place: lag for place, lag in lags.items() if lag is not None}
        yield _gauge(
            "lag_offsets", "Offsets in Kafka behind the mark, by its last answer.", known, "topic", "partition"
        )
        yield _gauge("mark_offset", "Last offset that has its ledger row; -1: none.", marks, "topic", "partition")


def _filled(
    kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, text: str, values: Values, *labels: str
) -> Metric:
    family = kind(f"{PREFIX}_{name}", text, labels=labels)
    for place, value in values.items():
        family.add_metric(place, value)
    return family


_gauge = partial(_filled, GaugeMetricFamily)
_counter = partial(_filled, CounterMetricFamily)
