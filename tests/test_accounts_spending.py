"""What is asked before credits are drawn: may it run, what will it cost, who comes close to the limit."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client
from hypothesis import given
from hypothesis import strategies as st
from litestar.testing import TestClient

from creditstream import accounts, spending
from creditstream.api import create_api
from creditstream.cli.commands import cli
from creditstream.client.testing import MemoryGate
from schemas.answers import By, Estimate, ShareOfRuns, SpendCheck, TopBy
from schemas.credits import parse_credits
from schemas.ledger import DEBIT_REASONS, FREE_REASONS, Pool
from schemas.problem import UnknownId
from streams.meter import Meter
from streams.settings import read_settings
from tests.account_records import Story, Topics
from tests.account_rows import AccountRows, at
from tests.records import EXAMPLES, STEADY
from tests.unit_bench import NO_KAFKA, Bench

DAY = timedelta(days=1)
ON_CHDB = pytest.mark.parametrize("database_url", ["chdb"], indirect=True)


def check(client: Client, action: str, workspace_id: str = "ws_1", **asked: Any) -> SpendCheck:
    return spending.check(client, EXAMPLES, workspace_id, action, **{"as_of": at("2026-01-31")} | asked)


def estimate(client: Client, action: str, cells: int, **asked: Any) -> Estimate:
    return spending.estimate(client, EXAMPLES, "ws_1", action, cells=cells, **{"as_of": at("2026-01-31")} | asked)


@pytest.fixture
def drawn(client: Client) -> Client:
    """A workspace with one credit of its 20,000 left, and 5 premium credits."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"))
    rows.grant(at("2026-01-15 14:00:00"), 5)
    rows.run(at("2026-01-20"), 19_999)
    rows.write(client)
    return client


CHECKS = [
    ("enrich_person", {}, True, "enough", "1", "1"),
    ("find_work_email", {}, False, "not_enough", "2", "1"),
    ("enrich_person", {"cells": 2}, False, "not_enough", "2", "1"),
    ("find_work_email", {"own_api_key": True}, True, "own_api_key", "0", None),
    ("format_date", {"cells": 1_000_000}, True, "free_action", "0", None),
    ("hubspot_send", {}, True, "free_action", "0", None),
    ("clearbit_enrich_company", {"cells": 5}, True, "enough", "5", "5"),
    ("clearbit_enrich_company", {"cells": 6}, False, "not_enough", "6", "5"),
    ("nobody_priced_this", {"own_api_key": True}, False, "unknown_action", "0", None),
    ("enrich_person", {"workspace_id": "ws_none"}, False, "unknown_workspace", "1", None),
    ("enrich_person", {"workspace_id": "ws_none", "on_unknown": "allow"}, True, "unknown_workspace", "1", None),
    ("enrich_person", {"as_of": at("2026-01-15")}, False, "unknown_plan", "1", None),
    ("enrich_person", {"as_of": at("2026-02-15"), "cells": 20_000}, True, "enough", "20000", "20000"),
]


@ON_CHDB
def test_a_check_follows_the_rules_of_the_gate(drawn: Client) -> None:
    """Own key and free actions pass, an unknown action never; otherwise cells times price against what remains."""
    for action, asked, *expected in CHECKS:
        found = check(drawn, action, **asked)
        assert [found.allowed, found.reason, found.credits, found.remaining] == expected, (action, asked)


@ON_CHDB
def test_a_workspace_without_a_plan_is_decided_by_the_caller(client: Client) -> None:
    """Its state says so."""
    rows = AccountRows()
    rows.run(at("2026-01-20"))
    rows.write(client)
    answers = [check(client, "enrich_person", on_unknown=choice) for choice in ("deny", "allow")]
    assert [(one.allowed, one.reason, one.state) for one in answers] == [
        (False, "unknown_plan", "unknown_plan"),
        (True, "unknown_plan", "unknown_plan"),
    ]


@ON_CHDB
def test_a_check_says_what_the_gate_says(drawn: Client) -> None:
    """The gate, told the same remaining credits, gives the same answer and reason."""
    gate = MemoryGate(EXAMPLES)
    gate.set("ws_1", "1")
    for action, own, cells in [("enrich_person", False, 1), ("enrich_person", False, 2), ("find_work_email", True, 9)]:
        told = gate.check("ws_1", action, own_api_key=own, cells=cells)
        found = check(drawn, action, own_api_key=own, cells=cells)
        assert (found.allowed, found.reason, found.credits) == (told.allowed, told.reason, told.price)


@ON_CHDB
def test_an_estimate_rests_on_the_columns_own_history_r14(client: Client) -> None:
    """Expected is the share of charged runs among those with the product's key, rounded up, against what is left."""
    rows = AccountRows()
    rows.plan(at("2026-01-15"))
    for reason, runs in [("charged", 2), ("no_data", 3), ("error", 2), ("own_api_key", 40)]:
        for _ in range(runs):
            rows.run(at("2026-01-20"), 2 if reason == "charged" else 0, reason=reason, action="find_work_email",
                     own_api_key=reason == "own_api_key", column_id="col_mail")  # fmt: skip
    rows.run(at("2026-01-20"), 2, action="find_work_email", column_id="col_other")
    rows.run(at("2026-01-20"), 1, column_id="col_mail")
    rows.write(client)

    found = estimate(client, "find_work_email", 1000, table_id="tbl_1", column_id="col_mail")
    assert (found.worst_case, found.expected) == ("2000", "571.429")
    assert {share.reason: share.runs for share in found.history} == {"charged": 2, "no_data": 3, "error": 2}
    assert (found.remaining, found.fits, found.warning) == ("19993", True, "")
    unsaid = estimate(client, "find_work_email", 1000)
    assert (unsaid.worst_case, unsaid.expected, unsaid.history) == ("2000", "2000", [])
    fresh = estimate(client, "find_work_email", 1000, column_id="col_new")
    assert (fresh.expected, fresh.history) == ("2000", [])
    maybe = estimate(client, "find_work_email", 20_000, column_id="col_mail")
    assert (maybe.fits, maybe.warning) == (False, "It may not fit: up to 40,000 credits, 19,993 left.")
    never = estimate(client, "find_work_email", 100_000, column_id="col_mail")
    assert never.warning == "It does not fit: about 57,142.858 credits expected, 19,993 left."


@ON_CHDB
def test_an_estimate_rests_on_no_run_from_before_the_action_had_a_price_r14(client: Client) -> None:
    """Such a run was free whatever it found, so it says nothing of what will be charged."""
    rows = AccountRows()
    rows.plan(at("2026-01-15"))
    for _ in range(8):
        rows.run(at("2026-01-20"), 0, reason="free_action", pool=Pool.NONE)
    rows.write(client)
    unpaid = estimate(client, "enrich_person", 1000, column_id="col_1")
    assert (unpaid.expected, unpaid.history) == ("1000", [])

    rows.run(at("2026-01-21"), 1)
    rows.run(at("2026-01-21"), 0, reason="no_data", outcome="no_data")
    rows.write(client)
    assert estimate(client, "enrich_person", 1000, column_id="col_1").expected == "500"


@ON_CHDB
def test_an_estimate_of_what_is_free_r13(client: Client) -> None:
    """Free actions and own keys cost 0 and always fit; an unknown action is an unknown id; no plan is a warning."""
    for action, asked in [("format_date", {}), ("find_work_email", {"own_api_key": True})]:
        found = estimate(client, action, 9, **asked)
        assert (found.worst_case, found.expected, found.fits, found.warning) == ("0", "0", True, "")
    with pytest.raises(UnknownId, match="no action 'x'"):
        estimate(client, "x", 9)
    planless = estimate(client, "enrich_person", 9)
    assert (planless.remaining, planless.fits) == (None, False)
    assert planless.warning == "The workspace has no plan yet, so what is left is unknown."


@STEADY
@given(
    worst=st.integers(0, 10**15),
    history=st.lists(st.builds(ShareOfRuns, reason=st.sampled_from(DEBIT_REASONS), runs=st.integers(1, 10**9))),
)
def test_an_expectation_is_never_too_small_nor_above_the_worst_case(worst: int, history: list[ShareOfRuns]) -> None:
    """Rounded up by less than a thousandth of a credit."""
    found = spending.expect(worst, history)
    runs = sum(share.runs for share in history)
    charged = sum(share.runs for share in history if share.reason not in FREE_REASONS)
    assert 0 <= found <= worst
    if runs:
        assert worst * charged <= found * runs < worst * charged + runs
    else:
        assert found == worst


@ON_CHDB
def test_top_lists_who_comes_close(client: Client) -> None:
    """By the share of the allowance, premium too; by the day on which credits will be gone; nobody without a limit."""
    rows = AccountRows()
    for name, credits in [("ws_half", 10_000), ("ws_over", 20_001), ("ws_fast", 12_000), ("ws_zero", 5)]:
        rows.workspace_id = name
        rows.plan(at("2026-01-01"), *(("cancelled", 0) if name == "ws_zero" else ()))
        days = 4 if name == "ws_fast" else 1
        for day in range(days):
            rows.run(at("2026-01-10") + day * DAY, credits // days)
    rows.workspace_id = "ws_half"
    rows.grant(at("2026-01-01"), 100)
    rows.run(at("2026-01-13"), 99, pool=Pool.PREMIUM)
    rows.workspace_id = "ws_planless"
    rows.run(at("2026-01-13"), 99)
    rows.write(client)

    found = spending.top(client, TopBy.USED, 10, at("2026-01-13 12:00:00"))
    assert [(row.workspace_id, row.pool, row.used_percent, row.state) for row in found] == [
        ("ws_over", "enrichment", 100, "exhausted"),
        ("ws_half", "premium", 99, "warning"),
        ("ws_fast", "enrichment", 60, "warning"),
        ("ws_half", "enrichment", 50, "warning"),
    ]
    assert [row.workspace_id for row in spending.top(client, TopBy.USED, 1, at("2026-01-13"))] == ["ws_over"]
    (fast,) = spending.top(client, TopBy.RUNS_OUT, 10, at("2026-01-13 12:00:00"))
    # 8,000 left at 12,000 in 7 days: 4.67 days.
    assert (fast.workspace_id, fast.runs_out_on, fast.period_end) == ("ws_fast", date(2026, 1, 17), date(2026, 2, 1))
    assert [row.runs_out_on for row in found] == [None, None, date(2026, 1, 17), None]


@ON_CHDB
def test_top_and_balance_forecast_alike(client: Client) -> None:
    """For any pace, at the edges of a period and of the week, both name the same day, or none."""
    rows = AccountRows()
    names = [f"ws_{n:02}" for n in range(21)]
    for n, name in enumerate(names):
        rows.workspace_id = name
        rows.plan(at("2026-01-01") + (n % 9) * DAY)
        for day in range(n % 5 + 1):
            rows.run(at("2026-01-04") + (day * (n % 3 + 1)) * DAY, 500 * (n % 7 + 1))
    rows.write(client)
    for as_of in (at("2026-01-06 12:00"), at("2026-01-08 23:59:59.999"), at("2026-02-02")):
        found = {row.workspace_id: row.runs_out_on for row in spending.top(client, TopBy.USED, 100, as_of)}
        soon = {row.workspace_id: row.runs_out_on for row in spending.top(client, TopBy.RUNS_OUT, 100, as_of)}
        by_balance = {name: accounts.balance(client, name, as_of)[0].runs_out_on for name in found}
        assert found == by_balance
        assert soon == {name: day for name, day in by_balance.items() if day}
    assert list(soon.values()) == sorted(soon.values())


@ON_CHDB
def test_top_of_the_past_goes_by_what_is_known_now_and_says_so(client: Client, tmp_path: Any) -> None:
    """A run that arrived later counts in it, unlike in a balance; the option and the API do not say otherwise."""
    rows = AccountRows()
    rows.plan(at("2026-01-01"))
    rows.run(at("2026-01-10"), 3, recorded_at=at("2026-01-20"))
    rows.write(client)
    (found,) = spending.top(client, TopBy.USED, 20, at("2026-01-15"))
    assert (found.used, accounts.balance(client, "ws_1", at("2026-01-15"))[0].used) == ("3", "0")

    (option,) = [each for each in cli.commands["top"].params if each.name == "as_of"]
    with served(client, str(tmp_path)) as api:
        asked = api.get("/schema/openapi.json").json()["paths"]["/v1/top"]["get"]["parameters"]
    (parameter,) = [each for each in asked if each["name"] == "as_of"]
    for said in (getattr(option, "help", ""), parameter["description"]):
        assert "as the ledger knows it now" in said


class _Answering(Meter):
    """A meter that only answers questions, over the test's own ledger."""

    def __init__(self, client: Client, home: str, **settings: Any) -> None:
        super().__init__(read_settings({}, home=home, **settings), NO_KAFKA)
        self.catalogue = EXAMPLES
        self._over = client

    async def ask(self, question: Any, *args: Any, **named: Any) -> Any:
        return question(self._over, *args, **named)


@contextmanager
def served(client: Client, home: str) -> Iterator[Any]:
    with TestClient(create_api(_Answering(client, home))) as api:
        yield api


def test_the_api_answers_as_the_functions_do(drawn: Client, tmp_path: Any) -> None:
    """Every question has a route with the same record; an unknown workspace is 404, a wrong value 400."""
    import msgspec

    at_noon = at("2026-01-31")
    as_of = {"as_of": at_noon.isoformat()}
    mine = {"workspace_id": "ws_1"} | as_of
    run = {"action": "enrich_person", "cells": 2}
    expected = {
        "/v1/balance": accounts.balance(drawn, "ws_1", at_noon),
        "/v1/periods": accounts.periods(drawn, "ws_1", at_noon),
        "/v1/statement": accounts.statement(drawn, "ws_1", None, at_noon),
        "/v1/plans": accounts.plans(drawn, "ws_1", at_noon),
        "/v1/grants": accounts.grants(drawn, "ws_1", at_noon),
        "/v1/limits": accounts.limits(drawn, "ws_1", at_noon),
        "/v1/alerts": [],
        "/v1/check": check(drawn, **run),
        "/v1/estimate": estimate(drawn, **run),
        "/v1/top": spending.top(drawn, TopBy.USED, 20, at_noon),
    }
    with served(drawn, str(tmp_path)) as api:
        for path, answer in expected.items():
            asked = mine | (run if path in ("/v1/check", "/v1/estimate") else {})
            found = api.get(path, params=as_of if path == "/v1/top" else asked)
            assert found.status_code == 200, (path, found.text)
            assert msgspec.json.decode(found.content) == msgspec.to_builtins(answer), path
        found = api.get("/v1/usage", params={"workspace_id": "ws_1", "period": "2026-01-20"})
        usage = accounts.period_usage(drawn, "ws_1", By.COLUMN, date(2026, 1, 31))
        assert msgspec.json.decode(found.content) == msgspec.to_builtins(usage)
        assert api.get("/v1/balance", params={"workspace_id": "ws_none"}).status_code == 404
        assert api.get("/v1/check", params=mine | {"action": "enrich_person", "cells": 0}).status_code == 400
        paths = api.get("/schema/openapi.json").json()["paths"]
        assert set(expected) <= set(paths)


@ON_CHDB
async def test_whoever_holds_the_account_knows_its_periods(client: Client, tmp_path: Path) -> None:
    """The worker saves the question for the plans, with the same answer; of another's workspace it asks."""
    story = Story()
    story.plan("4", at("2026-01-15 12:00"))
    story.plan("20", at("2026-01-20"), restart=True)
    story.runs(12, at("2026-01-10"), at("2026-02-25"))
    bench = await Bench.open(client)
    task = bench.start()
    for of_account, records in (chunks := Topics().append(story.steps)):
        bench.deliver(records, of_account=of_account)
    bench.unit.drain()
    await bench.wait(task, lambda: bench.acknowledged == len(chunks))
    meter = _Answering(client, str(tmp_path), partitions=1)
    meter.units[0] = bench.unit
    plans = meter.plans_of("ws_1")
    assert plans
    assert [plan.plan for plan in plans] == ["4", "20"]
    days = [date(2026, 1, day) for day in (1, 14, 15, 19, 20, 31)]
    answers = [accounts.period_usage(client, "ws_1", By.TABLE, day, plans) for day in days]
    assert answers == [accounts.period_usage(client, "ws_1", By.TABLE, day) for day in days]
    assert len({str(answer) for answer in answers}) == 3
    assert meter.plans_of("ws_2") is None
    await bench.kill(task)


@ON_CHDB
def test_now_is_the_default(drawn: Client) -> None:
    """Without ``as_of`` the running period is that of today."""
    today = time.strftime("%Y-%m-%d", time.gmtime())
    (found, _) = accounts.balance(drawn, "ws_1")
    assert str(found.period_start) <= today < str(found.period_end)
    assert parse_credits(found.remaining) == 20_000_000
