"""What people ask about runs, and what the audit asks, one function each: ``question(client, ...)`` → plain values.

The CLI and the read API share them. Accounts have theirs in `sinks.account_queries`, dead letters in
`sinks.dead_letters`.
"""

from datetime import date
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from clickhouse_connect.driver.client import Client

from schemas.answers import By, Explanation, LedgerRow, PartitionAudit, RunRow, SumAudit, UsageRow
from schemas.catalogue import Catalogue
from schemas.credits import format_credits, millicredits_of
from schemas.ledger import DEBIT_REASONS, FREE_REASONS, Kind, Reason
from schemas.problem import Problem, UnknownId
from sinks.explain import explain, run_of

_USED: Final = {*DEBIT_REASONS, Reason.REVERSED}


def usage(client: Client, workspace_id: str, by: By, start: date | None, end: date | None) -> list[UsageRow]:
    """Credits and runs of one workspace in the UTC days [start, end), most credits first (days: in order).

    What was reversed is taken off the credits, not off the runs. The sums are by plain keys, so that the ``usage``
    projection serves them: it would not serve ``sumIf``, so free runs are split off here. So are rows that are no
    usage: a condition for them would cost a seventh of the answer's time to plan.
    """
    keys = by.keys
    grouped = list(dict.fromkeys([*keys, "pool", "reason"]))
    found = client.query(
        f"SELECT {', '.join(grouped)}, sum(credits), count() FROM ledger "
        "WHERE workspace_id = %(workspace)s AND day >= %(start)s AND day < %(end)s "
        f"GROUP BY {', '.join(grouped)}",
        parameters={"workspace": workspace_id, "start": start or date(2020, 1, 1), "end": end or date(2149, 1, 1)},
    )
    sums: dict[tuple[Any, ...], list[Any]] = {}
    for *group, credits, runs in found.result_rows:
        fields = dict(zip(grouped, group, strict=True))
        if fields["reason"] not in _USED:
            continue
        total = sums.setdefault((*(fields[key] for key in keys), fields["pool"]), [Decimal(0), 0, 0])
        total[0] += credits
        total[1] += 0 if fields["reason"] == Reason.REVERSED else runs
        total[2] += runs if fields["reason"] in FREE_REASONS else 0
    return [
        UsageRow(
            **dict(zip((*keys, "pool"), group, strict=True)),
            credits=format_credits(millicredits_of(credits)),
            runs=runs,
            free_runs=free,
        )
        for group, (credits, runs, free) in sorted(sums.items(), key=lambda item: _rank(by, item))
    ]


def _rank(by: By, item: tuple[tuple[Any, ...], list[Any]]) -> tuple[Any, ...]:
    group, (credits, runs, _) = item
    return group if by == By.DAY else (-credits, -runs, group)


def example_run(client: Client, reason: Reason) -> UUID | None:
    """One of the newest runs with this reason, the dearest first: something to explain."""
    found = client.query(
        "SELECT run_id FROM (SELECT run_id, credits FROM ledger WHERE kind = 'run' AND reason = {reason:String} "
        "ORDER BY recorded_at DESC LIMIT 1000) ORDER BY credits DESC LIMIT 1",
        parameters={"reason": str(reason)},
    )
    return found.result_rows[0][0] if found.result_rows else None


def runs(
    client: Client,
    workspace_id: str,
    *,
    start: date | None = None,
    end: date | None = None,
    table_id: str = "",
    column_id: str = "",
    row_id: str = "",
    reason: str = "",
    limit: int,
) -> list[RunRow]:
    """The newest runs of a workspace, by the time at which they ran, of the UTC days [start, end); an empty filter:
    all.
    """
    wanted = {"table_id": table_id, "column_id": column_id, "row_id": row_id, "reason": reason}
    conditions = [f" AND {name} = {{{name}:String}}" for name, value in wanted.items() if value]
    conditions += [" AND day >= {start:Date}"] if start else []
    conditions += [" AND day < {end:Date}"] if end else []
    found = client.query(
        "SELECT run_id, ran_at, table_id, column_id, row_id, toString(action), toString(outcome), toString(pool), "
        "credits, toString(reason) FROM ledger WHERE workspace_id = {workspace:String} AND kind = 'run'"
        f"{''.join(conditions)} ORDER BY ran_at DESC, run_id LIMIT {{limit:UInt32}}",
        parameters=wanted | {"workspace": workspace_id, "start": start, "end": end, "limit": limit},
    )
    return [
        RunRow(
            run_id=str(run_id), ran_at=ran_at, table_id=table, column_id=column, row_id=row, action=action,
            outcome=outcome, pool=pool, credits=format_credits(millicredits_of(credits)), reason=why,
        )
        for run_id, ran_at, table, column, row, action, outcome, pool, credits, why in found.result_rows
    ]  # fmt: skip


def explanation(client: Client, run_id: UUID, catalogue: Catalogue, workspace_id: str = "") -> Explanation:
    """Why a run cost what it cost. UnknownId when no event carries this id; Problem when runs of several workspaces do
    and none is named.
    """
    rows = _rows_under(client, run_id, workspace_id) if run_id.int else []  # what could not be read has no run id
    if not rows:
        of_whom = f" of {workspace_id}" if workspace_id else ""
        raise UnknownId(
            f"no run {run_id}{of_whom} in the ledger",
            f"no event{of_whom} that could be read carries this id",
            "It may be older than the ledger, or unreadable: see `creditstream dead-letters list --reason malformed`.",
        )
    if len(names := sorted({row["workspace_id"] for row in rows if row["kind"] == Kind.RUN})) > 1:
        raise Problem(
            f"run id {run_id} names {len(names)} runs",
            f"of {', '.join(names)}",
            "Name the workspace with `--workspace`.",
        )
    cell = {name: run_of(rows)[name] for name in ("workspace_id", "table_id", "column_id", "row_id")}
    ((runs_of_this_cell,),) = client.query(
        "SELECT count() FROM ledger WHERE kind = 'run' AND workspace_id = {workspace_id:String} "
        "AND table_id = {table_id:String} AND column_id = {column_id:String} AND row_id = {row_id:String}",
        parameters=cell,
    ).result_rows
    return explain(rows, runs_of_this_cell, catalogue)


def _rows_under(client: Client, run_id: UUID, workspace_id: str) -> list[dict[str, Any]]:
    """Every ledger row under a run id, in the order of arrival; of one workspace, or (empty) of all."""
    found = client.query(
        "SELECT * EXCEPT (raw, raw_key, raw_headers, mark_read_at) FROM ledger WHERE run_id = {run:UUID} "
        "AND ({workspace:String} = '' OR workspace_id = {workspace:String}) "
        "ORDER BY recorded_at, kafka_partition, kafka_offset",
        parameters={"run": str(run_id), "workspace": workspace_id},
    )
    return [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]


# What `creditstream reconcile` asks.


def audit_partitions(client: Client, topic: str) -> list[PartitionAudit]:
    """Every chain of a topic: what its rows say of themselves, and how many of its runs have another debit, there or in
    another chain.
    """
    found = client.query(
        "SELECT topic, topic_id, kafka_partition, min(kafka_offset), max(kafka_offset), count(), "
        "uniqExact(kafka_offset), sum(offset_gap), uniqExactIf((workspace_id, run_id), kind = 'run' "
        "AND (workspace_id, run_id) IN (SELECT workspace_id, run_id FROM ledger WHERE topic = {topic:String} "
        "AND kind = 'run' GROUP BY workspace_id, run_id HAVING count() > 1)) "
        "FROM ledger WHERE topic = {topic:String} GROUP BY topic, topic_id, kafka_partition "
        "ORDER BY topic_id, kafka_partition",
        parameters={"topic": topic},
    )
    return [
        PartitionAudit(**dict(zip(PartitionAudit.__struct_fields__, row, strict=True))) for row in found.result_rows
    ]


def audit_sums(client: Client) -> SumAudit:
    """The sums through the usage projection, and the same over raw rows."""
    sql = (
        "SELECT sum(c), sum(n) FROM (SELECT workspace_id, day, pool, kind, reason, sum(credits) AS c, count() AS n "
        "FROM ledger GROUP BY workspace_id, day, pool, kind, reason)"
    )
    projected, raw = (client.query(sql, settings={"optimize_use_projections": use}).result_rows[0] for use in (1, 0))
    return SumAudit(
        credits_projected=format_credits(millicredits_of(projected[0])),
        rows_projected=projected[1],
        credits_raw=format_credits(millicredits_of(raw[0])),
        rows_raw=raw[1],
    )


def ledger_rows(client: Client, topic_id: str, partition: int, after: int, limit: int) -> list[LedgerRow]:
    """Rows of one chain after an offset, in Kafka's order, for a comparison with the topic."""
    found = client.query(
        "SELECT kafka_offset, toString(kind), toString(reason), toString(pool), toInt64(credits * 1000), workspace_id, "
        "toString(run_id), detail FROM ledger "
        "WHERE topic_id = {topic_id:String} AND kafka_partition = {partition:UInt16} "
        "AND kafka_offset > {after:Int64} ORDER BY kafka_offset LIMIT {limit:UInt32}",
        parameters={"topic_id": topic_id, "partition": partition, "after": after, "limit": limit},
    )
    return [LedgerRow(*row) for row in found.result_rows]
