"""The reference of limits: a second, slow, obvious implementation of "Plans, grants and limits" for one workspace.

It shares nothing with the meter: Decimal credits, dates, dictionaries, every balance summed afresh. Feed it what the
ledger holds of a workspace, in the order in which the meter took it in; it says where both pools stand at any instant,
and which alerts the rules imply. Credits are Decimal, times are aware UTC datetimes.
"""

from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import NamedTuple

ENRICHMENT, PREMIUM = "enrichment", "premium"
SEVERITY = {"unknown_plan": 0, "ok": 0, "warning": 1, "exhausted": 2}


class Plan(NamedTuple):
    """One plan as it stands from an instant on; no ``thresholds``: the default ones."""

    name: str
    allowance: Decimal
    restart_period: bool = False
    thresholds: tuple[int, ...] = ()
    remaining_below: Decimal | None = None


class Balance(NamedTuple):
    """Where one pool stands. ``allowance`` None: no plan yet; ``period`` None: premium has none."""

    used: Decimal
    allowance: Decimal | None
    state: str
    thresholds: tuple[int, ...]
    """Percents that stand crossed."""
    remaining_below: Decimal | None
    """The absolute line, where it stands crossed."""
    period: tuple[date, date] | None
    plan: str


class Told(NamedTuple):
    """One alert that the rules imply. ``position``: the record that caused it, as the caller names it; empty: time."""

    kind: str
    pool: str
    cause: str
    at: datetime
    position: str
    thresholds: tuple[int, ...]
    remaining_below: Decimal | None
    state: str
    used: Decimal
    allowance: Decimal


class ReferenceLimits:
    """One workspace. ``alerts`` grows with what is fed to it."""

    def __init__(self) -> None:
        self.alerts: list[Told] = []
        self._now: datetime | None = None
        self._next = datetime.max.replace(tzinfo=UTC)
        """The next instant at which time alone may change something."""
        self._plans: dict[datetime, Plan] = {}
        self._grants: dict[datetime, list[Decimal]] = {}
        self._own: tuple[tuple[int, ...], Decimal | None] | None = None
        self._days: dict[date, Decimal] = {}
        self._premium = Decimal(0)

    def plan(self, recorded_at: datetime, position: str, effective_at: datetime, plan: Plan) -> None:
        """A plan event; of two at one instant the one told last stands."""
        before = self._before(recorded_at)
        self._plans[effective_at] = plan
        self._shift(before, "plan", recorded_at, position)

    def grant(self, recorded_at: datetime, position: str, effective_at: datetime, credits: Decimal) -> None:
        """Premium credits."""
        before = self._before(recorded_at)
        self._grants.setdefault(effective_at, []).append(credits)
        self._shift(before, "grant", recorded_at, position)

    def limits(self, recorded_at: datetime, thresholds: tuple[int, ...], remaining_below: Decimal | None) -> None:
        """The workspace's own thresholds: they never alert."""
        self._before(recorded_at)
        self._own = thresholds, remaining_below

    def reverse(self, recorded_at: datetime, position: str, pool: str, day: date, credits: Decimal) -> None:
        """Give back what a run of that day drew; ``credits`` more than 0."""
        before = self._before(recorded_at)
        self._add(pool, day, -credits)
        self._shift(before, "reversal", recorded_at, position)

    def run(self, recorded_at: datetime, position: str, pool: str, day: date, credits: Decimal) -> None:
        """A debit dated by a day."""
        self.come(recorded_at)
        if not credits:
            return
        before = self.balance(pool, self._time)
        self._add(pool, day, credits)
        after = self.balance(pool, self._time)
        percents = tuple(sorted(set(after.thresholds) - set(before.thresholds)))
        below = after.remaining_below if before.remaining_below is None else None
        if percents or below is not None:
            kind = "exhausted" if 100 in percents else "crossed"
            self._tell(kind, pool, "run", recorded_at, position, after._replace(
                thresholds=percents, remaining_below=below,
            ))  # fmt: skip

    def come(self, until: datetime) -> None:
        """Time alone: each period that ends, each plan and grant that takes effect up to an instant."""
        while self._now and until >= self._next:
            instant = self._next
            before = {pool: self.balance(pool, self._time) for pool in (ENRICHMENT, PREMIUM)}
            self._now = instant
            for pool in before:
                self._come_to(instant, pool, before[pool])
            self._next = self._next_instant()
        if not self._now:
            self._now = until
            self._next = self._next_instant()
        self._now = max(self._now, until)

    def balance(self, pool: str, as_of: datetime) -> Balance:
        """Where a pool stands at an instant, by all that was fed."""
        plan = self._plan_at(as_of)
        if pool == PREMIUM:
            granted = {at: grants for at, grants in self._grants.items() if at <= as_of}
            allowance = sum((sum(grants, Decimal(0)) for grants in granted.values()), Decimal(0))
            whole = granted[max(granted)][-1] if granted else Decimal(0)
            return self._stands(self._premium, allowance, whole, plan, None)
        start, end = self.period(as_of.date(), as_of)
        used = sum((credits for day, credits in self._days.items() if start <= day < end), Decimal(0))
        allowance_or_none = self.allowance(start, end, as_of)
        return self._stands(used, allowance_or_none, allowance_or_none or Decimal(0), plan, (start, end))

    def period(self, day: date, as_of: datetime) -> tuple[date, date]:
        """First day, and first day no longer in it, of the billing period that holds a day."""
        effective = sorted(at for at in self._plans if at <= as_of)
        anchors = [at.date() for at in effective if at == effective[0] or self._plans[at].restart_period]
        later = [anchor for anchor in anchors if anchor > day]
        earlier = [anchor for anchor in anchors if anchor <= day]
        anchor, months = (max(earlier) if earlier else day.replace(day=1)), 0
        while _months_after(anchor, months + 1) <= day:
            months += 1
        return _months_after(anchor, months), min([_months_after(anchor, months + 1), *later])

    def allowance(self, start: date, end: date, as_of: datetime) -> Decimal | None:
        """The largest of the opening plan's and of every later plan's of the period, up to now."""
        effective = [at for at in sorted(self._plans) if at <= as_of and at.date() < end]
        opening = [at for at in effective if at.date() <= start][-1:]
        counting = opening + [at for at in effective if at.date() > start]
        return max((self._plans[at].allowance for at in counting), default=None)

    @property
    def _time(self) -> datetime:
        assert self._now is not None
        return self._now

    def _before(self, recorded_at: datetime) -> dict[str, Balance]:
        self.come(recorded_at)
        return {pool: self.balance(pool, self._time) for pool in (ENRICHMENT, PREMIUM)}

    def _add(self, pool: str, day: date, credits: Decimal) -> None:
        if pool == PREMIUM:
            self._premium += credits
        elif pool == ENRICHMENT:
            self._days[day] = self._days.get(day, Decimal(0)) + credits

    def _plan_at(self, as_of: datetime) -> Plan | None:
        effective = [at for at in self._plans if at <= as_of]
        return self._plans[max(effective)] if effective else None

    def _next_instant(self) -> datetime:
        _, end = self.period(self._time.date(), self._time)
        coming = [at for at in (*self._plans, *self._grants) if at > self._time]
        return min([datetime.combine(end, time(), UTC), *coming])

    def _come_to(self, instant: datetime, pool: str, before: Balance) -> None:
        ended = before.period is not None and instant == datetime.combine(before.period[1], time(), UTC)
        changes = instant in self._plans or (pool == PREMIUM and instant in self._grants)
        if ended and before.state in ("warning", "exhausted"):
            self._tell("period_started", pool, "time", instant, "", self.balance(pool, instant))
        elif changes:
            self._shift({pool: before}, "time", instant, "")

    def _shift(self, before: dict[str, Balance], cause: str, at: datetime, position: str) -> None:
        """At most one alert for a pool, when its severity has fallen or risen."""
        self._next = self._next_instant()
        for pool, old in before.items():
            new = self.balance(pool, self._time)
            change = SEVERITY[new.state] - SEVERITY[old.state]
            if change < 0:
                self._tell("recovered", pool, cause, at, position, new)
            elif change > 0:
                kind = "exhausted" if new.state == "exhausted" else "crossed"
                self._tell(kind, pool, cause, at, position, new)

    def _tell(self, kind: str, pool: str, cause: str, at: datetime, position: str, new: Balance) -> None:
        self.alerts.append(
            Told(
                kind, pool, cause, at, position, new.thresholds, new.remaining_below, new.state, new.used,
                new.allowance or Decimal(0),
            )
        )  # fmt: skip

    def _stands(
        self,
        used: Decimal,
        allowance: Decimal | None,
        whole: Decimal,
        plan: Plan | None,
        period: tuple[date, date] | None,
    ) -> Balance:
        name = plan.name if plan else ""
        if allowance is None:
            return Balance(used, None, "unknown_plan", (), None, period, name)
        remaining = allowance - used
        own_percents, own_below = self._own or ((), None)
        percents = own_percents or (plan and plan.thresholds) or (50, 80, 100)
        below = own_below if own_below is not None else plan and plan.remaining_below
        if not allowance:
            percents, below = (), None
        else:
            percents = (*percents, 100)
        passed = tuple(sorted({p for p in percents if remaining * 100 <= (100 - p) * whole}))
        below = below if below is not None and below < allowance and remaining <= below else None
        exhausted = remaining <= 0
        state = "exhausted" if exhausted else "warning" if passed or below is not None else "ok"
        return Balance(used, allowance, state, passed, below, period, name)


def _months_after(day: date, months: int) -> date:
    """The same day so many months later, or the last one that the month has."""
    year, month = day.year + (day.month - 1 + months) // 12, (day.month - 1 + months) % 12 + 1
    first = date(year, month, 1)
    found = first + timedelta(days=day.day - 1)
    while found.month != month:
        found -= timedelta(days=1)
    return found
