"""The publisher, on real Kafka: what a flush waits for, and what a stop does not."""

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from uuid import uuid4

import pytest

from schemas.problem import Unreachable
from streams.kafka import publisher
from streams.kafka.publisher import Publisher
from streams.kafka.topics import LIMIT_STATES, Broker
from streams.settings import Settings

WAIT_S_MAX = 30.0
BURST = 2_000


@pytest.fixture
def settings(kafka: str) -> Settings:
    """With a topic of one partition that nobody else writes."""
    settings = Settings(kafka_bootstrap=kafka, topic_prefix=f"{uuid4().hex}-", partitions=1)
    broker = Broker(settings)
    broker.create(LIMIT_STATES)
    return settings


@pytest.fixture
def unreachable() -> Iterator[Settings]:
    """A broker that takes connections and answers nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Settings(kafka_bootstrap=f"127.0.0.1:{server.getsockname()[1]}")


async def test_a_flush_does_not_wait_for_what_is_handed_over_meanwhile(settings: Settings) -> None:
    """A steady stream never empties the queue; what was handed over before the flush is with the broker after it."""
    published = Publisher(settings)
    incompressible, handed_over = os.urandom(1000), 0

    async def stream() -> None:
        nonlocal handed_over
        while True:
            for _ in range(BURST):
                published.send(LIMIT_STATES, 0, b"key", incompressible)
            handed_over += BURST
            await asyncio.sleep(0)

    streaming = asyncio.create_task(stream())
    try:
        for _ in range(3):
            await asyncio.sleep(0.1)
            before = handed_over
            async with asyncio.timeout(WAIT_S_MAX):
                await published.flush()
            assert before < handed_over
            (log,) = Broker(settings).log_ranges(settings.topic(LIMIT_STATES), [0]).values()
            assert log.end >= before
    finally:
        streaming.cancel()
        with suppress(asyncio.CancelledError):
            await streaming
        published.close()


async def test_a_stop_does_not_wait_for_a_broker_that_is_gone(unreachable: Settings) -> None:
    """A flush that is given up ends at once, and so does the publisher."""
    published = Publisher(unreachable)
    published.send(LIMIT_STATES, 0, b"key", b"value")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await published.flush()
    began = time.monotonic()
    published.close()
    assert time.monotonic() - began < publisher.DELIVERY_S_MAX / 4


async def test_what_kafka_does_not_take_is_said(unreachable: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the flush, and to whoever hands over more."""
    monkeypatch.setattr(publisher, "DELIVERY_S_MAX", 1)
    published = Publisher(unreachable)
    published.send(LIMIT_STATES, 0, b"key", b"value")
    with pytest.raises(Unreachable, match="does not take alerts and states"):
        await published.flush()
    with pytest.raises(Unreachable):
        published.send(LIMIT_STATES, 0, b"key", b"value")
    published.close()
