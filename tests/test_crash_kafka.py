"""The real worker when its Kafka goes: stopped and started again, killed together with the worker, gone for good.

By its name this file begins with the other crash tests: the longest must not be the last to begin.
"""

import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from streams.app import EXIT_RESTART
from tests.worker_process import WorkerProcess, cell_run, event_of, kafka_processes

START_S_MAX: Final = 60.0
OVER_HTTP: Final = pytest.mark.parametrize("database_url", ["http"], indirect=True)


@OVER_HTTP
def test_kafka_may_go_and_come_back(tmp_path: Path, ledger_url: str) -> None:
    """While Kafka is away the worker waits, or ends to be started again; what comes afterwards is metered once. SIGTERM
    ends it without Kafka too.
    """
    broker_home = Home.at(tmp_path / "kafka")
    with (
        broker_home.hold(),
        EmbeddedKafka(broker_home, print) as kafka,
        WorkerProcess(tmp_path / "home", kafka.bootstrap, "outage-", ledger_url=ledger_url) as worker,
    ):
        worker.create_topic()
        worker.produce(event_of(cell_run(f"ws_{number:04d}")) for number in range(40))
        worker.start().wait_until_metered()
        kafka.stop()
        time.sleep(3)
        kafka.start()
        worker.produce(event_of(cell_run(f"ws_{number:04d}")) for number in range(40))

        deadline = time.monotonic() + 2 * START_S_MAX
        while not worker.is_alive or not metered(worker):
            assert time.monotonic() < deadline
            if not worker.is_alive:
                assert worker.wait() == EXIT_RESTART
                worker.start()
            time.sleep(0.1)
        books = worker.reconcile()
        worker.wait_until(lambda status: {(unit.lag, unit.event_lag) for unit in status.units} == {(0, 0)}, "no lag")
        kafka.stop()
        assert worker.stop() in (0, EXIT_RESTART)

    assert (books.closes, books.rows, books.behind) == (True, 80, 0)


def test_a_worker_whose_kafka_is_away_says_so(tmp_path: Path) -> None:
    """Nothing else would tell: its partitions are still its own, and no lag grows."""
    broker_home = Home.at(tmp_path / "kafka")
    with (
        broker_home.hold(),
        EmbeddedKafka(broker_home, print) as kafka,
        WorkerProcess(tmp_path / "home", kafka.bootstrap, "away-") as worker,
    ):
        worker.create_topic()
        worker.start().wait_until(lambda status: status.ready, "ready", START_S_MAX)
        kafka.stop()
        worker.wait_until(
            lambda status: "Kafka has answered no heartbeat for" in "".join(status.not_ready_because), "told"
        )
        assert worker.stop() in (0, EXIT_RESTART)


def metered(worker: WorkerProcess) -> bool:
    """Whether every mark is at the log's end now."""
    status, ends = worker.status, worker.log_ends()
    return bool(status) and {unit.partition: unit.mark + 1 for unit in status.units} == ends  # type: ignore[union-attr]


def meter_embedded(worker: WorkerProcess) -> None:
    """Start it with a Kafka of its own, and have it meter 40 runs."""
    del worker.settings["kafka_bootstrap"]
    worker.start("--embedded").wait_until(lambda status: status.ready, "ready", START_S_MAX)
    endpoints = worker.home.worker()
    assert endpoints
    worker.settings["kafka_bootstrap"] = endpoints.kafka_bootstrap
    worker.produce(event_of(cell_run(f"ws_{number:04d}")) for number in range(40))
    worker.wait_until_metered()


def test_kill_9_of_an_embedded_worker_leaves_no_kafka_behind(tmp_path: Path) -> None:
    """Its Kafka ends with it, the next start finds topic and ledger as they were; without Kafka it ends with 75."""
    with WorkerProcess(tmp_path, "", "", partitions=2) as worker:
        meter_embedded(worker)
        worker.kill()
        psutil.wait_procs(kafka_processes(worker.home), timeout=15)
        assert not kafka_processes(worker.home)

        meter_embedded(worker)
        books = worker.reconcile()
        for process in kafka_processes(worker.home):
            process.kill()
        assert worker.wait() == EXIT_RESTART

    assert (books.closes, books.rows) == (True, 80)
