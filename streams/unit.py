"""A unit: partition n of both topics with one state, one writer and one sequence. The only place where order exists.

Order of effects for cell runs: 1 to 5 over a take, which is what waits for a unit, 1 to some 10,000 rows; the others
over all takes of a batch, some 40,000 rows at the most:

1. decode (`streams.rules.intake`) and rate the records (`streams.rules.rows`)
2. decide what is a copy: filter, then rows on their way, then one look-up in the ledger
3. fold into the balances (`streams.rules.balances`)
4. alerts, and states that changed, are handed to the producer
5. rows into the open batch
6. insert, when the batch is full or has lingered (`sinks.ledger`, protocol P1)
7. read the mark back
8. states whose ``used`` moved are handed over, too; the producer is flushed (`streams.settling`)
9. acknowledge the chunks; the Kafka commit follows: it means that rows are in *and* alerts are out

Account events go the same way. They are rated against the ledger and the rows on their way there, folded, told, and
written at once, in an insert of their own behind the runs that were folded before them. A reversal is a barrier: all
that came before it is written and read back first, so that it sees durable rows only. Its own rows are read back before
they are folded, too: after a crash it could see more, and be rated otherwise. The broker's time decides which topic
comes first (`streams.inbox`).

A crash between any two of these replays to the same ledger, since what the ledger does not have is read again; and to
the same alert ids, since what the commit has not seen is folded again (`streams.recovery`). While one batch is inserted
the next is prepared; every queue between them is bounded.
"""

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import msgspec
import structlog

from schemas.ledger import ACCOUNT_KINDS, Identity, Kind
from schemas.plan import PlanLists
from schemas.problem import Problem
from sinks.ledger import INSERT_AGE_S_MAX, TOO_OLD, Batch, Chain, ForeignMark, Incident, Ledger, Mark, batch_month
from streams.batches import AccountBatch, Batching, OpenBatch, chunk_bytes
from streams.inbox import BACKLOG_CHUNK, Inbox, Parcel
from streams.lookups import Lookups
from streams.reading import Reading
from streams.rules import account_events
from streams.rules.balances import Balances, Notice
from streams.rules.duplicates import KeyFilter, Original, decide
from streams.rules.facts import fold_event
from streams.rules.intake import read_chunk
from streams.rules.limits import FOREVER_MS
from streams.rules.messages import Source
from streams.rules.rating import RatingTable
from streams.rules.records import Record, UpTo
from streams.rules.rows import (
    Take,
    apply_verdicts,
    candidates,
    counts,
    drawn,
    originals,
    rate_take,
    source_of,
)  # fmt: skip
from streams.settling import Settling, Written
from streams.voice import Voice

TAKE_ROWS_MAX: Final = 10_000
TICK_S: Final = 0.25
"""How often a unit looks at the clock."""

log: Final = structlog.get_logger()


class Shared(msgspec.Struct, frozen=True):
    """What the units of a worker share."""

    ledger: Ledger
    rating: RatingTable
    plans: PlanLists
    partitions: int
    batching: Batching
    lookups: Lookups
    in_writer: Callable[..., Awaitable[Any]]
    """Run a blocking call in the writer's thread."""
    read_mark: Callable[[Chain], Awaitable[Mark]]
    """Between two inserts of this worker, however long the database takes."""
    written: Counter[str]
    """Rows by kind and reason since the start."""
    reading: Reading
    on_incident: Callable[["Unit", Problem], None]


class Filters(msgspec.Struct, frozen=True):
    """What a unit may have had before: the run ids, and the ids of account events."""

    runs: KeyFilter
    events: KeyFilter

    @property
    def nbytes(self) -> int:
        """Memory of both, bytes."""
        return self.runs.nbytes + self.events.nbytes

    @property
    def are_complete(self) -> bool:
        """Whether all that the ledger has is in them."""
        return self.runs.is_complete and self.events.is_complete


class Unit:
    """One assigned partition, from its first chunk to the last mark."""

    def __init__(
        self,
        marks: tuple[Mark, Mark],
        chains: tuple[Chain, Chain],
        filters: Filters,
        balances: Balances,
        voice: Voice,
        shared: Shared,
    ) -> None:
        self.chain, self.event_chain = chains
        self.mark, self.event_mark = marks
        self.filters: Final = filters
        self.balances: Final = balances
        self.voice: Final = voice
        self.incident: Problem | None = None
        self._shared = shared
        self._position = self._folded = self._first_mark = self.mark.last
        self._event_position = self._first_event_mark = self.event_mark.last
        self._alone_from_s = time.monotonic() + INSERT_AGE_S_MAX
        self._read_ms = self._events_read_ms = 0
        """The broker's time of the last record of each chain."""
        self._open = OpenBatch(self.mark.last)
        self._sealed: asyncio.Queue[OpenBatch] = asyncio.Queue(maxsize=1)
        self._inbox = Inbox(self._sealed.full, lambda: shared.reading.unread(self.chain.partition, self.read))
        self._unwritten: list[Take] = []
        self._unwritten_events: list[account_events.RatedEvent] = []
        self.settling: Final = Settling(balances, voice, lambda: self.folded)
        self._draining = self._is_tick_due = False
        self._closing = threading.Event()
        self.looks_back_ms = FOREVER_MS
        """The end (Unix ms) of a look-back that is under way: accounts are loaded as of then."""
        self.chores: deque[Callable[[Unit], Awaitable[None]]] = deque()
        """What others want done in the unit's sequence; one chore runs between two takes."""
        self._chores_due = 0

    @property
    def rows_unwritten(self) -> int:
        """Rows that are rated and not yet read back from the ledger."""
        return sum(len(take.runs.offsets) for take in self._unwritten)

    @property
    def read(self) -> UpTo:
        """What it has taken in."""
        return self._position, self._event_position

    @property
    def is_settled(self) -> bool:
        """Whether what it has folded is in the ledger, and everybody who should know has been told."""
        telling = self.balances.moved or self.balances.urgent or self.voice.has_unflushed
        looks_back = self.looks_back_ms != FOREVER_MS
        return not telling and not looks_back and self.folded == (self.mark.last, self.event_mark.last)

    @property
    def folded(self) -> UpTo:
        """What its balances hold."""
        return self._folded, self._event_position

    def receive(self, parcel: Parcel) -> None:
        """Take a chunk in. The transport bounds how much waits here."""
        self._inbox.put(parcel)

    def drain(self) -> None:
        """Write what is there at once: the worker stops, or the partition moves."""
        self._draining = True
        self.settling.hurry()
        self._inbox.nudge()

    async def run(self) -> None:
        """The unit's life. An incident ends it quietly; anything else that goes wrong is the process's end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._meter())
                tasks.create_task(self._write())
                tasks.create_task(self.settling.run())
                tasks.create_task(self._tick())
        except* Incident as group:
            incident = group.exceptions[0]
            assert isinstance(incident, Incident)
            self.incident = incident
            self._shared.on_incident(self, incident)
        finally:
            self.voice.close()

    def close(self) -> None:
        """Stop waiting for a database that does not answer."""
        self._closing.set()

    async def _meter(self) -> None:
        """The sequence: whatever waits, and between two takes the clock."""
        while True:
            await self._take_runs(await self._next_runs())
            if parcels := self._inbox.take_account_events(TAKE_ROWS_MAX):
                await self._take_account_events(parcels)
            if self._draining:
                self._inbox.leave_what_waits()
            if self._is_tick_due:
                self._is_tick_due = False
                self._chores_due = len(self.chores)  # one that comes again waits for the next tick
                self._look_at_the_clock()
            if self._chores_due:
                await self._do_a_chore()  # runs wait for one at a time

    async def _next_runs(self) -> list[Parcel]:
        """Cell runs for the open batch; none when it has lingered enough."""
        batching = self._shared.batching
        room = min(TAKE_ROWS_MAX, batching.rows_max - self._open.rows)
        return await self._inbox.take_runs(room, None if self._sealed.full() else self._open.deadline(batching))

    async def _take_runs(self, parcels: list[Parcel]) -> None:
        """Steps 1 to 5."""
        chunks = [chunk for parcel in parcels if (chunk := self._unread(parcel))]
        if chunks:
            await self._rate(chunks)
        self._open.parcels.extend(parcels)
        if self._is_time_to_seal():
            await self._seal()

    def _is_time_to_seal(self) -> bool:
        """A full batch is sealed even if it must wait for the writer; one that has only lingered, when the writer is
        free: so batches are large under a backlog, however short the linger.
        """
        batching = self._shared.batching
        # Parcels without a take held nothing new: nothing to write, and nothing to wait for.
        at_once = bool(self._open.parcels) and (self._draining or not self._open.takes)
        # Account events that wait will be sealed with it; if it went to the writer now, they would wait once more.
        due = at_once or (self._open.is_due(batching) and not self._inbox.has_account_events)
        return self._open.is_full(batching) or (due and not self._sealed.full())

    async def _seal(self) -> None:
        await self._sealed.put(self._open)
        self._open = OpenBatch(self._position)

    def _unread(self, parcel: Parcel) -> list[Record]:
        """The chunk without the records that this unit has had, as after a second seek."""
        chunk = parcel.chunk
        if chunk and chunk[0].offset <= self._position:
            chunk = [record for record in chunk if record.offset > self._position]
        if chunk:
            self._position = chunk[-1].offset
        return chunk

    async def _rate(self, chunks: list[list[Record]]) -> None:
        shared, after = self._shared, self._open.last
        parts = []
        for chunk in chunks:
            parts.append(read_chunk(chunk, self.chain.partition, shared.partitions))
            if len(chunk) >= BACKLOG_CHUNK:
                await asyncio.sleep(0)  # the next fetch is asked for while this one is decoded
        take = rate_take(self.chain, after, chunks, parts, shared.rating)
        await self._decide_copies(take)
        self.filters.runs.add(take.new_run_keys())
        await self._fold(take)
        self._unwritten.append(take)
        self._open.add(take, sum(chunk_bytes(chunk) for chunk in chunks))
        for chunk in chunks:
            chunk.clear()
        await asyncio.sleep(0)

    async def _decide_copies(self, take: Take) -> None:
        """Step 2. Only candidates cost anything; nearly always there are none, or a few."""
        suspicion = self.filters.runs.suspect(take.runs.keys)
        if not suspicion.any.any():
            return
        found = candidates(take, suspicion.any)
        known: dict[Identity, Original] = {}
        if suspicion.before.any():
            for earlier in self._unwritten:
                known |= originals(earlier, take.runs.keys[suspicion.before])
        unknown = {candidate.identity for candidate in found if suspicion.before[candidate.row]} - known.keys()
        if unknown:
            known |= await self._shared.lookups.runs(list(unknown))
        apply_verdicts(take, decide(found, known))

    async def _fold(self, take: Take) -> None:
        """Steps 3 and 4."""
        debits = drawn(take)
        self.balances.begin(int(debits.recorded_ms[0]))
        await self.load(debits.drawing(), int(debits.recorded_ms[0]))
        notices = self.balances.fold(debits)
        self._folded = take.last
        self._read_ms = max(self._read_ms, int(debits.recorded_ms[-1]))
        self._tell(notices, lambda notice: source_of(take, notice.row))
        self._evict()

    def _evict(self) -> None:
        # During a look-back an account is loaded as of before it: what an event has told would be told by time again.
        looks_back = self.looks_back_ms != FOREVER_MS
        self.balances.evict(self.mark.last, self._first_event_mark if looks_back else self.event_mark.last)

    async def load(self, names: Sequence[str], at_ms: int = FOREVER_MS) -> None:
        """Bring accounts into memory, as of the earliest of three instants: now, ``at_ms`` (the time of the record that
        needs them), and the end of the look-back.

        What the ledger holds of an account is all there is, whatever is being inserted meanwhile: one with rows above
        the mark is never evicted, so it would be in memory.
        """
        at_ms = min(at_ms, self.looks_back_ms)
        while missing := self.balances.missing(names, at_ms):
            openings = await self._shared.lookups.openings(missing, min(at_ms, self.balances.now_ms))
            await self.require_unmoved()
            self.balances.load(openings, at_ms)

    async def require_unmoved(self) -> None:
        """ForeignMark when the insert of a dead worker has landed since this unit began: what the ledger has just said
        of an account may hold rows that Kafka brings once more, and that would be counted twice. Behind an insert of
        ours none lands, nor does one on a mark that was read too long ago.
        """
        if time.monotonic() > self._alone_from_s:
            return
        if self.mark.last == self._first_mark:
            await self._require_last(self.chain, lambda: self.mark)
        if self.event_mark.last == self._first_event_mark:
            await self._require_last(self.event_chain, lambda: self.event_mark)

    async def _require_last(self, chain: Chain, mark: Callable[[], Mark]) -> None:
        before = mark().last
        found = (await self._shared.read_mark(chain)).last
        if found not in (before, mark().last):  # an insert of ours may have moved it meanwhile
            raise ForeignMark(f"{chain}: the mark is at {found}, expected {before}")

    def _tell(self, notices: Sequence[Notice], source: Callable[[Notice], Source]) -> None:
        self.voice.tell(self.balances, self.folded, [(n, source(n) if n.row >= 0 else None) for n in notices])

    async def _take_account_events(self, parcels: list[Parcel]) -> None:
        """What came before the next run, in one insert."""
        chunk = [record for parcel in parcels for record in parcel.chunk]
        chunk = [record for record in chunk if record.offset > self._event_position]
        if chunk:
            await self._meter_account_events(chunk)
        self._open.parcels += parcels
        await self._seal()

    async def _meter_account_events(self, chunk: list[Record]) -> None:
        received = account_events.receive(chunk, self.event_chain.partition, self._shared.partitions)
        is_barrier = bool(account_events.run_identities(received))
        if is_barrier:
            await self._write_all()
        rows = await self._rate_account_events(received)
        told = [account_events.fact_of(row) for row in rows if row.kind in ACCOUNT_KINDS]
        self.balances.begin(chunk[0].timestamp)
        await self.load([row.workspace_id for row in told], chunk[0].timestamp)
        self._open.followed_by = self._account_batch(chunk, rows)
        self._unwritten_events += rows
        if is_barrier:
            await self._write_all()
        self._event_position = chunk[-1].offset
        self._events_read_ms = max(self._events_read_ms, chunk[-1].timestamp)
        for row in told:
            notices = fold_event(self.balances, row)
            self._tell(notices, lambda notice: Source(self.event_chain, notice.row))
        self._evict()

    async def _rate_account_events(
        self, received: Sequence[account_events.Received]
    ) -> list[account_events.RatedEvent]:
        keys = account_events.keys_of(received)
        asked = account_events.to_look_up(received, self.filters.events.suspect(keys).before)
        self.filters.events.add(keys)
        unwritten = list(self._unwritten_events)  # before the ledger is asked: meanwhile they may get there
        known = await self._shared.lookups.known(asked) if asked else account_events.NOTHING_KNOWN
        known = account_events.with_rows(known, unwritten, self.event_chain)
        return account_events.rate_events(received, self.event_chain, known, self._shared.plans)

    def _account_batch(self, chunk: list[Record], rows: Sequence[account_events.RatedEvent]) -> AccountBatch:
        table = account_events.ledger_rows(
            self.event_chain, self._event_position, rows, batch_month(chunk[0].timestamp)
        )
        return AccountBatch(Batch(self.event_chain, self._event_position, chunk[-1].offset, table), rows)

    async def _write_all(self) -> None:
        await self._seal()
        await self._sealed.join()

    async def _write(self) -> None:
        """Steps 6 and 7, batch after batch, no faster than their tokens are remembered; then `settling` takes over."""
        clock = asyncio.get_running_loop().time
        while True:
            batch = await self._sealed.get()
            next_at = clock() + self._shared.batching.every_s
            self._inbox.nudge()  # a lingering batch may be sealed now
            if batch.takes:
                await self._write_runs(batch)
            if batch.followed_by:  # in the order of the fold: a replay folds in the ledger's order
                await self._write_account_events(batch.followed_by)
            self._settle(batch)
            self._sealed.task_done()
            if batch.takes or batch.followed_by:  # what inserts nothing leaves no token
                await asyncio.sleep(next_at - clock())

    def _settle(self, batch: OpenBatch) -> None:
        at_once = bool(batch.followed_by) or batch.is_full(self._shared.batching) or self._draining
        self.settling.add(Written((self.mark.last, self.event_mark.last), batch.parcels), at_once=at_once)

    async def _write_runs(self, batch: OpenBatch) -> None:
        self.mark = await self._append(batch.close(self.chain), self.mark)
        for take in batch.takes:
            self._unwritten.remove(take)
        self._count(sum((Counter(counts(take)) for take in batch.takes), Counter()), self.chain, self.mark)

    async def _write_account_events(self, written: AccountBatch) -> None:
        """Both marks are read again, so that ``mark_read_at`` orders the rows of both chains as they were folded."""
        stale = msgspec.structs.replace(self.event_mark, age_from=TOO_OLD)
        self.event_mark = await self._append(written.batch, stale)
        self.mark = msgspec.structs.replace(self.mark, age_from=TOO_OLD)
        del self._unwritten_events[: len(written.rows)]
        self._count(Counter(f"{row.kind}/{row.reason}" for row in written.rows), self.event_chain, self.event_mark)

    async def _append(self, batch: Batch, mark: Mark) -> Mark:
        written: Mark = await self._shared.in_writer(self._shared.ledger.append, batch, mark, self._closing)
        return written

    def _count(self, written: Counter[str], chain: Chain, mark: Mark) -> None:
        self._shared.written.update(written)
        if letters := {name: number for name, number in written.items() if name.startswith(Kind.DEAD_LETTER)}:
            log.warning("dead_letters", chain=str(chain), mark=mark.last, **letters)

    async def _tick(self) -> None:
        """The clock's part: what waits for time alone, and what settling leaves to it."""
        while True:
            await asyncio.sleep(TICK_S)
            self.voice.refresh()
            if not self._is_tick_due:
                self._is_tick_due = True
                self._inbox.nudge()
            self.settling.tick()

    async def _do_a_chore(self) -> None:
        self._chores_due -= 1
        await self.chores.popleft()(self)
        self._evict()
        if self._chores_due:
            self._inbox.nudge()

    def _look_at_the_clock(self) -> None:
        end_ms, events_end_ms = self._shared.reading.ends_ms(self.chain.partition, self.read)
        until_ms = min(max(self._read_ms, end_ms), max(self._events_read_ms, events_end_ms))
        self.voice.tell(self.balances, self.folded, [(notice, None) for notice in self.balances.come(until_ms)])
