"""Kafka topics: created explicitly, checked before every start. Blocking; the worker calls it in a thread.

A wrong partition count splits a workspace over two writers, and any timestamp but the broker's makes "late" and
"future" depend on a producer's clock. So the worker refuses a topic that does not fit.
"""

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ClusterMetadata, ConfigResource, NewTopic, ResourceType

from schemas.ledger import Position
from schemas.problem import Problem, Unreachable
from streams.kafka.connection import librdkafka
from streams.settings import Settings

CELL_RUNS: Final = "cell-runs"
ACCOUNT_EVENTS: Final = "account-events"
LIMIT_ALERTS: Final = "limit-alerts"
LIMIT_STATES: Final = "limit-states"
WEBHOOK_DELIVERIES: Final = "webhook-deliveries"
_DAY_MS: Final = 24 * 60 * 60 * 1000
ANSWER_TIMEOUT_S: Final = 10.0
SETTLED_POLL_S: Final = 0.01

_log: Final = logging.getLogger("creditstream.kafka")

_BROKERS_TIME: Final = {"message.timestamp.type": "LogAppendTime"}
_COMPACTED: Final = {"cleanup.policy": "compact"}


def _log_of_days(days: int) -> dict[str, str]:
    return {"cleanup.policy": "delete", "retention.ms": str(days * _DAY_MS), "max.message.bytes": str(1024 * 1024)}


TOPICS: Final[dict[str, tuple[dict[str, str], dict[str, str]]]] = {
    CELL_RUNS: (_BROKERS_TIME, _log_of_days(7)),
    ACCOUNT_EVENTS: (_BROKERS_TIME, _log_of_days(400)),
    LIMIT_ALERTS: ({}, _BROKERS_TIME | _log_of_days(40)),
    LIMIT_STATES: (_COMPACTED, {"segment.ms": str(_DAY_MS // 4), "min.cleanable.dirty.ratio": "0.3"}),
    WEBHOOK_DELIVERIES: (_COMPACTED, {"segment.ms": str(_DAY_MS // 4), "delete.retention.ms": str(_DAY_MS)}),
}
"""Topic → configuration that it must have, and what more it is created with. All have the same partition count: what
belongs to a workspace lies in partition n of each.
"""


class Topic(msgspec.Struct, frozen=True):
    """One topic as the broker has it. ``id`` is the broker's UUID: a re-created topic is another one."""

    name: str
    id: str
    partitions: int
    config: dict[str, str]


class LogRange(msgspec.Struct, frozen=True):
    """Kafka's log of one partition: the first offset that still exists, and the one after the last."""

    start: int
    end: int


def position_of(message: Message) -> Position:
    """Where a record that came from librdkafka, or was delivered by it, lies."""
    topic, partition, offset = message.topic(), message.partition(), message.offset()
    assert topic is not None
    assert partition is not None
    assert offset is not None
    return Position(topic, partition, offset)


def arrived(consumer: Consumer, wait_s: float, messages_max: int) -> list[Message]:
    """The next messages, errors too: what is here already, or else the first that comes within ``wait_s``."""
    first = consumer.poll(wait_s)
    if first is None:  # a message without a value is falsy, too
        return []
    # consume() waits for the whole number or the whole time, so it is only asked for what is already here.
    return [first, *consumer.consume(messages_max - 1, 0)]


class Broker:
    """Administration of the settings' Kafka cluster. Unreachable when it does not answer within `ANSWER_TIMEOUT_S`.

    `require`, `ensure` and `create` take a name of `TOPICS`; the other methods take one under the settings' prefix.
    """

    def __init__(self, settings: Settings) -> None:
        self.bootstrap: Final = settings.kafka_bootstrap
        self._settings = settings
        self._connection = librdkafka(settings) | {"log_level": 0}
        self._refusal = ""
        """What a broker said of a login or a certificate: librdkafka's own answer is then that there is none."""
        self._was_let_in = False
        # The client lives as long as this object: one that is dropped early fails its pending futures.
        self._admin = AdminClient(self._connection | {"error_cb": self._heard})

    def topic(self, name: str) -> Topic | None:
        """What the broker says of a topic; None when it does not exist."""
        metadata = self._call(self._metadata, name)
        self._was_let_in = True
        if error := metadata.topics[name].error:
            if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise self._refused(f"{name}: {error.str()}")
        resource = ConfigResource(ResourceType.TOPIC, name)
        described = self._answer(self._admin.describe_topics(TopicCollection([name])))[name]
        entries = self._answer(self._admin.describe_configs([resource]))[resource]
        config = {key: entry.value for key, entry in entries.items()}
        return Topic(name, str(described.topic_id), len(described.partitions), config)

    def require(self, name: str) -> Topic:
        """The topic as the worker needs it. Problem when it is missing or does not fit."""
        return self._fitting(name, self.topic(self._settings.topic(name)))

    def ensure(self, name: str) -> tuple[Topic, bool]:
        """The topic as `require`, created when it does not exist (then True)."""
        if found := self.topic(self._settings.topic(name)):
            return self._fitting(name, found), False
        self.create(name)
        return self.require(name), True

    def ensure_all(self) -> None:
        """All topics, as `ensure`."""
        for name in TOPICS:
            self.ensure(name)

    def create(self, name: str) -> None:
        """Create a topic with the settings' partitions and the required configuration; visible when this returns."""
        required, created = TOPICS[name]
        new = NewTopic(
            self._settings.topic(name),
            num_partitions=self._settings.partitions,
            replication_factor=self._settings.replication_factor,
            config={**required, **created},
        )
        self._answer(self._admin.create_topics([new]))
        # The broker's metadata follows the controller's answer a moment later.
        deadline = time.monotonic() + ANSWER_TIMEOUT_S
        while self.topic(new.topic) is None and time.monotonic() < deadline:
            time.sleep(SETTLED_POLL_S)

    def log_ranges(self, name: str, partitions: Iterable[int]) -> dict[int, LogRange]:
        """Start and end of each partition's log."""
        consumer = Consumer(self._connection | {"group.id": "creditstream-offsets"})
        try:
            ranges = {}
            for partition in partitions:
                start, end = self._call(_watermarks, consumer, name, partition)
                ranges[partition] = LogRange(start, end)
            return ranges
        finally:
            consumer.close()

    def committed(self, group: str, places: Iterable[tuple[str, int]]) -> dict[tuple[str, int], int | None]:
        """What a group has committed of each (topic, partition): the next offset, None where nothing."""
        consumer = Consumer(self._connection | {"group.id": group})
        try:
            asked = [TopicPartition(topic, partition) for topic, partition in places]
            found = self._call(consumer.committed, asked, timeout=ANSWER_TIMEOUT_S) if asked else []
            return {(place.topic, place.partition): place.offset if place.offset >= 0 else None for place in found}
        finally:
            consumer.close()

    def _fitting(self, name: str, topic: Topic | None) -> Topic:
        if not topic:
            missing = f"topic {self._settings.topic(name)} does not exist"
            raise Problem(missing, f"on {self.bootstrap}", "Run `creditstream topics`.")
        if topic.partitions != self._settings.partitions:
            raise Problem(
                f"topic {topic.name} does not fit",
                f"it has {topic.partitions} partitions, the settings say {self._settings.partitions}",
                "Set CREDITSTREAM_PARTITIONS; never add partitions: a workspace would then have two writers.",
            )
        required, _ = TOPICS[name]
        for key, value in required.items():
            if topic.config.get(key) != value:
                raise Problem(
                    f"topic {topic.name} does not fit",
                    f"{key} is {topic.config.get(key)}, not {value}",
                    f"Set it: kafka-configs.sh --alter --topic {topic.name} --add-config {key}={value}",
                )
        return topic

    def _metadata(self, name: str) -> ClusterMetadata:
        """librdkafka repeats a refused login until the timeout, and reports it only between two calls. So until it was
        let in once, it is asked for two short moments first; after that a broken handshake says nothing about a slow
        answer.
        """
        for moment_s in () if self._was_let_in else (0.5, 1.0):
            try:
                return self._admin.list_topics(name, timeout=moment_s)
            except KafkaException:
                self._admin.poll(0)
                if self._refusal:
                    raise
        if not self._was_let_in:  # nobody waits for long without a word
            _log.warning("waiting for Kafka at %s, up to %.0f s", self.bootstrap, ANSWER_TIMEOUT_S)
        return self._admin.list_topics(name, timeout=ANSWER_TIMEOUT_S)

    def _answer(self, futures: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: self._call(future.result, timeout=ANSWER_TIMEOUT_S) for key, future in futures.items()}

    def _call(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (KafkaException, TimeoutError) as error:
            found = error.args[0] if isinstance(error, KafkaException) else None
            self._admin.poll(0)
            refusal = found.str() if found and found.code() in _REFUSALS else self._refusal
            if refusal:
                raise self._refused(refusal) from error
            reason = found.str() if found else "no answer"
            raise Unreachable(
                f"Kafka at {self.bootstrap} does not answer",
                reason,
                "Start it, set CREDITSTREAM_KAFKA_BOOTSTRAP, or CREDITSTREAM_HOME to where a worker runs, or run "
                "`creditstream worker --embedded`.",
            ) from error

    def _heard(self, error: KafkaError) -> None:
        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):
            self._refusal = error.str()

    def _refused(self, why: str) -> Problem:
        where = "See the users and access rules in docs/operations.md."
        return Unreachable(f"Kafka at {self.bootstrap} refuses", why, where)


def _watermarks(consumer: Consumer, topic: str, partition: int) -> tuple[int, int]:
    """Start and end of one log. Right after an outage the metadata may lack a partition or its leader, and librdkafka
    would keep them: they are fetched again.
    """
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while True:
        try:
            return consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=ANSWER_TIMEOUT_S)
        except KafkaException as error:
            if error.args[0].code() not in _PASSING or time.monotonic() > deadline:
                raise
        time.sleep(SETTLED_POLL_S)
        consumer.list_topics(topic, timeout=ANSWER_TIMEOUT_S)


_PASSING: Final = frozenset(
    {
        KafkaError._UNKNOWN_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
    }
)
_REFUSALS: Final = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    }
)
