"""Batch transport: one fetched chunk of one partition is one Faust event.

Faust spends 50-80 µs on an event whatever it holds; a chunk of up to 2,000 records spreads that to less than 0.1 µs a
record. Everything that Faust does for an event (generation checks, seeks, flow control, waiting at shutdown) still
happens, once per chunk. Differences from Faust's own consumer, each with its reason:

- Commits follow chunks in their order and never pass one that is not acknowledged. Faust's gap tracking would.
- Back-pressure counts records and bytes in flight per partition, not events; a full partition is not fetched.
- A partition can be held: an incident stops its unit and nobody else's.
- aiokafka's record objects are not built: its Cython record has all that we read, and building costs 2-3 µs each.
- The consumer is made with the range assignor, a short fetch wait and read_committed, which Faust hard-codes otherwise.

The overridden methods are private names of pinned versions; ``tests/test_transport.py`` fails when one disappears.
"""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Set
from contextlib import suppress
from functools import partial
from itertools import chain, takewhile
from typing import Any, Final, cast

import aiokafka
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.coordinator.assignors.range import RangePartitionAssignor
from aiokafka.record.default_records import DefaultRecord
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, ConsumerMessage, Message
from faust.types.tuples import ack_lock
from mode.utils.futures import notify

from streams.rules.records import bytes_of, is_datable, recorded_ms_of

FETCH_WAIT_MS_MAX: Final = 25
"""How long the broker may hold a fetch open. One fetch per broker is under way at a time, so an idle partition's wait
delays a busy one by as much."""
CHUNK_RECORDS_MAX: Final = 2000
DRAIN_S_MAX: Final = 8.0
"""How long a stop or a rebalance waits for chunks in flight; what is not written then is read again."""
CLOCK_GRACE_MS: Final = 1_000
"""An answer of the broker tells where its log ended this much earlier: its clock may be behind ours."""
ANSWERS_APART_MS_MAX: Final = 2_000
"""After a longer silence one answer tells nothing: a process that stood still dates it later than it was given."""


class Chunk(list[Any]):
    """Consecutive records of one partition: the value of one Faust event. Its unit empties it once rows are made of it;
    ``records`` and ``nbytes`` count as in flight until it is acknowledged.
    """

    records: int = 0
    nbytes: int = 0


class Consumer(driver.Consumer):
    """Delivers chunks, commits behind the last one up to which all are acknowledged."""

    transport: "Transport"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._sent: defaultdict[TP, dict[int, bool]] = defaultdict(dict)
        self._begun: dict[TP, tuple[int, int]] = {}
        """Of a chunk that is acknowledged in part: its last offset, by which it is known, and the next to be done."""
        self._records_inflight: Counter[TP] = Counter()
        self._bytes_inflight: Counter[TP] = Counter()
        self._answered_ms: dict[TP, int] = {}
        self._room = asyncio.Event()
        self.held: set[TP] = set()
        """Partitions that are not fetched, whatever their room: their unit has an incident."""
        super().__init__(*args, **kwargs)

    def _new_consumer_thread(self) -> driver.AIOKafkaConsumerThread:
        return ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    async def perform_seek(self) -> None:
        """Go where the ledger says. Kafka is not asked for its commits: Faust stops reading for good, and in silence,
        where it does not answer within `broker_request_timeout`.
        """
        for tp, offset in self.transport.resume_at.items():
            if tp in self.assignment():
                await self.seek(tp, offset)

    def _is_full(self, tp: TP) -> bool:
        return (
            tp in self.held
            or self._records_inflight[tp] >= self.transport.records_inflight_max
            or self._bytes_inflight[tp] >= self.transport.bytes_inflight_max
        )

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> dict[TP, list[Any]]:
        assert active_partitions is not None
        full = {tp for tp in active_partitions if self._is_full(tp)}
        if full and not (active_partitions := active_partitions - full):
            self._room.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._room.wait(), timeout)
            return {}
        records = await super()._getmany(active_partitions, min(timeout, 0.05) if full else timeout)
        return {tp: [_chunk(found)] for tp, found in records.items() if found}

    def _to_message(self, tp: TP, record: Chunk) -> ConsumerMessage:
        last = record[-1]
        message = ConsumerMessage(
            tp.topic, tp.partition, last.offset, last.timestamp / 1000, last.timestamp_type,
            None, None, cast(Any, record), None, 0, record.nbytes, tp, generation_id=self.app.consumer_generation_id,
        )  # fmt: skip
        self._sent[tp][message.offset] = False
        self._records_inflight[tp] += len(record)
        self._bytes_inflight[tp] += record.nbytes
        return message

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Nothing: a chunk's own order is kept in ``_sent``."""

    def ack(self, message: Message) -> bool:
        """Acknowledge a chunk; False when it belongs to an earlier generation, or was acknowledged before."""
        with ack_lock:
            sent, message.acked = self._sent[message.tp], True
            ours = message.generation_id == self.app.consumer_generation_id and sent.get(message.offset) is False
            if ours:
                sent[message.offset] = True
                chunk = cast(Chunk, message.value)
                self._records_inflight[message.tp] -= chunk.records
                self._bytes_inflight[message.tp] -= chunk.nbytes
            self._unacked_messages.discard(message)
            self._room.set()
            notify(self._waiting_for_ack)
            return ours

    async def ack_part(self, message: Message, last: int) -> None:
        """Acknowledge a chunk up to an offset: it may be committed, and the chunk stays in flight."""
        with ack_lock:
            if message.generation_id == self.app.consumer_generation_id:
                self._begun[message.tp] = message.offset, last + 1

    def _filter_tps_with_pending_acks(self, topics: Set[Any] | None = None) -> Iterator[TP]:
        ours = (tp for tp in list(self._sent) if topics is None or tp in topics or tp.topic in topics)
        return chain(super()._filter_tps_with_pending_acks(topics), ours)

    def _new_offset(self, tp: TP) -> int | None:
        sent = self._sent[tp]
        done = list(takewhile(sent.__getitem__, sent))
        for offset in done:
            del sent[offset]
        begun, next_offset = self._begun.get(tp, (-1, 0))
        if next(iter(sent), None) == begun:
            return next_offset
        return done[-1] + 1 if done else None

    def end_ms(self, tp: TP, last: int) -> int:
        """The latest time (Unix ms) at which Kafka had no record of this partition after ``last``, by its answers to
        fetches; 0: it has one, or has not answered. Transaction markers may lie after the last record: once nothing is
        in flight, the fetch position is past them.
        """
        state = self._state_of(tp)
        if state is None or state.timestamp is None:
            return 0
        before, self._answered_ms[tp] = self._answered_ms.get(tp, 0), state.timestamp
        if state.timestamp - before > ANSWERS_APART_MS_MAX:
            return 0
        return 0 if self._behind(tp, state, state.highwater, last) else state.timestamp - CLOCK_GRACE_MS

    def lag(self, tp: TP, last: int) -> int | None:
        """How many offsets Kafka had after ``last``, by its latest answer to a fetch; None: it has not answered."""
        state = self._state_of(tp)
        return None if state is None else self._behind(tp, state, state.highwater, last)

    def unread(self, tp: TP, last: int) -> int | None:
        """As `lag`, without what Kafka keeps back while a transaction is open."""
        state = self._state_of(tp)
        return None if state is None else self._behind(tp, state, min(state.highwater, state.lso), last)

    def _behind(self, tp: TP, state: Any, end: int, last: int) -> int:
        is_idle = not self._records_inflight[tp] and state.has_valid_position
        behind: int = end - max(last + 1, state.position if is_idle else 0)
        return max(0, behind)

    def _state_of(self, tp: TP) -> Any:
        """What aiokafka knows of an assigned partition that Kafka has answered for; None: nothing."""
        thread = cast(Any, self._thread)
        consumer = thread and thread._consumer
        if not consumer or tp not in consumer.assignment():
            return None
        state = consumer._subscription.subscription.assignment.state_value(tp)
        return None if state.highwater is None else state

    def forget(self, message: Message) -> None:
        """Do not wait for this chunk: nobody will acknowledge it."""
        self._unacked_messages.discard(message)
        notify(self._waiting_for_ack)

    async def commit_start(self, offsets: Mapping[TP, int]) -> None:
        """Commit where a group begins: what follows then counts as not seen by it. Faust leaves out what a rebalance
        has taken meanwhile.
        """
        await self._commit_offsets(offsets)

    def hold(self, tp: TP) -> None:
        """Fetch this partition no more, and do not wait for its chunks in flight: nobody will acknowledge them."""
        self.held.add(tp)
        for message in [message for message in self._unacked_messages if message.tp == tp]:
            self.forget(message)

    async def wait_empty(self) -> None:
        """Wait for chunks in flight, at most `DRAIN_S_MAX`: one that hangs must not hang a stop or a rebalance."""
        self.transport.on_drain()
        give_up = self.loop.call_later(DRAIN_S_MAX, self._unacked_messages.clear)
        try:
            await super().wait_empty()
        finally:
            give_up.cancel()

    async def on_partitions_assigned(self, assigned: set[TP], generation_id: int = 0) -> None:
        """A new generation starts with nothing in flight."""
        self._sent.clear()
        self._begun.clear()
        self._records_inflight.clear()
        self._bytes_inflight.clear()
        await super().on_partitions_assigned(assigned, generation_id)


def _chunk(records: list[Any]) -> Chunk:
    times = [record.timestamp for record in records]
    if not (is_datable(min(times)) and is_datable(max(times))):
        records = [_dated(record) for record in records]
    chunk = Chunk(records)
    chunk.records = len(records)
    chunk.nbytes = bytes_of(records)
    return chunk


def _dated(record: Any) -> DefaultRecord:
    """A record with the time at which it counts as recorded."""
    at_ms = recorded_ms_of(record.timestamp)
    return DefaultRecord(record.offset, at_ms, record.timestamp_type, record.key, record.value, record.headers)


class ConsumerThread(driver.AIOKafkaConsumerThread):
    """Makes the aiokafka consumer as the write protocol needs it."""

    async def on_start(self) -> None:
        """Start, and as a static member do not join again once the group knows this one no more: another live process
        has its id, or got its partitions while this one stood still. Joining would steal the id back, every 0.5 s.
        """
        await super().on_start()
        coordinator = cast(Any, self._consumer)._coordinator
        coordinator._do_heartbeat = partial(self._beat, coordinator._do_heartbeat)
        self._hear()
        if self.app.conf.consumer_group_instance_id:
            coordinator.reset_generation = self._on_lost_membership

    async def _beat(self, beat: Callable[[], Awaitable[bool]]) -> bool:
        is_answered = await beat()
        if is_answered:
            self._hear()
        return is_answered

    def _hear(self) -> None:
        cast(Transport, self.transport).heard_s = time.monotonic()

    def _on_lost_membership(self) -> None:
        if not self.should_stop:
            cast(Transport, self.transport).on_lost_membership()

    async def on_thread_stop(self) -> None:
        """Stop, and leave the group, as a static member too: its partitions would stand still for the session time-out.

        A fetch that waits for a broker which is gone must not end the thread before it has said so.
        """
        if self._consumer is not None and self._consumer._coordinator is not None:
            self._consumer._coordinator._group_instance_id = None
        with suppress(asyncio.CancelledError):
            await super().on_thread_stop()

    def _create_worker_consumer(self, transport: driver.Transport) -> aiokafka.AIOKafkaConsumer:
        conf = self.app.conf
        return aiokafka.AIOKafkaConsumer(
            client_id=conf.broker_client_id,
            group_id=conf.id,
            group_instance_id=conf.consumer_group_instance_id,
            bootstrap_servers=driver.server_list(transport.url, transport.default_port),
            partition_assignment_strategy=[RangePartitionAssignor],
            enable_auto_commit=False,
            # Every start is a seek to the ledger's mark. An offset that Kafka no longer has ends the process, and the
            # next assignment sees the gap: "earliest" would step over it in silence.
            auto_offset_reset="none",
            max_poll_records=conf.broker_max_poll_records,
            max_poll_interval_ms=int(conf.broker_max_poll_interval * 1000),
            max_partition_fetch_bytes=conf.consumer_max_fetch_size,
            fetch_max_wait_ms=FETCH_WAIT_MS_MAX,
            request_timeout_ms=int(conf.broker_request_timeout * 1000),
            session_timeout_ms=int(conf.broker_session_timeout * 1000),
            rebalance_timeout_ms=int(conf.broker_rebalance_timeout * 1000),
            heartbeat_interval_ms=int(conf.broker_heartbeat_interval * 1000),
            isolation_level="read_committed",
            **driver.credentials_to_aiokafka_auth(conf.broker_credentials, conf.ssl_context),
        )


class Transport(driver.Transport):
    """Faust's Kafka transport with the chunk consumer. One per worker process."""

    Consumer = Consumer

    def __init__(self, *args: Any, records_inflight_max: int, bytes_inflight_max: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records_inflight_max = records_inflight_max
        self.bytes_inflight_max = bytes_inflight_max
        self.on_drain: Callable[[], None] = lambda: None
        """Called when chunks in flight are waited for: write them at once."""
        self.on_lost_membership: Callable[[], None] = lambda: None
        """Called in the consumer's thread, perhaps often: this static member is in the group no more."""
        self.heard_s = 0.0
        """Monotonic time of the last heartbeat that was answered, at first of the start; 0 before it."""
        self.resume_at: Mapping[TP, int] = {}
        """Where each assigned partition is read from: the ledger's mark + 1."""

    @property
    def silent_s(self) -> float:
        """Seconds since Kafka answered a heartbeat last, or since the start; 0 before it."""
        return time.monotonic() - self.heard_s if self.heard_s else 0.0


def deliver_plain_records() -> None:
    """From now on aiokafka hands out its Cython records as they are, for every consumer of this process."""
    PartitionRecords._consumer_record = lambda self, tp, record: record
