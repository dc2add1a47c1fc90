"""Balances: whatever is cut, evicted, loaded or lost on the way, they are the ledger's, and so are the alerts."""

import asyncio
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from itertools import count, groupby, takewhile
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from clickhouse_connect.driver.client import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.cell_run import to_milliseconds
from schemas.ledger import Pool
from sinks.clickhouse import connect
from sinks.migrate import migrate
from streams.rules import balances
from streams.rules.balances import METERED
from streams.rules.facts import openings
from streams.rules.periods import day_of
from streams.unit import Unit
from tests.account_records import Step, Story, at
from tests.ledger_rows import wait_until_grown
from tests.limit_histories import NAMES, SILENCE_MAX, Life, histories, live, referred
from tests.limit_voices import (
    Rated,
    Seen,
    account_fact_of,
    debits_of,
    kafka_record,
    rated,
    seen_by_sql,
    seen_of,
    told_of,
)
from tests.records import STEADY
from tests.reference_limits import ReferenceLimits, Told
from tests.unit_bench import Bench

NUMBERS: Final = count(1)


def lived(records: list[Rated], dice: random.Random, accounts_max: int) -> Life:
    """A life full of accidents: takes of any length, late inserts, evictions, crashes and commits at random."""
    life = Life(accounts_max)
    at = [0, 0]
    by_topic = [[r for r in records if r.step.of_account == of_account] for of_account in (False, True)]
    while sum(at) < len(records):
        following = records_from(records, at)
        of_account = following[0].step.of_account
        part = list(takewhile(lambda r: r.step.of_account == of_account, following[: dice.choice([1, 1, 2, 5])]))  # noqa: B023
        (life.take_events if of_account else life.take)(part)
        at[of_account] += len(part)
        life.assert_used()
        if dice.random() < 0.5:
            life.write(dice.choice([None, 1]))
        if dice.random() < 0.5:
            life.tell_states()
        if dice.random() < 0.3 and not life.unwritten:
            life.commit()
        if dice.random() < 0.5 or part[-1].step.recorded - life.heard > SILENCE_MAX:
            life.come(part[-1].step.recorded)
        if dice.random() < 0.2:
            life.crash()
            at = [mark + 1 for mark in life.marks]
    life.write()
    life.come(records[-1].step.recorded)
    life.tell_states()
    assert at == [len(topic) for topic in by_topic]
    return life


def records_from(records: list[Rated], at: list[int]) -> list[Rated]:
    """What has not been taken in, in the order of time."""
    return [record for record in records if record.offset >= at[record.step.of_account]]


@settings(STEADY, max_examples=100)
@given(histories(), st.integers(0, 1 << 32), st.sampled_from([1, 2, 100]))
def test_f19_accidents_change_no_balance_and_no_alert(steps: list[Step], seed: int, accounts_max: int) -> None:
    """Cuts, evictions, loads, crashes: balances are the reference's, alerts and ids those of the uncut fold."""
    records = rated(steps)
    reference = referred(records)
    expected = Counter((name, told) for name, limits in reference.items() for told in limits.alerts)

    uncut = live(records)
    assert Counter((name, told) for (name, _), told in uncut.told.items()) == expected

    life = lived(records, random.Random(seed), accounts_max)
    assert life.told == uncut.told
    assert_balances(life, reference, records)
    assert_states(life, reference, records)
    life.crash()
    life.come(records[-1].step.recorded)
    assert life.told == uncut.told
    assert_balances(life, reference, records)
    life.commit()
    life.crash()
    assert len(life.balances) == len(NAMES)
    assert_balances(life, reference, records)


def assert_balances(life: Life, reference: dict[str, ReferenceLimits], records: list[Rated]) -> None:
    """Every account in memory is where the reference says; one that waits for nothing may not know yet that a period
    has begun: its next record will tell it.
    """
    now = records[-1].step.recorded
    for account in life.balances:
        if account.name in reference and account.until_ms > to_milliseconds(now):
            for pool in METERED:
                found = reference[account.name].balance(pool, now)
                seen = Seen(found.used, found.allowance or Decimal(0), found.state, found.period, found.plan)
                assert seen_of(account.standing(pool)) == seen, account.name


def assert_states(life: Life, reference: dict[str, ReferenceLimits], records: list[Rated]) -> None:
    """What was told last of a pool is so, unless a period has begun since for one that waits for nothing."""
    for (name, pool), told in life.states.items():
        found = reference[name].balance(pool, records[-1].step.recorded)
        if told.period == found.period:
            assert (told.used, told.state) == (found.used, found.state), name


def test_f19_who_may_be_evicted() -> None:
    """Who was touched longest ago: not with rows above the mark, not with a state untold, not while waiting."""
    idle, busy, warned = Story("ws_a"), Story("ws_b"), Story("ws_c")
    warned.plan("4", at("Jan 15"))
    warned.runs(2, at("Jan 16"))
    idle.run(at("Jan 17"))
    busy.run(at("Jan 18"))
    life = Life(1)
    for record in rated([*warned.steps, *idle.steps, *busy.steps]):
        (life.take_events if record.step.of_account else life.take)([record])

    def left(durable: int, durable_events: int = 0) -> list[str]:
        life.balances.evict(durable, durable_events)
        return sorted(account.name for account in life.balances)

    assert left(durable=3) == ["ws_a", "ws_b", "ws_c"], "their states are not told"
    life.tell_states()
    assert left(durable=1) == ["ws_a", "ws_b", "ws_c"], "their rows are on their way"
    assert left(durable=2) == ["ws_b", "ws_c"]
    assert left(durable=3) == ["ws_c"], "it waits for its period's end"
    assert left(durable=3) == ["ws_c"]


def test_f19_who_has_events_above_the_mark_is_not_evicted() -> None:
    """Its plan is not in the ledger yet: loaded from there, it would have none."""
    planned, busy = Story("ws_a"), Story("ws_b")
    planned.plan("4", at("Jan 15"))
    busy.run(at("Jan 18"))
    life = Life(1)
    for record in rated([*planned.steps, *busy.steps]):
        (life.take_events if record.step.of_account else life.take)([record])
    life.tell_states()
    life.balances.evict(-1, -1)
    assert "ws_a" in life.balances
    life.balances.evict(-1, 0)
    assert "ws_a" not in life.balances


def test_f19_an_eviction_looks_at_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many accounts must stay beyond the bound, a take pays for some; those then come after all others."""
    monkeypatch.setattr(balances, "EVICTED_AT_ONCE", 3)
    names = [f"ws_{number:02}" for number in range(20)]
    now_ms = to_milliseconds(at("Jan 16"))
    held = balances.Balances(1, now_ms)
    for name in names:
        story = Story(name)
        story.plan("4", at("Jan 15"))
        (plan,) = [account_fact_of(record) for record in rated(story.steps)]
        assert plan
        held.load(openings([name], [plan], [(name, Pool.ENRICHMENT, day_of(now_ms), 2_000)]))  # it waits for a period
    held.evict(0, 0)  # as many as were loaded
    assert [account.name for account in held] == names
    held.evict(0, 0)
    assert [account.name for account in held] == names[3:] + names[:3]


def test_f19_who_was_touched_longest_ago_is_evicted_down_to_the_bound() -> None:
    """A bound that holds lets nobody go."""
    names = ["ws_a", "ws_b", "ws_c", "ws_a"]
    stories = [Story(name) for name in names]
    for hour, story in enumerate(stories):
        story.run(at(f"Jan 15 0{hour}:00"))
    held = balances.Balances(2, to_milliseconds(at("Jan 15")))
    held.load(dict.fromkeys(names, balances.NOTHING))
    for record in rated([step for story in stories for step in story.steps]):
        held.fold(debits_of([record]))
    held.moved.clear()
    for _ in range(2):
        held.evict(3, -1)
        assert [account.name for account in held] == ["ws_c", "ws_a"]


def test_a_cancelled_workspace_that_stands_still_is_told_of() -> None:
    """It was ok when the cancelling plan came: with the next period nothing remains, and each one after tells so."""
    cancelled, other = Story("ws_a"), Story("ws_b")
    cancelled.plan("10", at("Jan 15"))
    cancelled.plan("cancelled", at("Jan 20"))
    other.run(at("Apr 20"))
    records = rated([*cancelled.steps, *other.steps])
    life, reference = live(records), referred(records)["ws_a"]
    assert Counter(life.told.values()) == Counter(reference.alerts)
    assert [(told.kind, told.cause) for told in life.told.values()] == [("period_started", "time")] * 2
    told = life.states["ws_a", Pool.ENRICHMENT]
    assert (told.state, told.period) == ("exhausted", reference.balance(Pool.ENRICHMENT, at("Apr 20")).period)


def test_alerts_of_a_take_are_told_in_kafkas_order() -> None:
    """Whatever workspace, and whatever kind they are of."""
    late, early = Story("ws_a"), Story("ws_b")
    for story in (late, early):
        story.plan("4", at("Jan 15"))
    plans = [account_fact_of(record) for record in rated([*late.steps, *early.steps])]
    for story, hour in ((early, 1), (early, 2), (late, 3), (late, 4), (early, 5), (early, 6)):
        story.run(at(f"Jan 16 0{hour}:00"))
    steps = sorted([*late.steps[1:], *early.steps[1:]], key=lambda step: step.recorded)
    held = balances.Balances(2, to_milliseconds(at("Jan 16")))
    held.load(openings(["ws_a", "ws_b"], filter(None, plans), []))
    told = held.fold(debits_of(rated(steps)))
    assert [(notice.workspace_id, notice.row) for notice in told] == [("ws_b", 1), ("ws_a", 3), ("ws_b", 5)]


def test_an_instant_of_one_pool_is_no_news_of_the_other() -> None:
    """What a planned grant changes is told at once, by itself; of the other pool ``used`` has moved."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.grant("1", at("Jan 15"))
    story.run(at("Jan 16"), "clearbit_enrich_company")
    story.grant("5", at("Jan 18"), at("Jan 16 12:00"))
    story.run(at("Jan 19"))
    life = Life(accounts_max=100)
    for record in rated(story.steps):
        life.tell_states()
        (life.take_events if record.step.of_account else life.take)([record])
    assert (life.balances.moved, list(life.balances.urgent)) == (
        {("ws_1", Pool.ENRICHMENT)}, [("ws_1", Pool.PREMIUM)]
    )  # fmt: skip
    assert [(told.kind, told.cause) for told in life.told.values()][-1] == ("recovered", "time")


@pytest.mark.parametrize("effective", ["Jan 15", "Mar 15"])
def test_a_first_plan_writes_the_states_of_both_pools(effective: str) -> None:
    """Also one that is still to take effect, of a workspace that gates have heard nothing of."""
    story = Story()
    story.plan("10", at(effective), at("Jan 15"))
    life = Life(accounts_max=100)
    life.take_events(rated(story.steps))
    assert list(life.balances.urgent) == [("ws_1", Pool.ENRICHMENT), ("ws_1", Pool.PREMIUM)]


def test_a_line_is_seen_ahead_at_the_pace_of_what_was_drawn() -> None:
    """What an alert will say is asked for before it is due, and not of a pool that stands still."""
    story = Story()
    story.plan("10", at("Jan 15"))
    now_ms = to_milliseconds(at("Jan 16"))
    opening = openings(["ws_1"], filter(None, map(account_fact_of, rated(story.steps))), [])["ws_1"]
    account = balances.Account("ws_1", opening, now_ms)
    seen = []
    for credits in (1_000, 1_000, 0, 1_999):
        account.draw(Pool.ENRICHMENT, day_of(now_ms), credits)
        seen.append(account.look_ahead(Pool.ENRICHMENT))
    assert seen == [False, True, False, True]


def test_an_account_that_lives_on_keeps_its_last_days() -> None:
    """Those that a period may hold are there however long it is in memory; what is drawn late for an earlier one is
    none of theirs.
    """
    account = balances.Account("ws_1", balances.NOTHING, to_milliseconds(at("Jan 15")))
    first = day_of(to_milliseconds(at("Jan 15")))
    for day in range(first, first + 200):
        account.draw(Pool.ENRICHMENT, day, day)
        kept = range(max(first, day - balances.DAYS_KEPT + 1), day + 1)
        assert [account.used_on(each) for each in kept] == list(kept)
    for late in range(first - 50, kept[0] - balances.DAYS_KEPT):
        account.draw(Pool.ENRICHMENT, late, 1)
    assert [account.used_on(each) for each in kept] == list(kept)


def test_runs_ahead_of_the_broker_move_the_state_when_their_period_begins() -> None:
    """They drew from it before it began: a gate that goes over the edge by itself would believe it whole."""
    story = Story("ws_1")
    story.plan("4", at("Jan 15"))
    for second in range(4):
        story.run(at("Feb 15 00:00:01"), recorded=at(f"Feb 14 23:58:0{second}"))
    life = Life(accounts_max=100)
    plan, *runs = rated(story.steps)
    life.take_events([plan])
    for run in runs:
        life.take([run])
    life.balances.urgent.clear()
    assert life.balances.come(to_milliseconds(at("Feb 15"))) == [], "no record crossed a line of its period"
    assert ("ws_1", Pool.ENRICHMENT) in life.balances.urgent
    assert seen_of(life.balances["ws_1"].enrichment)[:3] == (4, 4, "exhausted")


def test_an_event_that_lags_behind_the_runs_skips_no_instant() -> None:
    """Received before a period's end and taken in when other runs have passed it: the end is told by time, as ever."""
    warned, other = Story("ws_a"), Story("ws_b")
    warned.plan("10", at("Jan 15"))
    warned.runs(10, at("Jan 16"), at("Jan 17"))
    other.run(at("Feb 15 01:00"))
    warned.plan("20", at("Feb 14 23:00"))
    life = Life(100)
    for record in rated([*warned.steps[:-1], *other.steps, warned.steps[-1]]):
        (life.take_events if record.step.of_account else life.take)([record])
    assert [(told.kind, told.cause, told.at) for told in life.told.values()][3:] == [
        ("period_started", "time", at("Feb 15"))
    ]
    assert seen_of(life.balances["ws_a"].enrichment)[:3] == (0, 20, "ok")


async def live_through(client: Client, records: list[Rated], dice: random.Random) -> dict[UUID, Told]:
    """Real units, one after the other, each killed at some moment; every alert that any of them published."""
    told: dict[UUID, Told] = {}
    committed: list[int | None] = [0, 0]

    async def insert_slowly(function: Any, *args: Any) -> Any:
        await asyncio.sleep(dice.choice([0, 0, 0.03]))
        return await asyncio.get_running_loop().run_in_executor(writer, function, *args)

    finished = False
    while not finished:
        with ThreadPoolExecutor(1) as writer:  # left once what a killed unit has sent is in
            bench = await Bench.open(client, committed=committed, accounts_max=2, batch_rows=3, in_writer=insert_slowly)
            task = bench.start()
            finished = await live_until(bench, task, records, dice)
            await bench.kill(task)
        await bench.unit.voice.flush()
        committed = bench.committed
        for alert in bench.alerts:
            assert told.setdefault(alert.alert_id, told_of(alert)) == told_of(alert), "one id for two crossings"
    return told


async def live_until(bench: Bench, task: "asyncio.Task[None]", records: list[Rated], dice: random.Random) -> bool:
    """Feed a unit what its ledger has not; False when it is to be killed before the end."""
    unit = bench.unit
    left = records_from(records, [mark + 1 for mark in unit.folded])
    for of_account, part in groupby(left, lambda record: record.step.of_account):
        for ready in in_threes(list(part)):
            now_ms = to_milliseconds(ready[-1].step.recorded)
            bench.ends_ms = now_ms, now_ms
            bench.deliver([kafka_record(record) for record in ready], of_account=of_account)
            if dice.random() < 0.1:
                return False
            await bench.wait(task, partial(has_come, unit, of_account, ready[-1].offset, now_ms))
    unit.drain()
    await bench.wait(task, lambda: unit.is_settled and unit.mark.last == unit.read[0])
    return True


def in_threes(records: list[Rated]) -> list[list[Rated]]:
    """Chunks as Kafka may deliver them."""
    return [records[first : first + 3] for first in range(0, len(records), 3)]


def has_come(unit: Unit, of_account: bool, offset: int, now_ms: int) -> bool:
    """Whether it has read so far, and heard the clock."""
    return unit.read[of_account] == offset and not any(a.waits and a.until_ms <= now_ms for a in unit.balances)


@settings(STEADY, max_examples=3)
@given(histories(min_size=30), st.integers(0, 1 << 32))
def test_f19_real_units_and_a_slow_ledger(chdb_dir: Path, steps: list[Step], seed: int) -> None:
    """Units that load, evict and die while inserts are slow: SQL's balances and all alerts are the reference's."""
    records = rated(steps)
    reference = referred(records)
    database = f"lives_{next(NUMBERS)}"
    with pytest.MonkeyPatch.context() as patch, connect(f"chdb://{chdb_dir}?database={database}") as client:
        patch.setattr("streams.unit.TICK_S", 0.01)
        migrate(client)
        wait_until_grown(client)
        told = asyncio.run(live_through(client, records, random.Random(seed)))
        assert Counter(told.values()) == Counter(told for limits in reference.values() for told in limits.alerts)
        now = records[-1].step.recorded
        for name, limits in reference.items():
            for pool in METERED:
                found = limits.balance(pool, now)
                seen = Seen(found.used, found.allowance or Decimal(0), found.state, found.period, found.plan)
                assert seen_by_sql(client, name, pool, now) == seen, name
        client.command(f"DROP DATABASE {database} SYNC")
