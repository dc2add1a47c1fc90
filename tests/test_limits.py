"""Terms, standings, lines and alert ids: exact for any numbers, and no two crossings under one id."""

from fractions import Fraction
from typing import Final
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.ledger import Pool
from schemas.limits import AlertKind, State
from streams.rules.limits import (
    FOREVER_MS,
    REMAINING_BELOW,
    Facts,
    Grant,
    Line,
    Standing,
    Terms,
    Thresholds,
    alert_id,
    alert_id_of_time,
    crossed,
    shifted,
    terms_of,
    turned,
)  # fmt: skip
from streams.rules.periods import DAY_MS, Period, PlanChange
from tests.records import STEADY

DAY: Final = 20_468
NOON: Final = DAY * DAY_MS + DAY_MS // 2
credits = st.integers(0, 10**9) | st.integers(0, 10)
percents = st.lists(st.integers(1, 100), max_size=5).map(tuple)


@settings(STEADY)
@given(credits, percents, st.none() | credits, credits)
def test_lines_are_exact(allowance: int, thresholds: tuple[int, ...], below: int | None, used: int) -> None:
    """Percent p stands crossed exactly when used >= p % of the allowance, in thousandths and without rounding."""
    plan = PlanChange(0, (0, 0), "p", allowance, False, thresholds, below)
    standing = Standing(terms_of(Facts((plan,)), Pool.ENRICHMENT, NOON), used)
    expected = {
        p for p in {*(thresholds or (50, 80)), 100} if allowance and Fraction(used) >= Fraction(allowance * p, 100)
    }
    assert {line.percent for line in standing.passed} - {REMAINING_BELOW} == expected
    is_low = below is not None and below < allowance and allowance - used <= below
    assert any(line.percent == REMAINING_BELOW for line in standing.passed) == is_low
    state = State.EXHAUSTED if used >= allowance else State.WARNING if expected or is_low else State.OK
    assert standing.state == state
    assert standing.remaining - standing.overage == allowance - used


@settings(STEADY)
@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=4), percents, st.integers(0, 4 * 10**6), st.integers(1, 4))
def test_premium_lines_are_of_the_newest_grant(
    grants: list[int], thresholds: tuple[int, ...], used: int, together: int
) -> None:
    """Percent p stands crossed exactly when at most (100 - p) % of the newest grant remain: of the last that arrived,
    where some take effect together.
    """
    facts = Facts(
        grants=tuple(Grant(n // together, (n, n), granted) for n, granted in enumerate(grants)),
        thresholds=Thresholds((0, 0), thresholds, None),
    )
    standing = Standing(terms_of(facts, Pool.PREMIUM, NOON), used)
    remaining = sum(grants) - used
    expected = {
        p for p in {*(thresholds or (50, 80)), 100} if Fraction(remaining) <= Fraction((100 - p) * grants[-1], 100)
    }
    assert {line.percent for line in standing.passed} == expected


@settings(STEADY)
@given(credits, st.lists(st.integers(0, 10**8), max_size=8))
def test_each_line_belongs_to_one_record(allowance: int, draws: list[int]) -> None:
    """However debits are cut, the crossings of the parts are those of the whole, each once."""
    terms = terms_of(Facts((PlanChange(0, (0, 0), "p", allowance),)), Pool.ENRICHMENT, NOON)
    used, found = 0, []
    for drawn in draws:
        found += crossed(terms, used, used + drawn)
        used += drawn
    assert found == list(crossed(terms, 0, used))


def test_a_change_of_state_tells_once() -> None:
    """It helped, it hurt, or neither; before the first plan there is nothing to compare."""
    told = {(before, after): shifted(before, after) for before in State for after in State}
    assert {pair for pair, kind in told.items() if kind == AlertKind.RECOVERED} == {
        (State.EXHAUSTED, State.WARNING), (State.EXHAUSTED, State.OK), (State.WARNING, State.OK)
    }  # fmt: skip
    assert {pair for pair, kind in told.items() if kind == AlertKind.EXHAUSTED} == {
        (before, State.EXHAUSTED) for before in (State.OK, State.WARNING, State.UNKNOWN_PLAN)
    }
    assert {pair for pair, kind in told.items() if kind == AlertKind.CROSSED} == {
        (before, State.WARNING) for before in (State.OK, State.UNKNOWN_PLAN)
    }


@pytest.mark.parametrize("at_its_end", [True, False])
def test_only_a_periods_end_begins_a_period(at_its_end: bool) -> None:
    """A plan or a grant of another instant does not, however warned the pool is."""
    facts = Facts((PlanChange(NOON, (NOON, 0), "p", 10),))
    before = Standing(terms_of(facts, Pool.ENRICHMENT, NOON), 9)
    assert before.terms.period is not None
    end = before.terms.period.end * DAY_MS
    instant = end if at_its_end else end - DAY_MS
    kind = turned(before, before._replace(used=0), instant, effective_now=False)
    assert kind == (AlertKind.PERIOD_STARTED if at_its_end else None)


def test_the_last_effect_is_that_of_plans_and_grants() -> None:
    """What an account in memory waits for, also beyond its period."""
    plans = PlanChange(5, (0, 0), "p", 1), PlanChange(9, (0, 1), "p", 1)
    assert Facts().last_effect_ms == 0
    assert Facts(plans).last_effect_ms == 9
    assert Facts(plans, (Grant(12, (0, 2), 1), Grant(3, (0, 3), 1))).last_effect_ms == 12


names = st.text(max_size=8) | st.sampled_from(["a", "a/enrichment", "seeded/a", "a/0", "0/a", "topic/0/1"])


@settings(STEADY, max_examples=300)
@given(st.lists(st.tuples(names, st.sampled_from(list(Pool)), st.integers(0, 3), st.integers(0, 3)), max_size=20))
def test_ids_of_time_are_unique(parts: list[tuple[str, Pool, int, int]]) -> None:
    """Workspaces have any names, slashes too: one id is one (workspace, pool, period, instant)."""
    ids: dict[UUID, tuple[str, Pool, int, int]] = {}
    for name, pool, start, at_ms in parts:
        terms = Terms(pool, Period(start, start + 1), 0, 0, "", (), FOREVER_MS)
        found = alert_id_of_time(name, Standing(terms, 0), at_ms, AlertKind.RECOVERED)
        assert ids.setdefault(found, (name, pool, start, at_ms)) == (name, pool, start, at_ms)


def test_ids_of_records_are_unique() -> None:
    """Topic id, partition, offset, pool, kind and lines: change one, and it is another alert."""
    of_20, of_50 = [Line(10_000, 50), Line(16_000, 80)], [Line(25_000, 50), Line(40_000, 80)]
    crossed_lines = [[], of_20, of_20[:1], of_20[1:], of_50, [Line(10_000, REMAINING_BELOW)]]
    ids = {
        alert_id(topic, partition, offset, pool, kind, lines)
        for topic in ("a", "b") for partition in (0, 1) for offset in (0, 11) for pool in Pool for kind in AlertKind
        for lines in crossed_lines
    }  # fmt: skip
    assert len(ids) == 2 * 2 * 2 * len(Pool) * len(AlertKind) * len(crossed_lines)
