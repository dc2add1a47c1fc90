"""Every event accounted for: Kafka's log against the ledger, offset by offset.

For each partition the topic is read again, rated by the reference rater, and compared with the ledger's rows: one row
for every offset up to the mark, with the same kind, reason, pool and credits. What lies behind the mark is not wrong,
only not metered yet.
"""

import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from uuid import UUID

import msgspec
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from creditstream.asking import Answers
from creditstream.reference import Expected, ReferenceRater
from schemas.answers import LedgerRow, PartitionAudit, SumAudit
from schemas.problem import Problem, Unreachable
from streams.topics import Broker, LogRange, Topic

PAGE_ROWS = 20_000
POLL_S = 1.0
SILENCE_S_MAX = 30.0
PROGRESS_EVERY_S = 1.0
EXAMPLES_MAX = 5


class PartitionBooks(msgspec.Struct, frozen=True, kw_only=True):
    """One partition: what Kafka holds, what the ledger holds, and how they differ."""

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
    """The whole topic. ``closes``: nothing is missing, doubled or different, and projections equal raw sums."""

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
        )


def reconcile(
    answers: Answers, bootstrap: str, topic_name: str, catalogue_dir: Path, say: Callable[[str], None] = lambda _: None
) -> Reconciliation:
    """Compare a topic with its ledger. Reads every event that Kafka still has; ``say`` hears of the progress."""
    broker = Broker(bootstrap)
    topic = broker.topic(topic_name)
    if topic is None:
        raise Problem(f"topic {topic_name} does not exist", f"on {bootstrap}", "Run `creditstream topics`.")
    chains = answers.audit_partitions(topic_name)
    audits = {chain.partition: chain for chain in chains if chain.topic_id == topic.id}
    made_again = {chain.partition for chain in chains if chain.topic_id != topic.id}
    ranges = broker.log_ranges(topic_name, range(topic.partitions))
    progress = _Progress(say, sum(found.end - found.start for found in ranges.values()))
    books = [
        _Books(
            answers, bootstrap, topic, partition, ranges[partition], audits.get(partition), partition in made_again
        ).close(catalogue_dir, progress)
        for partition in range(topic.partitions)
    ]
    sums = answers.audit_sums()
    sums_equal = (sums.credits_projected, sums.rows_projected) == (sums.credits_raw, sums.rows_raw)
    wrong = any(book.missing or book.doubled or book.different for book in books)
    return Reconciliation(
        topic=topic_name,
        closes=sums_equal and not wrong,
        **{
            name: sum(getattr(book, name) for book in books)
            for name in ("events", "rows", "missing", "doubled", "different", "behind", "offsets_without_event")
        },
        credits=f"{sum(Decimal(book.credits) for book in books):f}",
        credits_reference=f"{sum(Decimal(book.credits_reference) for book in books):f}",
        sums=sums,
        partitions=books,
    )


class _Progress:
    def __init__(self, say: Callable[[str], None], total: int) -> None:
        self._say, self._total, self._done = say, total, 0
        self._said_at = time.monotonic()

    def add(self) -> None:
        self._done += 1
        if self._done % 1000 == 0 and time.monotonic() - self._said_at > PROGRESS_EVERY_S:
            self._said_at = time.monotonic()
            self._say(f"reconciling {self._done:,} of {self._total:,} events")


class _Books:
    """One partition's two accounts, walked side by side."""

    def __init__(
        self,
        answers: Answers,
        bootstrap: str,
        topic: Topic,
        partition: int,
        log_range: LogRange,
        audit: PartitionAudit | None,
        made_again: bool,
    ) -> None:
        self._answers, self._bootstrap, self._topic, self._partition = answers, bootstrap, topic, partition
        self._log, self._audit, self._made_again = log_range, audit, made_again
        self._mark = audit.last if audit else -1
        self._examples: list[str] = []
        self._missing = self._different = self._events = 0
        self._credits = self._credits_reference = Decimal(0)

    def close(self, catalogue_dir: Path, progress: _Progress) -> PartitionBooks:
        """Walk both to the mark and say what was found."""
        rater = ReferenceRater(catalogue_dir, self._partition, self._topic.partitions)
        rows = self._ledger_rows()
        row = next(rows, None)
        for message in self._messages():
            progress.add()
            offset = message.offset() or 0
            self._events += 1
            while row and row.offset < offset:
                row = next(rows, None)
            expected = rater.expect(message.key(), message.value(), message.timestamp()[1])
            if row and row.offset == offset:
                self._compare(row, expected, rater)
            else:
                self._missing += 1
                self._example(
                    f"[{self._partition}]@{offset}: no ledger row, expected {expected.kind}/{expected.reason}"
                )
        return self._report()

    def _compare(self, row: LedgerRow, expected: Expected, rater: ReferenceRater) -> None:
        credits = Decimal(row.credits) / 1000
        self._credits += credits
        if expected.kind == "run" and row.kind != "run" and self._is_copy_of_older(row):
            self._credits_reference += credits
            rater.forget(row.workspace_id, row.run_id)
            return
        self._credits_reference += expected.credits
        if (row.kind, row.reason, row.pool, credits) != expected:
            self._different += 1
            self._example(
                f"[{self._partition}]@{row.offset}: ledger {row.kind}/{row.reason} {credits}, expected {expected}"
            )

    def _is_copy_of_older(self, row: LedgerRow) -> bool:
        """A copy of a run that this log does not hold: it lay before the log's start, or in a deleted topic of this
        name. The ledger names the original's position; a run that comes later in this log is compared there.
        """
        if row.reason not in ("duplicate", "conflicting_duplicate"):
            return False
        _, _, place = row.detail.partition(f"[{self._partition}]@")
        number = place.partition(" ")[0].rstrip(",")
        if number.isdigit() and int(number) < self._log.start:
            return True
        return self._made_again and any(
            delivery.kind == "run" for delivery in self._answers.explanation(UUID(row.run_id)).deliveries
        )

    def _example(self, text: str) -> None:
        if len(self._examples) < EXAMPLES_MAX:
            self._examples.append(text)

    def _ledger_rows(self) -> Iterator[LedgerRow]:
        after = self._log.start - 1
        while page := self._answers.ledger_rows(self._topic.id, self._partition, after, PAGE_ROWS):
            yield from page
            after = page[-1].offset

    def _messages(self) -> Iterator[Message]:
        """The partition's records from the log's start to the mark."""
        end = min(self._log.end, self._mark + 1)
        if self._log.start >= end:
            return
        consumer = Consumer(
            {
                "bootstrap.servers": self._bootstrap,
                "group.id": "creditstream-reconcile",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "fetch.queue.backoff.ms": 5,
                "isolation.level": "read_committed",
                "log_level": 0,
            }
        )
        try:
            consumer.assign([TopicPartition(self._topic.name, self._partition, self._log.start)])
            heard_at = time.monotonic()
            while True:
                for message in consumer.consume(2000, timeout=POLL_S):
                    heard_at = time.monotonic()
                    if message.error() or (message.offset() or 0) >= end:
                        return
                    yield message
                if time.monotonic() - heard_at > SILENCE_S_MAX:
                    raise Unreachable(f"Kafka at {self._bootstrap} does not answer", "while reading", "Try again.")
        except KafkaException as error:
            raise Unreachable(f"Kafka at {self._bootstrap} failed", str(error), "Try again.") from error
        finally:
            consumer.close()

    def _report(self) -> PartitionBooks:
        audit = self._audit
        return PartitionBooks(
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
