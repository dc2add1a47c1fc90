"""What the broker says of topics."""

import threading
import time
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions

from creditstream.producing import open_producer
from schemas.problem import Unreachable
from streams.kafka import topics
from streams.kafka.connection import librdkafka
from streams.kafka.topics import CELL_RUNS, Broker, LogRange, arrived
from streams.settings import read_settings
from tests.client_kafka import fresh_settings


def test_metadata_that_lack_a_partition_are_asked_for_again(kafka: str, tmp_path: Path) -> None:
    """As they may right after an outage: a partition that comes a second later is found, not called an outage."""
    settings = fresh_settings(kafka, CELL_RUNS, home=str(tmp_path))
    topic = settings.topic(CELL_RUNS)

    def grow() -> None:
        time.sleep(1)
        admin = AdminClient({"bootstrap.servers": kafka})
        admin.create_partitions([NewPartitions(topic, settings.partitions + 1)])[topic].result()

    growing = threading.Thread(target=grow)
    growing.start()
    try:
        found = Broker(settings).log_ranges(topic, [settings.partitions])
    finally:
        growing.join()
    assert found == {settings.partitions: LogRange(0, 0)}


def test_nobody_waits_for_a_silent_kafka_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said once what is waited for, before it is said that it did not answer."""
    monkeypatch.setattr(topics, "ANSWER_TIMEOUT_S", 0.2)
    with pytest.raises(Unreachable, match="does not answer"):
        Broker(read_settings({}, kafka_bootstrap="127.0.0.1:1")).topic("cell-runs")
    assert [record.getMessage() for record in caplog.records] == ["waiting for Kafka at 127.0.0.1:1, up to 0 s"]


def test_a_record_without_a_value_arrives_as_any_other(kafka: str, tmp_path: Path) -> None:
    """Also where it is the first that comes: librdkafka's message is then falsy."""
    settings = fresh_settings(kafka, CELL_RUNS, home=str(tmp_path))
    topic = settings.topic(CELL_RUNS)
    producer = open_producer(settings)
    for value in (None, b"", b"{}"):
        producer.produce(topic, value, b"key", 0)
    producer.flush()
    consumer = Consumer(librdkafka(settings) | {"group.id": "test", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    try:
        found = [message for _ in range(3) for message in arrived(consumer, 30, 1)]
    finally:
        consumer.close()
    assert [message.value() for message in found] == [None, b"", b"{}"]
