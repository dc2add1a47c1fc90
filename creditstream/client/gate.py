"""The gate: may this workspace still spend? Answered in the process, from a copy of the topic ``limit-states``.

A thread follows every partition from its beginning and keeps the newest states in memory; `Gate.check` only reads. How
sure the copy is, is measured: once a second Kafka is asked for the ends of the topic, and when the copy has reached
them, it is known to be complete as of the instant of the question. That covers a lost broker, a lost partition and a
follower that cannot keep up alike; when the last such instant is too long ago, the answer is ``stale``.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from creditstream.client.connection import KafkaOptions, connection, partitions, require_options
from creditstream.client.decision import CONTACT_LOST_S, UNCONFIRMED_NS, GateRules, Policy
from creditstream.client.flag import Flag
from creditstream.client.forking import abandon, await_resolver, survive_forks
from creditstream.client.states import StateMirror
from creditstream.client.trouble import Trouble
from creditstream.home import settings_of
from schemas.catalogue import Catalogue
from schemas.problem import Unreachable
from streams.kafka.topics import LIMIT_STATES, arrived
from streams.settings import Settings

READY_S_MAX: Final = 30
RETRY_S: Final = 0.5
START_POLL_S: Final = 0.02
ASK_EVERY_S: Final = 1.0
ANSWER_S_MAX: Final = 5.0
REACH_S_MAX: Final = 60.0
POLL_S: Final = 0.2
CHUNK_RECORDS_MAX: Final = 1000
STOP_S_MAX: Final = 5.0

_OURS: Final = {
    # librdkafka wants a group's name even from a consumer that joins none.
    "group.id": "creditstream-gate",
    "enable.auto.commit": False,
    "auto.offset.reset": "earliest",
    # The end may lie behind the last record: compaction leaves holes. This event tells where it is.
    "enable.partition.eof": True,
    # By default a full queue makes the fetcher sleep for a second, and a million states wait for it.
    "fetch.queue.backoff.ms": 5,
    # Little is fetched ahead, and in small pieces: it is what half of a gate's memory would go to, and no slower.
    "fetch.message.max.bytes": 128 * 1024,
    "queued.min.messages": 2000,
    "queued.max.messages.kbytes": 2048,
    # An answer that was lost, as over a frozen broker, is asked for again after this time: by default after a minute.
    "socket.timeout.ms": 10_000,
    "log_level": 0,
}
_NO_TOPIC: Final = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)


class Gate(GateRules):
    """Follows the limit states from its construction to `close`, and answers `check` meanwhile.

    ``on_unknown`` ("allow" or "deny") decides for a workspace without a plan or without a state, ``on_stale`` while
    the gate is not up to date: before it is ready, and ``stale_after_s`` (2 or more) after it last was. Without
    ``settings`` Kafka is looked for (`settings_of`); without a ``catalogue`` the settings' one is loaded. Problem when
    that fails, or an option of ``kafka`` is none.

    A forked child answers ``stale`` until its own follower, started by the first such answer, has caught up.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        on_unknown: Policy,
        on_stale: Policy,
        stale_after_s: int = CONTACT_LOST_S,
        catalogue: Catalogue | None = None,
        kafka: KafkaOptions | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        settings = settings or settings_of()
        super().__init__(
            catalogue or Catalogue.load(Path(settings.catalogue_dir)),
            on_unknown=on_unknown,
            on_stale=on_stale,
            stale_after_s=stale_after_s,
            clock=clock,
        )
        self._topic: Final = settings.topic(LIMIT_STATES)
        self._bootstrap: Final = settings.kafka_bootstrap
        self._config: Final = connection(settings, _OURS, kafka)
        if kafka:
            require_options(self._config)
        self._positions: dict[int, int] = {}
        self._closed = False
        self._starting = threading.Lock()
        self._follower: _Follower | None = None
        survive_forks(self)
        self._start()

    def wait_ready(self, timeout_s: int = READY_S_MAX) -> None:
        """Return once all states that Kafka had are held. Unreachable, with the last trouble, if it takes longer."""
        if self._closed:
            raise Unreachable("the gate is closed", "it has stopped following the limit states", "Create a new one.")
        deadline = time.monotonic() + timeout_s
        self._start()
        while (follower := self._follower) is None and time.monotonic() < deadline:
            time.sleep(START_POLL_S)  # another thread is starting it
            self._start()
        if follower is None or not follower.caught_up.wait(max(0, deadline - time.monotonic())):
            trouble = follower.trouble.reason if follower else "its thread is being started"
            raise Unreachable(
                f"the gate is not ready after {timeout_s} s",
                f"{trouble or 'the topic is still being read'} ({self._topic} on {self._bootstrap})",
                "Check CREDITSTREAM_KAFKA_BOOTSTRAP, and that the topic exists (`creditstream topics`).",
            )

    @property
    def is_ready(self) -> bool:
        """Whether it has caught up once."""
        return self.fresh_ns > UNCONFIRMED_NS

    def close(self) -> None:
        """Stop following. Later checks go on with what is held, until that is stale."""
        self._closed = True
        if self._follower:
            self._follower.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def after_fork(self) -> None:
        """In the child: the states are there, the thread that kept them up to date is not."""
        if self._follower:
            self._follower.abandon()
        self._follower = None
        self._starting = threading.Lock()
        self.fresh_ns = UNCONFIRMED_NS

    def _on_stale_answer(self) -> None:
        if self._follower is None and not self._closed:
            with suppress(RuntimeError):  # no more threads: the next check tries again
                self._start()

    def _start(self) -> None:
        # Never waited for: whoever holds it is starting the follower.
        if self._closed or self._follower or not self._starting.acquire(blocking=False):
            return
        try:
            if not self._follower:
                follower = _Follower(self._config, self._topic, self._positions, self.states, self._learn_fresh)
                follower.start()
                self._follower = follower
        finally:
            self._starting.release()

    def _learn_fresh(self) -> Callable[[], bool]:
        """A question begins now. To be called once all that there was by now is held; whether that is news enough to
        be called ready: what took long to read is about to be stale.
        """
        asked = time.monotonic_ns()

        def learned() -> bool:
            self.fresh_ns = max(self.fresh_ns, asked)
            return 2 * (time.monotonic_ns() - asked) <= self._stale_after_ns

        return learned


class _Ends:
    """A question for the ends of all partitions, and what becomes of it."""

    def __init__(self, admin: AdminClient, topic: str, count: int, learned: Callable[[], bool], noted: int) -> None:
        self.learned: Final = learned
        self.noted: Final = noted
        """What trouble had been noted by then."""
        self._asked_s: Final = time.monotonic()
        latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
        places = {TopicPartition(topic, partition): latest for partition in range(count)}
        self._futures: Final[dict[TopicPartition, Future[Any]]] = admin.list_offsets(
            places, request_timeout=ANSWER_S_MAX
        )

    @property
    def age_s(self) -> float:
        """Seconds since it was asked."""
        return time.monotonic() - self._asked_s

    def is_answered(self) -> bool:
        """Whether `failure` may be asked."""
        return all(future.done() for future in self._futures.values())

    @property
    def failure(self) -> KafkaError | None:
        """Why the broker did not say. Not raised from its future: exception, traceback and frames would hold each other
        and the Kafka handle, and a forked child that collects such garbage, and destroys a handle by that, does not
        survive it.
        """
        for future in self._futures.values():
            if failure := future.exception(0):
                return failure.args[0]  # type: ignore[no-any-return]
            if future.result(0).offset < 0:  # librdkafka's word for a question that was not answered in time
                return KafkaError(KafkaError._TIMED_OUT, f"no answer for {ANSWER_S_MAX:.0f} s")
        return None

    def reached(self, positions: dict[int, int]) -> bool:
        """Whether the positions have come to these ends. To be asked only without a `failure`."""
        return all(
            positions.get(place.partition, -1) >= future.result(0).offset for place, future in self._futures.items()
        )


class _Follower(threading.Thread):
    """Keeps a `StateMirror` up to date with the topic, whatever happens to the connection, until told to stop."""

    def __init__(
        self,
        config: dict[str, Any],
        topic: str,
        positions: dict[int, int],
        states: StateMirror,
        learn_fresh: Callable[[], Callable[[], bool]],
    ) -> None:
        super().__init__(name="creditstream-gate", daemon=True)
        self.caught_up: Final = Flag()
        self.trouble: Final = Trouble(f"the gate has trouble with {topic}")
        self._config, self._topic, self._positions = config, topic, positions
        self._states, self._learn_fresh = states, learn_fresh
        self._enough: Final = Flag()
        self._handles: list[object] = []

    def stop(self) -> None:
        """End the thread."""
        self._enough.set()
        if self.is_alive():
            self.join(STOP_S_MAX)

    def abandon(self) -> None:
        """In a forked child: never touch Kafka's handles again."""
        for handle in self._handles:
            abandon(handle)

    def run(self) -> None:
        """Follow; begin again where it was when something goes wrong."""
        await_resolver(self._enough, self.trouble.note)
        while not self._enough.is_set:
            with self.trouble:
                try:
                    self._follow()
                except KafkaException as error:
                    if error.args[0].code() in _NO_TOPIC:
                        self._positions.clear()  # when it is there again it is another one: its offsets begin anew
                    raise
            self._enough.wait(RETRY_S)

    def _follow(self) -> None:
        admin = AdminClient({key: value for key, value in self._config.items() if key not in _OURS} | {"log_level": 0})
        self._handles = [admin]
        count = partitions(admin, self._topic)
        consumer = Consumer({**self._config, "error_cb": self.trouble.note})
        self._handles = [admin, consumer]
        try:
            consumer.assign(
                [
                    TopicPartition(self._topic, partition, self._positions.get(partition, OFFSET_BEGINNING))
                    for partition in range(count)
                ]
            )
            ends = None
            while not self._enough.is_set:
                for message in arrived(consumer, POLL_S, CHUNK_RECORDS_MAX):
                    self._apply(message)
                ends = self._confirm(ends, admin, count)
        finally:
            self._handles = []
            consumer.close()

    def _apply(self, message: Message) -> None:
        partition, offset, error = message.partition(), message.offset(), message.error()
        if error is None:
            self._states.apply(message.key(), message.value())
            self._positions[partition] = offset + 1  # type: ignore[index,operator]  # every record has a place
        elif error.code() == KafkaError._PARTITION_EOF:
            self._positions[partition] = offset  # type: ignore[index,assignment]
        elif error.code() in _NO_TOPIC or error.fatal():
            raise KafkaException(error)
        else:
            self.trouble.note(error)

    def _confirm(self, ends: _Ends | None, admin: AdminClient, count: int) -> _Ends | None:
        """Ask for the ends now and then; when they are reached, say so."""
        if ends is None:
            return _Ends(admin, self._topic, count, self._learn_fresh(), self.trouble.noted)
        if not ends.is_answered():
            return ends
        if failure := ends.failure:
            if failure.code() in _NO_TOPIC:
                raise KafkaException(failure)
            self.trouble.note(failure)
            if ends.age_s < ASK_EVERY_S:
                return ends
            with suppress(KafkaException):  # asked again with the next question
                partitions(admin, self._topic)  # the leader may be another one: librdkafka goes on to ask the old one
            return None
        if ends.reached(self._positions):
            if ends.noted == self.trouble.noted:  # of one that came after the question its answer knows nothing
                self.trouble.end()
            if ends.learned():
                self.caught_up.set()
            return None if ends.age_s >= ASK_EVERY_S else ends
        # A question stays good however long the way to its answer is, unless the topic has been made anew meanwhile.
        return None if ends.age_s >= REACH_S_MAX else ends
