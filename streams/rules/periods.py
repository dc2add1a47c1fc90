"""Billing periods and allowances: pure functions of a plan history and an explicit ``as_of``. No clock, no I/O.

Days are UTC days as numbers since 1970-01-01; instants are Unix milliseconds; credits are millicredits. The ledger's
view ``billing_periods`` says the same in SQL, and a test holds the two equal.
"""

from bisect import bisect_right
from calendar import monthrange
from collections.abc import Iterable, Sequence
from datetime import date
from functools import lru_cache
from typing import Final, NamedTuple

from schemas.credits import Millicredits

DAY_MS: Final = 24 * 60 * 60 * 1000
_EPOCH_ORDINAL: Final = date(1970, 1, 1).toordinal()

Day = int
"""A UTC day, counted from 1970-01-01."""


class PlanChange(NamedTuple):
    """One plan event as the ledger holds it. ``arrival`` orders events of one ``effective_ms``: the last one stands."""

    effective_ms: int
    arrival: tuple[int, int]
    """(recorded_at in Unix ms, Kafka offset)"""
    plan: str
    allowance: Millicredits
    restart_period: bool = False
    thresholds: tuple[int, ...] = ()
    remaining_below: Millicredits | None = None


class Period(NamedTuple):
    """Whole UTC days ``[start, end)``."""

    start: Day
    end: Day

    def __contains__(self, day: object) -> bool:
        return isinstance(day, int) and self.start <= day < self.end


def day_of(instant_ms: int) -> Day:
    """The UTC day of an instant."""
    return instant_ms // DAY_MS


def to_date(day: Day) -> date:
    """A day's date."""
    return date.fromordinal(day + _EPOCH_ORDINAL)


def to_day(when: date) -> Day:
    """A date's day."""
    return when.toordinal() - _EPOCH_ORDINAL


@lru_cache(maxsize=65_536)
def _add_months(day: Day, months: int) -> Day:
    """The same day of the month so many months later, clamped to that month's last day: 31 Jan, 28 Feb, 31 Mar."""
    start = to_date(day)
    year, month = divmod(start.year * 12 + start.month - 1 + months, 12)
    return to_day(date(year, month + 1, min(start.day, monthrange(year, month + 1)[1])))


def history(changes: Iterable[PlanChange]) -> tuple[PlanChange, ...]:
    """Plan events in any order → one for each ``effective_ms``, in its order: the last one that arrived stands."""
    ordered = sorted(changes, key=lambda change: (change.effective_ms, change.arrival))
    return tuple({change.effective_ms: change for change in ordered}.values())


def in_effect(plans: Sequence[PlanChange], as_of_ms: int) -> Sequence[PlanChange]:
    """What of a `history` has come into effect by then."""
    return plans[: bisect_right(plans, as_of_ms, key=lambda change: change.effective_ms)]


def in_force(plans: Sequence[PlanChange], as_of_ms: int) -> PlanChange | None:
    """The plan of a `history` that holds at an instant; None before the first one."""
    effective = in_effect(plans, as_of_ms)
    return effective[-1] if effective else None


def anchors(plans: Sequence[PlanChange], as_of_ms: int) -> list[Day]:
    """The days from which periods count, ascending: that of the first plan, and of every restart since."""
    effective = in_effect(plans, as_of_ms)
    days = {day_of(change.effective_ms) for place, change in enumerate(effective) if not place or change.restart_period}
    return sorted(days)


def period_of(day: Day, plans: Sequence[PlanChange], as_of_ms: int) -> Period:
    """The billing period that holds a day. Before the first plan: its calendar month, cut at the plan's day.

    From an anchor, period n is ``[anchor + n months, anchor + n + 1 months)``, cut at the next anchor.
    """
    starts = anchors(plans, as_of_ms)
    place = bisect_right(starts, day)
    cut = starts[place : place + 1]
    if place:
        anchor = starts[place - 1]
        first, today = to_date(anchor), to_date(day)
        months = (today.year - first.year) * 12 + today.month - first.month
        months -= _add_months(anchor, months) > day
    else:
        anchor, months = to_day(to_date(day).replace(day=1)), 0
    return Period(_add_months(anchor, months), min([_add_months(anchor, months + 1), *cut]))


def allowance_of(period: Period, plans: Sequence[PlanChange], as_of_ms: int) -> Millicredits | None:
    """The period's allowance as it stands at ``as_of_ms``; None where there was no plan.

    The largest of its opening plan's (in force at the end of the first day, or now while that lasts) and of those of
    every plan that took effect on a later day of it, up to now.
    """
    effective = in_effect(plans, min(as_of_ms, period.end * DAY_MS - 1))
    opened = in_effect(effective, (period.start + 1) * DAY_MS - 1)
    return max((change.allowance for change in (*opened[-1:], *effective[len(opened) :])), default=None)


def next_allowance(period: Period, plans: Sequence[PlanChange]) -> Millicredits | None:
    """What the next period will begin with, by the plans that are known now."""
    opening = in_force(plans, period.end * DAY_MS)
    return opening.allowance if opening else None
