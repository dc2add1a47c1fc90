"""How a client connects to Kafka, and what it asks there before it begins."""

from collections.abc import Mapping
from typing import Any, Final

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer
from confluent_kafka.admin import AdminClient

from schemas.problem import Problem
from streams.kafka.connection import librdkafka
from streams.settings import Settings

KafkaOptions = Mapping[str, str | int]
"""librdkafka's properties, for clusters that need more than the settings can say: ``ssl.key.location``, say."""

RECONNECT_MS_MAX: Final = 1000
PROBE_S_MAX: Final = 1.0


def connection(settings: Settings, ours: Mapping[str, Any], theirs: KafkaOptions | None) -> dict[str, Any]:
    """librdkafka's configuration. Problem when the caller's options would change one of ours: they are the contract."""
    taken = sorted({"bootstrap.servers", *ours} & set(theirs or ()))
    if taken:
        raise Problem("Kafka options refused", f"{', '.join(taken)} may not be changed", "Leave them out.")
    return {
        **librdkafka(settings),
        "reconnect.backoff.max.ms": RECONNECT_MS_MAX,
        **(theirs or {}),
        **ours,
    }


def require_options(config: Mapping[str, Any]) -> None:
    """Problem for options that librdkafka refuses, of a consumer whose thread would only find that out."""
    try:
        Consumer(dict(config)).close()
    except KafkaException as error:
        if error.args[0].code() == KafkaError._INVALID_ARG:
            raise options_refused(error.args[0]) from error


def options_refused(error: KafkaError) -> Problem:
    """What a person is told of them."""
    return Problem("Kafka options refused", error.str(), "Correct `kafka=`.")


def partitions(kafka: AdminClient | Producer, topic: str) -> int:
    """How many the topic has. KafkaException when no broker answers within `PROBE_S_MAX`, or when it is not there."""
    found = kafka.list_topics(topic, timeout=PROBE_S_MAX).topics[topic]
    if found.error is not None:
        raise KafkaException(found.error)
    return len(found.partitions)
