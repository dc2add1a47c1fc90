"""The balances of one unit: a fold of its records, in memory. Pure: no I/O, no clock; "now" is a record's own time.

An account holds what the ledger says of one workspace: facts from account events, enrichment credits by UTC day,
premium credits of all time. Terms (`streams.rules.limits`) are computed when an account event or an instant changes
them; in between a debit is an addition and a comparison with the next line. So nearly every take is folded by sums
over its groups, and only a workspace that crosses a line, or passes an instant, is walked record by record.
"""

import heapq
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.credits import Millicredits
from schemas.ledger import POOLS, Pool, number_of
from schemas.limits import AlertKind, Cause
from streams.rules.intake import FEW
from streams.rules.limits import FOREVER_MS, NOT_OK, Facts, Line, Standing, crossed, kind_of, shifted, terms_of, turned
from streams.rules.periods import Day, Period, day_of

DAYS_KEPT: Final = 40
"""Days before "now" whose debits an account holds: a billing period has at most 31."""
EVICTED_AT_ONCE: Final = 256
"""Accounts that an eviction looks at, besides two for each that was loaded since the last one."""
METERED: Final = (Pool.ENRICHMENT, Pool.PREMIUM)
_MOVED: Final = {
    (True, True): frozenset(METERED),
    (True, False): frozenset({Pool.ENRICHMENT}),
    (False, True): frozenset({Pool.PREMIUM}),
    (False, False): frozenset[Pool](),
}

Integers = npt.NDArray[np.int64]
Key = tuple[str, Pool]


class Debits(NamedTuple):
    """Debits of one take as columns, in Kafka's order; rows that draw nothing may be among them."""

    workspaces: Sequence[str]
    """The distinct names."""
    codes: Integers
    """Row → place in ``workspaces``."""
    pool: npt.NDArray[np.int8]
    credits: Integers
    day: Integers
    recorded_ms: Integers
    offsets: Integers

    def drawing(self) -> list[str]:
        """The workspaces that draw anything."""
        return [self.workspaces[code] for code in np.flatnonzero(np.bincount(self.codes[self.credits != 0])).tolist()]


class Notice(NamedTuple):
    """One alert as the fold knows it. ``row``: which record of the take or chunk caused it; -1: time alone did."""

    kind: AlertKind
    workspace_id: str
    standing: Standing
    lines: tuple[Line, ...]
    at_ms: int
    cause: Cause
    row: int = -1


class Account:
    """One workspace as of a moment."""

    __slots__ = (
        "_days", "_enrichment", "_first_day", "_last_effect_ms", "_looked_at", "_next_lines", "_premium", "_used",
        "_used_premium", "awaited_ms", "event_offset", "facts", "name", "offset", "told", "until_ms",
    )  # fmt: skip

    def __init__(self, name: str, opening: "Opening", now_ms: int) -> None:
        self.name, self.facts = name, opening.facts
        self._first_day = day_of(now_ms) - DAYS_KEPT
        self._days = array("q")
        for day, credits in opening.enrichment.items():
            if credits:  # a later day of nothing, as of what is to be folded again, would move the days kept
                self._add(day, credits)
        self._used: Millicredits = 0
        self._used_premium = opening.premium
        self.until_ms = 0
        """The next instant at which something changes by time alone."""
        self.renew(now_ms)
        self._looked_at = [self._used, self._used_premium]
        self.awaited_ms = FOREVER_MS
        """The last instant for which it was put into the heap of boundaries."""
        self.offset = self.event_offset = -1
        """The last offset of the run chain, and of the account chain, that was folded into it."""
        self.told = self.outline()
        """What `limit-states` knows of it, without ``used``."""

    @property
    def enrichment(self) -> Standing:
        """Where the enrichment pool stands."""
        return Standing(self._enrichment, self._used)

    @property
    def premium(self) -> Standing:
        """Where the premium pool stands."""
        return Standing(self._premium, self._used_premium)

    def standing(self, pool: Pool) -> Standing:
        """Of one pool."""
        return self.premium if pool == Pool.PREMIUM else self.enrichment

    @property
    def waits(self) -> bool:
        """Whether time alone may change what is told of it: it is not `ok`; a plan or a grant is still to take effect;
        the next period has no allowance (it was cancelled); or runs whose clocks were ahead have drawn in that period.
        """
        if self._enrichment.next_allowance == 0 or any(self._days[max(0, self.period.end - self._first_day) :]):
            return True
        return self.enrichment.state in NOT_OK or self._last_effect_ms >= self.until_ms

    @property
    def period(self) -> Period:
        """The running billing period."""
        assert self._enrichment.period is not None
        return self._enrichment.period

    def outline(self) -> tuple[tuple[object, ...], ...]:
        """What of each pool is told at once when it changes: state, lines passed, and everything of its terms."""
        return tuple(
            (standing.state, standing.passed, *standing.terms[1:-1]) for standing in (self.enrichment, self.premium)
        )

    def used_between(self, period: Period) -> Millicredits:
        """Enrichment credits dated within a period that lies in the days kept."""
        start = max(0, period.start - self._first_day)
        return sum(self._days[start : max(0, period.end - self._first_day)])

    def used_on(self, day: Day) -> Millicredits:
        """Enrichment credits dated on a day."""
        return self.used_between(Period(day, day + 1))

    def draw(self, pool: Pool, day: Day, credits: Millicredits) -> None:
        """Add a debit; a negative one takes it back. On a day of a closed period it moves no standing."""
        if pool == Pool.PREMIUM:
            self._used_premium += credits
        else:
            self._add(day, credits)
            if day in self.period:
                self._used += credits

    def draw_below(self, sums: Sequence[tuple[Pool, Day, Millicredits]]) -> frozenset[Pool] | None:
        """Add many debits at once, unless together they would reach a line, or one is of a period to come: then None,
        and nothing is added. Else the pools whose ``used`` has moved.
        """
        start, end = self.period
        used, premium = self._used, self._used_premium
        for pool, day, credits in sums:
            if pool is Pool.PREMIUM:
                premium += credits
            elif start <= day < end:
                used += credits
            elif day >= end:
                return None
        if used >= self._next_lines[0] or premium >= self._next_lines[1]:
            return None
        for pool, day, credits in sums:
            if pool is Pool.ENRICHMENT:
                self._add(day, credits)
        moved = _MOVED[used != self._used, premium != self._used_premium]
        self._used, self._used_premium = used, premium
        return moved

    def renew(self, now_ms: int) -> None:
        """Compute the terms afresh: an account event came, or an instant."""
        self._premium = terms_of(self.facts, Pool.PREMIUM, now_ms)
        self._enrichment = terms_of(self.facts, Pool.ENRICHMENT, now_ms)
        self._used = self.used_between(self.period)
        self.until_ms = min(self._enrichment.until_ms, self._premium.until_ms)
        self._last_effect_ms = self.facts.last_effect_ms
        self.aim()

    def look_ahead(self, pool: Pool) -> bool:
        """Whether a line is reached within three times what was drawn since it was asked this before."""
        place = METERED.index(pool)
        used = self.standing(pool).used
        drawn, self._looked_at[place] = used - self._looked_at[place], used
        return used + 3 * drawn >= self._next_lines[place]

    def aim(self) -> None:
        """Look up the next lines, after a balance has crossed one or fallen."""
        self._next_lines = self.enrichment.next_line, self.premium.next_line

    def _add(self, day: Day, credits: Millicredits) -> None:
        place = day - self._first_day
        if place < 0:
            return
        if place >= len(self._days):
            self._days.extend([0] * (place + 2 - len(self._days)))
        if len(self._days) > 2 * DAYS_KEPT:
            stale = len(self._days) - DAYS_KEPT - 2
            del self._days[:stale]
            self._first_day += stale
            place -= stale
        self._days[place] += credits


class Opening(NamedTuple):
    """What the ledger holds of a workspace: facts, enrichment credits by day (of the days kept), all premium ones."""

    facts: Facts
    enrichment: Mapping[Day, Millicredits]
    premium: Millicredits


NOTHING: Final = Opening(Facts(), {}, 0)
"""A workspace that the ledger does not know."""


class Balances:
    """The accounts of one unit. ``now_ms`` is the latest broker time folded."""

    def __init__(self, accounts_max: int, now_ms: int) -> None:
        self._accounts: dict[str, Account] = {}
        self._accounts_max = accounts_max
        self._boundaries: list[tuple[int, str]] = []
        self._loaded = 0
        """Accounts taken in since the last eviction."""
        self.now_ms = now_ms
        self.knows_all = False
        """Whether every workspace that the ledger holds of this unit is in memory: then a new name is a new one."""
        self.moved: set[Key] = set()
        """Pools whose ``used`` has changed since their state was told."""
        self.urgent: dict[Key, None] = {}
        """Pools of which more has changed, in that order: told at once."""

    def __len__(self) -> int:
        return len(self._accounts)

    def __getitem__(self, name: str) -> Account:
        return self._accounts[name]

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def __contains__(self, name: str) -> bool:
        return name in self._accounts

    def begin(self, at_ms: int) -> None:
        """The first record of a unit whose ledger is empty: before it there was no time."""
        self.now_ms = self.now_ms or at_ms

    def missing(self, names: Iterable[str], at_ms: int = FOREVER_MS) -> list[str]:
        """The names that must be loaded before they can be folded. When all are known, a new name is a new account."""
        absent = [name for name in names if name not in self._accounts]
        if absent and self.knows_all:
            self.load(dict.fromkeys(absent, NOTHING), at_ms)
            return []
        return absent

    def load(self, openings: Mapping[str, Opening], at_ms: int = FOREVER_MS) -> None:
        """Take accounts in, as of the earlier of ``now_ms`` and ``at_ms``. Those in memory already stay as they are."""
        for name, opening in openings.items():
            if name not in self._accounts:
                self._loaded += 1
                account = self._accounts[name] = Account(name, opening, min(at_ms, self.now_ms))
                self._await(account)

    def evict(self, durable: int, durable_events: int) -> None:
        """Let go of the accounts touched longest ago, until the bound holds. One stays if it `waits`, has something to
        tell, or has records beyond the last ``durable`` offsets of runs and of account events.

        Only some accounts are looked at in one call, and one that stays goes to the end of the line: so a take costs
        the same, however many must stay beyond the bound.
        """
        excess = len(self._accounts) - self._accounts_max
        at_once, self._loaded = EVICTED_AT_ONCE + 2 * self._loaded, 0
        if excess <= 0:
            return
        telling = {name for name, _ in (*self.moved, *self.urgent)}
        for account in list(islice(self, at_once)):
            del self._accounts[account.name]
            is_in = account.offset <= durable and account.event_offset <= durable_events
            if account.waits or account.name in telling or not is_in:
                self._accounts[account.name] = account
                continue
            self.knows_all = False
            excess -= 1
            if not excess:
                return

    def fold(self, debits: Debits) -> list[Notice]:
        """Fold one take's debits. All its workspaces are in memory."""
        latest_ms, last = int(debits.recorded_ms.max()), int(debits.offsets[-1])
        notices: list[Notice] = []
        drawing = np.flatnonzero(debits.credits)
        for code, sums in _sums(debits, drawing).items():
            name = debits.workspaces[code]
            account = self._touch(name)
            account.offset = last
            moved = account.draw_below(sums) if account.until_ms > latest_ms else None
            if moved is None:
                notices += self._walk(account, debits, drawing[debits.codes[drawing] == code])
            else:
                self.moved.update([(name, pool) for pool in moved])
        self.now_ms = max(self.now_ms, latest_ms)
        return sorted(notices, key=lambda notice: (notice.at_ms, notice.row))

    def apply(
        self, name: str, cause: Cause | None, change: Callable[[Account], None], at_ms: int, row: int
    ) -> list[Notice]:
        """Fold one account event: ``change`` edits the facts, or draws. At most one notice for each pool, and none
        without a ``cause``; before them, those of the instants that come with it.
        """
        account = self._touch(name)
        account.event_offset = row
        # An event may lag behind the runs. Terms are computed as of now, so every instant up to now comes first.
        self.now_ms = max(self.now_ms, at_ms)
        notices = self._advance(account, self.now_ms)
        before = account.enrichment, account.premium
        change(account)
        account.renew(self.now_ms)
        for old, new in zip(before, (account.enrichment, account.premium), strict=True):
            if new.used != old.used:
                self.moved.add((name, new.terms.pool))
            if cause and (kind := shifted(old.state, new.state)):
                notices.append(Notice(kind, name, new, new.passed, at_ms, cause, row))
        if cause == Cause.PLAN:
            self.urgent |= {(name, pool): None for pool in METERED}
        self._look_ahead(account)
        return notices

    def come(self, until_ms: int) -> list[Notice]:
        """Time alone: every instant up to ``until_ms`` that an account waits for."""
        notices: list[Notice] = []
        while self._boundaries and self._boundaries[0][0] <= until_ms:
            instant, name = heapq.heappop(self._boundaries)
            account = self._accounts.get(name)
            if account and account.awaited_ms == instant:
                notices += self._advance(account, instant)
                self.now_ms = max(self.now_ms, instant)
        return notices

    def _touch(self, name: str) -> Account:
        """The account, as the most recently touched one where that matters."""
        account = self._accounts[name]
        if len(self._accounts) >= self._accounts_max:
            del self._accounts[name]
            self._accounts[name] = account
        return account

    def _walk(self, account: Account, debits: Debits, rows: Integers) -> list[Notice]:
        """One workspace through lines and instants: from one instant to the next its sums tell which records cross."""
        notices: list[Notice] = []
        while len(rows):
            notices += self._advance(account, int(debits.recorded_ms[rows[0]]))
            beyond = np.flatnonzero(debits.recorded_ms[rows] >= account.until_ms)
            end = int(beyond[0]) if len(beyond) else len(rows)
            for pool in METERED:
                notices += self._cross(account, pool, debits, rows[:end][debits.pool[rows[:end]] == number_of(pool)])
            rows = rows[end:]
        account.aim()
        self._look_ahead(account)
        return notices

    def _cross(self, account: Account, pool: Pool, debits: Debits, rows: Integers) -> list[Notice]:
        """Debits of one pool between two instants: draw them, and find the records by which lines are crossed."""
        before, (start, end) = account.standing(pool), account.period
        counting = rows
        if pool == Pool.ENRICHMENT:
            counting = rows[(debits.day[rows] >= start) & (debits.day[rows] < end)]
        reached = before.used + np.cumsum(debits.credits[counting])  # a run draws nothing negative, so it ascends
        crossing: dict[int, list[Line]] = {}
        for line in crossed(before.terms, before.used, int(reached[-1]) if len(reached) else before.used):
            crossing.setdefault(int(np.searchsorted(reached, line.used_at)), []).append(line)
        for day in np.unique(debits.day[rows]).tolist():
            self._draw(account, pool, day, int(debits.credits[rows[debits.day[rows] == day]].sum()))
        notices = []
        for place, lines in crossing.items():
            row, after = int(counting[place]), Standing(before.terms, int(reached[place]))
            at_ms = int(debits.recorded_ms[row])
            notices.append(Notice(kind_of(lines), account.name, after, tuple(lines), at_ms, Cause.RUN, row))
        return notices

    def _draw(self, account: Account, pool: Pool, day: Day, credits: Millicredits) -> None:
        used = account.standing(pool).used
        account.draw(pool, day, credits)
        if account.standing(pool).used != used:
            self.moved.add((account.name, pool))

    def _advance(self, account: Account, until_ms: int) -> list[Notice]:
        """Bring an account to an instant: what begins or takes effect on the way, in its order."""
        notices: list[Notice] = []
        while account.until_ms <= until_ms:
            instant, before = account.until_ms, (account.enrichment, account.premium)
            account.renew(instant)
            for old, new in zip(before, (account.enrichment, account.premium), strict=True):
                notices += notice_of_time(account.name, account.facts, old, new, instant)
            self._look_ahead(account)
        return notices

    def _look_ahead(self, account: Account) -> None:
        """What must be told at once, and the next instant to wait for."""
        outline = account.outline()
        for pool, old, new in zip(METERED, account.told, outline, strict=True):
            if old != new:
                self.urgent[account.name, pool] = None
        account.told = outline
        self._await(account)

    def _await(self, account: Account) -> None:
        if account.waits and account.awaited_ms != account.until_ms:
            account.awaited_ms = account.until_ms
            heapq.heappush(self._boundaries, (account.until_ms, account.name))


def notice_of_time(name: str, facts: Facts, old: Standing, new: Standing, instant: int) -> list[Notice]:
    """What an instant that comes tells of one pool, if anything. A plan's thresholds hold for both pools."""
    effective_now = any(change.effective_ms == instant for change in facts.plans)
    if new.terms.pool == Pool.PREMIUM:
        effective_now |= any(grant.effective_ms == instant for grant in facts.grants)
    kind = turned(old, new, instant, effective_now)
    return [Notice(kind, name, new, new.passed, instant, Cause.TIME)] if kind else []


def _sums(debits: Debits, drawing: Integers) -> dict[int, list[tuple[Pool, Day, Millicredits]]]:
    """Code → its debits by pool and day."""
    codes, pools, days = debits.codes[drawing], debits.pool[drawing], debits.day[drawing]
    sums: dict[int, list[tuple[Pool, Day, Millicredits]]] = {}
    for (code, pool, day), credits in _totals(codes, pools, days, debits.credits[drawing]):
        sums.setdefault(code, []).append((POOLS[pool - 1], day, credits))
    return sums


def _totals(
    codes: Integers, pools: npt.NDArray[np.int8], days: Integers, credits: Integers
) -> Iterable[tuple[tuple[int, int, Day], Millicredits]]:
    """(code, number of the pool, day) → sum."""
    if len(codes) <= FEW:
        few: dict[tuple[int, int, Day], Millicredits] = {}
        keys = zip(codes.tolist(), pools.tolist(), days.tolist(), strict=True)
        for key, drawn in zip(keys, credits.tolist(), strict=True):
            few[key] = few.get(key, 0) + drawn
        return few.items()
    first = days.min()
    span = days.max() - first + 1
    distinct, place = np.unique((codes * len(POOLS) + pools - 1) * span + days - first, return_inverse=True)
    totals = np.zeros(len(distinct), np.int64)
    np.add.at(totals, place, credits)
    groups, offsets = np.divmod(distinct, span)
    keys = zip(
        (groups // len(POOLS)).tolist(), (groups % len(POOLS) + 1).tolist(), (offsets + first).tolist(), strict=True
    )
    return zip(keys, totals.tolist(), strict=True)
