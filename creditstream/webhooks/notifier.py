"""The notifier: one thread that decides and writes, and as many that wait for receivers.

A turn is: read alerts → waiting deliveries into the outbox → commit the offsets → outcomes of ended attempts into the
outbox → start what is due. Each arrow waits until Kafka has what stands left of it.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from enum import StrEnum
from functools import partial
from queue import Empty, SimpleQueue
from shlex import quote
from typing import Any, Final, NamedTuple

import msgspec
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from creditstream.clock import now_ms
from creditstream.webhooks.deliveries import IN_FLIGHT_MAX, WAITING_MAX, Attempt, Deliveries
from creditstream.webhooks.endpoints import Endpoint
from creditstream.webhooks.outbox import Outbox, decode_alert
from creditstream.webhooks.schedule import Answer, after, give_up
from creditstream.webhooks.sending import send
from schemas.cell_run import to_milliseconds
from schemas.ledger import Position
from schemas.limits import LimitAlert
from schemas.webhook import ENDPOINTS_MAX, Delivery, DeliveryState, delivery_key
from streams.kafka.connection import librdkafka
from streams.kafka.topics import LIMIT_ALERTS, arrived, position_of
from streams.settings import Settings

ALERTS_AT_ONCE: Final = 100
POLL_S: Final = 0.1
POLL_IN_FLIGHT_S: Final = 0.01
"""While attempts are under way; an endpoint that catches up gets 400 alerts a second."""

LAND_S_MAX: Final = 3.0
"""How long attempts in flight are waited for when a partition, or the process, ends. Later ones are made again."""

TIDY_EVERY_MS: Final = 60_000

log: Final = structlog.get_logger()


class Step(StrEnum):
    """What has just happened; a crash may come after each."""

    READ = "read"
    PLANNED = "planned"
    COMMITTED = "committed"
    STARTED = "started"
    ANSWERED = "answered"
    RECORDED = "recorded"


def _pass(_: Step) -> None:
    """A step that nobody watches."""


class World(NamedTuple):
    """What lies outside of the notifier and Kafka. ``chance(n)`` gives 0 to n - 1."""

    now_ms: Callable[[], int] = now_ms
    chance: Callable[[int], int] = random.randrange
    send: Callable[[Endpoint, LimitAlert, int], Answer] = send
    reached: Callable[[Step], None] = _pass


class Notifier:
    """Delivers the alerts of the partitions that the consumer group gives it.

    `turn` again and again, then `stop`; `close` at the end in any case. All from one thread. Unreachable and
    KafkaException when Kafka is lost for good: start again, nothing is lost.
    """

    def __init__(self, settings: Settings, endpoints: Mapping[str, Endpoint], world: World | None = None) -> None:
        self.counts: Final[Counter[str]] = Counter(delivered=0, failed_attempts=0, given_up=0, gave_way=0)
        """Since the start: deliveries that were delivered, attempts that failed and are made again, deliveries that
        were given up, those of them that gave way to newer ones.
        """
        self._world: Final = world or World()
        self._file: Final = quote(settings.webhook_endpoints)
        self._endpoints = endpoints
        self._gone: set[str] = set()
        self._deliveries: Final = Deliveries()
        self._landed: Final[SimpleQueue[tuple[Attempt, Endpoint, Future[Answer]]]] = SimpleQueue()
        self._threads: Final = ThreadPoolExecutor(IN_FLIGHT_MAX * ENDPOINTS_MAX, "attempt")
        self._to_own: set[int] = set()
        self._is_crowded = False
        self._tidied_at_ms = 0
        self._alerts_topic: Final = settings.topic(LIMIT_ALERTS)
        self._outbox: Final = Outbox(settings)
        self._consumer: Final = Consumer(_consumer_config(settings))
        self._consumer.subscribe(
            [self._alerts_topic], on_assign=self._assigned, on_revoke=self._revoked, on_lost=self._lost
        )

    @property
    def partitions(self) -> frozenset[int]:
        """Of ``limit-alerts``: those that this notifier owns and has loaded."""
        return self._deliveries.partitions

    @property
    def waiting(self) -> int:
        """Deliveries that are not over."""
        return self._deliveries.waiting

    def reload(self, endpoints: Mapping[str, Endpoint]) -> None:
        """Go on with these endpoints; one that was gone, or is left alone, is tried again."""
        self._endpoints = endpoints
        self._gone.clear()
        self._deliveries.wake()

    def turn(self) -> None:
        """One round; lasts about `POLL_S` when there is nothing to do."""
        alerts = self._read()
        self._own()
        self._plan(alerts)
        self._record_ended(0)
        self._start_due()
        self._make_room()
        self._tidy()

    def stop(self) -> None:
        """Wait for what is in flight, `LAND_S_MAX` at the most, and record it."""
        self._land()
        log.info("notifier_stopped", **self._numbers(self._world.now_ms()))

    def close(self) -> None:
        """Leave the group. Records nothing."""
        for partition in self.partitions:
            self._deliveries.disown(partition)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._consumer.close()

    def _read(self) -> list[Message]:
        wait_s = POLL_IN_FLIGHT_S if self._deliveries.in_flight else POLL_S
        messages = arrived(self._consumer, wait_s, ALERTS_AT_ONCE)
        for message in messages:
            error = message.error()
            if error and not error.retriable():
                raise KafkaException(error)
        return [message for message in messages if not message.error()]

    def _own(self) -> None:
        """Load the outbox of partitions that are new here, before anything of them is planned or sent."""
        if not self._to_own:
            return
        records = self._outbox.read(self._to_own, lambda at: log.error("delivery_unreadable", at=at))
        for partition, newest in records.items():
            self._deliveries.own(partition, newest.values())
        self._to_own.clear()
        log.info("partitions_owned", partitions=sorted(self.partitions), waiting=self.waiting)

    def _plan(self, messages: list[Message]) -> None:
        # A rebalance in the middle of reading may have taken the partition of what was read.
        placed = {position_of(message): message for message in messages}
        owned = {place: message for place, message in placed.items() if place.partition in self.partitions}
        if not owned:
            return
        self._world.reached(Step.READ)
        new: dict[tuple[int, bytes], Delivery] = {}
        for place, message in owned.items():
            new |= {(place.partition, each.key): each for each in self._deliveries_of(place, message.value())}
        for (partition, key), delivery in new.items():
            self._outbox.put(partition, key, delivery)
        self._outbox.flush()
        for (partition, _), delivery in new.items():
            self._deliveries.put(partition, delivery)
        self._world.reached(Step.PLANNED)
        self._commit({place.partition: place.offset + 1 for place in owned})
        self._world.reached(Step.COMMITTED)

    def _deliveries_of(self, place: Position, value: object) -> list[Delivery]:
        alert = decode_alert(value)
        if alert is None or not isinstance(value, bytes):
            log.error("alert_unreadable", at=str(place))
            return []
        return [
            Delivery(
                endpoint=endpoint.name,
                alert_id=alert.alert_id,
                state=DeliveryState.WAITING,
                next_at_ms=self._world.now_ms(),
                alert=msgspec.Raw(value),
            )
            for endpoint in self._endpoints.values()
            if endpoint.wants(alert)
            and not self._deliveries.knows(place.partition, endpoint.name, delivery_key(endpoint.name, alert.alert_id))
        ]

    def _commit(self, ends: dict[int, int]) -> None:
        offsets = [TopicPartition(self._alerts_topic, partition, end) for partition, end in ends.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            # A rebalance is under way; whoever reads them again finds them in the outbox.
            log.warning("commit_refused", why=error.args[0].str())

    def _start_due(self) -> None:
        hopeless = []
        now_ms = self._world.now_ms()
        for attempt in self._deliveries.take_due(now_ms):
            endpoint = self._endpoints.get(attempt.delivery.endpoint)
            alert = decode_alert(attempt.delivery.alert)
            if alert is None:
                why = "unreadable"
            elif endpoint is None:
                why = "not in the file"
            elif endpoint.name in self._gone:
                why = "410 Gone, earlier"
            else:
                future = self._threads.submit(self._world.send, endpoint, alert, now_ms // 1000)
                future.add_done_callback(partial(self._ended, attempt, endpoint))
                self._world.reached(Step.STARTED)
                continue
            hopeless.append((attempt, give_up(attempt.delivery, why, now_ms), Answer(0, why)))
        self._record(hopeless)

    def _ended(self, attempt: Attempt, asked: Endpoint, done: Future[Answer]) -> None:
        """In the attempt's thread."""
        self._landed.put((attempt, asked, done))

    def _record_ended(self, wait_s: float) -> None:
        """Record the outcome of every attempt that has ended; wait for the first one for a while."""
        outcomes = []
        try:
            while True:
                attempt, asked, done = self._landed.get(timeout=wait_s)
                wait_s = 0
                answer, now_ms = self._as_of_now(asked, _answer_of(done)), self._world.now_ms()
                self._world.reached(Step.ANSWERED)
                if answer.is_gone:
                    self._gone.add(attempt.delivery.endpoint)
                if answer.leave_alone_s:
                    self._deliveries.leave_alone(attempt.delivery.endpoint, now_ms + answer.leave_alone_s * 1000)
                outcomes.append((attempt, after(attempt.delivery, answer, now_ms, self._world.chance(2**31)), answer))
        except Empty:
            self._record(outcomes)

    def _as_of_now(self, asked: Endpoint, answer: Answer) -> Answer:
        """What the answer means for the endpoint as the file has it now. One that was replaced meanwhile may say that a
        delivery has arrived, but not that the new one is gone, or wants to be left alone.
        """
        is_replaced = self._endpoints.get(asked.name) != asked
        return answer._replace(status=0, retry_after_s=None) if is_replaced and not answer.is_success else answer

    def _record(self, outcomes: list[tuple[Attempt, Delivery, Answer]]) -> None:
        ours = []
        for attempt, delivery, answer in outcomes:
            if self._deliveries.landed(attempt):
                ours.append((attempt.partition, delivery, answer))
            else:
                log.warning("attempt_of_lost_partition", partition=attempt.partition, **_told(delivery, answer))
        self._write(ours)

    def _write(self, outcomes: list[tuple[int, Delivery, Answer]]) -> None:
        """What became of deliveries: into the outbox, then into memory and the log."""
        if not outcomes:
            return
        for partition, delivery, _ in outcomes:
            self._outbox.put(partition, delivery.key, delivery)
        self._outbox.flush()
        for partition, delivery, answer in outcomes:
            self._deliveries.put(partition, delivery)
            self._tell(delivery, answer)
        self._world.reached(Step.RECORDED)

    def _tell(self, delivery: Delivery, answer: Answer) -> None:
        told = _told(delivery, answer)
        if delivery.state is DeliveryState.DELIVERED:
            self.counts["delivered"] += 1
            log.info("alert_delivered", **told)
        elif delivery.state is DeliveryState.FAILED:
            self.counts["given_up"] += 1
            whom = f"--endpoint {delivery.endpoint} --endpoints {self._file}"  # nobody else, who may have it
            log.error("alert_given_up", **told, fix=f"creditstream alerts resend {delivery.alert_id} {whom}")
        else:
            self.counts["failed_attempts"] += 1
            log.warning("attempt_failed", **told, again_in_s=(delivery.next_at_ms - self._world.now_ms()) // 1000)

    def _make_room(self) -> None:
        """Read no more alerts while an endpoint's share is full, but for a while only: nobody is held up by another."""
        share, now_ms = WAITING_MAX // max(1, len(self._endpoints)), self._world.now_ms()
        is_crowded = self._deliveries.is_crowded(share, now_ms)
        if is_crowded:
            # Again each time: an assignment begins without a pause.
            self._consumer.pause(self._consumer.assignment())
        elif self._is_crowded:
            self._consumer.resume(self._consumer.assignment())
        if is_crowded != self._is_crowded:
            log.warning("alerts_held_back" if is_crowded else "alerts_read_again", waiting=self.waiting)
        self._is_crowded = is_crowded
        why = f"gave way to newer ones: {share:,} wait for it"
        giving_way = self._deliveries.giving_way(share, now_ms)
        self._write([(partition, give_up(each, why, now_ms), Answer(0, why)) for partition, each in giving_way])
        self.counts["gave_way"] += len(giving_way)

    def _tidy(self) -> None:
        """Each minute: forget what is old, and tell how it goes, whether something has happened or not: silence means
        that this loop stands still.
        """
        now_ms = self._world.now_ms()
        if 0 <= now_ms - self._tidied_at_ms < TIDY_EVERY_MS:  # less than 0: the clock was set back
            return
        self._tidied_at_ms = now_ms
        for partition, key in self._deliveries.forget_old(now_ms):
            self._outbox.put(partition, key, None)
        self._outbox.flush()
        log.info("deliveries", **self._numbers(now_ms))

    def _numbers(self, now_ms: int) -> dict[str, int]:
        """What an operator asks for. ``oldest_s``: since what the oldest waiting alert tells of; 0: none waits."""
        alerts = (decode_alert(delivery.alert) for delivery in self._deliveries.each_waiting())
        oldest_ms = min((to_milliseconds(alert.at) for alert in alerts if alert), default=now_ms)
        return {
            "partitions": len(self.partitions),
            "waiting": self.waiting,
            "in_flight": self._deliveries.in_flight,
            "oldest_s": max(0, now_ms - oldest_ms) // 1000,
            **self.counts,
        }

    def _land(self) -> None:
        deadline = time.monotonic() + LAND_S_MAX
        while self._deliveries.in_flight and time.monotonic() < deadline:
            self._record_ended(POLL_S)

    def _assigned(self, _: Consumer, places: list[TopicPartition]) -> None:
        self._to_own |= {place.partition for place in places}

    def _revoked(self, consumer: Consumer, places: list[TopicPartition]) -> None:
        """The next owner loads the outbox after this has returned: what is in flight is recorded first."""
        mine = {place.partition for place in places} & self.partitions
        if mine:
            self._land()
        self._lost(consumer, places)

    def _lost(self, _: Consumer, places: list[TopicPartition]) -> None:
        for place in places:
            self._to_own.discard(place.partition)
            self._deliveries.disown(place.partition)
        log.info("partitions_lost", partitions=sorted(place.partition for place in places))


def _answer_of(done: Future[Answer]) -> Answer:
    """What came of an attempt. A defect of ours is its failure, too: it ends neither the notifier nor the delivery."""
    error = done.exception()
    if not isinstance(error, Exception):
        return done.result()
    log.error("attempt_broke", error=type(error).__name__, exc_info=error)
    return Answer(0, f"it broke here: {type(error).__name__}", "See the notifier's log, and report it.")


def _told(delivery: Delivery, answer: Answer) -> dict[str, Any]:
    """What a line of the log says of an attempt: nothing that is secret, and no URL."""
    return {
        "endpoint": delivery.endpoint,
        "alert_id": str(delivery.alert_id),
        "attempts": delivery.attempts,
        "answer": answer.said,
        "took_ms": answer.took_ms,
    }


def _consumer_config(settings: Settings) -> dict[str, Any]:
    # A static member is known again at once when it starts again after a kill; a dynamic one after its session.
    static = {"group.instance.id": settings.instance} if settings.instance else {}
    return {
        **librdkafka(settings),
        **static,
        "group.id": f"{settings.topic_prefix}creditstream-notifier",
        "enable.auto.commit": False,
        # A group without a commit begins with all that is there; who is not meant by the past says `since`.
        "auto.offset.reset": "earliest",
        # Eager: every member has handed over before the next owner of a partition loads it.
        "partition.assignment.strategy": "range",
        "session.timeout.ms": 10_000,
        # A member hears of a rebalance with its next heartbeat; all of them wait for that.
        "heartbeat.interval.ms": 1_000,
        "queued.max.messages.kbytes": 8 * 1024,
        "isolation.level": "read_committed",
        "log_level": 0,
        "error_cb": _kafka_failed,
    }


def _kafka_failed(error: KafkaError) -> None:
    if error.code() == KafkaError._ALL_BROKERS_DOWN:
        log.warning("kafka_unreachable", why=error.str())
