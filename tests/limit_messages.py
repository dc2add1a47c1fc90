"""Limit messages: what left on both topics, and what should have, by a slow second fold of the ledger's rows.

The reference is written from the charge rules and shares nothing with `streams`: exact fractions of credits, every
standing from sums over what came before. It folds a partition in the order in which its rows were written, and for any
other order of the two topics it says what a run or an event would have told (`Reference.explains`, `Reference.untold`).
"""

import time
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from functools import cache
from itertools import accumulate, product
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from confluent_kafka import Consumer, KafkaError, TopicPartition

from schemas.limits import LimitAlert, LimitState
from streams.kafka.topics import LIMIT_ALERTS, LIMIT_STATES, Broker, arrived
from streams.settings import Settings

SILENCE_S_MAX: Final = 30.0
SMALL_PLANS: Final = """
version = 1
effective_from = 2020-01-01T00:00:00Z
plans = [
    { id = "p200", allowance = "200" },
    { id = "p400", allowance = "400", thresholds = [25, 50, 75, 90] },
    { id = "p900", allowance = "900", remaining_below = "30" },
    { id = "p2500", allowance = "2500" },
]
"""
SMALL_PLAN_NAMES: Final = ("p200", "p400", "p900", "p2500")
ENRICHMENT, PREMIUM = "enrichment", "premium"
ROWS: Final = (
    "SELECT kafka_partition, topic, kafka_offset, toString(kind), workspace_id, toString(pool), toString(credits), "
    "toString(toDate(ran_at)), toUnixTimestamp64Milli(recorded_at), toUnixTimestamp64Milli(effective_at), "
    "toString(plan), toString(allowance), thresholds, toString(remaining_below) FROM ledger "
    "WHERE kind IN ('run', 'reversal', 'plan', 'grant', 'limits') "
    "ORDER BY kafka_partition, mark_read_at, topic LIKE '%account-events', kafka_offset"
)
"""All that moves a balance or its limits, in the order in which it was folded."""


class LedgerRow(NamedTuple):
    """One row of `ROWS`."""

    partition: int
    topic: str
    offset: int
    kind: str
    workspace_id: str
    pool: str
    credits: Fraction
    day: date
    recorded_ms: int
    effective_ms: int
    plan: str
    allowance: Fraction
    thresholds: tuple[int, ...]
    below: Fraction | None

    @property
    def position(self) -> str:
        """Where it lies in Kafka."""
        return f"{self.topic}[{self.partition}]@{self.offset}"


class Told(NamedTuple):
    """What of an alert is decided by the rules, and no courtesy."""

    workspace_id: str
    pool: str
    kind: str
    position: str
    thresholds: tuple[int, ...]
    below: Fraction | None
    state: str
    used: Fraction
    allowance: Fraction


class Stands(NamedTuple):
    """Where a pool stands."""

    state: str
    used: Fraction
    allowance: Fraction
    thresholds: tuple[int, ...]
    below: Fraction | None
    plan: str
    period: tuple[date, date] | None


class Lines(NamedTuple):
    """The terms under which a pool's ``used`` is judged; ``whole``: of which the percents are."""

    allowance: Fraction | None
    whole: Fraction
    percents: tuple[int, ...]
    below: Fraction | None

    def passed(self, used: Fraction) -> tuple[int | None, ...]:
        """What stands crossed, as percents; None: the absolute line."""
        allowance = self.allowance
        if not allowance:
            return ()
        crossed: list[int | None] = [
            percent for percent in self.percents if allowance - used <= (100 - percent) * self.whole / 100
        ]
        if self.below is not None and self.below < allowance and allowance - used <= self.below:
            crossed.append(None)
        return tuple(crossed)

    def state(self, used: Fraction) -> str:
        """The limit state."""
        if self.allowance is None:
            return "unknown_plan"
        if used >= self.allowance:
            return "exhausted"
        return "warning" if self.passed(used) else "ok"


def small_plans(directory: Path) -> str:
    """A plan list whose plans a test can use up; for the setting ``plans_dir``."""
    directory.mkdir()
    (directory / "small.toml").write_text(SMALL_PLANS)
    return str(directory)


def ledger_rows(found: Iterable[Sequence[Any]]) -> list[LedgerRow]:
    """The answer to `ROWS`."""
    rows = []
    for (
        partition,
        topic,
        offset,
        kind,
        name,
        pool,
        credits,
        day,
        recorded,
        effective,
        plan,
        given,
        percents,
        under,
    ) in found:
        below = None if Fraction(under) < 0 else Fraction(under)
        rows.append(
            LedgerRow(
                partition, topic, offset, kind, name, pool, Fraction(credits), date.fromisoformat(day), recorded,
                effective, plan, Fraction(given), tuple(percents), below,
            )
        )  # fmt: skip
    return rows


class Workspace:
    """One workspace's runs and account events, each in Kafka's order, and in the order in which they were folded."""

    def __init__(self, name: str, rows: Sequence[LedgerRow]) -> None:
        self.name = name
        self.rows = [row for row in rows if row.pool != "none" or row.kind == "limits"]
        self.runs = [row for row in self.rows if row.kind == "run"]
        self.events = [row for row in self.rows if row.kind != "run"]
        self.lines = cache(self._lines)
        self.period = cache(self._period)
        self._drawn = cache(self._sums)

    def tells(self, runs: int, events: int, is_run: bool) -> list[Told]:
        """What the record tells that comes after so many runs and so many events."""
        row = self.runs[runs] if is_run else self.events[events]
        after = (runs + is_run, events + (not is_run))
        told = []
        for pool in (ENRICHMENT, PREMIUM):
            old, new = self.stands(pool, runs, events), self.stands(pool, *after)
            lines = _all(new)
            if is_run:
                lines = tuple(line for line in lines if line not in _all(old))
                kind = ("exhausted" if 100 in lines else "crossed") if lines else ""
            else:
                kind = _shifted(old.state, new.state) if row.kind != "limits" else ""
            if kind:
                percents = tuple(sorted(line for line in lines if line is not None))
                below = self.lines(pool, after[1]).below if None in lines else None
                told.append(
                    Told(self.name, pool, kind, row.position, percents, below, new.state, new.used, new.allowance)
                )
        return told

    def is_told(self, published: set[Told]) -> bool:
        """Whether there is an order of its runs and its events in which all that they tell was published."""
        ends = len(self.runs), len(self.events)
        reached = {(0, 0)}
        for runs, events in product(range(ends[0] + 1), range(ends[1] + 1)):
            if (runs, events) in reached:
                if runs < ends[0] and published.issuperset(self.tells(runs, events, True)):
                    reached.add((runs + 1, events))
                if events < ends[1] and published.issuperset(self.tells(runs, events, False)):
                    reached.add((runs, events + 1))
        return ends in reached

    def stands(self, pool: str, runs: int, events: int) -> Stands:
        """Where a pool stands after its first ``runs`` and ``events``."""
        lines, used = self.lines(pool, events), self.used(pool, runs, events)
        passed = lines.passed(used)
        return Stands(
            lines.state(used),
            used,
            lines.allowance or Fraction(0),
            tuple(sorted(line for line in passed if line is not None)),
            lines.below if None in passed else None,
            self._plans(events)[-1].plan if self._plans(events) else "",
            self.period(events) if pool == ENRICHMENT else None,
        )

    def used(self, pool: str, runs: int, events: int) -> Fraction:
        """The sum of the pool's debits, of the running period where it has one."""
        start, end = self.period(events) if pool == ENRICHMENT else (date.min, date.max)
        reversed_ = [row for row in self.events[:events] if row.kind == "reversal" and row.pool == pool]
        given_back = sum((row.credits for row in reversed_ if start <= row.day < end), Fraction(0))
        return self._drawn(pool, start, end)[runs] + given_back

    def _sums(self, pool: str, start: date, end: date) -> list[Fraction]:
        counts = (row.credits if row.pool == pool and start <= row.day < end else Fraction(0) for row in self.runs)
        return list(accumulate(counts, initial=Fraction(0)))

    def _plans(self, events: int) -> list[LedgerRow]:
        known = [row for row in self.events[:events] if row.kind == "plan"]
        standing = {row.effective_ms: row for row in sorted(known, key=lambda row: row.offset)}
        return [standing[at] for at in sorted(standing)]

    def _period(self, events: int) -> tuple[date, date]:
        """That of today: from the day of the first plan, which is less than a month ago; else the calendar month."""
        today = datetime.now(UTC).date()
        plans = self._plans(events)
        start = _day(plans[0].effective_ms) if plans else today.replace(day=1)
        following = (start.replace(day=1) + timedelta(days=32)).replace(day=1)
        last = (following + timedelta(days=32)).replace(day=1) - timedelta(days=1)
        end = min(following.replace(day=min(start.day, last.day)), last)
        assert start <= today < end, "the reference knows one period"
        return start, end

    def _lines(self, pool: str, events: int) -> Lines:
        plans = self._plans(events)
        own = [row for row in self.events[:events] if row.kind == "limits"][-1:]
        plan = plans[-1:]
        percents = next((row.thresholds for row in (*own, *plan) if row.thresholds), (50, 80, 100))
        below = next((row.below for row in (*own, *plan) if row.below is not None), None)
        if pool == PREMIUM:
            grants = [row for row in self.events[:events] if row.kind == "grant"]
            newest = max(grants, key=lambda row: (row.effective_ms, row.recorded_ms, row.offset), default=None)
            whole = newest.allowance if newest else Fraction(0)
            return Lines(sum((row.allowance for row in grants), Fraction(0)), whole, _with_100(percents), below)
        if not plans:
            return Lines(None, Fraction(0), (), None)
        first = _day(plans[0].effective_ms)
        opened = [row for row in plans if _day(row.effective_ms) == first][-1]
        allowance = max(row.allowance for row in (opened, *plans) if row is opened or _day(row.effective_ms) > first)
        return Lines(allowance, allowance, _with_100(percents), below)


def _with_100(percents: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({100, *percents}))


def _all(stands: Stands) -> tuple[int | None, ...]:
    return (*stands.thresholds, *([None] if stands.below is not None else []))


def _day(milliseconds: int) -> date:
    return datetime.fromtimestamp(milliseconds // 1000, UTC).date()


def _shifted(before: str, after: str) -> str:
    severity = ("ok", "warning", "exhausted")
    if after == "unknown_plan":
        return ""
    change = severity.index(after) - severity.index("ok" if before == "unknown_plan" else before)
    if not change:
        return ""
    return "recovered" if change < 0 else "exhausted" if after == "exhausted" else "crossed"


class Reference:
    """The second fold of a whole ledger."""

    def __init__(self, found: Iterable[Sequence[Any]]) -> None:
        rows = ledger_rows(found)
        names = dict.fromkeys(row.workspace_id for row in rows)
        self.workspaces = {name: Workspace(name, [row for row in rows if row.workspace_id == name]) for name in names}
        self._by_position = {
            row.position: (workspace, number, row.kind == "run")
            for workspace in self.workspaces.values()
            for group in (workspace.runs, workspace.events)
            for number, row in enumerate(group)
        }

    def crossings(self) -> set[Told]:
        """Every alert that the ledger implies, by the order in which it was written."""
        told: set[Told] = set()
        for workspace in self.workspaces.values():
            runs = events = 0
            for row in workspace.rows:
                is_run = row.kind == "run"
                told.update(workspace.tells(runs, events, is_run))
                runs, events = runs + is_run, events + (not is_run)
        return told

    def untold(self, published: set[Told]) -> set[Told]:
        """Crossings that the ledger implies and nobody was told. When a dead worker's insert lands late, its rows stand
        before others that its successor folded first: nothing is missed where another order tells what was published.
        """
        missing = self.crossings() - published
        whole = {name for name in {told.workspace_id for told in missing} if self.workspaces[name].is_told(published)}
        return {told for told in missing if told.workspace_id not in whole}

    def explains(self, told: Told) -> bool:
        """Whether some order of the two topics makes its record tell this."""
        if told.position not in self._by_position:
            return False
        workspace, number, is_run = self._by_position[told.position]
        others = range(len(workspace.events if is_run else workspace.runs) + 1)
        orders = ((number, other) if is_run else (other, number) for other in others)
        return any(told in workspace.tells(*order, is_run) for order in orders)

    def states(self) -> dict[tuple[str, str], Stands]:
        """Where every pool stands in the end."""
        return {
            (name, pool): workspace.stands(pool, len(workspace.runs), len(workspace.events))
            for name, workspace in self.workspaces.items()
            for pool in (ENRICHMENT, PREMIUM)
        }

    def told_pools(self) -> set[tuple[str, str]]:
        """Pools of which there must be a state: those that were drawn in the running period, and all of a workspace
        with a plan. What is dated in an earlier one moves nothing that a gate asks for.
        """
        drawn = {key for key, stands in self.states().items() if stands.used}
        planned = {name for name, it in self.workspaces.items() if any(row.kind == "plan" for row in it.events)}
        return drawn | {(name, pool) for name in planned for pool in (ENRICHMENT, PREMIUM)}


def told_by(alert: LimitAlert) -> Told:
    """What an alert says, but for its courtesies."""
    below = None if alert.remaining_below is None else Fraction(alert.remaining_below)
    return Told(
        alert.workspace_id, str(alert.pool), str(alert.kind), alert.position, alert.thresholds, below,
        str(alert.state), Fraction(alert.used), Fraction(alert.allowance),
    )  # fmt: skip


def stands_by(state: LimitState) -> Stands:
    """What a state says, but for its origin."""
    period = (state.period_start, state.period_end) if state.period_start and state.period_end else None
    return Stands(
        str(state.state), Fraction(state.used), Fraction(state.allowance), state.thresholds,
        None if state.remaining_below is None else Fraction(state.remaining_below), state.plan, period,
    )  # fmt: skip


_alert: Final = msgspec.json.Decoder(LimitAlert).decode
_state: Final = msgspec.json.Decoder(LimitState).decode


def published_alerts(settings: Settings) -> list[LimitAlert]:
    """All of ``limit-alerts``, each partition in its order."""
    return [_alert(value) for value in _values(settings, LIMIT_ALERTS)]


def published_states(settings: Settings) -> list[LimitState]:
    """All of ``limit-states`` that compaction has left, each partition in its order."""
    return [_state(value) for value in _values(settings, LIMIT_STATES)]


def newest_states(settings: Settings) -> dict[tuple[str, str], LimitState]:
    """(workspace, pool) → the last state on the topic."""
    return {(state.workspace_id, str(state.pool)): state for state in published_states(settings)}


def _values(settings: Settings, topic: str) -> list[bytes]:
    name = settings.topic(topic)
    ranges = Broker(settings).log_ranges(name, range(settings.partitions))
    left = {partition for partition, found in ranges.items() if found.end > found.start}
    consumer = Consumer(
        {
            "bootstrap.servers": settings.kafka_bootstrap, "group.id": f"{name}-reader", "enable.auto.commit": False,
            "enable.partition.eof": True, "fetch.queue.backoff.ms": 5, "fetch.wait.max.ms": 10, "log_level": 0,
        }
    )  # fmt: skip
    values: dict[int, list[bytes]] = {partition: [] for partition in sorted(left)}
    deadline = time.monotonic() + SILENCE_S_MAX
    try:
        consumer.assign([TopicPartition(name, partition, ranges[partition].start) for partition in left])
        while left:
            assert time.monotonic() < deadline, f"{name} cannot be read to its end"
            for message in arrived(consumer, 0.2, 1000):
                error = message.error()
                if error and error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition())
                elif not error:
                    values[message.partition()].append(message.value())
    finally:
        consumer.close()
    return [value for partition in values.values() for value in partition]


class Verdict(NamedTuple):
    """What left on both topics beside what the ledger implies."""

    alerts: int
    """Distinct ones: a replay may have sent one again."""
    implied: int
    """Crossings, by the order in which the ledger was written."""
    untold: set[Told]
    """See `Reference.untold`."""
    unexplained: set[Told]
    """Alerts of which no order of the two topics is the reason."""
    ambiguous_ids: set[str]
    """Ids that stand for two crossings, or share one."""
    pools: int
    without_state: set[tuple[str, str]]
    wrong_states: dict[tuple[str, str], tuple[Stands, Stands]]
    """What was said last, and what the ledger says."""


def judge(settings: Settings, reference: Reference) -> Verdict:
    """Compare everything that was published under these settings with a second fold."""
    alerts = published_alerts(settings)
    published, implied = {told_by(alert) for alert in alerts}, reference.crossings()
    whats: dict[str, set[Any]] = {}
    names: dict[Any, set[str]] = {}
    for alert in alerts:
        lines = alert.thresholds, alert.remaining_below, alert.allowance
        name, what = str(alert.alert_id), (alert.position, alert.pool, alert.kind, *lines)
        whats.setdefault(name, set()).add(what)
        names.setdefault(what, set()).add(name)
    shared = {name for found in names.values() if len(found) > 1 for name in found}
    states = {key: stands_by(state) for key, state in newest_states(settings).items()}
    balances = reference.states()
    return Verdict(
        alerts=len(whats),
        implied=len(implied),
        untold=reference.untold(published),
        unexplained={told for told in published - implied if not reference.explains(told)},
        ambiguous_ids={name for name, found in whats.items() if len(found) > 1} | shared,
        pools=len(states),
        without_state=reference.told_pools() - states.keys(),
        wrong_states={key: (state, balances[key]) for key, state in states.items() if state != balances[key]},
    )
