"""What people ask of accounts, in SQL: sums of one workspace, a run's debit, who comes close to a limit.

Credits are millicredits, days count from 1970-01-01. ``as_of_ms`` (Unix ms) None: all that the ledger knows; otherwise
what was recorded by then, which no projection serves.
"""

from typing import Any, Final, NamedTuple
from uuid import UUID

from clickhouse_connect.driver.client import Client

from schemas.answers import EventRow, ShareOfRuns, TopBy, TopRow
from schemas.credits import Millicredits, format_credits, millicredits_of
from schemas.ledger import Kind, Pool
from schemas.limits import FORECAST_DAYS, FORECAST_DAYS_MIN
from sinks.ledger import POSITION

_RECORDED: Final = " AND recorded_at <= fromUnixTimestamp64Milli({as_of:Int64}, 'UTC')"
EVERY_DAY: Final = (0, 65_535)
"""All days that a Date can hold."""


class DaySum(NamedTuple):
    """What one workspace drew from one pool on one UTC day: by runs, and (negative) by reversals."""

    pool: Pool
    day: int
    kind: Kind
    credits: Millicredits
    rows: int


def _known(as_of_ms: int | None) -> str:
    return "" if as_of_ms is None else _RECORDED


def knows(client: Client, workspace_id: str) -> bool:
    """Whether any run or account event of this workspace is in the ledger."""
    found = client.query(
        "SELECT 1 FROM ledger WHERE workspace_id = {workspace:String} AND kind != 'dead_letter' LIMIT 1",
        parameters={"workspace": workspace_id},
    )
    return bool(found.result_rows)


def plan_starts(client: Client, workspace_id: str) -> list[tuple[int, tuple[int, int], bool]]:
    """(effective_at, (recorded_at, Kafka offset), restarts its period) of every plan of a workspace, in Unix ms: all
    that its billing periods rest on. Another column, or a server-side parameter, would cost half a millisecond.
    """
    found = client.query(
        "SELECT toUnixTimestamp64Milli(effective_at), toUnixTimestamp64Milli(recorded_at), kafka_offset, "
        "restart_period FROM ledger WHERE workspace_id = %(workspace)s AND kind = 'plan'",
        parameters={"workspace": workspace_id},
    )
    return [(effective, (recorded, offset), restarts) for effective, recorded, offset, restarts in found.result_rows]


def day_sums(client: Client, workspace_id: str, days: tuple[int, int], as_of_ms: int | None) -> list[DaySum]:
    """Sums of one workspace by pool, day and kind, in the order of days: of the days [first, end), and of every day of
    premium, which has no period. Runs that draw from no pool are among them.
    """
    found = client.query(
        "SELECT toString(pool), toInt32(toUInt16(day)), toString(kind), toInt64(sum(credits) * 1000), count() "
        "FROM ledger WHERE workspace_id = {workspace:String} AND kind IN ('run', 'reversal') "
        "AND (pool = 'premium' OR day >= toDate({start:UInt16}) AND day < toDate({end:UInt16})) "
        f"{_known(as_of_ms)} GROUP BY pool, day, kind ORDER BY day",
        parameters={"workspace": workspace_id, "start": days[0], "end": days[1], "as_of": as_of_ms},
    )
    return [DaySum(Pool(pool), day, Kind(kind), credits, rows) for pool, day, kind, credits, rows in found.result_rows]


def drawn(client: Client, workspace_id: str, pool: Pool, days: tuple[int, int], as_of_ms: int | None) -> Millicredits:
    """One sum: what the pool's debits come to in the days [first, end), reversals included."""
    return _drawn(client, workspace_id, pool, days, _known(as_of_ms), {"as_of": as_of_ms})


class RunDebit(NamedTuple):
    """Where a run's debit stands: in Kafka, in time, in which pool and on which day."""

    workspace_id: str
    topic_id: str
    offset: int
    recorded_ms: int
    pool: Pool
    day: int
    credits: Millicredits


def debit_of(client: Client, workspace_id: str, run_id: UUID) -> RunDebit | None:
    """The debit of a run; None when there is none."""
    found = client.query(
        "SELECT workspace_id, topic_id, kafka_offset, toUnixTimestamp64Milli(recorded_at), "
        "toString(pool), toInt32(toUInt16(day)), toInt64(credits * 1000) FROM ledger "
        "WHERE workspace_id = {workspace:String} AND run_id = {run:UUID} AND kind = 'run'",
        parameters={"workspace": workspace_id, "run": str(run_id)},
    ).result_rows
    for name, topic_id, offset, recorded, pool, day, credits in found:
        return RunDebit(name, topic_id, offset, recorded, Pool(pool), day, credits)
    return None


def drawn_before(client: Client, debit: RunDebit, days: tuple[int, int]) -> Millicredits:
    """What the debit's pool had drawn in the days [first, end) when the debit came.

    The order is Kafka's: by offset within the run's own topic, by the broker's time across topics; on a tie the run
    comes first.
    """
    condition = (
        " AND if(topic_id = {topic_id:String}, kafka_offset < {offset:UInt64}, "
        "recorded_at < fromUnixTimestamp64Milli({recorded:Int64}, 'UTC'))"
    )
    given = {"topic_id": debit.topic_id, "offset": debit.offset, "recorded": debit.recorded_ms}
    return _drawn(client, debit.workspace_id, debit.pool, days, condition, given)


def _drawn(
    client: Client, workspace_id: str, pool: Pool, days: tuple[int, int], condition: str, given: dict[str, Any]
) -> Millicredits:
    ((credits,),) = client.query(
        "SELECT toInt64(sum(credits) * 1000) FROM ledger WHERE workspace_id = {workspace:String} "
        "AND kind IN ('run', 'reversal') AND pool = {pool:String} "
        f"AND day >= toDate({{start:UInt16}}) AND day < toDate({{end:UInt16}}){condition}",
        parameters={"workspace": workspace_id, "pool": str(pool), "start": days[0], "end": days[1], **given},
    ).result_rows
    return int(credits)


def shares(
    client: Client, workspace_id: str, action: str, table_id: str, column_id: str, as_of_ms: int | None
) -> list[ShareOfRuns]:
    """How the runs of a column ended, most frequent first. An empty table or column: all of them."""
    found = client.query(
        "SELECT toString(reason) AS why, count() AS runs FROM ledger WHERE workspace_id = {workspace:String} "
        "AND kind = 'run' AND action = {action:String} AND ({table:String} = '' OR table_id = {table:String}) "
        f"AND ({{column:String}} = '' OR column_id = {{column:String}}){_known(as_of_ms)} "
        "GROUP BY why ORDER BY runs DESC, why",
        parameters={
            "workspace": workspace_id,
            "action": action,
            "table": table_id,
            "column": column_id,
            "as_of": as_of_ms,
        },
    )
    return [ShareOfRuns(reason=reason, runs=runs) for reason, runs in found.result_rows]


def event_rows(client: Client, workspace_id: str, event_id: UUID) -> list[EventRow]:
    """What became of an account event: every ledger row under its id, in the order of arrival; none while it is not
    metered.
    """
    found = client.query(
        f"SELECT {POSITION}, recorded_at, toString(kind), toString(reason), credits, detail FROM ledger "
        "WHERE workspace_id = {workspace:String} AND event_id = {event:UUID} ORDER BY recorded_at, kafka_offset",
        parameters={"workspace": workspace_id, "event": str(event_id)},
    )
    return [
        EventRow(
            position=position,
            recorded_at=at,
            kind=kind,
            reason=reason,
            credits=format_credits(millicredits_of(credits)),
            detail=detail,
        )
        for position, at, kind, reason, credits, detail in found.result_rows
    ]


_ORDERS: Final = {
    TopBy.USED: "intDiv(toInt128(used * 1000) * 1000000, toInt128(allowance * 1000)) DESC, overage DESC, workspace_id",
    TopBy.RUNS_OUT: "runs_out_on, remaining, workspace_id",
}


def top(client: Client, by: TopBy, as_of_ms: int, limit: int) -> list[TopRow]:
    """Pools with an allowance, those that used the largest share of it first; or those whose enrichment credits will be
    gone before their period ends, the soonest first.

    The forecast: the mean of the last 7 days, today and no day before the period included, with debits on 3 of them.
    """
    found = client.query(
        _TOP.format(condition="isNotNull(runs_out_on)" if by == TopBy.RUNS_OUT else "true", order=_ORDERS[by]),
        parameters={"as_of": as_of_ms, "days": FORECAST_DAYS, "active": FORECAST_DAYS_MIN, "limit": limit},
    )
    return [
        TopRow(
            workspace_id=workspace_id, pool=pool, state=state, used=format_credits(used),
            allowance=format_credits(allowance), remaining=format_credits(remaining),
            used_percent=used * 100 // allowance, period_end=period_end, plan=plan, runs_out_on=runs_out_on,
        )
        for workspace_id, pool, state, used, allowance, remaining, period_end, plan, runs_out_on in found.result_rows
    ]  # fmt: skip


_TOP: Final = """
SELECT workspace_id, pool, state, toInt64(used * 1000), toInt64(allowance * 1000), toInt64(remaining * 1000),
       period_end, toString(plan),
       if(pool = 'enrichment' AND active >= {{active:UInt8}} AND lately > 0 AND remaining > 0 AND last_day < period_end,
          last_day, NULL) AS runs_out_on
FROM
(
    SELECT workspace_id, pool, state, used, allowance, remaining, overage, period_end, plan,
           toDate(fromUnixTimestamp64Milli({{as_of:Int64}}, 'UTC')) AS today,
           greatest(today - {{days:UInt8}} + 1, assumeNotNull(period_start)) AS since,
           arrayFilter(draw -> draw.1 >= since AND draw.1 <= today, drawn) AS draws,
           arraySum(draw -> draw.2, draws) AS lately, arrayCount(draw -> draw.2 > 0, draws) AS active,
           intDiv(toInt128(remaining * 1000) * (today - since + 1), greatest(toInt128(lately * 1000), 1)) AS days_left,
           today + toUInt16(least(days_left, 366)) AS last_day
    FROM balances_as_of(as_of = fromUnixTimestamp64Milli({{as_of:Int64}}, 'UTC'))
    WHERE allowance > 0
)
WHERE {condition}
ORDER BY {order}
LIMIT {{limit:UInt32}}
"""
