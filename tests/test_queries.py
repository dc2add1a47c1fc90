"""What analysts, support and programs ask: the views, the questions, the API; on chDB and over HTTP."""

import random
import re
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from threading import Event

import pytest
from clickhouse_connect.driver.client import Client
from litestar.testing import TestClient

from creditstream.api import create_api
from schemas.answers import By
from schemas.cell_run import to_milliseconds
from schemas.ledger import DEAD_LETTER_REASONS, DEBIT_REASONS, Position
from schemas.limits import AlertKind
from schemas.problem import UnknownId, Unreachable
from sinks import accounts, dead_letters, queries
from sinks.ledger import Batch, Ledger
from streams.meter import Meter
from streams.rules.periods import day_of
from streams.settings import read_settings
from streams.unit import TAKE_ROWS_MAX
from tests.account_rows import AccountRows
from tests.records import Record, Road
from tests.unit_bench import NO_KAFKA

VIEWS = (
    "debits", "usage_by_column", "usage_by_day", "usage_by_period", "billing_periods", "balances", "alerts",
    "reversals", "late_runs", "free_runs", "dead_letters", "duplicates",
)  # fmt: skip
SUMMED = ("usage_by_column", "usage_by_day", "free_runs")
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


@pytest.fixture
def filled(client: Client) -> Iterator[Client]:
    """A ledger of 3,000 simulated events over ten days, as the worker would write them."""
    import pyarrow as pa

    from creditstream.simulate import events

    ledger, road = Ledger(client), Road()
    stream = events(seed=7, ran_at=NOW)
    for day in range(10):
        recorded, dice = to_milliseconds(NOW + timedelta(minutes=day)), random.Random(day)
        mark = ledger.mark(road.chain)
        records = [
            Record(mark.next + n, _on_a_day(event.value, dice.randint(12, 21)), event.key.encode(), recorded)
            for n, event in enumerate(islice(stream, 300))
        ]
        rows = road.table(records)
        month = pa.repeat(pa.scalar(202611, pa.uint32()), len(rows))
        ledger.append(
            Batch(road.chain, mark.last, records[-1].offset, rows.append_column("batch_month", month)), mark, Event()
        )
    return client


def _on_a_day(value: bytes, day: int) -> bytes:
    return value.replace(b"-22T", b"-%02dT" % day)


def test_every_column_of_every_view_has_a_comment(client: Client) -> None:
    """A view is a contract: nobody has to guess what a column means."""
    commented = dict(
        client.query(
            "SELECT table, countIf(comment = '') FROM system.columns WHERE database = currentDatabase() "
            "AND table IN %(views)s GROUP BY table",
            parameters={"views": list(VIEWS)},
        ).result_rows
    )
    assert commented == dict.fromkeys(VIEWS, 0)


def test_views_sum_to_the_raw_rows(filled: Client) -> None:
    """Credits and runs are the same through every view as over raw rows without projections."""
    ((credits, runs),) = filled.query(
        "SELECT sum(credits), count() FROM ledger WHERE kind = 'run'", settings={"optimize_use_projections": 0}
    ).result_rows
    assert credits > 0
    for view in ("debits", "usage_by_column", "usage_by_day"):
        counted = "count()" if view == "debits" else "sum(runs)"
        assert filled.query(f"SELECT sum(credits), {counted} FROM {view}").result_rows == [(credits, runs)]
    charged = filled.query("SELECT count() FROM debits WHERE credits > 0").result_rows[0][0]
    assert filled.query("SELECT sum(runs) FROM free_runs").result_rows == [(runs - charged,)]
    kinds = dict(filled.query("SELECT kind, count() FROM ledger GROUP BY kind").result_rows)
    assert filled.query("SELECT count() FROM dead_letters").result_rows == [(kinds["dead_letter"],)]
    assert filled.query("SELECT count() FROM duplicates").result_rows == [(kinds.get("duplicate", 0),)]


@pytest.mark.parametrize("view", SUMMED)
def test_summing_views_are_served_by_the_projection(filled: Client, view: str) -> None:
    """They do not read raw rows, so their cost does not grow with the number of runs."""
    plan = filled.query(f"EXPLAIN projections = 1 SELECT * FROM {view} WHERE day >= '2026-11-01'").result_rows
    assert "ReadFromMergeTree (usage)" in "\n".join(line for (line,) in plan)


def test_usage_reads_one_workspace_through_the_projection(filled: Client) -> None:
    """The question prunes by workspace and day: it does not depend on other workspaces' rows."""
    plan = "\n".join(
        line
        for (line,) in filled.query(
            "EXPLAIN projections = 1, indexes = 1 SELECT table_id, column_id, pool, reason, sum(credits), count() "
            "FROM ledger WHERE workspace_id = 'ws_0001' AND day >= '2026-11-01' "
            "GROUP BY table_id, column_id, pool, reason"
        ).result_rows
    )
    assert "ReadFromMergeTree (usage)" in plan
    assert "workspace_id" in plan


@pytest.mark.parametrize("by", list(By))
def test_usage_sums_to_the_same_whatever_it_is_grouped_by(filled: Client, by: By) -> None:
    """Each grouping foots to the workspace's total, exactly."""
    rows = queries.usage(filled, "ws_0001", by, None, None)
    ((credits, runs),) = filled.query(
        "SELECT sum(credits), count() FROM debits WHERE workspace_id = 'ws_0001'"
    ).result_rows
    assert (sum(Decimal(row.credits) for row in rows), sum(row.runs for row in rows)) == (credits, runs)
    free = filled.query("SELECT sum(runs) FROM free_runs WHERE workspace_id = 'ws_0001'").result_rows[0][0]
    assert sum(row.free_runs for row in rows) == free


def test_a_question_names_as_many_workspaces_as_a_take_may_hold(client: Client) -> None:
    """More than a server takes as one parameter: under a backlog all of them may have to be loaded at once."""
    names = [f"{number:0128}" for number in range(TAKE_ROWS_MAX)]
    rows = AccountRows(names[-1])
    rows.run(NOW, recorded_at=NOW)
    rows.write(client)
    now_ms, since = to_milliseconds(NOW), NOW.date()
    drawn = [(names[-1], "enrichment", day_of(now_ms), 1_000)]
    assert accounts.facts_of(client, names) == []
    assert accounts.draws_of(client, names, since) == drawn
    assert accounts.draws_recorded_by(client, dict.fromkeys(names, now_ms), since) == drawn
    assert accounts.draws_recorded_by(client, dict.fromkeys(names, now_ms - 1), since) == []
    asked = [accounts.TopQuestion(name, "enrichment", None, None) for name in names]
    assert [len(accounts.top_columns(client, asked)[question]) for question in asked[-2:]] == [0, 1]


def test_usage_takes_half_open_ranges_of_days(filled: Client) -> None:
    """Adjacent ranges add up, with nothing counted twice."""
    cut = date(2026, 11, 17)
    halves = [queries.usage(filled, "ws_0001", By.DAY, *days) for days in ((None, cut), (cut, None))]
    assert [*halves[0], *halves[1]] == queries.usage(filled, "ws_0001", By.DAY, None, None)
    assert max(row.day for row in halves[0] if row.day) < cut


def test_a_dead_letter_is_found_by_its_position(filled: Client) -> None:
    """With its bytes; another position is an unknown id."""
    letter = dead_letters.dead_letters(filled, "malformed", 1)[0]
    position = Position.parse(letter.position)
    assert dead_letters.dead_letter(filled, position) == letter
    assert letter.raw.startswith("{")
    for other in (position._replace(partition=7), position._replace(topic="account-events")):
        with pytest.raises(UnknownId, match=re.escape(str(other))):
            dead_letters.dead_letter(filled, other)


def test_the_ledgers_own_audit_agrees_with_itself(filled: Client) -> None:
    """One row per offset; projections equal raw sums; what `reconcile` reads is in Kafka's order."""
    (audit,) = queries.audit_partitions(filled, "cell-runs")
    assert (audit.rows, audit.distinct_offsets, audit.gaps, audit.doubled_runs) == (3000, 3000, 3000, 0)
    sums = queries.audit_sums(filled)
    assert (sums.credits_projected, sums.rows_projected) == (sums.credits_raw, sums.rows_raw)
    pages = [queries.ledger_rows(filled, "topic-1", 0, after, 1000) for after in (-1, 999, 1999, 2999)]
    assert [row.offset for page in pages for row in page] == list(range(3000))


def test_the_audit_finds_a_run_with_two_debits_wherever_they_lie(client: Client) -> None:
    """Also under an earlier topic of that name, or in another partition: each by itself is a run like any other."""
    rows = AccountRows()
    twice = [rows.run(NOW) for _ in range(3)]
    rows.run(NOW)
    rows.run(NOW, run_id=twice[0])
    rows.run(NOW, run_id=twice[1], topic_id="topic-0")
    rows.run(NOW, run_id=twice[2], kafka_partition=1)
    rows.run(NOW, run_id=twice[2], workspace_id="ws_2", topic_id="topic-0")
    rows.write(client)
    audits = queries.audit_partitions(client, "cell-runs")
    doubled = {(audit.topic_id, audit.partition): audit.doubled_runs for audit in audits}
    assert doubled == {("topic-0", 0): 1, ("topic-1", 0): 3, ("topic-1", 1): 1}
    assert queries.audit_partitions(client, "account-events") == []


def test_the_api_is_described_and_says_when_it_is_not_ready(tmp_path: Path) -> None:
    """OpenAPI is generated from the same types; before an assignment the worker is alive and not ready."""
    with TestClient(create_api(Meter(read_settings({}, home=str(tmp_path)), NO_KAFKA))) as api:
        described = api.get("/schema/openapi.json").json()
        assert {"/v1/usage", "/v1/runs/{run_id}", "/v1/dead-letters", "/v1/actions/{action}"} <= set(described["paths"])
        assert described["components"]["schemas"]["UsageRow"]["properties"]["credits"] == {"type": "string"}
        rows = described["paths"]["/v1/audit/rows"]["get"]["description"]
        assert rows.endswith("each as an array, in the order of these fields.")
        assert api.get("/livez").status_code == 200
        ready = api.get("/readyz")
    assert (ready.status_code, ready.json()) == (503, {"ready": False, "because": ["no assignment yet"]})


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"from": "2026-12-01", "to": "2026-11-01"}, "to=2026-11-01 is not after from=2026-12-01"),
        ({"from": "2026-11-01", "to": "2026-11-01"}, "to=2026-11-01 is not after from=2026-11-01"),
        ({"period": "2026-11-02", "from": "2026-11-01"}, "period 2026-11-02 already names the days"),
    ],
)
def test_the_api_refuses_days_that_are_none(tmp_path: Path, asked: dict[str, str], why: str) -> None:
    """As the command does: an empty answer would pass for a workspace without runs."""
    with TestClient(create_api(Meter(read_settings({}, home=str(tmp_path)), NO_KAFKA))) as api:
        found = api.get("/v1/usage", params={"workspace_id": "ws_1", **asked})
    assert (found.status_code, found.json()["why"]) == (400, why)


@pytest.mark.parametrize(
    ("path", "status", "why"),
    [
        ("/v1/usage", 400, "Missing required query parameter 'workspace_id' for path /v1/usage"),
        ("/v1/runs?workspace_id=ws_1&limit=0", 400, "limit: Expected `int` >= 1"),
        ("/v1/balance?workspace_id=ws_1&as_of=2026-11-01", 400, "as_of: Invalid RFC3339 encoded datetime"),
        ("/v1/balance?workspace_id=ws_1&as_of=1790000000", 400, "as_of: a number is no RFC3339 encoded datetime"),
        ("/v1/usage?workspace_id=ws_1&from=soon", 400, "from: Invalid RFC3339 encoded date"),
        ("/v1/statement?workspace_id=ws_1&period=soon", 400, "period: Invalid RFC3339 encoded date"),
        ("/v1/usage?workspace_id=ws_1&form=2026-11-01", 400, "no parameter is called 'form'"),
        ("/v1/usage?workspace_id=ws_1&start=2026-11-01", 400, "no parameter is called 'start'"),
        ("/v1/usage?workspace_id=ws_1&by=week", 400, "by: Invalid enum value 'week'; it takes " + ", ".join(By)),
        ("/v1/runs?workspace_id=ws_1&reason=malformed", 400, "it takes " + ", ".join(DEBIT_REASONS)),
        ("/v1/runs/example?reason=duplicate", 400, "it takes " + ", ".join(DEBIT_REASONS)),
        ("/v1/dead-letters?reason=charged", 400, "it takes " + ", ".join(DEAD_LETTER_REASONS)),
        ("/v1/parked-events?reasons=too_large&reasons=error", 400, "it takes " + ", ".join(DEAD_LETTER_REASONS)),
        ("/v1/alerts?kind=over", 400, "kind: Invalid enum value 'over'; it takes " + ", ".join(AlertKind)),
        (
            "/v1/check?workspace_id=ws_1&action=a&on_unknown=ask",
            400,
            "on_unknown: Invalid enum value 'ask'; it takes allow, deny",
        ),
        ("/v1/runs/nothing", 400, "run_id: Invalid UUID"),
        ("/v1/account-events/nothing?workspace_id=ws_1", 400, "event_id: Invalid UUID"),
        ("/v1/nothing", 404, "Not Found"),
        ("/v1/usage?workspace_id=ws_1&workspace_id=ws_2", 400, "'workspace_id' may be given only once"),
        ("/v1/dead-letters?reason=malformed&reason=too_large", 400, "'reason' may be given only once"),
        ("/v1/estimate?workspace_id=ws_1&action=find_work_email&cells=9&table_id=t", 400, "`table_id` only narrows it"),
    ],
)
def test_what_is_refused_before_it_is_asked_is_said_alike(tmp_path: Path, path: str, status: int, why: str) -> None:
    """As every other failure, and as OpenAPI describes them."""
    with TestClient(create_api(Meter(read_settings({}, home=str(tmp_path)), NO_KAFKA))) as api:
        found = api.get(path)
        described = api.get("/schema/openapi.json").json()
    assert (found.status_code, found.json()["why"]) == (status, why)
    for code in ("400", "404", "503"):
        shape = described["paths"]["/v1/usage"]["get"]["responses"][code]["content"]["application/json"]["schema"]
        name = shape["$ref"].removeprefix("#/components/schemas/")
        assert described["components"]["schemas"][name]["properties"].keys() == found.json().keys()


def test_a_worker_that_stops_says_so(tmp_path: Path) -> None:
    """Its API outlives its ledger by moments: a question is told to come again, and is no failure of ours."""
    meter = Meter(read_settings({}, home=str(tmp_path)), NO_KAFKA)
    meter.close()
    with TestClient(create_api(meter), raise_server_exceptions=False) as api:
        found = api.get("/v1/top")
    assert (found.status_code, found.json()["exit_code"]) == (503, Unreachable.exit_code)
