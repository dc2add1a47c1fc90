"""Every event accounted for: Kafka's logs against the ledger, offset by offset.

For each partition the topics are read again, rated by the reference raters, and compared with the ledger's rows: one
row for every offset up to the mark, with the same kind, reason, pool and credits, of the same workspace. What lies
behind the mark is not wrong, only not metered yet.
"""

import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import UUID

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from creditstream.asking import Answers
from creditstream.reference import UNKNOWN_RUN, Expected, ReferenceBilling, ReferenceRater
from schemas.answers import LedgerRow, PartitionAudit, SumAudit
from schemas.catalogue import Catalogue
from schemas.ledger import Position
from schemas.problem import Problem, Unreachable
from streams.kafka.connection import librdkafka
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, Broker, LogRange, Topic, arrived, position_of
from streams.rules.records import recorded_ms_of
from streams.settings import Settings

PAGE_ROWS = 20_000
POLL_S = 1.0
CHUNK = 2000
SILENCE_S_MAX = 30.0
PROGRESS_EVERY_S = 1.0
EXAMPLES_MAX = 5


class PartitionBooks(msgspec.Struct, frozen=True, kw_only=True):
    """One partition of a topic: what Kafka holds, what the ledger holds, and how they differ."""

    topic: str
    partition: int
    log_start: int
    log_end: int
    mark: int
    events: int
    rows: int
    missing: int
    doubled: int
    different: int
    behind: int
    offsets_without_event: int
    credits: str
    credits_reference: str
    examples: list[str]


class Reconciliation(msgspec.Struct, frozen=True, kw_only=True):
    """All topics. ``closes``: nothing is missing, doubled or different, and projections equal raw sums."""

    topic: str
    closes: bool
    events: int
    rows: int
    missing: int
    doubled: int
    different: int
    behind: int
    offsets_without_event: int
    credits: str
    credits_reference: str
    sums: SumAudit
    partitions: list[PartitionBooks]

    @property
    def sentence(self) -> str:
        """The result in one line."""
        equal = "equal to" if self.credits == self.credits_reference and not self.different else "NOT equal to"
        return (
            f"{self.events:,} events in Kafka, {self.rows:,} ledger rows, {self.missing:,} missing, "
            f"{self.doubled:,} doubled; {Decimal(self.credits):,f} credits {equal} the reference rater's"
            + (f"; {self.behind:,} more offsets in Kafka are not metered yet" if self.behind else "")
        )

    @property
    def sums_sentence(self) -> str:
        """The same sums on two roads, in one line."""
        sums = self.sums
        return (
            f"sums through projections: {Decimal(sums.credits_projected):,f} credits, {sums.rows_projected:,} rows; "
            f"over raw rows: {Decimal(sums.credits_raw):,f} credits, {sums.rows_raw:,} rows"
        )


def reconcile(
    answers: Answers,
    settings: Settings,
    say: Callable[[str], object] = lambda _: None,
) -> Reconciliation:
    """Compare the topics of cell runs and of account events with the ledger. Reads every event that Kafka still has;
    ``say`` hears of the progress.
    """
    broker = Broker(settings)
    # Account events first: a run that one of them reverses was in the ledger before it.
    event_log = _Log.read(answers, broker, settings.topic(ACCOUNT_EVENTS))
    run_log = _Log.read(answers, broker, settings.topic(CELL_RUNS))
    logs = (run_log, event_log)
    _require_common(logs, broker.bootstrap)
    _require_same_catalogue(answers, Path(settings.catalogue_dir))
    progress = _Progress(say, sum(found.end - found.start for log in logs for found in log.ranges.values()))
    books = []
    for partition in range(run_log.topic.partitions):
        rater = ReferenceRater(Path(settings.catalogue_dir), partition, run_log.topic.partitions)
        books.append(_Books(answers, settings, run_log, partition).close(_Runs(rater), progress))
        events = ReferenceBilling(Path(settings.plans_dir), partition, event_log.topic.partitions, rater.debits)
        books.append(_Books(answers, settings, event_log, partition).close(_Events(events), progress))
    sums = answers.audit_sums()
    sums_equal = (sums.credits_projected, sums.rows_projected) == (sums.credits_raw, sums.rows_raw)
    wrong = any(book.missing or book.doubled or book.different for book in books)
    return Reconciliation(
        topic=run_log.topic.name,
        closes=sums_equal and not wrong,
        **{
            name: sum(getattr(book, name) for book in books)
            for name in ("events", "rows", "missing", "doubled", "different", "behind", "offsets_without_event")
        },
        credits=f"{sum(Decimal(book.credits) for book in books):f}",
        credits_reference=f"{sum(Decimal(book.credits_reference) for book in books):f}",
        sums=sums,
        partitions=sorted(books, key=lambda book: (book.topic != run_log.topic.name, book.partition)),
    )


class _Log(NamedTuple):
    """One topic: Kafka's log of each partition, and what the ledger's rows say of themselves."""

    topic: Topic
    ranges: dict[int, LogRange]
    audits: dict[int, PartitionAudit]
    older: dict[int, list[str]]
    """Partition → other topic ids under which the ledger has rows of it."""

    @classmethod
    def read(cls, answers: Answers, broker: Broker, name: str) -> "_Log":
        """Problem when the topic does not exist."""
        topic = broker.topic(name)
        if topic is None:
            raise Problem(f"topic {name} does not exist", f"on {broker.bootstrap}", "Run `creditstream topics`.")
        audits: dict[int, PartitionAudit] = {}
        older: dict[int, list[str]] = {}
        for chain in answers.audit_partitions(name):
            if chain.topic_id == topic.id:
                audits[chain.partition] = chain
            else:
                older.setdefault(chain.partition, []).append(chain.topic_id)
        return cls(topic, broker.log_ranges(name, range(topic.partitions)), audits, older)


def _require_common(logs: tuple[_Log, ...], bootstrap: str) -> None:
    """Problem when all that the ledger has is of other topics: of another Kafka, or of topics that were since made
    again. Nothing would be missing then, and nothing proven.
    """
    if any(log.older for log in logs) and not any(log.audits for log in logs):
        raise Problem(
            "the ledger has no event of these topics",
            f"it has rows of topics with these names, but with other ids than those at {bootstrap}",
            "Set CREDITSTREAM_KAFKA_BOOTSTRAP to the worker's Kafka. If topics are new, let it meter them first.",
        )


def _require_same_catalogue(answers: Answers, directory: Path) -> None:
    """Problem when the catalogue here is not the workers': every run of what differs would look wrongly priced."""
    here = {version.number: version.content_hash for version in Catalogue.load(directory).versions}
    for pinned in answers.catalogue_versions():
        if here.get(pinned.number) != pinned.content_hash:
            differs = "is another" if pinned.number in here else "is not there"
            raise Problem(
                "the catalogue here differs from the workers'",
                f"version {pinned.number} {differs} in {directory}",
                "Set CREDITSTREAM_CATALOGUE_DIR as on the workers.",
            )


class _Referee(Protocol):
    """A reference rater, and what it cannot know."""

    def expect(self, message: Message) -> Expected:
        """The verdict on the next record."""

    def excuses(self, row: LedgerRow, expected: Expected, books: "_Books") -> bool:
        """Whether the ledger differs for a good reason; then the rater has forgotten the record."""


class _Runs:
    def __init__(self, rater: ReferenceRater) -> None:
        self._rater = rater

    def expect(self, message: Message) -> Expected:
        return self._rater.expect(message.key(), message.value(), recorded_ms_of(message.timestamp()[1]))

    def excuses(self, row: LedgerRow, expected: Expected, books: "_Books") -> bool:
        """A copy of a run that this log does not hold, or an action that the catalogue did not know yet."""
        excused = expected.kind == "run" != row.kind and (row.reason == "unknown_action" or books.is_copy_of_older(row))
        if excused:
            self._rater.forget(row.workspace_id, row.run_id)
        return excused


class _Events:
    def __init__(self, rater: ReferenceBilling) -> None:
        self._rater = rater

    def expect(self, message: Message) -> Expected:
        return self._rater.expect(message.key(), message.value())

    def excuses(self, row: LedgerRow, expected: Expected, books: "_Books") -> bool:
        """A run that had not arrived, or that Kafka no longer has; a plan that no list knew yet; a copy of an event
        that this log does not hold.
        """
        if expected.reason == UNKNOWN_RUN:
            if was_there := row.kind == "reversal" and books.was_debited(row):
                self._rater.remember()
            return was_there or books.is_copy_of_older(row)
        early = (expected.reason, row.reason) in (("reversed", UNKNOWN_RUN), ("plan_changed", "unknown_plan"))
        if excused := early or (expected.kind not in ("dead_letter", "duplicate") and books.is_copy_of_older(row)):
            self._rater.forget()
        return excused


class _Progress:
    def __init__(self, say: Callable[[str], object], total: int) -> None:
        self._say, self._total, self._done = say, total, 0
        self._said_at = time.monotonic()

    def add(self) -> None:
        self._done += 1
        if self._done % 1000 == 0 and time.monotonic() - self._said_at > PROGRESS_EVERY_S:
            self._said_at = time.monotonic()
            self._say(f"reconciling {self._done:,} of {self._total:,} events")


class _Books:
    """One partition's two accounts, walked side by side."""

    def __init__(self, answers: Answers, settings: Settings, log: _Log, partition: int) -> None:
        self._answers, self._settings, self._topic, self._partition = answers, settings, log.topic, partition
        self._log, self._audit = log.ranges[partition], log.audits.get(partition)
        self._older = log.older.get(partition, [])
        self._mark = self._audit.last if self._audit else -1
        self._examples: list[str] = []
        self._missing = self._different = self._events = 0
        self._credits = self._credits_reference = Decimal(0)

    def close(self, referee: _Referee, progress: _Progress) -> PartitionBooks:
        """Walk both to the mark and say what was found."""
        rows = self._ledger_rows()
        row = next(rows, None)
        for message in self._messages():
            progress.add()
            place = position_of(message)
            self._events += 1
            while row and row.offset < place.offset:
                row = next(rows, None)
            expected = referee.expect(message)
            if row and row.offset == place.offset:
                self._compare(place, row, expected, referee, message.key() or b"")
            else:
                self._missing += 1
                self._example(f"{place}: no ledger row, expected {expected}")
        return self._report()

    def _compare(self, place: Position, row: LedgerRow, expected: Expected, referee: _Referee, key: bytes) -> None:
        credits = Decimal(row.credits) / 1000
        self._credits += credits
        found = Expected(row.kind, row.reason, row.pool, credits)
        if found != expected and referee.excuses(row, expected, self):
            self._credits_reference += credits
            return
        self._credits_reference += expected.credits
        # A dead letter may be of nobody; whatever else there is lies under the key of its workspace.
        if found != expected or (row.kind != "dead_letter" and row.workspace_id.encode() != key):
            self._different += 1
            ledger, rated = f"{found} of {row.workspace_id}", f"{expected} of {key.decode(errors='replace')}"
            self._example(f"{place}: ledger {ledger}, expected {rated}")

    def is_copy_of_older(self, row: LedgerRow) -> bool:
        """A copy of an event that this log does not hold: it lay before the log's start, or in a deleted topic of this
        name. The ledger names the original's position; one that comes later in this log is compared there.
        """
        if row.reason not in ("duplicate", "conflicting_duplicate"):
            return False
        _, _, place = row.detail.partition(f"[{self._partition}]@")
        number = place.partition(" ")[0].rstrip(",")
        if not number.isdigit():
            return False
        before = int(number) < self._log.start
        return before or any(self._is_original(topic_id, int(number), row) for topic_id in self._older)

    def _is_original(self, topic_id: str, offset: int, copy: LedgerRow) -> bool:
        """Whether a deleted topic had there what this is a copy of. Of account events only reversals name a run."""
        found = self._answers.ledger_rows(topic_id, self._partition, offset - 1, 1)
        return any(
            (row.offset, row.workspace_id) == (offset, copy.workspace_id)
            and row.kind not in ("duplicate", "dead_letter")
            and (row.kind != "run" or row.run_id == copy.run_id)
            for row in found
        )

    def was_debited(self, row: LedgerRow) -> bool:
        """Whether a run that Kafka no longer has drew what this row takes back."""
        drawn = -Decimal(row.credits) / 1000
        deliveries = self._answers.explanation(UUID(row.run_id), row.workspace_id).deliveries
        return any(one.kind == "run" and Decimal(one.credits) == drawn for one in deliveries)

    def _example(self, text: str) -> None:
        if len(self._examples) < EXAMPLES_MAX:
            self._examples.append(text)

    def _ledger_rows(self) -> Iterator[LedgerRow]:
        after = self._log.start - 1
        while page := self._answers.ledger_rows(self._topic.id, self._partition, after, PAGE_ROWS):
            yield from page
            after = page[-1].offset

    def _messages(self) -> Iterator[Message]:
        """The partition's records from the log's start to the mark. Unreachable when Kafka does not give all."""
        end = min(self._log.end, self._mark + 1)
        if self._log.start >= end:
            return
        consumer = Consumer(
            librdkafka(self._settings)
            | {
                "group.id": "creditstream-reconcile",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                # What Kafka drops while it is read must not be skipped: it was never compared.
                "auto.offset.reset": "error",
                "fetch.queue.backoff.ms": 5,
                # The end of a log is known when a fetch from there is answered: with nothing, after so long.
                "fetch.wait.max.ms": 10,
                "isolation.level": "read_committed",
                "log_level": 0,
            }
        )
        try:
            consumer.assign([TopicPartition(self._topic.name, self._partition, self._log.start)])
            heard_at = time.monotonic()
            while True:
                for message in arrived(consumer, POLL_S, CHUNK):
                    heard_at = time.monotonic()
                    error = message.error()
                    if error and error.code() != KafkaError._PARTITION_EOF:
                        raise self._unread(error.str())
                    if error or position_of(message).offset >= end:
                        return
                    yield message
                if time.monotonic() - heard_at > SILENCE_S_MAX:
                    raise self._unread(f"{self._settings.kafka_bootstrap} is silent")
        except KafkaException as error:
            raise self._unread(str(error)) from error
        finally:
            consumer.close()

    def _unread(self, why: str) -> Unreachable:
        return Unreachable(f"{self._topic.name}[{self._partition}] cannot be read up to its mark", why, "Try again.")

    def _report(self) -> PartitionBooks:
        audit = self._audit
        return PartitionBooks(
            topic=self._topic.name,
            partition=self._partition,
            log_start=self._log.start,
            log_end=self._log.end,
            mark=self._mark,
            events=self._events,
            rows=audit.rows if audit else 0,
            missing=self._missing,
            doubled=(audit.rows - audit.distinct_offsets + audit.doubled_runs) if audit else 0,
            different=self._different,
            behind=max(0, self._log.end - self._mark - 1),
            offsets_without_event=(audit.gaps - audit.distinct_offsets) if audit else 0,
            credits=f"{self._credits:f}",
            credits_reference=f"{self._credits_reference:f}",
            examples=self._examples,
        )
