"""The real worker as a process, for tests that start, kill, stop and question it. Every wait is bounded."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self
from uuid import UUID, uuid4

import psutil
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from creditstream import kafka_guard
from creditstream.asking import WorkerAnswers
from creditstream.home import Home
from creditstream.producing import open_producer
from creditstream.reconcile import Reconciliation, reconcile
from schemas.account import AccountEvent
from schemas.answers import Status
from schemas.cell_run import CellRun, Outcome
from schemas.codec import encode_account_event, encode_run
from schemas.problem import Problem, Unreachable
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, Broker, Topic
from streams.settings import PREFIX, Settings, read_settings

ROOT: Final = Path(__file__).parents[1]
WAIT_S_MAX: Final = 60.0
POLL_S: Final = 0.05
LOG_LINES_SHOWN: Final = 15
COMMAND: Final = ("-m", "creditstream", "worker")
LINGER_MS: Final = 200


class Event(NamedTuple):
    """One Kafka record to produce; partition -1: that of the key."""

    key: bytes | None
    value: bytes | None
    partition: int = -1
    headers: Sequence[tuple[str, bytes]] = ()


def environment(**settings: str | int) -> dict[str, str]:
    """This process's environment with these settings and no others of creditstream's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    return inherited | {PREFIX + name.upper(): str(value) for name, value in settings.items()}


class WorkerProcess:
    """`creditstream worker` on one home and the topic of one prefix. A context manager: it leaves nothing behind.

    The settings stay the same through every restart unless `settings` is written to.
    """

    def __init__(self, home: Path, bootstrap: str, prefix: str, **settings: str | int) -> None:
        self.home: Final = Home.at(home)
        self.settings: dict[str, str | int] = {
            "kafka_bootstrap": bootstrap,
            "topic_prefix": prefix,
            "api_port": 0,
            "linger_ms": LINGER_MS,
            **settings,
        }
        self.log: Final = self.home.path / "logs" / "worker.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def configured(self) -> Settings:
        """The worker's settings as it reads them."""
        return read_settings(environment(**self.settings), home=str(self.home.path))

    @property
    def broker(self) -> Broker:
        """Administration of the worker's Kafka."""
        return Broker(self.configured)

    def create_topic(self) -> Topic:
        """The worker's topics, created where they are missing; that of the cell runs."""
        self.broker.ensure_all()
        return self.broker.require(CELL_RUNS)

    def make_topic_again(self, name: str = CELL_RUNS) -> Topic:
        """Delete one of its topics, and create it under its name; that of the cell runs."""
        topic, admin = self.configured.topic(name), self._admin()
        admin.delete_topics([topic])[topic].result(WAIT_S_MAX)
        deadline = time.monotonic() + WAIT_S_MAX
        while self.broker.topic(topic):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return self.create_topic()

    def drop_runs(self, before: Mapping[int, int]) -> None:
        """What retention does to cell runs, at once. ``before``: partition → its new first offset."""
        places = [TopicPartition(self.configured.topic(CELL_RUNS), *place) for place in before.items()]
        admin = self._admin()
        for place, dropped in admin.delete_records(places).items():
            assert dropped.result(WAIT_S_MAX).low_watermark == place.offset

    def _admin(self) -> AdminClient:
        """To be kept until Kafka has answered: what a client that is gone was asked never ends."""
        return AdminClient({"bootstrap.servers": self.configured.kafka_bootstrap})

    @property
    def pid(self) -> int:
        """Of the last process started."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def ended(self) -> int | None:
        """The exit code of the last process; None while it runs, and before the first."""
        return self._process and self._process.poll()

    def start(self, *options: str, command: Sequence[str] = COMMAND) -> Self:
        """Start the process, and return at once."""
        assert not self.is_alive
        self.log.parent.mkdir(parents=True, exist_ok=True)
        place = ("--home", str(self.home.path)) if command is COMMAND else ()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *command, *place, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env=environment(**self.settings, home=str(self.home.path)),
                start_new_session=True,
            )
        return self

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = WAIT_S_MAX) -> int:
        """The exit code, once the process has ended by itself."""
        assert self._process is not None
        return self._process.wait(seconds)

    @property
    def answers(self) -> WorkerAnswers:
        """Its read API. Problem while it has not published one."""
        endpoints = self.home.worker()
        if endpoints is None or endpoints.pid != self.pid:
            raise Problem("the worker has no API yet")
        return WorkerAnswers(endpoints.api_url)

    @property
    def status(self) -> Status | None:
        """What it says of itself; None while it does not answer."""
        try:
            return self.answers.status()
        except Problem:
            return None

    def readyz(self) -> tuple[int, dict[str, Any]]:
        """HTTP status and body of its readiness."""
        endpoints = self.home.worker()
        assert endpoints is not None
        try:
            with urllib.request.urlopen(f"{endpoints.api_url}/readyz", timeout=WAIT_S_MAX) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def metrics(self) -> list[str]:
        """Lines of its metrics."""
        endpoints = self.home.worker()
        assert endpoints is not None
        with urllib.request.urlopen(f"{endpoints.api_url}/metrics", timeout=WAIT_S_MAX) as answer:
            assert answer.headers["content-type"].startswith("text/plain; version=")
            return str(answer.read().decode()).splitlines()

    def wait_until(self, condition: Callable[[Status], object], what: str, seconds: float = WAIT_S_MAX) -> Status:
        """The status, once it fulfils the condition. AssertionError when the process ends or the time is over."""
        deadline = time.monotonic() + seconds
        status = None
        while time.monotonic() < deadline:
            assert self.is_alive, f"the worker ended with exit code {self.wait()} before {what}"
            if (status := self.status) and condition(status):
                return status
            time.sleep(POLL_S)
        raise AssertionError(f"not {what} within {seconds:.0f} s: {status}")

    def wait_until_ready(self) -> Status:
        """Until it meters everything that it should."""
        return self.wait_until(lambda status: status.ready, "ready")

    def wait_until_metered(self, seconds: float = WAIT_S_MAX) -> Status:
        """Until both marks of every partition are at the logs' ends."""
        ends, event_ends = self.log_ends(), self.log_ends(ACCOUNT_EVENTS)

        def metered(status: Status) -> bool:
            units = {unit.partition: unit for unit in status.units}
            return units.keys() >= ends.keys() and all(
                unit.mark >= ends[partition] - 1 and unit.event_mark >= event_ends[partition] - 1
                for partition, unit in units.items()
            )

        return self.wait_until(metered, f"metered to {ends}, {event_ends}", seconds)

    def log_ends(self, topic: str = CELL_RUNS) -> dict[int, int]:
        """Partition → the offset after Kafka's last."""
        settings = self.configured
        ranges = self.broker.log_ranges(settings.topic(topic), range(settings.partitions))
        return {partition: found.end for partition, found in ranges.items()}

    def produce(self, events: Iterable[Event]) -> None:
        """Send records to the worker's topic, and wait until Kafka has them."""
        settings = self.configured
        send(_producer(settings.kafka_bootstrap), settings.topic(CELL_RUNS), events)

    def bill(self, events: Iterable[AccountEvent]) -> None:
        """Send account events, as billing does, and wait until Kafka has them."""
        settings = self.configured
        records = [Event(event.workspace_id.encode(), encode_account_event(event)) for event in events]
        send(_producer(settings.kafka_bootstrap), settings.topic(ACCOUNT_EVENTS), records)

    def behind(self) -> dict[tuple[str, int], int]:
        """(topic, partition) → the end of its log, where Kafka's commit has not come to it."""
        settings = self.configured
        topics = settings.topic(CELL_RUNS), settings.topic(ACCOUNT_EVENTS)
        broker, partitions = self.broker, range(settings.partitions)
        ends = {(name, p): found.end for name in topics for p, found in broker.log_ranges(name, partitions).items()}
        try:
            committed = broker.committed(f"{settings.topic_prefix}creditstream", ends)
        except Unreachable:  # the first to name a group on a new Kafka is told that it has no coordinator
            return ends
        return {place: end for place, end in ends.items() if (committed[place] or 0) < end}

    def wait_until_told(self, seconds: float = WAIT_S_MAX) -> None:
        """Until Kafka's commit is at the end of both topics: rows are in the ledger, and alerts and states are out."""
        deadline = time.monotonic() + seconds
        while behind := self.behind():
            assert self.is_alive, f"the worker ended with exit code {self.wait()}"
            assert time.monotonic() < deadline, f"not told within {seconds:.0f} s: {behind}"
            time.sleep(0.1)

    def reconcile(self) -> Reconciliation:
        """Kafka's logs against the ledger, by the running worker's answers."""
        return reconcile(self.answers, self.configured)

    def log_lines(self) -> list[str]:
        """Everything that all processes of this home have written."""
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []

    def log_events(self, name: str) -> list[dict[str, Any]]:
        """The log's lines of one event."""
        found = []
        for line in self.log_lines():
            with suppress(json.JSONDecodeError):
                event = json.loads(line)
                if event.get("event") == name:
                    found.append(event)
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_alive:
            self.kill()
        if error:
            tail = "\n".join(line[:600] for line in self.log_lines()[-LOG_LINES_SHOWN:])
            error.add_note(f"the end of {self.log}:\n{tail}")


@cache
def _producer(bootstrap: str) -> Producer:
    """One for all tests: an idempotent producer takes half a second to begin."""
    return open_producer(read_settings({}, kafka_bootstrap=bootstrap))


def send(producer: Producer, topic: str, events: Iterable[Event]) -> None:
    """Produce records and wait for them; those of a transaction are only handed over."""
    for number, event in enumerate(events):
        placed: dict[str, Any] = {"partition": event.partition} if event.partition >= 0 else {}
        while True:
            try:
                producer.produce(topic, event.value, event.key, headers=list(event.headers), **placed)
                break
            except BufferError:
                producer.poll(0.1)
        if number % 1000 == 0:
            producer.poll(0)
    assert producer.flush(WAIT_S_MAX) == 0


def cell_run(workspace: str = "ws_0001", **fields: Any) -> CellRun:
    """A run of an action that costs 1 credit, now; what a test cares about is in ``fields``."""
    plain: dict[str, Any] = {
        "run_id": uuid4(),
        "workspace_id": workspace,
        "table_id": "tbl_1",
        "column_id": "col_1",
        "row_id": "row_1",
        "action": "enrich_person",
        "outcome": Outcome.DATA,
        "ran_at": datetime.now(UTC),
    }
    return CellRun(**plain | fields)


def event_of(run: CellRun) -> Event:
    """The record by which a producer sends a run."""
    return Event(run.workspace_id.encode(), encode_run(run))


class Finished(NamedTuple):
    """A command that has ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def environment_of(worker: WorkerProcess) -> dict[str, str | int]:
    """The settings under which a command finds the worker's home."""
    return worker.settings | {"home": str(worker.home.path)}


def read_json(done: Finished) -> Any:
    """The answer, when nothing went wrong: JSON on standard output and nothing else there."""
    assert done.code == 0, done
    return json.loads(done.out)


def creditstream(
    *words: str, settings: Mapping[str, str | int] | None = None, stdin: str = "", seconds: float = WAIT_S_MAX
) -> Finished:
    """Run the command line as a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "creditstream", *words],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment(**settings or {}),
        timeout=seconds,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def kafka_processes(home: Home) -> list[psutil.Process]:
    """The guard and the Kafka of a home, the guard first."""
    mark = f"-Dcreditstream.home={home.path}"
    found = [process for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())]
    return sorted(found, key=lambda process: kafka_guard.__file__ not in process.info["cmdline"])


_ASK: Final = """
import json, sys
from sinks.clickhouse import connect
with connect(sys.argv[1]) as client:
    print(json.dumps([client.query(sql).result_rows for sql in sys.argv[2:]], default=str))
"""


def ask_ledger(url: str, *questions: str) -> list[list[list[Any]]]:
    """The rows that each question finds, asked by a process of its own: chDB allows one directory in each."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK, url, *questions],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=WAIT_S_MAX,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers: list[list[list[Any]]] = json.loads(done.stdout)
    return answers


def run_id_of(event: Event) -> UUID:
    """The run that a good record names."""
    assert event.value is not None
    return UUID(json.loads(event.value)["run_id"])
