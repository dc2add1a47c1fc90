"""Limit alerts that were published, beside the ledger: written down by the worker, read by people."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from clickhouse_connect.driver.client import Client

from schemas.answers import PublishedAlert
from schemas.credits import format_credits, millicredits_of
from schemas.limits import LimitAlert
from sinks.accounts import EPOCH

_COLUMNS: Final = (
    "alert_id", "workspace_id", "pool", "kind", "state", "used", "allowance", "thresholds", "remaining_below",
    "period_start", "period_end", "plan", "cause", "at", "position", "run_id", "seeded",
)  # fmt: skip


def note_alerts(client: Client, alerts: Sequence[LimitAlert]) -> None:
    """Write down what was published, for the view ``alerts``. Raises what the database raises."""
    client.insert(
        "published_alerts",
        [
            [
                alert.alert_id, alert.workspace_id, str(alert.pool), str(alert.kind), str(alert.state),
                Decimal(alert.used), Decimal(alert.allowance), list(alert.thresholds),
                Decimal(alert.remaining_below or -1), alert.period_start or EPOCH, alert.period_end or EPOCH,
                alert.plan, str(alert.cause), alert.at, alert.position, alert.run_id or UUID(int=0), alert.seeded,
            ]
            for alert in alerts
        ],
        column_names=_COLUMNS,
    )  # fmt: skip


def published_alerts(
    client: Client,
    *,
    workspace_id: str = "",
    kind: str = "",
    run_id: UUID | None = None,
    limit: int,
    as_of_ms: int | None = None,
) -> list[PublishedAlert]:
    """Alerts that left the meter, newest first; of one time, by their records' offsets. Empty filters: all.

    A run is asked for by its id: a topic that is made again counts its offsets afresh, so positions come again.
    """
    conditions = [
        f"{name} = {{{name}:String}}" for name, value in (("workspace_id", workspace_id), ("kind", kind)) if value
    ]
    if run_id:
        conditions.append("run_id = {run_id:UUID}")
    if as_of_ms is not None:
        conditions.append("at <= fromUnixTimestamp64Milli({as_of:Int64}, 'UTC')")
    found = client.query(
        f"SELECT {', '.join((*_COLUMNS, 'published_at'))} FROM alerts WHERE {' AND '.join(conditions) or 'true'} "
        "ORDER BY at DESC, toInt64OrZero(splitByChar('@', position)[-1]) DESC, alert_id LIMIT {limit:UInt32}",
        parameters={
            "workspace_id": workspace_id, "kind": kind, "run_id": str(run_id or ""), "as_of": as_of_ms, "limit": limit,
        },
    )  # fmt: skip
    return [_alert(dict(zip(found.column_names, row, strict=True))) for row in found.result_rows]


def _alert(row: dict[str, Any]) -> PublishedAlert:
    below, run_id = row["remaining_below"], row["run_id"]
    told = {
        "used": format_credits(millicredits_of(row["used"])),
        "allowance": format_credits(millicredits_of(row["allowance"])),
        "remaining_below": None if below is None else format_credits(millicredits_of(below)),
        "alert_id": str(row["alert_id"]),
        "run_id": str(run_id) if run_id.int else "",
        "thresholds": list(row["thresholds"]),
    }
    return PublishedAlert(**row | told)
