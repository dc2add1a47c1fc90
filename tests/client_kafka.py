"""Topics, limit states and cell runs by hand: what the tests of the client share."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, date, datetime
from functools import cache
from itertools import count
from typing import Any, Final
from uuid import UUID

import msgspec
from confluent_kafka import Consumer, Producer, TopicPartition

from creditstream.producing import open_producer
from schemas.cell_run import CellRun, Outcome
from schemas.codec import decode_run
from schemas.ledger import Pool
from schemas.limits import AsOf, LimitState, State, state_key
from streams.kafka.topics import CELL_RUNS, LIMIT_STATES, Broker
from streams.settings import Settings, read_settings

WAIT_S_MAX: Final = 60.0
POLL_S: Final = 0.02
_PREFIXES: Final = count(1)


def fresh_settings(bootstrap: str, *topics: str, partitions: int = 2, **fields: Any) -> Settings:
    """Settings with a prefix that nobody else uses; these topics exist."""
    prefix = f"client-{time.time_ns()}-{next(_PREFIXES)}-"
    settings = read_settings({}, kafka_bootstrap=bootstrap, topic_prefix=prefix, partitions=partitions, **fields)
    make_topics(settings, *topics)
    return settings


def make_topics(settings: Settings, *topics: str) -> None:
    """Have these topics under the settings' prefix."""
    for topic in topics:
        Broker(settings).ensure(topic)


class Door:
    """An address that refuses connections until `open` is called, and then leads to a broker."""

    def __init__(self, leads_to: str) -> None:
        self._server = socket.socket()  # bound, so that nobody else takes the port; who does not listen refuses
        self._server.bind(("127.0.0.1", 0))
        self._address = self._server.getsockname()
        self._target = leads_to.split(":")

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self._address[0]}:{self._address[1]}"

    def open(self) -> None:
        """From now on whoever knocks comes through. The broker then tells its own address."""
        self._server.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Refuse again."""
        with suppress(OSError):  # it was never opened
            self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                inside, _ = self._server.accept()
                outside = socket.create_connection((self._target[0], int(self._target[1])))
                for source, sink in ((inside, outside), (outside, inside)):
                    threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError), source, sink:
        while data := source.recv(65_536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Return once the condition holds. AssertionError when it does not in `WAIT_S_MAX`."""
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline, f"not {what} within {WAIT_S_MAX:.0f} s"
        time.sleep(POLL_S)


def complaints(done: subprocess.CompletedProcess[str]) -> list[str]:
    """What a worker said on standard error, but for Kafka that is slow: so it may be on a busy machine."""
    return [line for line in done.stderr.splitlines() if not line.startswith("cell runs are waiting: no acknowledg")]


def limit_state(workspace_id: str = "ws_1", remaining: str = "10", seen: int = 1, **fields: Any) -> LimitState:
    """A state of the enrichment pool; ``seen``: how many cell runs the meter had folded."""
    plain = {
        "pool": Pool.ENRICHMENT,
        "state": State.OK,
        "used": "0",
        "allowance": remaining,
        "overage": "0",
        "as_of": as_of(seen),
        "period_start": date(2026, 1, 15),
    }
    return LimitState(workspace_id=workspace_id, remaining=remaining, **plain | fields)


def as_of(seen: int, log: str = "log") -> AsOf:
    """Up to where the meter had folded."""
    return AsOf(log=log, cell_runs=seen, account_events=0, at=datetime(2026, 1, 1, tzinfo=UTC))


def record_of(state: LimitState) -> tuple[bytes, bytes]:
    """Key and value of a limit state."""
    return state_key(state.workspace_id, state.pool), msgspec.json.encode(state)


def publish(settings: Settings, records: Iterable[tuple[bytes, bytes | None]]) -> None:
    """Write records to ``limit-states``; Kafka has them when this returns."""
    producer = _producer(settings.kafka_bootstrap)
    for key, value in records:
        producer.produce(settings.topic(LIMIT_STATES), value, key)
        producer.poll(0)
    assert producer.flush(WAIT_S_MAX) == 0


@cache
def _producer(bootstrap: str) -> Producer:
    """One for all tests: an idempotent producer takes half a second to begin."""
    return open_producer(read_settings({}, kafka_bootstrap=bootstrap))


def a_run(number: int, workspace_id: str = "ws_1", **fields: Any) -> CellRun:
    """Run ``number`` of a workspace; its row is named after it."""
    plain = {
        "run_id": UUID(int=number + (1 << 64)),
        "table_id": "tbl_1",
        "column_id": "col_1",
        "row_id": f"row_{number}",
        "action": "enrich_person",
        "outcome": Outcome.DATA,
        "ran_at": datetime(2026, 8, 1, tzinfo=UTC),
    }
    return CellRun(workspace_id=workspace_id, **plain | fields)


def recorded(settings: Settings) -> dict[int, list[CellRun]]:
    """Partition → all that ``cell-runs`` holds there now, in Kafka's order."""
    topic = settings.topic(CELL_RUNS)
    ranges = Broker(settings).log_ranges(topic, range(settings.partitions))
    consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap, "group.id": "client-tests", "log_level": 0})
    runs: dict[int, list[CellRun]] = {}
    try:
        for partition, found in ranges.items():
            consumer.assign([TopicPartition(topic, partition, found.start)])
            runs[partition] = []
            deadline = time.monotonic() + WAIT_S_MAX
            while len(runs[partition]) < found.end - found.start:
                message = consumer.poll(1)
                if message is not None and not message.error():
                    runs[partition].append(decode_run(message.value()))
                else:  # nothing yet, or what a broker says right after an outage
                    assert time.monotonic() < deadline, message and message.error()
    finally:
        consumer.close()
    return runs


def first_copies(settings: Settings) -> dict[str, list[int]]:
    """Workspace → the numbers of its runs, in the order in which their first copies lie in Kafka."""
    found: dict[str, dict[int, None]] = {}
    for runs in recorded(settings).values():
        for run in runs:
            found.setdefault(run.workspace_id, {}).setdefault(run.run_id.int - (1 << 64))
    return {workspace_id: list(numbers) for workspace_id, numbers in found.items()}
