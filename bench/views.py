"""How long people wait for an answer: views and questions over a ledger of many rows, embedded.

    .venv/bin/python -m bench.views                     20 million rows of 2,000 workspaces; `top` over 100,000
    .venv/bin/python -m bench.views --rows 1000000

Rows come in bursts, as tables are run: 200 cells of 10 columns of one table on one day, and day after day, so that a
month lies in its own ClickHouse partition; months that are over are merged, as the ledger does after a quiet day.
Workspaces differ in size by the cube. Figures are milliseconds, without the query condition cache, which would answer a
repeated question from memory: the least and the median of the rounds, and the least CPU time of the process, all
threads, which other load moves less. The first line is the cost of any question.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from uuid import UUID

from clickhouse_connect.driver.client import Client
from rich.console import Console
from rich.table import Table

from creditstream import accounts, spending
from schemas.answers import By, TopBy
from schemas.catalogue import EXAMPLE_CATALOGUES, Catalogue
from sinks import queries
from sinks.clickhouse import connect
from sinks.migrate import migrate

CHUNK = 1_000_000
DAYS = 360
"""Before today."""

_BURSTS = """
INSERT INTO ledger (topic, topic_id, kafka_partition, kafka_offset, recorded_at, kind, run_id, workspace_id, table_id,
    column_id, row_id, action, outcome, ran_at, pool, credits, reason, catalogue, batch_month, mark_read_at)
SELECT 'cell-runs', 'topic-1', cityHash64(ws) % 4, number, ran_at + INTERVAL 1 SECOND, 'run', generateUUIDv7(), ws,
    concat('tbl_', toString(intHash32(burst + 1) % 6)), concat('col_', toString(col)),
    concat('row_', toString(number)), 'find_work_email', 'data',
    toDateTime64(today() - {days:UInt32}, 3, 'UTC')
        + INTERVAL ({first:UInt32} + intHash32(burst + 5) % {span:UInt32}) DAY
        + INTERVAL intHash64(number + 5) % 86400 SECOND AS ran_at,
    if(col = 0, 'premium', 'enrichment'), 1, 'charged', 1, toYYYYMM(ran_at), now64(3)
FROM
(
    SELECT number, intDiv(number, {burst:UInt32}) AS burst, number % 10 AS col,
           concat('ws_', leftPad(toString(toUInt32({workspaces:UInt32} * pow((intHash32(burst) % 1000000) / 1000000,
                  {skew:UInt8}))), 6, '0')) AS ws
    FROM numbers({chunk:UInt32} * {size:UInt32}, {size:UInt32})
)
"""
_PLANS = """
INSERT INTO ledger (topic, topic_id, kafka_partition, kafka_offset, recorded_at, kind, reason, pool, workspace_id,
    event_id, effective_at, ran_at, plan, allowance, restart_period, batch_month, mark_read_at)
SELECT 'account-events', 'topic-2', 0, number, effective_at, 'plan', 'plan_changed', 'none',
    concat('ws_', leftPad(toString(number % {workspaces:UInt32}), 6, '0')), generateUUIDv7(),
    toDateTime64(today() - {days:UInt32}, 3, 'UTC') + INTERVAL 14 HOUR
        + INTERVAL number % 31 + intDiv(number, {workspaces:UInt32}) * 70 DAY AS effective_at, effective_at, '20k',
    100 * (1 + intDiv(number, {workspaces:UInt32})), intDiv(number, {workspaces:UInt32}) = 3, toYYYYMM(effective_at),
    now64(3)
FROM numbers(4 * {workspaces:UInt32})
"""

Question = Callable[[], object]


def fill(client: Client, rows: int, workspaces: int, burst: int, skew: int) -> None:
    """A ledger of so many runs, and four plans for each workspace."""
    given = {"workspaces": workspaces, "days": DAYS, "burst": burst, "skew": skew, "size": min(CHUNK, rows)}
    while not client.query("SELECT uptime() > 2").result_rows[0][0]:
        time.sleep(0.1)
    chunks = max(1, rows // CHUNK)
    for chunk in range(chunks):
        first, end = DAYS * chunk // chunks, DAYS * (chunk + 1) // chunks
        client.command(_BURSTS, parameters=given | {"chunk": chunk, "first": first, "span": max(1, end - first)})
    client.command(_PLANS, parameters=given)
    months = client.query("SELECT DISTINCT batch_month FROM ledger WHERE batch_month < toYYYYMM(today())").result_rows
    for (month,) in months:
        client.command(f"OPTIMIZE TABLE ledger PARTITION {month} FINAL")


def questions(client: Client, workspace: str) -> dict[str, Question]:
    """What is asked of one workspace. The uncached setting is the client's own."""
    catalogue = Catalogue.load(EXAMPLE_CATALOGUES)
    run = _a_run(client, workspace)

    today = datetime.now(UTC).date()
    plans = accounts.facts(client, workspace, accounts.moment(None)).plans
    views = ("usage_by_period", "billing_periods", "balances", "usage_by_column", "debits", "late_runs")
    asked: dict[str, Question] = {
        "API: usage of a day range": lambda: queries.usage(
            client, workspace, By.COLUMN, date(2026, 1, 1), date(2026, 2, 1)
        ),
        "API: usage of the running period, by column": lambda: accounts.period_usage(
            client, workspace, By.COLUMN, today
        ),
        "the same, by the worker that holds its account": lambda: accounts.period_usage(
            client, workspace, By.COLUMN, today, plans
        ),
        "API: balance": lambda: accounts.balance(client, workspace),
        "API: balance, as of an instant": lambda: accounts.balance(client, workspace, datetime.now(UTC)),
        "API: periods": lambda: accounts.periods(client, workspace),
        "API: statement": lambda: accounts.statement(client, workspace),
        "API: check": lambda: spending.check(client, catalogue, workspace, "find_work_email", cells=100),
        "API: estimate": lambda: spending.estimate(
            client, catalogue, workspace, "find_work_email", cells=100, table_id="tbl_1", column_id="col_1"
        ),
        "API: explain": lambda: accounts.explanation(client, catalogue, run),
    }
    for view in views:
        sql = f"SELECT * FROM {view} WHERE workspace_id = '{workspace}' LIMIT 1000"
        asked[f"view: {view}"] = lambda sql=sql: client.query(sql)  # type: ignore[misc]
    return asked


def _a_run(client: Client, workspace: str) -> UUID:
    found = client.query(
        "SELECT run_id FROM ledger WHERE workspace_id = {ws:String} AND kind = 'run' LIMIT 1",
        parameters={"ws": workspace},
    )
    run: UUID = found.result_rows[0][0]
    return run


def everybody(client: Client) -> dict[str, Question]:
    """What is asked of all workspaces at once."""
    return {
        "top, by use": lambda: spending.top(client, TopBy.USED, 20),
        "top, by the day they run out": lambda: spending.top(client, TopBy.RUNS_OUT, 20),
        "view: balances, by state": lambda: client.query("SELECT state, count() FROM balances GROUP BY state"),
    }


def measure(table: Table, asked: dict[str, Question], rounds: int) -> None:
    """A row of the table for each question. Round by round, so that all meet the same moments of the machine."""
    spent: dict[str, list[float]] = {name: [] for name in asked}
    cpu: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, question in asked.items():
            began, worked = time.perf_counter(), time.process_time()
            question()
            spent[name].append((time.perf_counter() - began) * 1000)
            cpu[name].append((time.process_time() - worked) * 1000)
    for name in asked:
        table.add_row(name, *(f"{ms:.1f}" for ms in (min(spent[name]), statistics.median(spent[name]), min(cpu[name]))))


def ledger(directory: str, name: str) -> Client:
    """An empty ledger, and a client that measures without the condition cache."""
    client = connect(f"chdb://{directory}?database={name}")
    migrate(client)
    client.command("SET use_query_condition_cache = 0")
    return client


def main() -> None:
    """Fill two ledgers, and ask."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--top-rows", type=int, default=4_000_000)
    parser.add_argument("--workspaces", type=int, default=100_000, help="of the second ledger")
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory(prefix="creditstream-views-") as directory:
        client = ledger(directory, "one")
        fill(client, chosen.rows, 2_000, burst=200, skew=3)
        found = client.query(
            "SELECT workspace_id, count() AS runs FROM ledger WHERE kind = 'run' GROUP BY workspace_id "
            "ORDER BY runs DESC"
        ).result_rows
        for workspace, rows in (found[0], found[len(found) // 2]):
            table = Table(
                "question", "min ms", "median ms", "CPU ms", title=f"{workspace}: {rows:,} of {chosen.rows:,} rows"
            )
            measure(table, {"SELECT 1": lambda: client.query("SELECT 1")} | questions(client, workspace), chosen.rounds)
            console.print(table)
        client = ledger(directory, "all")
        fill(client, chosen.top_rows, chosen.workspaces, burst=10, skew=1)
        table = Table("question", "min ms", "median ms", "CPU ms", title=f"all {chosen.workspaces:,} workspaces")
        measure(table, everybody(client), max(3, chosen.rounds // 2))
        console.print(table)


if __name__ == "__main__":
    main()
