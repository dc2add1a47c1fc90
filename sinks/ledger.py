"""P1: the write protocol that makes the ledger exactly once.

For each Kafka partition, named by its topic's **id**, the ledger itself says where to go on: the *mark* is the last
offset that has a row. Kafka's committed offset never decides.

1. On assignment the mark is read, audited and compared with Kafka's log; reading resumes at mark + 1.
2. A batch is any run of offsets that starts at mark + 1, with a row for every one.
3. A batch is one insert: one ClickHouse partition, one block, one part, all or nothing. Its token is
   ``epoch/topic id/partition/mark + 1``: put-if-absent on that place of the chain, whoever comes second is dropped.
   Each row carries ``mark_read_at``; a constraint of the table refuses one older than 120 s.
4. Whatever the insert answered, the mark is read again. At the batch's end and ours: done. Unmoved: the batch is not
   there, and is sent again under the same token. Anything else: another writer was here (`ForeignMark`).
5. Five acknowledged inserts with the mark unmoved: the token outlived its rows. If the server has started since the
   chain's last row, it died amid an insert, between writing down the token and naming the part (`MergeTreeSink` does
   both, in this order): the place goes on under its next token, ``.../mark + 1/1``, put-if-absent as well, and nobody
   takes that before he has found the first one spent. Else, as after a restore, an operator raises the epoch.

``append_steps`` is the protocol without I/O: it yields what to do next and receives the answer, so the worker drives it
against a database and the simulator against crashes, second owners and lost answers.
"""

import math
import threading
import time
from collections.abc import Callable, Generator
from typing import Final

import msgspec
import pyarrow as pa
from clickhouse_connect.driver.client import Client

from schemas.cell_run import from_milliseconds
from schemas.ledger import Position
from schemas.problem import Problem
from sinks.clickhouse import DatabaseError, first_line
from sinks.columns import instants

MARK_AGE_S_MAX: Final = 60.0
"""An older mark is read again before an insert."""
INSERT_AGE_S_MAX: Final = 120.0
"""The table refuses an insert that rests on an older mark."""
ACKNOWLEDGED_MAX: Final = 5
SPENT_MAX: Final = 3
"""A server may die so often amid inserts for one place before an operator is asked for."""
RETRY_WAIT_S: Final = (0.1, 0.3, 1.0, 3.0)
"""Waits between attempts; the last one repeats. Waiting is the back-pressure."""
YOUNG_SERVER_S: Final = 2
"""Until its server is this old, the table refuses every insert."""
YOUNG_WAIT_S: Final = 0.1
TOO_OLD: Final = -math.inf
"""``age_from`` of a mark that must be read again before an insert, as of one from a server that is too young."""
TOKEN_WINDOW_S: Final = 240
"""The table must remember the tokens of all inserts within this time; a worker checks at its start that it does."""

POSITION: Final = "concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset))"
"""SQL: a row's `schemas.ledger.Position` as text."""


class Chain(msgspec.Struct, frozen=True):
    """One Kafka partition of one incarnation of a topic: the unit of sequence in the ledger."""

    topic: str
    topic_id: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]"

    def position(self, offset: int) -> str:
        """Where a record of it lies in Kafka, as people write it: ``cell-runs[3]@88123``."""
        return str(Position(self.topic, self.partition, offset))


class Mark(msgspec.Struct, frozen=True):
    """What the ledger holds of a chain. Offsets are Kafka's; times are Unix milliseconds of the server's clock."""

    last: int
    """The highest offset, -1 when there is no row."""
    first: int
    rows: int
    gaps: int
    """Sum of ``offset_gap``: equals ``last - first + 1`` in a whole chain."""
    written_under: int
    """``mark_read_at`` of the last row: which attempt wrote it."""
    read_at: int
    is_of_earlier_life: bool = False
    """Whether the server has started since the last row was written, or there is none."""
    age_from: float = 0.0
    """This process's monotonic clock, seconds: from here on its age counts, earlier where less of it is left."""

    @property
    def next(self) -> int:
        """Where to read on."""
        return self.last + 1

    @property
    def is_whole(self) -> bool:
        """Whether its rows stand for every offset from the first to the last."""
        return self.rows == 0 or self.gaps == self.last - self.first + 1


class Batch(msgspec.Struct, frozen=True):
    """Rows of consecutive records of one chain, a row for every one, in one table without ``mark_read_at``."""

    chain: Chain
    after: int
    """The mark on which it stands: the offset before its first."""
    last: int
    rows: pa.Table


def token_window(client: Client) -> int:
    """How many insert tokens the ledger's table remembers."""
    (engine,) = client.query(
        "SELECT engine_full FROM system.tables WHERE database = currentDatabase() AND name = 'ledger'"
    ).result_rows[0]
    _, _, tail = engine.partition("non_replicated_deduplication_window = ")
    return int(tail.split(",")[0]) if tail else 0


def batch_month(recorded_ms: int) -> int:
    """The ClickHouse partition of a batch, from the broker's time of its first record: ``202611``."""
    first = from_milliseconds(recorded_ms)
    return first.year * 100 + first.month


class ForeignMark(Exception):
    """The mark is where only another writer can have put it; this process must not go on (exit 75)."""


class Incident(Problem):
    """A chain that an operator must look at. It pauses its unit; the other units go on."""


class Stopped(Exception):
    """The batch was given up because its unit closes; the next owner reads the same offsets again."""


class ReadMark(msgspec.Struct, frozen=True):
    """Ask for the mark; answered by a `Mark`, however long that takes."""


class Insert(msgspec.Struct, frozen=True):
    """Send the batch under ``token``; answered True when acknowledged, False when it failed or nobody knows."""

    batch: Batch
    token: str
    mark_read_at: int
    spent: int = 0
    """How many tokens of this place have outlived their rows."""


Step = ReadMark | Insert
Steps = Generator[Step, Mark | bool, Mark]


def append_steps(batch: Batch, mark: Mark, epoch: int, now: Callable[[], float] = time.monotonic) -> Steps:
    """Protocol steps 3 to 5 for one batch. Returns the mark at the batch's end.

    ForeignMark when another writer was here; Incident when acknowledged inserts did not move the mark.
    """
    place = f"{epoch}/{batch.chain.topic_id}/{batch.chain.partition}/{batch.after + 1}"
    attempts: set[int] = set()
    acknowledged = spent = 0
    while True:
        while now() - mark.age_from > MARK_AGE_S_MAX:
            mark = _expect_mark((yield ReadMark()))
        if mark.last == batch.after:
            attempts.add(mark.read_at)
            acknowledged += bool((yield Insert(batch, f"{place}/{spent}" if spent else place, mark.read_at, spent)))
            mark = _expect_mark((yield ReadMark()))
        if mark.last == batch.last and mark.written_under in attempts:
            return mark
        if mark.last != batch.after:
            raise ForeignMark(f"{batch.chain}: the mark is at {mark.last}, expected {batch.after} or our {batch.last}")
        if acknowledged < ACKNOWLEDGED_MAX:
            continue
        if mark.is_of_earlier_life and spent < SPENT_MAX:
            acknowledged, spent = 0, spent + 1
        else:
            raise Incident(
                f"{batch.chain}: the ledger drops what it acknowledges",
                f"{acknowledged} inserts after offset {batch.after} were acknowledged, but the mark did not move: "
                "the insert tokens outlived their rows, as after a restore",
                f"Stop all workers. Raise CREDITSTREAM_EPOCH above {epoch}, then start them.",
            )


def _expect_mark(answer: Mark | bool) -> Mark:
    assert isinstance(answer, Mark)
    return answer


def mark_of(client: Client, chain: Chain) -> Mark:
    """The mark of one chain, served by the ``marks`` projection. Raises what the database raises."""
    asked = time.monotonic()
    found = client.query(_MARK, parameters={"topic_id": chain.topic_id, "partition": chain.partition})
    last, first, rows, gaps, written_under, read_at, uptime_s = found.result_rows[0]
    usable_s = min(MARK_AGE_S_MAX, max(0, uptime_s - 1) / 2)
    age_from = asked - (MARK_AGE_S_MAX - usable_s) if uptime_s >= YOUNG_SERVER_S else TOO_OLD
    # A row never rests on a mark that was read before its server started.
    is_of_earlier_life = written_under < read_at - uptime_s * 1000
    return Mark(last if rows else -1, first, rows, gaps, written_under, read_at, is_of_earlier_life, age_from)


class Ledger:
    """The ledger's writing side over one connection. Blocking: the worker calls it in a thread.

    ``on_trouble`` is told whose batch it is, and what the database said when it failed; "" when it is in, or given up.
    """

    def __init__(
        self, client: Client, epoch: int = 0, on_trouble: Callable[[Chain, str], None] = lambda chain, what: None
    ) -> None:
        self._client = client
        self._epoch = epoch
        self._on_trouble = on_trouble

    def mark(self, chain: Chain) -> Mark:
        """See `mark_of`."""
        return mark_of(self._client, chain)

    def insert(self, step: Insert) -> None:
        """One attempt. Raises what the database raises; afterwards only the mark knows what happened."""
        rows = step.batch.rows
        stamped = rows.append_column("mark_read_at", instants([step.mark_read_at] * len(rows)))
        self._client.insert_arrow(
            "ledger", stamped.combine_chunks(), settings={"insert_deduplication_token": step.token, "async_insert": 0}
        )

    def append(self, batch: Batch, mark: Mark, closing: threading.Event) -> Mark:
        """Write one batch by P1 and return the new mark, waiting out a database that does not answer.

        ForeignMark and Incident as `append_steps`; Stopped when ``closing`` was set while it waited.
        """
        try:
            return self._append(batch, mark, closing)
        finally:
            self._on_trouble(batch.chain, "")

    def _append(self, batch: Batch, mark: Mark, closing: threading.Event) -> Mark:
        steps = append_steps(batch, mark, self._epoch)
        step = next(steps)
        failures = 0
        while True:
            try:
                answer: Mark | bool = self._do(step, batch.chain)
                if isinstance(answer, Mark) and answer.age_from == TOO_OLD:
                    _pause(YOUNG_WAIT_S, closing)
            except DatabaseError as error:
                self._on_trouble(batch.chain, f"{batch.chain} after offset {batch.after}: {first_line(error)}")
                _pause(RETRY_WAIT_S[min(failures, len(RETRY_WAIT_S) - 1)], closing)
                failures += 1
                if isinstance(step, ReadMark):
                    continue
                answer = False
            try:
                step = steps.send(answer)
            except StopIteration as done:
                return _expect_mark(done.value)

    def _do(self, step: Step, chain: Chain) -> Mark | bool:
        if isinstance(step, ReadMark):
            return self.mark(chain)
        if step.spent:
            what = f"{chain} after offset {step.batch.after}: the server died amid an insert, and its token is spent"
            self._on_trouble(chain, what)
        self.insert(step)
        return True


def _pause(seconds: float, closing: threading.Event) -> None:
    if closing.wait(seconds):
        raise Stopped


_MARK: Final = """
SELECT max(kafka_offset), min(kafka_offset), count(), sum(offset_gap),
       toUnixTimestamp64Milli(argMax(mark_read_at, kafka_offset)), toUnixTimestamp64Milli(now64(3)), uptime()
FROM ledger WHERE topic_id = {topic_id:String} AND kafka_partition = {partition:UInt16}
"""
