"""The real worker, killed: exactly once through SIGKILL, a dying ClickHouse, two owners and whatever befalls a log.

Every test ends with the same question: do the books close, offset by offset, against a second rater?
"""

import itertools
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

import msgspec
import pytest
from confluent_kafka import Producer

from creditstream.producing import PRODUCER_CONFIG
from creditstream.reconcile import Reconciliation
from schemas.answers import By
from schemas.problem import Problem
from streams.app import EXIT_RESTART
from streams.kafka.transport import FETCH_WAIT_MS_MAX
from tests.client_kafka import wait_until
from tests.ledger_rows import INVARIANTS
from tests.traffic import WildTraffic
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
CHDB_BACKLOG: Final = 40_000
HTTP_BACKLOG: Final = 25_000
SMALL_BATCH: Final = 400
"""Rows: a backlog is many inserts, so that a kill hits every step of one."""
SMALL_CHUNKS: Final = {"batch_rows_max": SMALL_BATCH, "faust_broker_max_poll_records": SMALL_BATCH // 2}
"""A batch takes a chunk whole, and a backlog of whole chunks does not outlast ten kills on a fast machine."""
JOIN_S_MAX: Final = 60.0

OVER_HTTP: Final = pytest.mark.parametrize("database_url", ["http"], indirect=True)


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
    """SIGKILL at a random instant between the interpreter's start and its first rows, however fast the machine."""
    worker.start()
    last = time.monotonic() + dice.uniform(0.3, 3.0)
    while time.monotonic() < last and not ((status := worker.status) and any(status.written.values())):
        time.sleep(0.05)
    worker.kill()


def test_f9_kill_9_at_random_instants_with_chdb(tmp_path: Path, kafka: str, prefix: str) -> None:
    """Ten SIGKILLs and a SIGTERM while a backlog is drained: one row for every offset, every run charged once."""
    dice, traffic = random.Random(9), WildTraffic(9)
    with WorkerProcess(tmp_path, kafka, prefix, instance="one", **SMALL_CHUNKS) as worker:
        worker.create_topic()
        worker.produce(traffic.events(CHDB_BACKLOG))
        kills = [kill_while_it_writes] * 4 + [kill_while_it_starts] * 6
        dice.shuffle(kills)
        for kill in kills:
            kill(worker, dice)
            worker.produce(traffic.events(200))

        worker.start()
        status = worker.wait_until(lambda status: any(status.written.values()), "writing", JOIN_S_MAX)
        assert sum(unit.mark + 1 for unit in status.units) < CHDB_BACKLOG, "it was done before the last kill"
        assert worker.stop() == 0
        worker.produce(traffic.events(200))
        del worker.settings["batch_rows_max"], worker.settings["faust_broker_max_poll_records"]
        worker.start().wait_until_metered(JOIN_S_MAX)
        books = worker.reconcile()
        assert worker.stop() == 0

    assert_books_close(books, CHDB_BACKLOG + 11 * 200)
    assert ask_ledger(f"chdb://{worker.home.ledger}", *INVARIANTS) == [[]] * len(INVARIANTS)


@OVER_HTTP
def test_f12_two_owners_share_a_topic_until_one_is_killed(
    tmp_path: Path, kafka: str, prefix: str, ledger_url: str
) -> None:
    """A second worker joins amid a backlog and is killed amid the next: partitions move twice, and the books close."""
    traffic = WildTraffic(12)
    with (
        WorkerProcess(tmp_path / "first", kafka, prefix, ledger_url=ledger_url, batch_rows_max=500) as first,
        WorkerProcess(tmp_path / "second", kafka, prefix, ledger_url=ledger_url, batch_rows_max=500) as second,
    ):
        first.create_topic()
        first.produce(traffic.events(HTTP_BACKLOG))
        first.start()
        second.start()
        supervise_until([first, second], lambda owned: set(map(len, owned)) == {2}, "shared")
        first.produce(traffic.events(5000))
        second.kill()
        supervise_until([first], lambda owned: len(owned[0]) == 4, "taken over")
        first.produce(traffic.events(1000))
        ends = first.log_ends()
        supervise_until([first], lambda owned: {p: mark + 1 for p, mark in owned[0].items()} == ends, "metered")
        books = first.reconcile()

    assert_books_close(books, HTTP_BACKLOG + 6000)


def supervise_until(workers: list[WorkerProcess], condition: Callable[[list[dict[int, int]]], bool], what: str) -> None:
    """As an orchestrator does: start again what ends with 75, until the marks that each owns fulfil the condition."""
    deadline = time.monotonic() + JOIN_S_MAX
    while time.monotonic() < deadline:
        for worker in workers:
            if not worker.is_alive:
                assert worker.wait() == EXIT_RESTART
                worker.start()
        statuses = [worker.status for worker in workers]
        owned = [{unit.partition: unit.mark for unit in status.units} if status else {} for status in statuses]
        if condition(owned):
            return
        time.sleep(0.05)
    raise AssertionError(f"not {what} within {JOIN_S_MAX:.0f} s: {owned}")


@OVER_HTTP
def test_f14_a_retention_gap_pauses_one_unit_or_is_stepped_over(worker: WorkerProcess, prefix: str) -> None:
    """Kafka dropped unread events: that unit pauses with an incident, the others go on; with `continue` it does too."""
    every_partition = [f"ws_{number:04d}" for number in range(40)]

    def runs() -> list[Event]:
        return [event_of(cell_run(workspace)) for workspace in every_partition]

    worker.produce(runs())
    worker.start().wait_until_metered()
    worker.signal(signal.SIGSTOP)
    time.sleep(20 * FETCH_WAIT_MS_MAX / 1000)  # what it has asked for would be its answer when it wakes
    marks = worker.log_ends()
    worker.produce(runs() + runs())
    gap = 3
    worker.drop_runs({2: marks[2] + gap})
    worker.signal(signal.SIGCONT)
    assert worker.wait() == EXIT_RESTART, "a worker that lags behind retention must not skip it in silence"

    worker.start()
    status = worker.wait_until(lambda status: any(unit.incident for unit in status.units), "in an incident")
    others = {partition: end for partition, end in worker.log_ends().items() if partition != 2}
    status = worker.wait_until(
        lambda status: {unit.partition: unit.mark + 1 for unit in status.units if unit.partition != 2} == others,
        "metered but for the paused unit",
    )
    assert [(unit.partition, unit.mark + 1) for unit in status.units if unit.incident] == [(2, marks[2])]
    code, body = worker.readyz()
    assert code == 503
    assert f"Kafka dropped {gap} events before they were read" in str(body["because"])
    assert [line["chain"] for line in worker.log_events("incident")] == [f"{prefix}cell-runs[2]"]
    assert {'creditstream_incident{partition="2"} 1.0', 'creditstream_incident{partition="1"} 0.0'} <= set(
        worker.metrics()
    )
    assert worker.stop() == 0

    worker.settings["retention_gap"] = "continue"
    worker.start().wait_until_metered()
    assert worker.readyz()[0] == 200
    books = worker.reconcile()
    assert [book.offsets_without_event for book in books.partitions] == [0, 0, gap, 0] + [0] * 4  # of both topics
    assert (books.closes, books.behind, books.rows) == (True, 0, 120 - gap)


@OVER_HTTP
def test_f13_a_topic_made_again_is_metered_from_its_first_offset(worker: WorkerProcess) -> None:
    """A running worker ends to be started again, since its marks are another topic's; then the new topic is metered
    from offset 0, and a copy of a run from the old one is a copy.
    """
    old, new = ([event_of(cell_run(f"ws_{number:04d}")) for number in range(40)] for _ in range(2))
    worker.produce(old)
    worker.start().wait_until_metered()
    before = worker.create_topic()
    after = worker.make_topic_again()
    assert before.id != after.id
    worker.produce([*new, *old])

    assert worker.wait() == EXIT_RESTART
    status = worker.start().wait_until_metered()

    assert status.written == {"run/charged": 40, "duplicate/duplicate": 40}
    explained = worker.answers.explanation(run_id_of(old[0]))
    assert [delivery.kind for delivery in explained.deliveries] == ["run", "duplicate"]
    books = worker.reconcile()
    assert_books_close(books, 80)
    assert books.sums.credits_raw == "80"


@OVER_HTTP
def test_f15_aborted_transactions_are_not_billed(worker: WorkerProcess) -> None:
    """An aborted transaction leaves a gap that adds up, across a restart; the events of a committed one are billed."""
    settings = worker.configured
    topic, workspace = f"{settings.topic_prefix}cell-runs", "ws_0001"
    producer = Producer(
        {"bootstrap.servers": settings.kafka_bootstrap, **PRODUCER_CONFIG, "transactional.id": f"{topic}-billing"}
    )
    producer.init_transactions(WAIT_S_MAX)

    def transaction(end: Callable[[float], None], count: int) -> list[Event]:
        events = [event_of(cell_run(workspace)) for _ in range(count)]
        before = sum(worker.log_ends().values())
        producer.begin_transaction()
        send(producer, topic, events)
        end(WAIT_S_MAX)
        # The transaction's marker may come after its answer, and behind the next record.
        wait_until(lambda: sum(worker.log_ends().values()) > before + count, "ended by a marker")
        return events

    transaction(producer.abort_transaction, 3)
    billed = transaction(producer.commit_transaction, 4)
    worker.start()
    worker.wait_until(lambda status: status.written == {"run/charged": 4}, "billed")
    worker.kill()
    aborted = transaction(producer.abort_transaction, 5)
    billed += transaction(producer.commit_transaction, 6)
    worker.produce([event_of(cell_run(workspace)), billed[0]])
    worker.start().wait_until_metered()

    books = worker.reconcile()
    assert_books_close(books, 12)
    assert sum(book.offsets_without_event for book in books.partitions) == 5 + 3, (
        "aborted events, and markers between rows"
    )
    assert books.credits == "11"
    with pytest.raises(Problem, match="no run"):
        worker.answers.explanation(run_id_of(aborted[0]))


@OVER_HTTP
def test_f16_copies_late_runs_and_re_runs(worker: WorkerProcess) -> None:
    """A run counts once in its batch, in a later one and after a kill -9; another run of its cell counts again."""
    now = datetime.now(UTC)
    run = cell_run(action="find_work_email", ran_at=now)
    conflict = msgspec.structs.replace(run, row_id="another row")
    worker.produce(map(event_of, [run, run, conflict]))
    worker.start().wait_until_metered()
    worker.produce([event_of(run)])
    worker.wait_until_metered()
    worker.kill()
    late = cell_run(row_id="row_2", ran_at=now - timedelta(days=31))
    again = msgspec.structs.replace(run, run_id=cell_run().run_id)
    worker.produce(map(event_of, [run, late, again, conflict]))
    worker.start().wait_until_metered()

    explained = worker.answers.explanation(run.run_id)
    kinds = Counter((delivery.kind, delivery.credits) for delivery in explained.deliveries)
    assert kinds == {("run", "2"): 1, ("duplicate", "0"): 3, ("dead_letter", "0"): 2}
    assert explained.runs_of_this_cell == 2
    assert "row_id" in worker.answers.dead_letters("conflicting_duplicate", 1)[0].detail
    by_day = worker.answers.usage(run.workspace_id, By.DAY, None, None)
    assert [(row.day, row.credits) for row in by_day] == [(late.ran_at.date(), "1"), (now.date(), "4")]
    assert_books_close(worker.reconcile(), 8)
