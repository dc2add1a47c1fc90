"""A broker that freezes, stops and comes back, under a gate and a producer that were at work."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil
import pytest
from confluent_kafka import KafkaError

from creditstream.client import Because, CellRunProducer, Gate
from creditstream.client.connection import KafkaOptions
from creditstream.client.gate import ANSWER_S_MAX, ASK_EVERY_S
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from streams.kafka.topics import CELL_RUNS, LIMIT_STATES, Broker
from tests.client_kafka import (
    a_run,
    first_copies,
    fresh_settings,
    limit_state,
    publish,
    record_of,
    recorded,
    wait_until,
)

SLOW_RUNS: Final = 3000
"""More than are acknowledged, one by one, in the moments in which Kafka is awake."""
FENCED_S: Final = 5.0
"""Longer than the controller waits for its broker: when this wakes, its partitions have a leader anew."""


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


def left(gate: Gate, *names: str) -> list[str | None]:
    """What each workspace has left; None while that is not known."""
    return [gate.check(name, "enrich_person").remaining for name in names]


def _configuration(process: psutil.Process) -> str:
    return (Path(process.cwd()) / "server.properties").read_text()


@pytest.mark.parametrize("how", ["stopped", "frozen"])
def test_an_outage_is_noticed_by_the_gate_and_survived_by_the_producer(
    mortal: EmbeddedKafka, tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """While Kafka is gone, or its connection brings nothing, the gate says that it is stale, in its log once, and
    recording goes on. Afterwards the gate goes on where it was, no run is lost, and no first copy has overtaken
    another.
    """
    settings = fresh_settings(mortal.bootstrap, LIMIT_STATES, CELL_RUNS, home=str(tmp_path))
    publish(settings, [record_of(limit_state(f"ws_{number}", "5", 1)) for number in range(50)])
    java = java_of(mortal)
    accepted = 0

    def record(producer: CellRunProducer, runs: int) -> None:
        nonlocal accepted
        for number in range(accepted, accepted + runs):
            producer.record(a_run(number, f"ws_{number % 3}"))
        accepted += runs

    with (
        CellRunProducer(settings, memory_s_max=1) as producer,
        Gate(settings, on_unknown="deny", on_stale="deny", stale_after_s=3) as gate,
    ):
        gate.wait_ready()
        wait_until(lambda: gate.check("ws_1", "enrich_person"), "fresh")
        record(producer, 500)
        assert producer.flush(60) == 0
        record(producer, 200)
        mortal.stop() if how == "stopped" else java.suspend()
        record(producer, 200)
        wait_until(lambda: gate.check("ws_1", "enrich_person").reason == Because.STALE, "stale")
        assert caplog.text.count("the gate has trouble") <= 1
        wait_until(lambda: producer.counts().waiting_in_spool, "in the spool")
        record(producer, 200)
        if how == "stopped":
            mortal.start()
        else:
            time.sleep(FENCED_S)
            java.resume()
        record(producer, 200)
        wait_until(lambda: gate.check("ws_1", "enrich_person"), "fresh again")
        publish(settings, [record_of(limit_state("ws_1", "4", 2))])
        wait_until(lambda: left(gate, "ws_1", "ws_2") == ["4", "5"], "followed")
        followed_ns = time.monotonic_ns()
        wait_until(lambda: gate.fresh_ns > followed_ns, "known to be complete by a question of afterwards")
        assert (gate.states.overtaken, gate.states.unreadable) == (0, 0)
        assert producer.flush(60) == 0
        record(producer, 200)
        assert producer.flush(60) == 0
        assert producer.counts().spool_bytes == 0
    assert first_copies(settings) == {f"ws_{start}": list(range(start, accepted, 3)) for start in range(3)}


def test_a_question_that_a_frozen_kafka_leaves_open_makes_nothing_fresh(mortal: EmbeddedKafka) -> None:
    """Where no answer comes librdkafka gives offsets that are none, and no error: the gate does not take them for the
    topic's end, however long it may be without an answer before it is stale.
    """
    settings = fresh_settings(mortal.bootstrap, LIMIT_STATES)
    java = java_of(mortal)
    with Gate(settings, on_unknown="deny", on_stale="deny", stale_after_s=600) as gate:
        gate.wait_ready()
        java.suspend()
        frozen_ns = time.monotonic_ns()
        try:
            time.sleep(ASK_EVERY_S + ANSWER_S_MAX + 1)
        finally:
            java.resume()
        assert gate.fresh_ns < frozen_ns
        wait_until(lambda: gate.fresh_ns > frozen_ns, "fresh again")


def test_a_slow_kafka_is_waited_for(mortal: EmbeddedKafka, tmp_path: Path) -> None:
    """While acknowledgements trickle in, runs that are older than `memory_s_max` are neither spooled nor sent again."""
    settings = fresh_settings(mortal.bootstrap, CELL_RUNS, home=str(tmp_path))
    java = java_of(mortal)
    one_by_one: KafkaOptions = {"batch.num.messages": 1, "max.in.flight": 1}
    with CellRunProducer(settings, memory_s_max=2, kafka=one_by_one) as producer:
        producer.record(a_run(0))
        assert producer.flush(60) == 0
        started_s = time.monotonic()
        for number in range(1, SLOW_RUNS):
            producer.record(a_run(number))
        while time.monotonic() < started_s + 5:
            delivered = producer.counts().delivered
            java.suspend()
            time.sleep(0.3)
            java.resume()
            wait_until(lambda delivered=delivered: producer.counts().delivered > delivered, "acknowledged")
        waited = producer.counts().waiting_in_memory
        assert producer.flush(60) == 0
        assert (producer.counts().spooled, producer.counts().delivered) == (0, SLOW_RUNS)
    assert waited, "Kafka was not slow"
    assert [len(runs) for runs in recorded(settings).values() if runs] == [SLOW_RUNS]


def test_a_handshake_that_once_broke_off_makes_no_slow_broker_a_refusal(mortal: EmbeddedKafka, tmp_path: Path) -> None:
    """A worker asks of its topics as long as it lives; whoever was let in waits for the answer."""
    settings = fresh_settings(mortal.bootstrap, CELL_RUNS, home=str(tmp_path))
    broker = Broker(settings)
    assert broker.topic(settings.topic(CELL_RUNS))
    broker._heard(KafkaError(KafkaError._SSL))
    java = java_of(mortal)
    waking = threading.Timer(1, java.resume)
    java.suspend()
    waking.start()
    try:
        assert broker.topic(settings.topic(CELL_RUNS))
    finally:
        waking.join()
