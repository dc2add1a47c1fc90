"""The real worker, killed: exactly once through SIGKILL, a dying ClickHouse, second owners and what Kafka does to a log.

Every test ends with the same question: do the books close, offset by offset, against a second rater?
"""

import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import msgspec
import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from creditstream.producing import PRODUCER_CONFIG
from creditstream.reconcile import Reconciliation
from schemas.answers import By
from schemas.cell_run import CellRun, Outcome
from schemas.codec import encode_run
from schemas.problem import Problem
from streams.app import EXIT_RESTART
from streams.topics import Topic
from tests.clickhouse_server import ClickHouseServer
from tests.worker_process import (
    WAIT_S_MAX,
    Event,
    WorkerProcess,
    ask_ledger,
    cell_run,
    event_of,
    run_id_of,
    send,
)

NUMBERS: Final = itertools.count(1)
CHDB_BACKLOG: Final = 100_000
HTTP_BACKLOG: Final = 40_000
SMALL_BATCH: Final = 1000
"""Rows: a backlog is many inserts, so that a kill hits every step of one."""
JOIN_S_MAX: Final = 60.0

OVER_HTTP: Final = pytest.mark.parametrize("database_url", ["http"], indirect=True)

ACTIONS: Final = ("enrich_person", "find_work_email", "job_role_count", "clearbit_enrich_company", "format_date")
UNKNOWN: Final = "an_action_that_nobody_priced"


class Traffic:
    """What enrichment workers produce at their worst, the same for a seed but for the clock.

    One event in ten is a copy (of the newest events, or of any before: after a restart too), a conflicting copy, or
    one that must become a dead letter.
    """

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._started = datetime.now(UTC)
        self.runs: list[CellRun] = []

    def events(self, count: int) -> Iterator[Event]:
        """The next events."""
        for _ in range(count):
            fate = self._dice.random()
            if fate < 0.9 or not self.runs:
                yield self._first_delivery()
            elif fate < 0.98:
                run = self._dice.choice(self.runs[-20:] if fate < 0.93 else self.runs)
                yield event_of(run)
            elif fate < 0.985:
                yield event_of(msgspec.structs.replace(self._dice.choice(self.runs), row_id="another row"))
            else:
                yield self._unmeterable()

    def _run(self) -> CellRun:
        dice = self._dice
        return CellRun(
            run_id=UUID(int=dice.getrandbits(128)),
            workspace_id=f"ws_{dice.randrange(40):04d}",
            table_id=f"tbl_{dice.randrange(3)}",
            column_id=f"col_{dice.randrange(5)}",
            row_id=f"row_{dice.randrange(100_000)}",
            action=dice.choice(ACTIONS),
            outcome=dice.choice(tuple(Outcome)),
            ran_at=self._started - timedelta(seconds=dice.randrange(40 * 86_400)),
            own_api_key=dice.random() < 0.1,
        )

    def _first_delivery(self) -> Event:
        run = self._run()
        self.runs.append(run)
        return event_of(run)

    def _unmeterable(self) -> Event:
        run, key = self._run(), b"ws_0000"
        year = timedelta(days=366)
        return self._dice.choice(
            (
                Event(key, b'{"run_id": '),
                Event(key, b"\xff\xfe\x00"),
                Event(key, None),
                Event(None, b"", 0),
                Event(key, b'"' + b"x" * 70_000 + b'"'),
                Event(b"another key", encode_run(run)),
                event_of(msgspec.structs.replace(run, action=UNKNOWN)),
                event_of(msgspec.structs.replace(run, ran_at=self._started + year)),
                event_of(msgspec.structs.replace(run, ran_at=self._started - year - year)),
            )
        )


@pytest.fixture
def prefix() -> str:
    """Topics and group of one test on the session's Kafka."""
    return f"crash-{next(NUMBERS)}-"


@pytest.fixture
def worker(tmp_path: Path, kafka: str, prefix: str, ledger_url: str) -> Iterator[WorkerProcess]:
    """A worker over HTTP with its topic, not started."""
    with WorkerProcess(tmp_path / "home", kafka, prefix, ledger_url=ledger_url, instance="one") as process:
        process.create_topic()
        yield process


def assert_books_close(books: Reconciliation, events: int | None = None) -> None:
    """Nothing missing, doubled, different or still to come, and the projections hold what the rows hold."""
    examples = [example for book in books.partitions for example in book.examples]

    assert books.closes, examples
    assert (books.missing, books.doubled, books.different, books.behind) == (0, 0, 0, 0), examples
    assert books.rows == (books.events if events is None else events)
    assert books.credits == books.credits_reference
    assert (books.sums.credits_projected, books.sums.rows_projected) == (
        books.sums.credits_raw,
        books.sums.rows_raw,
    )


INVARIANTS: Final = (
    "SELECT topic_id, kafka_partition, kafka_offset FROM ledger "
    "GROUP BY topic_id, kafka_partition, kafka_offset HAVING count() > 1 LIMIT 5",
    "SELECT workspace_id, run_id FROM ledger WHERE kind = 'run' "
    "GROUP BY workspace_id, run_id HAVING count() > 1 LIMIT 5",
    "SELECT topic_id, kafka_partition FROM ledger GROUP BY topic_id, kafka_partition "
    "HAVING sum(offset_gap) != max(kafka_offset) - min(kafka_offset) + 1",
    "SELECT mark_read_at FROM ledger GROUP BY topic_id, kafka_partition, _part HAVING uniqExact(batch_month) > 1",
)
"""Each finds what must not be: an offset with two rows, a run with two debits, a hole, an insert in two months."""


def written(worker: WorkerProcess) -> int:
    """Rows that the ledger has, by the marks."""
    status = worker.status
    return sum(unit.mark + 1 for unit in status.units) if status else 0


def kill_while_it_writes(worker: WorkerProcess, dice: random.Random) -> None:
    """Start it, let it write something, SIGKILL at a random instant of the next 0.6 s."""
    worker.start()
    worker.wait_until(lambda status: any(status.written.values()), "writing", JOIN_S_MAX)
    time.sleep(dice.uniform(0, 0.6))
    worker.kill()


def kill_while_it_starts(worker: WorkerProcess, dice: random.Random) -> None:
    """SIGKILL at a random instant between the interpreter's start and its first rows."""
    worker.start()
    time.sleep(dice.uniform(0.3, 3.0))
    worker.kill()


def test_f9_kill_9_at_random_instants_with_chdb(tmp_path: Path, kafka: str, prefix: str) -> None:
    """Twelve SIGKILLs and a SIGTERM while a backlog is drained: one row for every offset, every run charged once."""
    dice, traffic = random.Random(9), Traffic(9)
    with WorkerProcess(tmp_path, kafka, prefix, instance="one", batch_rows_max=SMALL_BATCH) as worker:
        worker.create_topic()
        worker.produce(traffic.events(CHDB_BACKLOG))
        for kill in [kill_while_it_writes] * 6 + [kill_while_it_starts] * 6:
            kill(worker, dice)
            worker.produce(traffic.events(500))

        worker.start()
        before = worker.wait_until(lambda status: any(status.written.values()), "writing")
        assert sum(unit.mark + 1 for unit in before.units) < CHDB_BACKLOG, "it was done before the last kill"
        assert worker.stop() == 0
        worker.produce(traffic.events(500))
        worker.settings["batch_rows_max"] = 40_000
        worker.start().wait_until_metered()
        books = worker.reconcile()
        kinds = {row.kind for row in worker.answers.dead_letters("", 10_000)} if False else set()
        assert not kinds
        assert worker.stop() == 0

        assert_books_close(books)
        assert ask_ledger(f"chdb://{worker.home.ledger}", *INVARIANTS) == [[]] * len(INVARIANTS)
