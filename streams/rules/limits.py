"""Limits: where a pool stands, and what it tells when it moves. Pure: no clock, no I/O.

*Terms* are what holds of a pool from one instant to the next at which time or an account event changes it: period,
allowance, and the *lines* at which people are told. They follow from plans, grants and the workspace's own thresholds
alone. A *standing* is terms and what was used under them; everything that a gate, an alert or a person is told of a
pool is read off a standing. Credits are millicredits, instants Unix milliseconds.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple
from uuid import UUID, uuid5

from schemas.credits import Millicredits
from schemas.ledger import Pool
from schemas.limits import DEFAULT_THRESHOLDS, AlertKind, State
from streams.rules.periods import (
    DAY_MS,
    Period,
    PlanChange,
    allowance_of,
    day_of,
    in_effect,
    in_force,
    next_allowance,
    period_of,
)

FOREVER_MS: Final = 2**62
"""Later than every instant: nothing changes by time alone."""
REMAINING_BELOW: Final = 0
"""In place of a percent: the absolute line."""
NOT_OK: Final = (State.WARNING, State.EXHAUSTED)

_ALERTS: Final = UUID("6f2d4a52-5ab0-5a6e-9f0c-0d6c2f3d7c11")
"""Namespace of alert ids (RFC 9562, version 5)."""


class Grant(NamedTuple):
    """One premium grant as the ledger holds it."""

    effective_ms: int
    arrival: tuple[int, int]
    credits: Millicredits


class Thresholds(NamedTuple):
    """A workspace's own thresholds. Empty percents, or no absolute line: the plan's."""

    arrival: tuple[int, int]
    percents: tuple[int, ...]
    remaining_below: Millicredits | None


class Facts(NamedTuple):
    """All that account events have said of a workspace: a plan `history`, grants, the newest thresholds."""

    plans: tuple[PlanChange, ...] = ()
    grants: tuple[Grant, ...] = ()
    thresholds: Thresholds | None = None

    @property
    def last_effect_ms(self) -> int:
        """When the last of the plans and grants takes effect; 0 when there are none."""
        last = [change.effective_ms for change in self.plans[-1:]]
        return max(last + [grant.effective_ms for grant in self.grants], default=0)


class Line(NamedTuple):
    """Crossed when ``used`` reaches ``used_at``. ``percent`` is `REMAINING_BELOW` for the absolute line."""

    used_at: Millicredits
    percent: int


class Terms(NamedTuple):
    """What holds of a pool until ``until_ms``. ``allowance`` None: no plan yet. Premium has no period."""

    pool: Pool
    period: Period | None
    allowance: Millicredits | None
    next_allowance: Millicredits | None
    plan: str
    lines: tuple[Line, ...]
    """Ascending."""
    until_ms: int


class Standing(NamedTuple):
    """Terms, and the sum of the pool's debits under them; reversals may make it negative."""

    terms: Terms
    used: Millicredits

    @property
    def state(self) -> State:
        """May the workspace still run actions of this pool?"""
        allowance = self.terms.allowance
        if allowance is None:
            return State.UNKNOWN_PLAN
        if self.used >= allowance:
            return State.EXHAUSTED
        return State.WARNING if self.passed else State.OK

    @property
    def passed(self) -> tuple[Line, ...]:
        """The lines that stand crossed; on the line counts."""
        return tuple(line for line in self.terms.lines if line.used_at <= self.used)

    @property
    def next_line(self) -> Millicredits:
        """What ``used`` must reach for the next line; out of reach when there is none."""
        return next((line.used_at for line in self.terms.lines if line.used_at > self.used), FOREVER_MS)

    @property
    def remaining(self) -> Millicredits:
        """What may still be drawn; 0 without a plan."""
        return max(0, (self.terms.allowance or 0) - self.used)

    @property
    def overage(self) -> Millicredits:
        """What was drawn beyond the allowance."""
        return max(0, self.used - (self.terms.allowance or 0))


def terms_of(facts: Facts, pool: Pool, as_of_ms: int) -> Terms:
    """The terms of a pool at an instant: R01, R06, R07, R10; docs/limits.md says them in full."""
    return _premium_terms(facts, as_of_ms) if pool == Pool.PREMIUM else _enrichment_terms(facts, as_of_ms)


def _enrichment_terms(facts: Facts, as_of_ms: int) -> Terms:
    effective = in_effect(facts.plans, as_of_ms)
    period = period_of(day_of(as_of_ms), facts.plans, as_of_ms)
    allowance = allowance_of(period, facts.plans, as_of_ms)
    plan = effective[-1] if effective else None
    coming = facts.plans[len(effective) :]
    return Terms(
        pool=Pool.ENRICHMENT,
        period=period,
        allowance=allowance,
        next_allowance=next_allowance(period, facts.plans),
        plan=plan.plan if plan else "",
        lines=_lines(facts.thresholds, plan, allowance or 0, allowance or 0),
        until_ms=min([period.end * DAY_MS, *(change.effective_ms for change in coming[:1])]),
    )


def _premium_terms(facts: Facts, as_of_ms: int) -> Terms:
    granted = [grant for grant in facts.grants if grant.effective_ms <= as_of_ms]
    allowance = sum(grant.credits for grant in granted)
    newest = max(granted, key=lambda grant: grant[:2]).credits if granted else 0
    plan = in_force(facts.plans, as_of_ms)
    return Terms(
        pool=Pool.PREMIUM,
        period=None,
        allowance=allowance,
        next_allowance=None,
        plan=plan.plan if plan else "",
        lines=_lines(facts.thresholds, plan, allowance, newest),
        until_ms=min(
            [grant.effective_ms for grant in facts.grants if grant.effective_ms > as_of_ms], default=FOREVER_MS
        ),
    )


def _lines(own: Thresholds | None, plan: PlanChange | None, allowance: int, whole: int) -> tuple[Line, ...]:
    """Percent p is crossed when what remains is at most (100 - p) % of ``whole``, exactly; the absolute line when at
    most so much remains. Void where there is no allowance, or where nothing had to be used for it.
    """
    if not allowance:
        return ()
    percents = {100, *((own and own.percents) or (plan and plan.thresholds) or DEFAULT_THRESHOLDS)}
    lines = [Line(allowance - (100 - percent) * whole // 100, percent) for percent in percents]
    below = own.remaining_below if own and own.remaining_below is not None else plan and plan.remaining_below
    if below is not None and below < allowance:
        lines.append(Line(allowance - below, REMAINING_BELOW))
    return tuple(sorted(lines))


def crossed(terms: Terms, before: Millicredits, after: Millicredits) -> tuple[Line, ...]:
    """The lines with ``before < line <= after``: a crossing belongs to one record."""
    return tuple(line for line in terms.lines if before < line.used_at <= after)


def kind_of(lines: Sequence[Line]) -> AlertKind:
    """``exhausted`` when 100 % is among them."""
    return AlertKind.EXHAUSTED if any(line.percent == 100 for line in lines) else AlertKind.CROSSED


_SEVERITY: Final = (State.OK, State.WARNING, State.EXHAUSTED)


def shifted(before: State, after: State) -> AlertKind | None:
    """What a plan, a grant or a reversal tells: it helped, it hurt, or (None) neither."""
    if after == State.UNKNOWN_PLAN:
        return None
    place = _SEVERITY.index(State.OK if before == State.UNKNOWN_PLAN else before)
    change = _SEVERITY.index(after) - place
    if change < 0:
        return AlertKind.RECOVERED
    if change > 0:
        return AlertKind.EXHAUSTED if after == State.EXHAUSTED else AlertKind.CROSSED
    return None


def turned(before: Standing, after: Standing, instant: int, effective_now: bool) -> AlertKind | None:
    """What an instant that comes tells. A period that begins tells those who were warned or stopped, and nobody else;
    ``effective_now``: a plan or a grant that this pool goes by takes effect at this instant.
    """
    began = before.terms.period is not None and instant == before.terms.period.end * DAY_MS
    if began and before.state in NOT_OK:
        return AlertKind.PERIOD_STARTED
    return shifted(before.state, after.state) if effective_now else None


def alert_id(topic_id: str, partition: int, offset: int, pool: Pool, kind: AlertKind, lines: Sequence[Line]) -> UUID:
    """The id of an alert that a record caused: a replay repeats it, and no other record has it. Nor has the same record
    under another plan, as after a crash before either was written: there it crosses other lines.
    """
    crossed_at = ",".join(f"{line.percent}:{line.used_at}" for line in lines)
    return uuid5(_ALERTS, f"{topic_id}/{partition}/{offset}/{pool}/{kind}/{crossed_at}")


def alert_id_of_time(workspace_id: str, standing: Standing, at_ms: int, kind: AlertKind) -> UUID:
    """The id of an alert that time alone caused, at this instant of this period."""
    start = standing.terms.period.start if standing.terms.period else 0
    return uuid5(_ALERTS, f"{workspace_id}/{standing.terms.pool}/{start}/{at_ms}/{kind}")
