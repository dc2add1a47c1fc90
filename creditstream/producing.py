"""A Kafka producer as every producer of cell runs must be set up, and a few records that it delivers by hand."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from confluent_kafka import KafkaError, Message, Producer

from schemas.ledger import Position
from schemas.problem import Unreachable
from streams.kafka.connection import librdkafka
from streams.kafka.topics import position_of
from streams.settings import Settings

PRODUCER_CONFIG: dict[str, Any] = {
    # Java's hash. librdkafka's default would split one workspace over two partitions, and every run be `misrouted`.
    "partitioner": "murmur2_random",
    # A retry inside the producer is written once; acks=all follows from it.
    "enable.idempotence": True,
    "compression.type": "zstd",
    # Long enough to share requests, too short to matter for an alert.
    "linger.ms": 5,
    "log_level": 2,
}
DELIVERY_S_MAX: Final = 30.0
"""For all of them, the first hundred thousand at least."""
POLL_S: Final = 0.1


def open_producer(settings: Settings) -> Producer:
    """A producer for cell runs and account events; connects in the background."""
    return Producer(librdkafka(settings) | PRODUCER_CONFIG)


class Outgoing(NamedTuple):
    """A record that is to be delivered, keyed by its workspace."""

    topic: str
    workspace_id: str
    value: bytes
    headers: Sequence[tuple[str, bytes]] = ()


def deliver(settings: Settings, records: Sequence[Outgoing], what: str, fix: str) -> list[Position]:
    """Where each record lies in Kafka. Unreachable, with a word for ``what`` they are, when one was not delivered."""
    producer = open_producer(settings)
    places: dict[int, Position] = {}
    refusals: list[str] = []

    def delivered(number: int, error: KafkaError | None, message: Message) -> None:
        if error:
            refusals.append(error.str())
        else:
            places[number] = position_of(message)

    deadline = time.monotonic() + DELIVERY_S_MAX
    for number, record in enumerate(records):
        while time.monotonic() < deadline:
            try:
                producer.produce(
                    record.topic, record.value, record.workspace_id,
                    headers=list(record.headers), on_delivery=partial(delivered, number),
                )  # fmt: skip
                break
            except BufferError:
                producer.poll(POLL_S)
        producer.poll(0)
    producer.flush(max(0, deadline - time.monotonic()))
    if lost := len(records) - len(places):
        why = refusals[0] if refusals else f"no answer within {DELIVERY_S_MAX:.0f} s"
        raise Unreachable(
            f"{lost:,} of {len(records):,} {what} not delivered", f"{settings.kafka_bootstrap}: {why}", fix
        )
    return [places[number] for number in range(len(records))]
