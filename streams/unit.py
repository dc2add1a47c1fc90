"""A unit: one Kafka partition with one state, one writer and one sequence. The only place where order exists.

Order of effects, over everything that waits for a unit, 1 to 40,000 rows:

1. decode and rate the records (`streams.rows`)
2. settle copies: filter, then rows on their way, then one look-up in the ledger
3. rows into the open batch
4. insert, when the batch is full or has lingered (`sinks.ledger`, protocol P1)
5. read the mark back
6. acknowledge the chunks; the Kafka commit follows, and only informs

A crash between any two of these replays to the same ledger: what the ledger does not have is read again, and what it
has is not. While one batch is inserted the next is prepared; every queue between them is bounded.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import msgspec
import pyarrow as pa
import structlog

from schemas.cell_run import from_milliseconds
from schemas.ledger import Kind
from schemas.problem import Problem
from sinks.ledger import Batch, Chain, Incident, Ledger, Mark
from streams.duplicates import Identity, Original, RunFilter, settle
from streams.intake import read_chunk
from streams.rating import RatingTable
from streams.rows import Take, apply_verdicts, candidates, counts, ledger_rows, originals, rate_take

BATCH_BYTES_MAX: Final = 32 * 1024 * 1024
"""Kafka bytes of one batch at the most: large events make shorter batches, not larger ones."""

TAKE_ROWS_MAX: Final = 10_000
BACKLOG_CHUNK: Final = 500
"""A chunk of this many records or more was fetched from a backlog."""
GATHER_S: Final = 0.02
"""How long more chunks of a backlog are waited for."""

log: Final = structlog.get_logger()


class Event(msgspec.Struct, frozen=True, eq=False):
    """One chunk that was delivered, and how to say that it is done."""

    chunk: Any
    acknowledge: Callable[[], Any]


class Batching(msgspec.Struct, frozen=True):
    """When a batch is written: at ``rows_max`` rows, or ``linger_s`` seconds after its first."""

    rows_max: int
    linger_s: float


class Lanes(msgspec.Struct, frozen=True):
    """What a unit shares with the others: the ledger, its threads, and the catalogue's rating table."""

    ledger: Ledger
    rating: RatingTable
    partitions: int
    batching: Batching
    find_runs: Callable[[list[Identity]], Any]
    """Awaitable: identity → the ledger's debit, for those that it has."""
    in_writer: Callable[..., Any]
    """Awaitable: run a blocking call in the writer's thread."""
    written: Counter[str]
    """Rows by kind and reason since the start."""
    on_incident: Callable[["Unit", Problem], None]


class Unit:
    """One assigned partition, from its first chunk to the last mark."""

    def __init__(self, mark: Mark, chain: Chain, run_filter: RunFilter, lanes: Lanes) -> None:
        self.chain: Final = chain
        self.mark = mark
        self.run_filter: Final = run_filter
        self.incident: Problem | None = None
        self._lanes = lanes
        self._position = mark.last
        self._waiting: asyncio.Queue[Event] = asyncio.Queue()
        self._open = OpenBatch(mark.last)
        self._sealed: asyncio.Queue[OpenBatch] = asyncio.Queue(maxsize=1)
        self._unwritten: list[Take] = []
        self._draining = False
        self._closing = threading.Event()

    @property
    def rows_unwritten(self) -> int:
        """Rows that are rated and not yet read back from the ledger."""
        return sum(len(take.runs.offsets) for take in self._unwritten)

    def receive(self, event: Event) -> None:
        """Take over a chunk. The transport bounds how much waits here."""
        self._waiting.put_nowait(event)

    def drain(self) -> None:
        """Write what is there at once: the worker stops, or the partition moves."""
        self._draining = True
        self._waiting.put_nowait(_NUDGE)

    async def run(self) -> None:
        """The unit's life. An incident ends it quietly; anything else that goes wrong is the process's end."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._meter())
                tasks.create_task(self._write())
        except* Incident as group:
            incident = group.exceptions[0]
            assert isinstance(incident, Incident)
            self.incident = incident
            self._lanes.on_incident(self, incident)

    def close(self) -> None:
        """Stop waiting for a database that does not answer."""
        self._closing.set()

    async def _meter(self) -> None:
        """Steps 1 to 3, for whatever waits."""
        while True:
            events = await self._take()
            chunks = [chunk for event in events if (chunk := self._unread(event))]
            if chunks:
                await self._rate(chunks)
            self._open.events.extend(event for event in events if event is not _NUDGE)
            if self._is_time_to_seal():
                await self._sealed.put(self._open)
                self._open = OpenBatch(self._position)

    def _is_time_to_seal(self) -> bool:
        """A full batch goes, if need be after a wait; one that has only lingered goes when the writer is free: under a
        backlog batches are large, whatever the linger.
        """
        batching = self._lanes.batching
        due = self._open.is_due(batching) or (self._draining and bool(self._open.events))
        return self._open.is_full(batching) or (due and not self._sealed.full())

    async def _take(self) -> list[Event]:
        """What waits, up to a full batch; nothing when the open batch has lingered enough.

        A long chunk tells of a backlog: then some more are gathered, since a take has a price of its own.
        """
        room = min(TAKE_ROWS_MAX, self._lanes.batching.rows_max - self._open.rows)
        deadline = None if self._sealed.full() else self._open.deadline(self._lanes.batching)
        events: list[Event] = []
        rows = 0
        try:
            async with asyncio.timeout_at(deadline) as waiting:
                while rows < room and not (events and self._waiting.empty() and len(events[-1].chunk) < BACKLOG_CHUNK):
                    events.append(await self._waiting.get())
                    rows += len(events[-1].chunk)
                    waiting.reschedule(asyncio.get_running_loop().time() + GATHER_S)
        except TimeoutError:
            pass
        return events

    def _unread(self, event: Event) -> Any:
        """The chunk without what this unit has had before, as after a seek that came twice."""
        chunk = event.chunk
        if chunk and chunk[0].offset <= self._position:
            chunk = [record for record in chunk if record.offset > self._position]
        if chunk:
            self._position = chunk[-1].offset
        return chunk

    async def _rate(self, chunks: list[Any]) -> None:
        lanes, after = self._lanes, self._open.last
        parts = []
        for chunk in chunks:
            parts.append(read_chunk(chunk, self.chain.partition, lanes.partitions))
            await asyncio.sleep(0)  # the next fetch is asked for while this one is decoded
        take = rate_take(self.chain, after, chunks, parts, lanes.rating)
        await self._settle_copies(take)
        self.run_filter.add(take.new_run_keys())
        self._unwritten.append(take)
        self._open.add(take, ledger_rows(take), sum(chunk_bytes(chunk) for chunk in chunks))
        for records in (take.records, *chunks):
            records.clear()  # half of the worker's memory, and nobody reads them any more
        await asyncio.sleep(0)

    async def _settle_copies(self, take: Take) -> None:
        """Step 2. Only candidates cost anything; nearly always there are none, or a few."""
        suspicion = self.run_filter.suspect(take.runs.keys)
        if not suspicion.any.any():
            return
        found = candidates(take, suspicion.any)
        known: dict[Identity, Original] = {}
        if suspicion.before.any():
            for earlier in self._unwritten:
                known |= originals(earlier, take.runs.keys[suspicion.before])
        unknown = {candidate.identity for candidate in found if suspicion.before[candidate.row]} - known.keys()
        if unknown:
            known |= await self._lanes.find_runs(list(unknown))
        apply_verdicts(take, settle(found, known))

    async def _write(self) -> None:
        """Steps 4 to 6, batch after batch."""
        while True:
            batch = await self._sealed.get()
            self._waiting.put_nowait(_NUDGE)  # a lingering batch may be sealed now
            if batch.takes:
                self.mark = await self._lanes.in_writer(
                    self._lanes.ledger.append, batch.close(self.chain), self.mark, self._closing
                )
            written: Counter[str] = Counter()
            for take in batch.takes:
                self._unwritten.remove(take)
                written.update(counts(take))
            self._lanes.written.update(written)
            if letters := {name: number for name, number in written.items() if name.startswith(Kind.DEAD_LETTER)}:
                log.warning("dead_letters", chain=str(self.chain), mark=self.mark.last, **letters)
            for event in batch.events:
                await event.acknowledge()


class OpenBatch:
    """Rows that are gathered for one insert."""

    def __init__(self, after: int) -> None:
        self.after: Final = after
        self.last = after
        self.rows = 0
        self.takes: list[Take] = []
        self.events: list[Event] = []
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._since = 0.0

    def add(self, take: Take, rows: pa.Table, nbytes: int) -> None:
        """Append the rows of one take; ``nbytes`` as they were in Kafka."""
        if not self.takes:
            self._since = asyncio.get_running_loop().time()
        self.takes.append(take)
        self._tables.append(rows)
        self.rows += len(rows)
        self.last = take.last
        self._bytes += nbytes

    def deadline(self, batching: Batching) -> float | None:
        """Loop time at which it has lingered enough; None while it is empty."""
        return self._since + batching.linger_s if self.takes else None

    def is_due(self, batching: Batching) -> bool:
        """Full, or old enough, or nothing but records that were known already."""
        if not self.takes:
            return bool(self.events)
        return self.is_full(batching) or asyncio.get_running_loop().time() >= self._since + batching.linger_s

    def is_full(self, batching: Batching) -> bool:
        """No further row fits."""
        return self.rows >= batching.rows_max or self._bytes >= BATCH_BYTES_MAX

    def close(self, chain: Chain) -> Batch:
        """The batch for the ledger. Its ClickHouse partition follows from its first record alone: a second writer of
        the same place must meet the same deduplication log.
        """
        first = from_milliseconds(int(self.takes[0].runs.recorded_ms[0]))
        rows = pa.concat_tables(self._tables)
        month = pa.repeat(pa.scalar(first.year * 100 + first.month, pa.uint32()), len(rows))
        return Batch(chain, self.after, self.last, rows.append_column("batch_month", month))


def chunk_bytes(chunk: Any) -> int:
    """Bytes of the values as Kafka held them."""
    return getattr(chunk, "nbytes", 0) or sum(len(record.value or b"") for record in chunk)


async def _nothing() -> None:
    """A nudge needs no acknowledgement."""


_NUDGE: Final = Event([], _nothing)
