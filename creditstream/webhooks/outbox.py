"""The outbox: the newest record of every delivery, on a compacted topic. Blocking; for one thread."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final
from uuid import UUID

import msgspec
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from creditstream.producing import PRODUCER_CONFIG
from schemas.limits import LimitAlert
from schemas.problem import Unreachable
from schemas.webhook import Delivery
from streams.kafka.connection import librdkafka
from streams.kafka.topics import WEBHOOK_DELIVERIES, arrived, position_of
from streams.settings import Settings

SILENCE_S_MAX: Final = 30.0
WRITE_S_MAX: Final = 30.0
POLL_S: Final = 0.5
CHUNK: Final = 1000
ALERT_BYTES_MAX: Final = 64 * 1024
"""Ours have less than 20 kB; the outbox must be able to hold what it is given."""

_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(Delivery).decode
_decode_alert: Final = msgspec.json.Decoder(LimitAlert).decode
_UNREADABLE: Final = (ValueError, RecursionError)
"""What decoding raises; msgspec's errors are ValueErrors, those of text that is no UTF-8, too."""


class Outbox:
    """Reads and writes deliveries. What was `put` is safe once `flush` has returned."""

    def __init__(self, settings: Settings) -> None:
        self._settings: Final = settings
        self._topic: Final = settings.topic(WEBHOOK_DELIVERIES)
        self._failure: KafkaError | None = None
        config: dict[str, Any] = {"linger.ms": 0, "delivery.timeout.ms": int(WRITE_S_MAX * 1000)}
        self._producer = Producer(librdkafka(settings) | PRODUCER_CONFIG | config)

    def put(self, partition: int, key: bytes, delivery: Delivery | None) -> None:
        """Hand a record to the producer; None: nobody needs to know the delivery any more."""
        value = _encode(delivery) if delivery else None
        deadline = time.monotonic() + WRITE_S_MAX
        while True:
            try:
                self._producer.produce(self._topic, value, key, partition, on_delivery=self._delivered)
                return
            except BufferError:
                self._producer.poll(POLL_S)
                if time.monotonic() > deadline:
                    raise self._unreachable("it takes no records") from None

    def flush(self) -> None:
        """Wait until Kafka has everything. Unreachable when it does not."""
        left = self._producer.flush(WRITE_S_MAX)
        if left or self._failure:
            raise self._unreachable(self._failure.str() if self._failure else "no answer")

    def read(self, partitions: Iterable[int], unreadable: Callable[[str], object]) -> dict[int, dict[bytes, Delivery]]:
        """Partition → key → newest record. ``unreadable`` is told where a record is that is none of ours."""
        found: dict[int, dict[bytes, Delivery]] = {partition: {} for partition in partitions}
        for message in read_to_end(self._settings, self._topic, found):
            key, value, place = message.key() or b"", message.value(), position_of(message)
            records = found[place.partition]
            assert isinstance(key, bytes)
            if value is None:
                records.pop(key, None)
                continue
            try:
                delivery = _decode(value)
            except _UNREADABLE:
                unreadable(str(place))
                continue
            if isinstance(delivery.alert, msgspec.Raw):
                # A raw field is a view of the whole message; its copy is not.
                delivery = msgspec.structs.replace(delivery, alert=delivery.alert.copy())
            records[key] = delivery
        return found

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        self._failure = error or self._failure

    def _unreachable(self, why: str) -> Unreachable:
        where = f"{self._topic} on {self._settings.kafka_bootstrap}"
        return Unreachable(f"{where} cannot be written", why, "Start Kafka first.")


def read_to_end(settings: Settings, topic: str, partitions: Iterable[int]) -> Iterator[Message]:
    """Every record of these partitions, from their beginning to what is their end when it gets there.

    Unreachable when Kafka is silent for `SILENCE_S_MAX`, or refuses.
    """
    left = set(partitions)
    if not left:
        return
    where = f"{topic} on {settings.kafka_bootstrap}"
    consumer = _reader(settings)
    try:
        # An assignment before the leaders are known is looked at again only half a second later.
        consumer.list_topics(topic, SILENCE_S_MAX)
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in left])
        heard_at = time.monotonic()
        while left:
            for message in arrived(consumer, POLL_S, CHUNK):
                heard_at = time.monotonic()
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(position_of(message).partition)
                elif not error.retriable():
                    raise KafkaException(error)
            if time.monotonic() - heard_at > SILENCE_S_MAX:
                raise Unreachable(f"{where} does not answer", "while it is read", "Try again.")
    except KafkaException as error:
        why = error.args[0].str() if isinstance(error.args[0], KafkaError) else str(error)
        raise Unreachable(f"{where} cannot be read", why, "Try again.") from error
    finally:
        consumer.close()


def _reader(settings: Settings) -> Consumer:
    return Consumer(
        librdkafka(settings)
        | {
            "group.id": "creditstream-outbox",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            # What is deleted while it is read is passed over; by default all the rest would be, too.
            "auto.offset.reset": "earliest",
            # An empty partition says so at once.
            "fetch.wait.max.ms": 10,
            "queued.max.messages.kbytes": 8 * 1024,
            "fetch.queue.backoff.ms": 5,
            "isolation.level": "read_committed",
            "log_level": 0,
        }
    )


def find_alert(settings: Settings, topic: str, partitions: Iterable[int], alert_id: UUID) -> tuple[int, bytes] | None:
    """Partition and message of an alert that ``limit-alerts`` still has."""
    needle = str(alert_id).encode()
    for message in read_to_end(settings, topic, partitions):
        value = message.value()
        if not isinstance(value, bytes) or needle not in value:
            continue
        alert = decode_alert(value)
        if alert and alert.alert_id == alert_id:
            return position_of(message).partition, value
    return None


def decode_alert(value: object) -> LimitAlert | None:
    """The alert of a message; None when it is none that we know."""
    if not isinstance(value, bytes | msgspec.Raw) or len(memoryview(value)) > ALERT_BYTES_MAX:
        return None
    try:
        alert = _decode_alert(value)
    except _UNREADABLE:
        return None
    # Without an offset it could not be compared with anything.
    return alert if alert.at.tzinfo else None
