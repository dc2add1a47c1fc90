"""The worker as a service: how it starts, refuses, logs, drains, survives, and ends."""

import itertools
import json
import random
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, KafkaError, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from creditstream.asking import WorkerAnswers
from creditstream.reconcile import reconcile
from schemas.account import PlanChanged
from schemas.answers import LedgerRow, SumAudit
from schemas.codec import encode_run
from schemas.problem import Unreachable
from sinks.clickhouse import connect
from sinks.migrate import create_database, migrate
from tests.clickhouse_server import ClickHouseServer
from tests.ledger_rows import wait_until_grown
from tests.worker_process import WAIT_S_MAX, Event, WorkerProcess, cell_run, creditstream, environment_of, event_of

NUMBERS: Final = itertools.count(1)
DRAIN_S_MAX: Final = 10.0
START_S_MAX: Final = 60.0


@pytest.fixture(scope="module")
def ledger_url(http_server: ClickHouseServer) -> str:
    """One migrated database over HTTP for all of these workers: chains of different topics never meet."""
    url = f"{http_server.url}/worker"
    create_database(url)
    with connect(url) as client:
        migrate(client)
        wait_until_grown(client)
    return url


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, kafka: str, ledger_url: str) -> Iterator[WorkerProcess]:
    """The process behind `worker`."""
    home = tmp_path_factory.mktemp("worker")
    with WorkerProcess(home, kafka, "worker-", ledger_url=ledger_url, instance="one") as process:
        process.create_topic()
        yield process


@pytest.fixture
def worker(shared: WorkerProcess) -> WorkerProcess:
    """A worker that is ready; the same one for all tests, unless one has ended it."""
    if not shared.is_alive:
        shared.start()
    shared.wait_until_ready()
    return shared


@pytest.fixture
def another(tmp_path: Path, kafka: str, ledger_url: str) -> Iterator[WorkerProcess]:
    """A worker on a home and a topic of its own, not started; the topic does not exist."""
    prefix = f"worker-{next(NUMBERS)}-"
    with WorkerProcess(tmp_path / "home", kafka, prefix, ledger_url=ledger_url) as process:
        yield process


def refusal(worker: WorkerProcess) -> str:
    """The one line of a worker that does not start."""
    assert worker.start().wait() == 1
    (line,) = worker.log_lines()
    return line


def test_malformed_bytes_never_stop_the_worker(worker: WorkerProcess) -> None:
    """Whatever bytes come, each is one ledger row as the second rater expects, and the same process goes on."""
    pid, dice = worker.pid, random.Random(7)
    good = encode_run(cell_run())
    deep = b"[" * 5000
    values = [
        None, b"", b"null", b"{}", b"[]", b'"', deep, good + b"x", good * 2, b"\xff" * 30, b"\x00" * 30,
        b"\xef\xbb\xbf" + good, good.replace(b"ws_0001", b"ws_\xff001"), good.replace(b"ws_0001", b"ws_\\ud800"),
        good.replace(b"ws_0001", b"ws_\\u0000"), good.replace(b"data", b"other"), b"x" * 900_000,
        good[:-1] + b', "ran_at": "9999-12-31T23:59:59Z"}', good[:-1] + b', "ran_at": "0001-01-01T00:00:00Z"}',
        good[:-1] + b', "own_api_key": 1e400}', good[:-1] + b', "unknown": ' + b"[" * 300 + b"]" * 300 + b"}",
        good[:-1] + b', "ran_at": 1}', good[:-1] + b', "run_id": "' + b"0" * 32 + b'"}',
    ]  # fmt: skip
    values += [mutated(good, dice) for _ in range(300)]
    headers = [("trace", b"\xff\xfe"), ("", b"")]

    worker.produce(Event(b"ws_0001", value, headers=headers) for value in values)
    last = cell_run()
    worker.produce([Event(b"\xff\xfe", good), Event(None, good), event_of(last)])
    worker.wait_until_metered()

    assert worker.pid == pid
    assert worker.answers.explanation(last.run_id).credits == "1"
    books = worker.reconcile()
    assert books.closes, [example for book in books.partitions for example in book.examples]
    assert books.behind == 0


def test_reconcile_proves_nothing_that_it_could_not_read(another: WorkerProcess) -> None:
    """Records that Kafka drops while they are read were never compared: it ends, and names the place."""
    another.create_topic()
    another.produce(event_of(cell_run()) for _ in range(10))
    another.start().wait_until_metered()
    topic = f"{another.settings['topic_prefix']}cell-runs"
    ends = another.log_ends()
    (partition,) = (partition for partition, end in ends.items() if end)

    class Dropping(WorkerAnswers):
        def audit_sums(self) -> SumAudit:
            raise AssertionError("nothing is proven")

        def ledger_rows(self, topic_id: str, partition: int, after: int, limit: int) -> list[LedgerRow]:
            rows = super().ledger_rows(topic_id, partition, after, limit)
            if rows:
                another.drop_runs({partition: 10})
            return rows

    endpoints = another.home.worker()
    assert endpoints is not None
    with pytest.raises(Unreachable, match=re.escape(f"{topic}[{partition}] cannot be read up to its mark: ")):
        reconcile(Dropping(endpoints.api_url), another.configured)


def test_a_ledger_that_is_away_is_no_riddle(worker: WorkerProcess, http_server: ClickHouseServer) -> None:
    """Who asks the worker meanwhile is told what does not answer, with exit code 5."""
    http_server.kill()
    try:
        done = creditstream("top", settings=environment_of(worker))
    finally:
        http_server.start()
    assert (done.code, done.err.count("\n")) == (5, 1), done
    assert done.err.startswith("creditstream: the ledger failed: ")


def mutated(value: bytes, dice: random.Random) -> bytes:
    """A few bytes of it changed, doubled or gone."""
    damaged = bytearray(value)
    for _ in range(dice.randint(1, 3)):
        place = dice.randrange(len(damaged))
        damaged[place : place + dice.randint(0, 2)] = dice.choice((b"", bytes([dice.randrange(256)]), b'"', b"0"))
    return bytes(damaged)


def test_a_second_worker_on_a_home_is_refused_with_the_pid(worker: WorkerProcess, another: WorkerProcess) -> None:
    """One line that names the process which holds the home, and exit code 1."""
    another.home = worker.home  # type: ignore[misc]

    line = refusal(another)

    assert "is in use" in line
    assert str(worker.pid) in line
    assert worker.is_alive


def test_a_ledger_that_refuses_is_no_riddle(another: WorkerProcess, http_server: ClickHouseServer) -> None:
    """A worker that it does not let start says in a line what the ledger said, with exit code 5."""
    http_server.fault("exception", 243, on="select", containing="FROM catalogue_versions")
    assert another.start().wait() == 5
    (line,) = another.log_lines()
    assert line.startswith("creditstream: the ledger failed: ")


def test_a_taken_port_is_refused(worker: WorkerProcess, another: WorkerProcess) -> None:
    """One line that names the port and the setting."""
    another.create_topic()
    endpoints = worker.home.worker()
    assert endpoints
    another.settings["api_port"] = port = endpoints.api_url.rpartition(":")[2]

    line = refusal(another)

    assert port in line
    assert "CREDITSTREAM_API_PORT" in line


def test_a_missing_topic_is_refused(another: WorkerProcess) -> None:
    """One line that says how to create it."""
    assert "does not exist" in (line := refusal(another))
    assert "creditstream topics" in line


def test_a_topic_with_another_number_of_partitions_is_refused(another: WorkerProcess) -> None:
    """One line with both numbers."""
    another.create_topic()
    another.settings["partitions"] = 3

    assert "it has 4 partitions, the settings say 3" in refusal(another)


def test_a_topic_with_the_producers_clock_is_refused(another: WorkerProcess) -> None:
    """Only the broker's clock says what is late: one line that names the topic's setting."""
    another.create_topic()
    date_by(another, "CreateTime")

    assert "message.timestamp.type is CreateTime, not LogAppendTime" in refusal(another)


def test_records_from_before_a_topic_took_the_brokers_clock_stop_nobody(another: WorkerProcess) -> None:
    """Producers that count microseconds, which brokers before Kafka 4 let pass: nobody knows when these were recorded,
    so their runs are set aside, and those behind them are metered.
    """
    another.create_topic()
    date_by(another, "CreateTime")
    configure(another, "message.timestamp.after.max.ms", str(2**63 - 1))
    topic = f"{another.settings['topic_prefix']}cell-runs"
    producer = Producer({"bootstrap.servers": another.configured.kafka_bootstrap, "partitioner": "murmur2_random"})
    for at_ms in (1_790_000_000_000_000, 2**62):
        record = event_of(cell_run("ws_1"))._asdict() | {"timestamp": at_ms, "headers": []}
        produce_until_taken(producer, topic, record)
    date_by(another, "LogAppendTime")
    another.produce([event_of(cell_run("ws_1"))])

    another.start().wait_until_metered()
    found = another.reconcile()
    letters = [row for row in another.answers.dead_letters("future_run", 100) if row.position.startswith(topic)]
    assert (found.closes, len(letters)) == (True, 2), found


def produce_until_taken(producer: Producer, topic: str, record: dict[str, Any]) -> None:
    """The broker acts on a changed setting a moment after it has said so, and refuses the record until then."""
    answers: list[KafkaError | None] = []
    deadline = time.monotonic() + WAIT_S_MAX
    while answers[-1:] != [None]:
        assert time.monotonic() < deadline, answers[-1]
        producer.produce(topic, **record, on_delivery=lambda error, _: answers.append(error))
        assert producer.flush(WAIT_S_MAX) == 0


def date_by(worker: WorkerProcess, clock: str) -> None:
    """Whose clock dates what is written to this worker's topic of runs from now on."""
    configure(worker, "message.timestamp.type", clock)


def configure(worker: WorkerProcess, setting: str, value: str) -> None:
    """Change a setting of this worker's topic of runs."""
    entry = ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET)
    name = f"{worker.settings['topic_prefix']}cell-runs"
    admin = AdminClient({"bootstrap.servers": worker.configured.kafka_bootstrap})
    resource = ConfigResource(ResourceType.TOPIC, name, incremental_configs=[entry])
    (altered,) = admin.incremental_alter_configs([resource]).values()
    altered.result(WAIT_S_MAX)


def test_the_log_is_one_json_object_a_line(worker: WorkerProcess) -> None:
    """Every line has an event, a level and a time, whoever wrote it."""
    lines = [json.loads(line) for line in worker.log_lines()]

    assert {"started", "assigned"} <= {line["event"] for line in lines}
    assert all({"event", "level", "timestamp"} <= line.keys() for line in lines)


def test_sigterm_drains_what_was_read(worker: WorkerProcess) -> None:
    """Within 10 s, exit code 0; what was read is written and committed although its linger was not over."""
    worker.kill()
    worker.settings["linger_ms"] = 60_000
    worker.start().wait_until_ready()
    worker.produce(event_of(cell_run(f"ws_{number % 40:04d}")) for number in range(2000))
    ends = worker.log_ends()
    worker.wait_until(lambda status: sum(unit.rows_unwritten for unit in status.units) == 2000, "holding all rows")

    stopping = time.monotonic()
    assert worker.stop() == 0
    assert time.monotonic() - stopping < DRAIN_S_MAX

    assert worker.log_events("stopped")[-1] | {"exit_code": 0, "rows": 2000} == worker.log_events("stopped")[-1]
    assert committed(worker) == ends


def test_f6_a_group_that_begins_anew_commits_both_topics(another: WorkerProcess) -> None:
    """Also the one that is quiet: without its commit, what crashes next would not be folded again but seeded."""
    another.create_topic()
    another.bill(
        PlanChanged(
            event_id=uuid4(), workspace_id=f"ws_{number}", plan="20k", effective_at=datetime(2026, 1, 15, tzinfo=UTC)
        )
        for number in range(8)
    )
    another.start().wait_until_told()
    assert another.stop() == 0
    admin, group = (
        AdminClient({"bootstrap.servers": another.configured.kafka_bootstrap}),
        f"{another.settings['topic_prefix']}creditstream",
    )
    admin.delete_consumer_groups([group])[group].result(WAIT_S_MAX)
    another.start().wait_until_told()


def committed(worker: WorkerProcess) -> dict[int, int]:
    """Kafka's committed offsets of the worker's group."""
    settings = worker.configured
    group = f"{settings.topic_prefix}creditstream"
    consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap, "group.id": group, "log_level": 0})
    try:
        places = [TopicPartition(f"{settings.topic_prefix}cell-runs", number) for number in range(4)]
        return {place.partition: place.offset for place in consumer.committed(places, WAIT_S_MAX)}
    finally:
        consumer.close()


def test_faust_itself_runs_the_worker(another: WorkerProcess) -> None:
    """``faust -A streams.app worker`` meters too, and stops on SIGTERM with exit code 0."""
    another.create_topic()
    another.produce(event_of(cell_run(f"ws_{number:04d}")) for number in range(40))
    another.start(command=("-m", "faust", "-A", "streams.app", "worker", "-l", "info"))
    count = f"SELECT count() FROM ledger WHERE topic = '{another.settings['topic_prefix']}cell-runs'"

    with connect(str(another.settings["ledger_url"])) as client:
        deadline = time.monotonic() + START_S_MAX
        while client.query(count).result_rows[0][0] < 40:
            assert another.is_alive
            assert time.monotonic() < deadline
            time.sleep(0.1)

    assert another.stop() == 0
