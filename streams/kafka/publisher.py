"""Hands messages to Kafka without waiting, and says when Kafka has them.

One idempotent producer for all units of a worker, with a thread of its own that hears of deliveries. A message that
Kafka does not take within `DELIVERY_S_MAX` is fatal: its chunk is then never acknowledged, and the next process folds
it again to the same alert.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Final

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from schemas.problem import Unreachable
from streams.kafka.connection import librdkafka
from streams.settings import Settings

DELIVERY_S_MAX: Final = 60
QUEUE_MESSAGES_MAX: Final = 200_000
POLL_S: Final = 0.05
FLUSH_POLL_S: Final = 0.005

Partition = tuple[str | None, int | None]
"""Of a topic, by its name."""

_encode: Final = msgspec.json.Encoder().encode


class Publisher:
    """Blocks only whoever hands a message over, while `QUEUE_MESSAGES_MAX` of them wait for a slow broker."""

    def __init__(self, settings: Settings) -> None:
        self._prefix = settings.topic_prefix
        self._bootstrap = settings.kafka_bootstrap
        self._failure = ""
        self._handed_over: Counter[Partition] = Counter()
        self._taken: Counter[Partition] = Counter()
        """By the producer's thread alone. Kafka takes the messages of a partition in their order."""
        self._closing = threading.Event()
        self._producer = Producer(
            librdkafka(settings)
            | {
                "enable.idempotence": True,
                "linger.ms": 1,
                "compression.type": "lz4",
                "message.timeout.ms": DELIVERY_S_MAX * 1000,
                "queue.buffering.max.messages": QUEUE_MESSAGES_MAX,
                "log_level": 2,
            }
        )
        self._thread = threading.Thread(target=self._listen, name="publisher", daemon=True)
        self._thread.start()

    def publish(self, topic: str, partition: int, key: bytes, message: msgspec.Struct) -> None:
        """Hand over one message, as JSON, for a partition: that of its workspace, as in every topic."""
        self.send(topic, partition, key, _encode(message))

    def send(
        self, topic: str, partition: int, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        """Hand over bytes as they are."""
        topic = self._prefix + topic
        while True:
            self._raise_failure()
            try:
                self._producer.produce(
                    topic, value, key, partition, headers=list(headers), on_delivery=self._on_delivery
                )
                self._handed_over[topic, partition] += 1
                return
            except BufferError:
                time.sleep(POLL_S)

    async def flush(self) -> None:
        """Return once Kafka has everything that was handed over before; what is handed over meanwhile is not waited
        for. Unreachable when Kafka does not take it.
        """
        due = dict(self._handed_over)
        while any(self._taken[place] < number for place, number in due.items()):
            self._raise_failure()
            await asyncio.sleep(FLUSH_POLL_S)
        self._raise_failure()

    def close(self) -> None:
        """Stop listening; what was not flushed may be lost."""
        self._closing.set()
        self._thread.join()

    def _raise_failure(self) -> None:
        if self._failure:
            raise Unreachable(
                f"Kafka at {self._bootstrap} does not take alerts and states",
                self._failure,
                "See the broker's log; the worker sends them again when it starts.",
            )

    def _listen(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(POLL_S)

    def _on_delivery(self, error: KafkaError | None, message: Message) -> None:
        if error:
            self._failure = error.str()
        else:
            self._taken[message.topic(), message.partition()] += 1
