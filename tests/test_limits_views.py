"""What analysts read of plans and limits: periods, balances, alerts, reversals, late runs."""

import random
from collections import defaultdict
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, NamedTuple, cast
from uuid import UUID

import pytest
from clickhouse_connect.driver.client import Client

from creditstream import accounts
from schemas.cell_run import from_milliseconds, to_milliseconds
from schemas.ledger import Pool
from streams.rules.balances import METERED
from streams.rules.limits import Facts, Grant, Standing, Thresholds, terms_of
from streams.rules.periods import DAY_MS, PlanChange, allowance_of, day_of, history, in_effect, period_of, to_date
from tests.account_rows import NEVER, SECOND, AccountRows, at

ON_CHDB: Final = pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
WORKSPACES: Final = 1500
EARLY_MS: Final = 5 * 60 * 1000
AS_OF: Final = [
    at("2024-02-29 00:00:00"), at("2024-03-01"), at("2025-03-01"), at("2025-12-31 23:59:59.999"), at("2026-07-15 14:00")
]  # fmt: skip


class Tile(NamedTuple):
    """One billing period, as both sides say it."""

    start: date
    end: date
    allowance: Decimal
    plan: str


class Past(NamedTuple):
    """What the ledger holds of one workspace, in the order of arrival. Debits: (Unix ms, pool, credits)."""

    plans: list[PlanChange]
    grants: list[Grant]
    thresholds: Thresholds | None
    debits: list[tuple[int, Pool, int]]


def a_past(dice: random.Random) -> Past:
    """Plans on any day of the month, several on a day or at one instant, late, early, out of order; grants and runs."""
    first = to_milliseconds(datetime(dice.choice([2023, 2024]), dice.randint(1, 12), 1, tzinfo=UTC))
    effective = [first + dice.choice([0, 28, 29, 30, dice.randint(0, 30)]) * DAY_MS + dice.randrange(DAY_MS)]
    for _ in range(dice.choice([0, 1, 2, 4, 8])):
        before = dice.choice(effective)
        later = dice.choice([0, 0, dice.randrange(DAY_MS), dice.randrange(30 * DAY_MS), dice.randrange(700 * DAY_MS)])
        effective.append(before + later)
    dice.shuffle(effective)
    recorded = sorted(moment + dice.choice([0, 1000, -40 * DAY_MS, 20 * DAY_MS]) for moment in effective)
    plans = [
        PlanChange(
            moment,
            (recorded[n], n),
            f"plan-{n}",
            dice.choice([20_000_000, 50_000_000, 100_000_000, 0, 12_500]),
            dice.random() < 0.4,
            dice.choice([(), (), (10, 100), (95,)]),
            dice.choice([None, 0, 1_000_000]),
        )
        for n, moment in enumerate(effective)
    ]
    grants = [
        Grant(first + dice.randrange(700 * DAY_MS), (first + n, 100 + n), dice.choice([1, 999, 20_000_000]))
        for n in range(dice.choice([0, 1, 1, 3]))
    ]
    own = Thresholds((first, 200), dice.choice([(), (1,), (60, 90)]), dice.choice([None, 0, 5_000_000]))
    debits = [
        (
            first + dice.randrange(-90 * DAY_MS, 700 * DAY_MS),
            dice.choice(METERED),
            dice.choice([1, 250, 4_000_000, -500]),
        )
        for _ in range(dice.choice([0, 0, 3, 30]))
    ]
    return Past(plans[: dice.choice([0, 9, 9, 9])], grants, dice.choice([None, own]), debits)


def tiles(past: Past, as_of_ms: int) -> list[Tile]:
    """The periods by `streams.rules.periods`, from the first day that something happened on."""
    plans = history(past.plans)
    days = [day_of(change.effective_ms) for change in in_effect(plans, as_of_ms)]
    days += [day_of(ran_ms) for ran_ms, _, _ in past.debits if day_of(ran_ms) <= day_of(as_of_ms + EARLY_MS)]
    if not days:
        return []
    found, day, last = [], min(days), max(day_of(as_of_ms), *days, 0)
    while day <= last:
        period = period_of(day, plans, as_of_ms)
        opening = in_effect(in_effect(plans, as_of_ms), (period.start + 1) * DAY_MS - 1)
        allowance = Decimal(allowance_of(period, plans, as_of_ms) or 0).scaleb(-3)
        found.append(Tile(to_date(period.start), to_date(period.end), allowance, opening[-1].plan if opening else ""))
        day = period.end
    return found


def standings(past: Past, as_of_ms: int) -> dict[Pool, Standing]:
    """Both pools by `streams.rules.limits`."""
    facts = Facts(history(past.plans), tuple(past.grants), past.thresholds)
    found = {}
    for pool in METERED:
        terms = terms_of(facts, pool, as_of_ms)
        drawn = [
            credits
            for ran_ms, from_pool, credits in past.debits
            if from_pool == pool
            and day_of(ran_ms) <= day_of(as_of_ms + EARLY_MS)
            and (not terms.period or day_of(ran_ms) in terms.period)
        ]
        found[pool] = Standing(terms, sum(drawn))
    return found


@pytest.fixture
def pasts(client: Client) -> dict[str, Past]:
    """A ledger of many workspaces, each with a past of its own."""
    dice = random.Random(20260131)
    pasts = {f"ws_{n:04}": a_past(dice) for n in range(WORKSPACES)}
    rows = AccountRows()
    for name, past in pasts.items():
        rows.workspace_id = name
        for change in past.plans:
            rows.plan(
                from_milliseconds(change.effective_ms),
                change.plan,
                credits_of(change.allowance),
                recorded_at=from_milliseconds(change.arrival[0]),
                restart_period=change.restart_period,
                thresholds=change.thresholds,
                remaining_below=-1 if change.remaining_below is None else credits_of(change.remaining_below),
            )
        for grant in past.grants:
            rows.grant(from_milliseconds(grant.effective_ms), credits_of(grant.credits))
        if own := past.thresholds:
            below = -1 if own.remaining_below is None else credits_of(own.remaining_below)
            rows.limits(from_milliseconds(own.arrival[0]), thresholds=own.percents, remaining_below=below)
        for ran_ms, pool, credits in past.debits:
            rows.run(from_milliseconds(ran_ms), credits_of(credits), pool=pool)
    rows.write(client)
    return pasts


def credits_of(millicredits: int) -> Decimal:
    """As the ledger's columns take them."""
    return Decimal(millicredits).scaleb(-3)


@ON_CHDB
def test_billing_periods_are_those_of_the_pure_functions(client: Client, pasts: dict[str, Past]) -> None:
    """For any history of plans, at any instant, SQL and Python name the same periods, allowances and plans."""
    for as_of in AS_OF:
        found = defaultdict(list)
        rows = client.query(
            "SELECT workspace_id, period_start, period_end, allowance, plan "
            "FROM billing_periods_as_of(as_of = {as_of:DateTime64(3, 'UTC')}) ORDER BY workspace_id, period_start",
            parameters={"as_of": as_of},
        ).result_rows
        for name, *tile in rows:
            found[name].append(Tile(*tile))
        as_of_ms = to_milliseconds(as_of)
        expected = {name: by_python for name, past in pasts.items() if (by_python := tiles(past, as_of_ms))}
        assert len(expected) > WORKSPACES // 3
        assert dict(found) == expected


@ON_CHDB
def test_balances_are_the_standings_of_the_pure_functions(client: Client, pasts: dict[str, Past]) -> None:
    """For any past, at any instant, SQL and Python agree on used, allowance, state, period and plan of both pools."""
    seen = set()
    for as_of in AS_OF:
        rows = client.query(
            "SELECT workspace_id, pool, used, allowance, remaining, overage, state, period_start, period_end, plan "
            "FROM balances_as_of(as_of = {as_of:DateTime64(3, 'UTC')})",
            parameters={"as_of": as_of},
        ).result_rows
        found = {(name, Pool(pool)): tuple(rest) for name, pool, *rest in rows}
        for name, past in pasts.items():
            for pool, standing in standings(past, to_milliseconds(as_of)).items():
                terms = standing.terms
                known = (name, pool) in found
                assert known or (standing.used == 0 and not terms.allowance)
                if known:
                    seen.add((pool, standing.state))
                    assert found[name, pool] == (
                        credits_of(standing.used), credits_of(terms.allowance or 0), credits_of(standing.remaining),
                        credits_of(standing.overage), standing.state, terms.period and to_date(terms.period.start),
                        terms.period and to_date(terms.period.end), terms.plan,
                    )  # fmt: skip
    assert len(seen) == 7


@ON_CHDB
def test_usage_by_period_adds_up_to_the_debits(client: Client, pasts: dict[str, Past]) -> None:
    """Every debit lies in exactly one billing period, that of `billing_periods`, and in the running one it is used."""
    ((through, raw),) = client.query(
        "SELECT (SELECT (sum(credits), sum(runs)) FROM usage_by_period), "
        "(SELECT (sum(credits), count()) FROM ledger WHERE kind = 'run')"
    ).result_rows
    assert through == raw
    ((shown, drawing),) = client.query(
        "WITH (workspace_id, table_id, column_id, pool) AS drawer "
        "SELECT (SELECT uniqExact(drawer) FROM usage_by_period), "
        "(SELECT uniqExact(drawer) FROM ledger WHERE kind IN ('run', 'reversal'))"
    ).result_rows
    assert shown == drawing, "what is neither a run nor a reversal has a row"
    ((outside,),) = client.query(
        "WITH (workspace_id, period_start, period_end) AS period SELECT count() FROM usage_by_period "
        "WHERE period_start <= today() AND period NOT IN "
        "(SELECT workspace_id, period_start, period_end FROM billing_periods)"
    ).result_rows
    assert outside == 0
    ((apart,),) = client.query(
        "SELECT count() FROM (SELECT workspace_id, sum(credits) AS drawn FROM usage_by_period "
        "WHERE pool = 'enrichment' AND period_start <= today() AND period_end > today() GROUP BY workspace_id) AS u "
        "JOIN balances AS b ON u.workspace_id = b.workspace_id WHERE b.pool = 'enrichment' AND b.used != u.drawn"
    ).result_rows
    assert apart == 0


class Explaining:
    """A client that keeps the plan of every sum over debits that it answers."""

    def __init__(self, client: Client) -> None:
        self.plans: list[str] = []
        self._client = client

    def query(self, sql: str, **given: Any) -> Any:
        if "kind IN ('run', 'reversal')" in sql:
            plan = self._client.query(f"EXPLAIN projections = 1 {sql}", **given).result_rows
            self.plans.append("\n".join(line for (line,) in plan))
        return self._client.query(sql, **given)


@ON_CHDB
def test_one_workspace_is_read_through_the_projection(client: Client, pasts: dict[str, Past]) -> None:
    """What is asked of a workspace depends on no other one's rows: the filter reaches every table that a view reads,
    and questions of now read no raw run.
    """
    for view in ("usage_by_period", "balances", "billing_periods", "usage_by_column", "usage_by_day"):
        reads = [
            line.strip()
            for (line,) in client.query(
                f"EXPLAIN projections = 1, indexes = 1 SELECT * FROM {view} WHERE workspace_id = 'ws_0007'"
            ).result_rows
            if "ReadFromMergeTree" in line or "workspace_id in" in line
        ]
        assert [line for line in reads if "ReadFromMergeTree (usage)" in line], view
        assert len(reads) == 2 * len([line for line in reads if "ReadFromMergeTree" in line]), view
    for question in (accounts.balance, accounts.periods, accounts.statement):
        asked = Explaining(client)
        question(cast(Client, asked), "ws_0007")
        assert asked.plans
        assert all("ReadFromMergeTree (usage)" in plan for plan in asked.plans), question


def test_a_reversal_is_a_debit_that_gives_back_r11(client: Client) -> None:
    """On the day of its run, under its column: all sums fall by it, and no count of runs does."""
    rows = AccountRows()
    run = rows.run(at("2026-01-20 10:00:00"), 2)
    rows.run(at("2026-01-20 11:00:00"), 3)
    rows.reverse(run, at("2026-03-01"), actor="ada")
    rows.write(client)

    for view in ("usage_by_column", "usage_by_day", "usage_by_period"):
        assert client.query(f"SELECT sum(credits), sum(runs) FROM {view}").result_rows == [(Decimal(3), 2)], view
    assert client.query("SELECT kind, credits, day FROM debits WHERE run_id = %(run)s ORDER BY recorded_at",
                        parameters={"run": str(run)}).result_rows == [
        ("run", Decimal(2), date(2026, 1, 20)), ("reversal", Decimal(-2), date(2026, 1, 20)),
    ]  # fmt: skip
    reversals = client.query("SELECT run_id, day, pool, credits, recorded_at, actor, position FROM reversals")
    assert reversals.result_rows == [
        (run, date(2026, 1, 20), "enrichment", Decimal(-2), at("2026-03-01"), "ada", "account-events[0]@0")
    ]  # fmt: skip


def test_a_late_run_came_when_its_period_had_ended(client: Client) -> None:
    """At the end counts; a run of an earlier day of the running period is not late."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"))
    rows.run(at("2026-02-14 23:59:59"), recorded_at=at("2026-02-14 23:59:59") + SECOND, row_id="at the end")
    rows.run(at("2026-02-13"), recorded_at=at("2026-02-14 23:59:59.999"), row_id="in time")
    rows.run(at("2026-01-03"), recorded_at=at("2026-01-20"), row_id="before the first plan")
    rows.write(client)

    late = client.query("SELECT ran_at, period_start, period_end FROM late_runs ORDER BY ran_at").result_rows
    assert late == [
        (at("2026-01-03"), date(2026, 1, 1), date(2026, 1, 15)),
        (at("2026-02-14 23:59:59"), date(2026, 1, 15), date(2026, 2, 15)),
    ]


def test_a_premium_run_is_never_late(client: Client) -> None:
    """Its pool has no period; an unmetered run of the same hour has one."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"))
    for row_id, pool in (("premium", Pool.PREMIUM), ("free", Pool.NONE)):
        rows.run(at("2026-02-10"), recorded_at=at("2026-02-16"), pool=pool, row_id=row_id)
    rows.write(client)
    assert client.query("SELECT pool FROM late_runs").result_rows == [("none",)]


@pytest.mark.parametrize("zone", ["America/Los_Angeles", "Asia/Tokyo"])
def test_now_is_now_in_every_time_zone_of_the_server(client: Client, zone: str) -> None:
    """A plan of an hour ago is in force, one that takes effect in an hour is not."""
    ((now,),) = client.query("SELECT now64(3, 'UTC')").result_rows
    hour = timedelta(hours=1)
    rows = AccountRows()
    rows.plan(now - hour, "now")
    rows.plan(now + hour, "soon", restart_period=True, recorded_at=now)
    rows.write(client)
    for view in ("balances WHERE pool = 'enrichment'", "billing_periods"):
        found = client.query(f"SELECT plan FROM {view}", settings={"session_timezone": zone}).result_rows
        assert found == [("now",)], view


def test_an_alert_is_listed_once_however_often_it_was_published(client: Client) -> None:
    """After a crash it may stand in the table twice; the first one is shown."""
    names = ["alert_id", "workspace_id", "pool", "kind", "state", "used", "allowance", "thresholds", "period_start",
             "period_end", "plan", "cause", "at", "position", "run_id", "seeded", "published_at"]  # fmt: skip
    alert = [UUID(int=7), "ws_1", "enrichment", "crossed", "warning", 10_000, 20_000, [50], date(2026, 1, 15),
             date(2026, 2, 15), "20k", "run", at("2026-01-20"), "cell-runs[0]@9", UUID(int=8), False]  # fmt: skip
    premium = [UUID(int=9), "ws_1", "premium", "exhausted", "exhausted", 5, 5, [50, 80, 100], NEVER.date(),
               NEVER.date(), "20k", "run", at("2026-01-21"), "cell-runs[0]@11", UUID(int=10), False]  # fmt: skip
    for second, row in enumerate([alert, alert, premium]):
        client.insert("published_alerts", [[*row, at("2026-01-22") + second * SECOND]], column_names=names)

    found = client.query("SELECT * FROM alerts ORDER BY at").named_results()
    (first, second) = list(found)
    assert (first["alert_id"], first["published_at"]) == (UUID(int=7), at("2026-01-22"))
    assert (first["period_start"], first["thresholds"], first["remaining_below"]) == (date(2026, 1, 15), [50], None)
    assert (second["pool"], second["period_start"], second["period_end"]) == ("premium", None, None)
