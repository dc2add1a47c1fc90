"""What a worker does now: its marks, what waits, and what keeps it from metering."""

import time
from typing import Final

from creditstream import __version__
from schemas.answers import Status, UnitStatus
from streams.meter import Meter
from streams.unit import Unit

KAFKA_SILENT_S_MAX: Final = 10.0
"""Kafka answers a heartbeat each second; after so long it has given the partitions to another worker, if it lives."""


def status_of(meter: Meter) -> Status:
    """The meter as people and ``demo`` see it."""
    reasons = not_ready_because(meter)
    return Status(
        version=__version__,
        ready=not reasons,
        not_ready_because=reasons,
        topic=meter.topic.name,
        kafka_bootstrap=meter.settings.kafka_bootstrap,
        units=[_unit_status(meter, partition, unit) for partition, unit in sorted(meter.units.items())],
        written=dict(meter.written),
        told=dict(meter.told),
        uptime_s=int(time.time() - meter.started_at),
        duplicate_filter_bytes=sum(unit.filters.nbytes for unit in meter.units.values()),
    )


def _unit_status(meter: Meter, partition: int, unit: Unit) -> UnitStatus:
    marks = unit.mark.last, unit.event_mark.last
    lag, event_lag = meter.reading.lags(partition, marks)
    return UnitStatus(
        partition=partition,
        mark=marks[0],
        event_mark=marks[1],
        lag=lag,
        event_lag=event_lag,
        balances=len(unit.balances),
        rows_unwritten=unit.rows_unwritten,
        incident=str(unit.incident or ""),
    )


def not_ready_because(meter: Meter) -> list[str]:
    """Why it does not meter everything that it should; empty when it does."""
    if not meter.assigned:
        return ["no assignment yet"]
    incidents = [f"{unit.chain}: {unit.incident}" for unit in meter.units.values() if unit.incident]
    incidents += filter(None, [meter.parted])
    if (silent_s := meter.reading.silent_s()) > KAFKA_SILENT_S_MAX:
        incidents.append(f"Kafka has answered no heartbeat for {silent_s:.0f} s")
    return incidents + [f"ledger: {what}" for what in dict.fromkeys(meter.threads.troubles.values())]
