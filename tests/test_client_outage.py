"""A broker that freezes, stops and comes back, under a gate and a producer that were at work."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from creditstream.client import Because, CellRunProducer, Gate
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from streams.topics import CELL_RUNS, LIMIT_STATES
from tests.client_kafka import a_run, first_copies, fresh_settings, limit_state, publish, record_of, wait_until


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedKafka]:
    """A Kafka that a test may stop; the test starts it again."""
    home = Home.at(tmp_path_factory.mktemp("mortal"))
    with home.hold(), EmbeddedKafka(home, print) as broker:
        yield broker


def java_of(kafka: EmbeddedKafka) -> psutil.Process:
    """The broker's own process."""
    [java] = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name() == "java" and f"127.0.0.1:{kafka.bootstrap.split(':')[1]}" in _configuration(process)
    ]
    return java


def _configuration(process: psutil.Process) -> str:
    return (Path(process.cwd()) / "server.properties").read_text()


def test_a_stopped_broker_makes_the_gate_stale_until_it_is_back(mortal: EmbeddedKafka) -> None:
    """While Kafka is gone the gate says so after `stale_after_s`; afterwards it goes on where it was."""
    settings = fresh_settings(mortal.bootstrap, LIMIT_STATES)
    publish(settings, [record_of(limit_state(f"ws_{number}", "5", 1)) for number in range(50)])
    with Gate(settings, on_unknown="deny", on_stale="deny", stale_after_s=3) as gate:
        gate.wait_ready()
        assert gate.check("ws_1", "enrich_person")
        mortal.stop()
        wait_until(lambda: gate.check("ws_1", "enrich_person").reason == Because.STALE, "stale")
        assert mortal.start() == settings.kafka_bootstrap
        wait_until(lambda: gate.check("ws_1", "enrich_person"), "fresh")
        publish(settings, [record_of(limit_state("ws_1", "4", 2))])
        wait_until(lambda: gate.check("ws_1", "enrich_person").remaining == "4", "followed")
        assert gate.check("ws_2", "enrich_person").remaining == "5"
        assert (gate.states.overtaken, gate.states.unreadable) == (0, 0)


def test_a_frozen_broker_makes_the_gate_stale_too(mortal: EmbeddedKafka) -> None:
    """A connection that stands and brings nothing is no contact."""
    settings = fresh_settings(mortal.bootstrap, LIMIT_STATES)
    publish(settings, [record_of(limit_state())])
    java = java_of(mortal)
    with Gate(settings, on_unknown="deny", on_stale="deny", stale_after_s=3) as gate:
        gate.wait_ready()
        java.suspend()
        try:
            wait_until(lambda: gate.check("ws_1", "enrich_person").reason == Because.STALE, "stale")
        finally:
            java.resume()
        wait_until(lambda: gate.check("ws_1", "enrich_person"), "fresh")


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_runs_of_an_outage_arrive_in_order(mortal: EmbeddedKafka, tmp_path: Path, how: str) -> None:
    """Recording goes on before, in and after an outage: no run is lost, and no first copy overtakes another."""
    settings = fresh_settings(mortal.bootstrap, CELL_RUNS, home=str(tmp_path))
    java = java_of(mortal)
    number = 0

    def record(producer: CellRunProducer, runs: int) -> None:
        nonlocal number
        for _ in range(runs):
            producer.record(a_run(number, f"ws_{number % 3}"))
            number += 1

    with CellRunProducer(settings, memory_s_max=1) as producer:
        record(producer, 500)
        assert producer.flush(60) == 0
        record(producer, 200)
        mortal.stop() if how == "stopped" else java.suspend()
        record(producer, 200)
        wait_until(lambda: producer.counts().waiting_in_spool, "in the spool")
        record(producer, 200)
        mortal.start() if how == "stopped" else java.resume()
        record(producer, 200)
        assert producer.flush(60) == 0
        record(producer, 200)
        assert producer.flush(60) == 0
        assert producer.counts().spool_bytes == 0
    assert first_copies(settings) == {f"ws_{start}": list(range(start, number, 3)) for start in range(3)}
