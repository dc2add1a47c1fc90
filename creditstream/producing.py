"""A Kafka producer as every producer of cell runs must be set up, and why each setting is there."""

from typing import Any

from confluent_kafka import Producer

from streams.connection import librdkafka
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


def open_producer(settings: Settings) -> Producer:
    """A producer for cell runs and account events; connects in the background."""
    return Producer(librdkafka(settings) | PRODUCER_CONFIG)
