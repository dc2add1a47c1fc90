"""From an assignment to a unit that may go on: marks, the duplicate filter, balances, and what is told at the start."""

import asyncio
import functools
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import date
from typing import Any, Final, NamedTuple

import msgspec
import structlog

from schemas.problem import Unreachable
from sinks import accounts, filter_keys
from sinks.accounts import AccountFact
from sinks.ledger import Chain, Incident, Mark
from streams import recovery
from streams.kafka.topics import LogRange
from streams.patience import patiently
from streams.rules.balances import METERED, Balances, Notice
from streams.rules.duplicates import KEYS_AT_ONCE, KeyFilter
from streams.rules.facts import openings
from streams.rules.limits import FOREVER_MS
from streams.rules.messages import Source
from streams.rules.records import UpTo
from streams.settings import Settings
from streams.unit import Filters, Shared, Unit
from streams.voice import Outlets, Voice

EXACT_DAYS: Final = 30
"""Runs since the batch month of so many days ago are in the filter's exact tier; older ones in its Bloom filter."""
LOAD_S_MAX: Final = 60
"""How long an assignment waits for an answer of the ledger."""
RECOVERY_S_MAX: Final = 300
"""How long it may take to fold again what was not told."""
SEEDED_MAX: Final = 10_000_000

log: Final = structlog.get_logger()


class Assigned(NamedTuple):
    """Partition n of both topics, as the ledger and as Kafka has it. The commits are next offsets, None: none."""

    chains: tuple[Chain, Chain]
    marks: tuple[Mark, Mark]
    logs: tuple[LogRange, LogRange]
    committed: tuple[int | None, int | None]


class Kept(msgspec.Struct, frozen=True):
    """What a unit had in memory when it was released with nothing on its way, and where both chains stood."""

    at: UpTo
    filters: Filters
    balances: Balances


Background = Callable[[Coroutine[Any, Any, None]], Any]


class Loader:
    """Loads units. Every wait is for the ledger; ``ask`` asks it once, in the reader's thread, ``look_up_aside`` until
    it answers, where no unit waits behind it; ``background`` runs what need not be waited for.
    """

    def __init__(
        self,
        settings: Settings,
        shared: Shared,
        outlets: Outlets,
        ask: Callable[..., Awaitable[Any]],
        look_up_aside: Callable[..., Awaitable[Any]],
        on_trouble: Callable[[str], None],
        background: Background,
    ) -> None:
        self._settings, self._shared, self._outlets = settings, shared, outlets
        self._ask, self._look_up_aside = ask, look_up_aside
        self._on_trouble, self._background = on_trouble, background
        self._lives = 0

    async def load(self, assigned: Assigned, kept: Kept | None) -> Unit:
        """The unit of these partitions. ``kept``: what an earlier assignment left, used if no mark has moved since."""
        chains, marks = assigned.chains, assigned.marks
        examined = (
            examine(mark, chain, log_range, self._settings.retention_gap)
            for mark, chain, log_range in zip(marks, chains, assigned.logs, strict=True)
        )
        incident = next(filter(None, examined), None)
        self._lives += 1
        voice = Voice(chains, f"{os.getpid()}.{time.time_ns()}.{self._lives}", self._outlets)
        at = marks[0].last, marks[1].last
        if kept and kept.at == at:
            unit = Unit(marks, chains, kept.filters, kept.balances, voice, self._shared)
            unit.incident = incident
            return unit
        filters = Filters(await self._load_runs(chains[0]), KeyFilter(self._filter_bytes(of_runs=False)))
        balances = Balances(self._settings.balances_max // self._settings.partitions, 0)
        unit = Unit(marks, chains, filters, balances, voice, self._shared)
        if incident:
            unit.incident = incident
            return unit
        log_starts = assigned.logs[0].start, assigned.logs[1].start
        start = recovery.starting_point(at, assigned.committed, log_starts)
        try:
            async with asyncio.timeout(RECOVERY_S_MAX):
                seen_ms = await self._recover(unit, start)
        except TimeoutError as error:
            raise Unreachable(f"{unit.chain} is not recovered", f"after {RECOVERY_S_MAX} s", "See the log.") from error
        # Of topics that were made anew nothing has been told either.
        is_seeded = start.is_seeded or not marks[0].rows + marks[1].rows
        unit.settling.is_seeding = is_seeded and bool(
            await self._look_up(*self._workspaces_of(unit, 1, accounts.EPOCH))
        )
        unit.looks_back_ms = balances.now_ms or FOREVER_MS
        self._background(self._look_back(unit, seen_ms, balances.now_ms))
        self._background(self._load_events(filters.events, chains[1]))
        return unit

    async def _look_up(self, question: Callable[..., Any], *args: Any) -> Any:
        return await self._patiently(functools.partial(self._ask, question, *args))

    async def read_mark(self, chain: Chain) -> Mark:
        """How far the ledger has this chain."""
        mark: Mark = await self._patiently(
            functools.partial(self._shared.in_writer, self._shared.ledger.mark, chain), f"{chain}: "
        )
        return mark

    async def _patiently(self, ask: Callable[[], Awaitable[Any]], whose: str = "") -> Any:
        """Not for ever: another worker may reach the database."""
        return await patiently(ask, self._on_trouble, whose, LOAD_S_MAX)

    def _filter_bytes(self, of_runs: bool) -> int:
        """Account events are few: an eighth of the bound is theirs."""
        bytes_max = self._settings.duplicate_filter_mb_max * 1024 * 1024 // self._settings.partitions
        return bytes_max * 7 // 8 if of_runs else bytes_max // 8

    async def _load_events(self, event_filter: KeyFilter, chain: Chain) -> None:
        """All of them, at the end of what is loaded aside; meanwhile every account event is a candidate."""
        event_filter.add(await self._look_up_aside(filter_keys.event_keys, chain))
        event_filter.is_complete = True

    async def _load_runs(self, chain: Chain) -> KeyFilter:
        run_filter = KeyFilter(self._filter_bytes(of_runs=True))
        since = time.time() - EXACT_DAYS * 86_400
        run_filter.add(await self._look_up(filter_keys.recent_run_keys, chain, since))
        self._background(self._load_older(run_filter, chain, since))
        return run_filter

    async def _load_older(self, run_filter: KeyFilter, chain: Chain, since: float) -> None:
        """The Bloom tier, month by month, a breath of the event loop between its parts; meanwhile every run is a
        candidate.
        """
        for month in await self._look_up_aside(filter_keys.older_months, chain, since):
            keys = await self._look_up_aside(filter_keys.run_keys_of, chain, month)
            for start in range(0, len(keys), KEYS_AT_ONCE):
                run_filter.add_older(keys[start : start + KEYS_AT_ONCE])
                await asyncio.sleep(0)
        run_filter.is_complete = True

    async def _recover(self, unit: Unit, start: recovery.Start) -> int:
        """Fold again what the commit has not seen, and tell it; then load who was active last. Returns the unit's "now"
        before what is folded again.
        """
        balances, chains = unit.balances, (unit.chain, unit.event_chain)
        after = start.runs_after, start.events_after
        for chain, offset in zip(chains, after, strict=True):
            balances.now_ms = max(balances.now_ms, await self._look_up(accounts.last_recorded_ms, chain, offset))
        tail = await self._look_up(accounts.tail_of, chains[0], after[0], chains[1], after[1])
        seen_ms = balances.now_ms
        if names := recovery.names_of(tail):
            balances.begin(recovery.first_ms(tail))
            seen_ms = balances.now_ms
            events: list[AccountFact] = []
            draws: list[tuple[str, str, int, int]] = []
            for part in recovery.in_parts(names):  # a statement that names them all may be longer than the ledger takes
                events += await self._look_up(accounts.facts_of, part)
                draws += await self._look_up(accounts.draws_of, part, recovery.first_day(balances.now_ms))
            await unit.require_unmoved()
            balances.load(openings(names, *recovery.without(tail, events, draws)))
            told = recovery.refold(balances, tail, chains)
            unit.voice.tell(balances, unit.folded, told)
            unit.voice.tell_moved(balances, unit.folded)
            await unit.voice.flush()
            log.info("folded_again", chain=str(unit.chain), rows=len(tail.debits), events=len(tail.events))
        preloaded = min(recovery.PRELOADED_MAX, self._settings.balances_max // self._settings.partitions)
        names = await self._look_up(*self._workspaces_of(unit, preloaded, accounts.EPOCH))
        if not (are_all := len(names) < preloaded):
            active_since = recovery.active_since(balances.now_ms)
            names = await self._look_up(*self._workspaces_of(unit, preloaded, active_since))
        for part in recovery.in_parts(names):
            await unit.load(part)
        balances.knows_all = are_all
        return seen_ms

    def _workspaces_of(self, unit: Unit, limit: int, since: date) -> tuple[Any, ...]:
        """The question for a unit's workspaces with rows since a day."""
        return accounts.workspaces_of, unit.chain.partition, self._settings.partitions, limit, since

    async def _look_back(self, unit: Unit, seen_ms: int, started_ms: int) -> None:
        """In the background: find whom time alone may move, from 48 h before what the commit has seen up to the unit's
        "now" at its start, and let it load them in its sequence; then those who are seeded.
        """
        partition, partitions = unit.chain.partition, self._settings.partitions
        from_ms = seen_ms - recovery.LOOK_BACK_MS
        since = recovery.first_day(from_ms)
        names = await self._look_up_aside(accounts.restless, partition, partitions, since, from_ms)
        for part in recovery.in_parts(names):
            unit.chores.append(_telling(part, *await self._told_by_time(part, from_ms, started_ms)))
        if unit.settling.is_seeding:
            seeded = await self._look_up_aside(*self._workspaces_of(unit, SEEDED_MAX, accounts.EPOCH))
            unit.chores += [_seeding(part) for part in recovery.in_parts(seeded)]
        unit.chores.append(_looked_back)

    async def _told_by_time(
        self, names: Sequence[str], from_ms: int, to_ms: int
    ) -> tuple[list[str], list[tuple[Notice, Source | None]]]:
        """Whom of these workspaces time alone moved between two instants, and what it told: each one's first instant,
        then the second.
        """
        known: dict[str, list[AccountFact]] = {name: [] for name in names}
        for row in await self._look_up_aside(accounts.facts_of, names):
            known[row.workspace_id].append(row)
        left = {name: recovery.instants_of(rows, from_ms, to_ms) for name, rows in known.items()}
        moved = [name for name, instants in left.items() if instants]
        told: list[tuple[Notice, Source | None]] = []
        while due := {name: instants[0] for name, instants in left.items() if instants}:
            before = {name: instant - 1 for name, instant in due.items()}
            draws = await self._look_up_aside(accounts.draws_recorded_by, before, recovery.first_day(from_ms))
            then = openings(due, [], draws)
            for name, instant in due.items():
                told += recovery.told_at(name, known[name], instant, then[name])
                left[name] = left[name][1:]
        return moved, told


async def _looked_back(unit: Unit) -> None:
    unit.looks_back_ms = FOREVER_MS
    unit.settling.is_seeding = False


def _telling(
    names: Sequence[str], moved: Sequence[str], told: Sequence[tuple[Notice, Source | None]]
) -> Callable[[Unit], Awaitable[None]]:
    """A chore: load these accounts, then tell, states too: the commit may have passed an instant before its tick."""

    async def chore(unit: Unit) -> None:
        await unit.load(names)
        unit.balances.urgent |= {(name, pool): None for name in moved for pool in METERED}
        unit.voice.tell(unit.balances, unit.folded, told)

    return chore


def _seeding(names: Sequence[str]) -> Callable[[Unit], Awaitable[None]]:
    """A chore: load these accounts, then tell where they stand."""

    async def chore(unit: Unit) -> None:
        await unit.load(names)
        recovery.seed(unit.balances, unit.voice, unit.folded, names)

    return chore


def examine(mark: Mark, chain: Chain, log_range: LogRange, retention_gap: str) -> Incident | None:
    """The audit at assignment: what an operator must look at before this partition may go on."""
    if not mark.is_whole:
        return Incident(
            f"{chain}: the ledger has a hole",
            f"offsets {mark.first} to {mark.last} have {mark.rows} rows that stand for {mark.gaps} offsets",
            "Restore the missing part, or see docs/operations.md.",
        )
    if mark.next > log_range.end:
        return Incident(
            f"{chain}: the ledger is ahead of Kafka",
            f"the mark is at {mark.last}, Kafka's log ends before {log_range.end}",
            "Kafka lost data: restore it, or see docs/operations.md.",
        )
    lost = log_range.start - mark.next
    if mark.rows and lost > 0 and retention_gap == "stop":
        return Incident(
            f"{chain}: Kafka dropped {lost:,} events before they were read",
            f"the mark is at {mark.last}, Kafka's log starts at {log_range.start}",
            "Set CREDITSTREAM_RETENTION_GAP=continue to go on without them; the gap stays visible.",
        )
    return None
