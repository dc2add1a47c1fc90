"""The outbox on a real Kafka: what is read, and what is said when Kafka takes or gives nothing."""

import os
from typing import Final
from uuid import uuid4

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from creditstream.producing import open_producer
from creditstream.webhooks import outbox as outbox_module
from creditstream.webhooks.outbox import Outbox, read_to_end
from schemas.problem import Unreachable
from schemas.webhook import Delivery, DeliveryState
from streams.kafka.topics import LIMIT_ALERTS, WEBHOOK_DELIVERIES
from streams.settings import Settings
from tests.client_kafka import fresh_settings

WAIT_S_MAX: Final = 60.0
NO_TEXT: Final = b'"\xff"'
DEEP: Final = b"[" * 20_000 + b"]" * 20_000
NOWHERE: Final = Settings(kafka_bootstrap="127.0.0.1:1")
QUEUE_RECORDS: Final = 100_000
"""So many the producer holds."""


@pytest.fixture
def settings(kafka: str) -> Settings:
    """Topics of its own."""
    return fresh_settings(kafka, LIMIT_ALERTS, WEBHOOK_DELIVERIES)


def test_records_of_others_in_the_outbox_are_passed_over(settings: Settings) -> None:
    """What cannot be read is named by its position, and hides nothing else."""
    topic = settings.topic(WEBHOOK_DELIVERIES)
    producer = open_producer(settings)
    for value in (b"no record", b'{"endpoint":' + NO_TEXT + b"}", b'{"x":' + DEEP + b"}"):
        producer.produce(topic, value, b"key", 1)
    producer.flush()
    outbox = Outbox(settings)
    delivery = Delivery(endpoint="one", alert_id=uuid4(), state=DeliveryState.DELIVERED)
    outbox.put(1, delivery.key, delivery)
    outbox.flush()
    said: list[str] = []

    assert outbox.read([0, 1], said.append) == {0: {}, 1: {delivery.key: delivery}}
    assert said == [f"{topic}[1]@{offset}" for offset in range(3)]


def test_what_is_deleted_while_it_is_read_hides_nothing_else(settings: Settings) -> None:
    """Retention that overtakes a reader takes from it what is gone, and not the rest."""
    topic = settings.topic(LIMIT_ALERTS)
    producer = open_producer(settings)
    for _ in range(400):
        producer.produce(topic, os.urandom(64 * 1024), partition=0)
        producer.poll(0)
    producer.flush()
    found = read_to_end(settings, topic, [0])
    offsets = [next(found).offset()]
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap})
    (deleted,) = admin.delete_records([TopicPartition(topic, 0, 399)]).values()
    deleted.result(WAIT_S_MAX)
    offsets += [message.offset() for message in found]

    assert len(offsets) < 399, "all of it was read before"
    assert (offsets[0], offsets[-1]) == (0, 399)


def test_more_than_the_producer_holds_is_written(settings: Settings) -> None:
    """As after 48 days without a notifier: all of it must go at once."""
    outbox = Outbox(settings)
    for _ in range(QUEUE_RECORDS):
        outbox.put(0, b"key", None)
    delivery = Delivery(endpoint="one", alert_id=uuid4(), state=DeliveryState.DELIVERED)
    outbox.put(0, b"key", delivery)
    outbox.flush()
    assert outbox.read([0], print) == {0: {b"key": delivery}}


def test_a_silent_kafka_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by who hands records over, nor by who wants them written, nor by who reads."""
    outbox = Outbox(NOWHERE)
    monkeypatch.setattr(outbox_module, "WRITE_S_MAX", 0.1)
    monkeypatch.setattr(outbox_module, "POLL_S", 0.1)
    monkeypatch.setattr(outbox_module, "SILENCE_S_MAX", 0.1)
    outbox.put(0, b"key", None)
    with pytest.raises(Unreachable, match=r"webhook-deliveries on 127\.0\.0\.1:1 cannot be written: no answer"):
        outbox.flush()
    for _ in range(QUEUE_RECORDS - 1):
        outbox.put(0, b"key", None)
    with pytest.raises(Unreachable, match="cannot be written: it takes no records"):
        outbox.put(0, b"key", None)
    with pytest.raises(Unreachable, match=r"topic on 127\.0\.0\.1:1 cannot be read: "):
        list(read_to_end(NOWHERE, "topic", [0]))


def test_a_partition_that_gives_nothing_is_not_waited_for_without_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without a leader, say; here one that Kafka does not have."""
    monkeypatch.setattr(outbox_module, "SILENCE_S_MAX", 0.5)
    with pytest.raises(Unreachable, match="does not answer: while it is read"):
        list(read_to_end(settings, settings.topic(WEBHOOK_DELIVERIES), [settings.partitions]))
