"""Three voices that say the same of a story: the pure fold, the reference, and a real unit with its ledger and SQL."""

import asyncio
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from functools import cache, partial
from itertools import groupby
from typing import Any, Final, NamedTuple

import numpy as np
from clickhouse_connect.driver.client import Client

from creditstream.reference import Expected, ReferenceBilling, ReferenceRater
from schemas.account import LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.catalogue import EXAMPLE_CATALOGUES
from schemas.cell_run import from_milliseconds, to_milliseconds
from schemas.credits import parse_credits
from schemas.ledger import Kind, Pool, number_of
from schemas.limits import LimitAlert
from sinks.accounts import AccountFact
from sinks.ledger import Chain
from streams.rules.balances import NOTHING, Account, Balances, Debits, Notice
from streams.rules.facts import fold_event
from streams.rules.limits import REMAINING_BELOW, Standing
from streams.rules.periods import DAY_MS, to_date
from tests.account_records import PLANS, PLANS_DIR, Step, Story, Topics
from tests.records import Record
from tests.reference_limits import Plan, ReferenceLimits, Told
from tests.unit_bench import NOT_AT_END, Bench

CHUNK: Final = 2_000


class Seen(NamedTuple):
    """A pool at an instant, as all voices say it. ``period``: first day, and first day no longer in it."""

    used: Decimal
    allowance: Decimal
    state: str
    period: tuple[date, date] | None
    plan: str


class Heard(NamedTuple):
    """What one voice says of a story: the pool at each of its checks, and all alerts."""

    seen: list[Seen]
    alerts: list[Told]


class Rated(NamedTuple):
    """One step as the reference raters understand it; ``offset`` on its topic."""

    step: Step
    offset: int
    expected: Expected
    day: int
    """UTC day of the run, or of the run that is reversed."""

    @property
    def position(self) -> str:
        """Which record it is."""
        return f"{'account-events' if self.step.of_account else 'cell-runs'}[0]@{self.offset}"


def rated(steps: Sequence[Step]) -> list[Rated]:
    """The steps by the reference raters, in their order."""
    rater = ReferenceRater(EXAMPLE_CATALOGUES, 0, 1)
    billing = ReferenceBilling(PLANS_DIR, 0, 1, rater.debits)
    days: dict[str, int] = {}
    found = []
    for step, (of_account, (record,)) in zip(steps, _records(steps), strict=True):
        if of_account:
            expected = billing.expect(record.key, record.value)
            day = days.get(str(step.event.run_id), 0) if isinstance(step.event, RunReversed) else 0
        else:
            expected = rater.expect(record.key, record.value, record.timestamp)
            assert isinstance(step.event, dict)
            day = to_milliseconds(datetime.fromisoformat(step.event["ran_at"])) // DAY_MS
            if expected.kind == "run":
                days[step.event["run_id"]] = day
        found.append(Rated(step, record.offset, expected, day))
    return found


def kafka_record(record: Rated) -> Record:
    """The step as Kafka holds it."""
    step = record.step
    return Record(record.offset, step.value, step.workspace_id.encode(), to_milliseconds(step.recorded))


@cache
def _rated_story(story: Story) -> list[Rated]:
    return rated(story.steps)


def _records(steps: Sequence[Step]) -> Iterator[tuple[bool, list[Any]]]:
    topics = Topics()
    for step in steps:
        yield from topics.append([step])


# The reference.


def by_reference(story: Story) -> Heard:
    """`tests.reference_limits`."""
    limits = ReferenceLimits()
    seen = []
    for part, check in _parts(story, _rated_story(story)):
        for record in part:
            refer(limits, record)
        if check:
            limits.come(check.when)
            found = limits.balance(check.pool, check.when)
            seen.append(Seen(found.used, found.allowance or Decimal(0), found.state, found.period, found.plan))
    return Heard(seen, limits.alerts)


def refer(limits: ReferenceLimits, record: Rated) -> None:
    """Feed one record to a reference."""
    at, event, expected = record.step.recorded, record.step.event, record.expected
    if expected.kind == "run":
        limits.run(at, record.position, expected.pool, to_date(record.day), expected.credits)
    elif expected.kind == "reversal":
        limits.reverse(at, record.position, expected.pool, to_date(record.day), -expected.credits)
    elif expected.kind == "plan":
        assert isinstance(event, PlanChanged)
        limits.plan(at, record.position, event.effective_at, plan_of(event))
    elif expected.kind == "grant":
        assert isinstance(event, PremiumGranted)
        limits.grant(at, record.position, event.effective_at, Decimal(event.credits))
    elif expected.kind == "limits":
        assert isinstance(event, LimitsChanged)
        below = None if event.remaining_below is None else Decimal(event.remaining_below)
        percents = () if event.thresholds is None else tuple(sorted({100, *event.thresholds}))
        limits.limits(at, percents, below)


def plan_of(event: PlanChanged) -> Plan:
    """What an event's plan means."""
    plan = PLANS.find(event.plan, 0)
    assert plan is not None
    below = None if plan.remaining_below is None else Decimal(plan.remaining_below).scaleb(-3)
    return Plan(plan.id, Decimal(plan.allowance).scaleb(-3), event.restart_period, plan.thresholds, below)


# The pure fold.


def by_fold(story: Story) -> Heard:
    """`streams.rules.balances`, with nothing around it."""
    balances = Balances(100, 0)
    balances.begin(to_milliseconds(story.steps[0].recorded))
    balances.load({story.workspace_id: NOTHING})
    seen, alerts = [], []
    for part, check in _parts(story, _rated_story(story)):
        for of_account, records in groupby(part, lambda record: record.step.of_account):
            alerts += fold(balances, list(records), of_account)
        if check:
            told = balances.come(to_milliseconds(check.when))
            alerts += [told_by(notice, {}) for notice in told]
            seen.append(seen_of(balances[story.workspace_id].standing(Pool(check.pool))))
    return Heard(seen, alerts)


def fold(balances: Balances, records: Sequence[Rated], of_account: bool) -> list[Told]:
    """Fold records of one topic, as one take or as one chunk."""
    positions = {record.offset if of_account else row: record.position for row, record in enumerate(records)}
    if not of_account:
        return [told_by(notice, positions) for notice in balances.fold(debits_of(records))]
    rows = [row for record in records if (row := account_fact_of(record))]
    return [told_by(notice, positions) for row in rows for notice in fold_event(balances, row)]


def debits_of(records: Sequence[Rated]) -> Debits:
    """Cell runs as the fold takes them."""
    names = sorted({record.step.workspace_id for record in records})
    return Debits(
        workspaces=names,
        codes=np.array([names.index(record.step.workspace_id) for record in records], np.int64),
        pool=np.array([number_of(Pool(record.expected.pool)) for record in records], np.int8),
        credits=np.array([int(record.expected.credits * 1000) for record in records], np.int64),
        day=np.array([record.day for record in records], np.int64),
        recorded_ms=np.array([to_milliseconds(record.step.recorded) for record in records], np.int64),
        offsets=np.array([record.offset for record in records], np.int64),
    )


def account_fact_of(record: Rated) -> AccountFact | None:
    """An account event as its ledger row; None for a copy and a dead letter."""
    step, expected = record.step, record.expected
    if expected.kind in ("dead_letter", "duplicate"):
        return None
    row = AccountFact(
        step.workspace_id, Kind(expected.kind), to_milliseconds(step.recorded), record.offset, 0, "", 0, False, (),
        None, expected.pool, int(expected.credits * 1000), record.day,
    )  # fmt: skip
    match step.event:
        case PlanChanged() as event:
            plan = PLANS.find(event.plan, 0)
            assert plan is not None
            return row._replace(
                effective_ms=to_milliseconds(event.effective_at), plan=plan.id, allowance=plan.allowance,
                restart_period=event.restart_period, thresholds=plan.thresholds, remaining_below=plan.remaining_below,
            )  # fmt: skip
        case PremiumGranted() as event:
            at_ms = to_milliseconds(event.effective_at)
            return row._replace(effective_ms=at_ms, allowance=parse_credits(event.credits))
        case LimitsChanged() as event:
            percents = () if event.thresholds is None else tuple(sorted({100, *event.thresholds}))
            below = None if event.remaining_below is None else parse_credits(event.remaining_below)
            return row._replace(thresholds=percents, remaining_below=below)
    return row


def seen_of(standing: Standing) -> Seen:
    """A standing in the words of all voices."""
    period = standing.terms.period
    return Seen(
        in_credits(standing.used), in_credits(standing.terms.allowance or 0), str(standing.state),
        (to_date(period.start), to_date(period.end)) if period else None, standing.terms.plan,
    )  # fmt: skip


def told_by(notice: Notice, positions: dict[int, str]) -> Told:
    """A notice in the words of all voices."""
    standing = notice.standing
    allowance = standing.terms.allowance or 0
    below = [allowance - line.used_at for line in notice.lines if line.percent == REMAINING_BELOW]
    return Told(
        str(notice.kind), str(standing.terms.pool), str(notice.cause), from_milliseconds(notice.at_ms),
        positions[notice.row] if notice.row >= 0 else "",
        tuple(sorted(line.percent for line in notice.lines if line.percent != REMAINING_BELOW)),
        in_credits(below[0]) if below else None, str(standing.state), in_credits(standing.used), in_credits(allowance),
    )  # fmt: skip


def in_credits(millicredits: int) -> Decimal:
    """Exactly."""
    return Decimal(millicredits).scaleb(-3)


# The unit.


async def by_unit(story: Story, client: Client, number: int) -> Heard:
    """A real unit on chains of its own; ``seen`` is what SQL says, after the unit's own account said the same."""
    # A topic of its own: a new topic on an old ledger begins where the one of its name ended.
    chains = (
        Chain(f"cell-runs-{number}", f"runs-{number}", 0),
        Chain(f"account-events-{number}", f"events-{number}", 0),
    )
    bench = await Bench.open(client, chains=chains, batch_rows=40_000, linger_s=0.01, accounts_max=2)
    task = bench.start()
    topics, delivered = Topics(), 0
    seen = []
    for part, check in _parts(story, story.steps):
        for of_account, records in topics.append(part):
            for first in range(0, len(records), CHUNK):
                bench.deliver(records[first : first + CHUNK], of_account=of_account)
                delivered += 1
            await bench.wait(task, partial(_is_read, bench, of_account, records[-1].offset))
        bench.unit.drain()
        await bench.wait(task, partial(_is_acknowledged, bench, delivered))
        if check:
            await bench.unit.load([story.workspace_id])  # of so few accounts it may have been let go
            account = bench.unit.balances[story.workspace_id]
            await _time_comes(bench, task, account, to_milliseconds(check.when))
            found = seen_by_sql(client, story.workspace_id, check.pool, check.when)
            assert found == seen_of(account.standing(Pool(check.pool)))
            seen.append(found)
    await bench.unit.voice.flush()
    await bench.kill(task)
    return Heard(seen, [told_of(alert) for alert in bench.alerts if alert.workspace_id == story.workspace_id])


async def by_unit_from_backlog(story: Story, client: Client, number: int, account_first: bool) -> list[Told]:
    """The alerts of a real unit that finds both topics full, gets one long before the other, and has the time of the
    last check.
    """
    chains = Chain(f"cell-runs-{number}", f"runs-{number}", 0), Chain(f"account-events-{number}", f"events-{number}", 0)
    bench = await Bench.open(client, chains=chains, batch_rows=40_000, linger_s=0.01)
    parts = Topics().append(story.steps)
    topics = [[record for of, part in parts if of == of_account for record in part] for of_account in (False, True)]
    bench.unread = lambda read: (len(topics[0]) - 1 - read[0], len(topics[1]) - 1 - read[1])
    task = bench.start()
    delivered = 0
    for of_account in (account_first, not account_first):
        for first in range(0, len(topics[of_account]), CHUNK):
            bench.deliver(topics[of_account][first : first + CHUNK], of_account=of_account)
            delivered += 1
        await asyncio.sleep(0.1)
    bench.unit.drain()
    await bench.wait(task, partial(_is_acknowledged, bench, delivered))
    when = max(story.steps[-1].recorded, *(check.when for check in story.checks))
    await _time_comes(bench, task, bench.unit.balances[story.workspace_id], to_milliseconds(when))
    await bench.unit.voice.flush()
    await bench.kill(task)
    return [told_of(alert) for alert in bench.alerts if alert.workspace_id == story.workspace_id]


def _is_read(bench: Bench, of_account: bool, offset: int) -> bool:
    """What is not yet read may be overtaken by the other topic."""
    return bench.unit.read[of_account] == offset


def _is_acknowledged(bench: Bench, chunks: int) -> bool:
    return bench.acknowledged == chunks


async def _time_comes(bench: Bench, task: "asyncio.Task[None]", account: Account, when_ms: int) -> None:
    """Nothing more is on the topics, and the clock says so late."""
    bench.ends_ms = when_ms, when_ms
    await bench.wait(task, lambda: account.until_ms > when_ms)
    bench.ends_ms = NOT_AT_END


def seen_by_sql(client: Client, workspace_id: str, pool: str, when: datetime) -> Seen:
    """The view ``balances`` as of an instant."""
    ((used, allowance, state, start, end, plan),) = client.query(
        "SELECT used, allowance, state, period_start, period_end, plan "
        "FROM balances_as_of(as_of = {when:DateTime64(3, 'UTC')}) "
        "WHERE workspace_id = {name:String} AND pool = {pool:String}",
        parameters={"when": when, "name": workspace_id, "pool": pool},
    ).result_rows
    return Seen(used, allowance, state, (start, end) if start else None, plan)


def told_of(alert: LimitAlert) -> Told:
    """A published alert in the words of all voices, which know of one topic."""
    position = re.sub(r"-\d+\[", "[", alert.position)
    return Told(
        str(alert.kind), str(alert.pool), str(alert.cause), alert.at.astimezone(UTC), position, alert.thresholds,
        None if alert.remaining_below is None else Decimal(alert.remaining_below), str(alert.state),
        Decimal(alert.used), Decimal(alert.allowance),
    )  # fmt: skip


def _parts(story: Story, records: Sequence[Any]) -> Iterator[tuple[Sequence[Any], Any]]:
    """The records up to each check, in their order, and the check; last those after all checks."""
    done = 0
    for check in story.checks:
        yield records[done : check.after], check
        done = check.after
    yield records[done:], None
