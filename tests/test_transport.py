"""The batch transport: what it overrides must exist, and a commit never passes an unfinished chunk."""

import asyncio
import inspect
import itertools
import logging
import struct
from gzip import compress
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from aiokafka.consumer import fetcher
from aiokafka.consumer.fetcher import PartitionRecords
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c
from faust.tables.manager import TableManager
from faust.transport import consumer as faust_consumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import Worker

from creditstream.logs import logging_config
from streams import app
from streams.kafka import transport
from streams.kafka.lenient_headers import read_any_header
from streams.kafka.topics import Topic
from streams.settings import read_settings

TOPIC = TP("cell-runs", 0)
OVERRIDDEN = (
    "_new_consumer_thread", "perform_seek", "_getmany", "_to_message", "_add_gap", "ack",
    "_filter_tps_with_pending_acks", "_new_offset", "wait_empty", "on_partitions_assigned",
)  # fmt: skip
READ = ("_read_offset", "_committed_offset", "_unacked_messages", "_waiting_for_ack", "_commit_offsets")


class Record(NamedTuple):
    """What aiokafka's Cython record offers of itself."""

    offset: int
    value: bytes = b"{}"
    timestamp: int = 1_790_000_000_000
    timestamp_type: int = 1
    key: bytes = b"ws"
    headers: tuple[tuple[str, bytes], ...] = ()


@pytest.fixture
async def consumer() -> Any:
    """A chunk consumer of an app that is not connected; Faust wants a running loop, so its tests are coroutines."""
    made = app.create_app(read_settings({}, batch_rows_max=100))
    made_consumer = transport.Consumer(
        made.transport,
        callback=lambda message: None,
        on_partitions_revoked=lambda tps: None,
        on_partitions_assigned=lambda tps: None,
    )
    yield made_consumer
    made_consumer._thread.thread_loop.close()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_faust_still_has_what_the_transport_overrides(name: str) -> None:
    """A method that disappears upstream would silently leave Faust's own behaviour in place."""
    assert callable(getattr(driver.Consumer, name))
    ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (transport.Consumer, driver.Consumer))
    assert len(ours.parameters) == len(theirs.parameters)


@pytest.mark.parametrize("name", READ)
async def test_faust_still_has_the_attributes_that_are_read(name: str, consumer: Any) -> None:
    """Private state that the transport relies on."""
    assert hasattr(consumer, name)


def test_the_other_overridden_places_are_still_there() -> None:
    """The consumer thread's factory, the table manager's start, the worker's last second, aiokafka's record factory."""
    assert callable(driver.AIOKafkaConsumerThread._create_worker_consumer)
    assert "sleep(1.0)" in inspect.getsource(TableManager.on_start)
    assert "sleep(1.0)" in inspect.getsource(Worker._sentinel_task)
    assert list(inspect.signature(PartitionRecords._consumer_record).parameters) == ["self", "tp", "record"]
    assert "_new_offset" in inspect.getsource(faust_consumer.Consumer)


def deliver(consumer: Any, *offsets: int) -> Any:
    """One chunk of these offsets, as Faust delivers it."""
    message = consumer._to_message(TOPIC, transport._chunk([Record(offset) for offset in offsets]))
    consumer._unacked_messages.add(message)
    return message


async def test_a_commit_waits_for_the_first_unfinished_chunk(consumer: Any) -> None:
    """Chunks that are done out of order are committed in order, all at once when the gap closes."""
    first, second, third = deliver(consumer, 1, 2), deliver(consumer, 3, 7), deliver(consumer, 8)
    assert consumer.ack(second)
    assert consumer._new_offset(TOPIC) is None
    assert consumer.ack(first)
    assert consumer._new_offset(TOPIC) == 8
    assert consumer.ack(third)
    assert consumer._new_offset(TOPIC) == 9


async def test_a_part_of_a_chunk_is_committed_behind_the_chunks_before_it(consumer: Any) -> None:
    """Both topics are committed up to one moment, wherever it lies in their chunks; the rest stays in flight."""
    first, second, third = deliver(consumer, 1, 2), deliver(consumer, 3, 4, 5), deliver(consumer, 6, 7)
    await consumer.ack_part(second, 3)
    assert consumer._new_offset(TOPIC) is None
    assert consumer.ack(first)
    assert consumer._new_offset(TOPIC) == 4
    await consumer.ack_part(second, 4)
    assert (consumer._new_offset(TOPIC), consumer._records_inflight[TOPIC]) == (5, 5)
    assert consumer.ack(second)
    assert consumer._new_offset(TOPIC) == 6
    consumer.app.consumer_generation_id = 5
    await consumer.ack_part(third, 6)
    assert consumer._new_offset(TOPIC) is None, "its generation is over"


async def test_a_group_begins_where_it_still_reads(consumer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rebalance may take partitions while they are loaded; aiokafka refuses to commit nothing, which ends Faust."""
    other, committed = TP("cell-runs", 1), list[dict[TP, int]]()

    async def commit(offsets: dict[TP, int]) -> bool:
        committed.append(offsets)
        return True

    monkeypatch.setattr(consumer, "assignment", lambda: {other})
    monkeypatch.setattr(consumer._thread, "commit", commit)
    await consumer.commit_start({TOPIC: 5})
    assert committed == []
    await consumer.commit_start({TOPIC: 5, other: 7})
    assert committed == [{other: 7}]


async def test_both_topics_are_seen_in_one_assignment(consumer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The consumer's thread may change it at any instant: that is no group of workers that differ."""
    made, assigned = consumer.app, list[set[int]]()
    made.meter.topic, made.meter.event_topic = (Topic(name, name, 1, {}) for name in ("cell-runs", "account-events"))
    assignments = itertools.chain([{TOPIC, TP("account-events", 0)}], itertools.repeat(set()))
    monkeypatch.setattr(consumer, "assignment", lambda: next(assignments))

    async def assign(partitions: set[int], group: str) -> tuple[Any, Any]:
        assigned.append(partitions)
        return {}, {}

    monkeypatch.setattr(made.meter, "assign", assign)
    made.consumer = consumer
    await made.load_units()
    assert assigned == [{0}]


async def test_no_order_of_acknowledgements_commits_past_an_open_chunk(consumer: Any) -> None:
    """After each acknowledgement, in any order, the committed offset is that of the longest finished prefix."""
    for order in itertools.permutations(range(5)):
        consumer._sent.clear()
        messages = [deliver(consumer, 10 * n, 10 * n + 9) for n in range(5)]
        committed, done = 0, set()
        for n in order:
            consumer.ack(messages[n])
            done.add(n)
            committed = consumer._new_offset(TOPIC) or committed
            assert committed == 10 * next(k for k in range(6) if k not in done)


async def test_an_earlier_generations_chunk_is_not_counted(consumer: Any) -> None:
    """After a rebalance its acknowledgement changes nothing."""
    message = deliver(consumer, 1)
    consumer.app.consumer_generation_id = 5
    assert not consumer.ack(message)
    assert consumer._new_offset(TOPIC) is None


async def test_reading_begins_where_the_ledger_says_whatever_kafka_answers(
    consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faust gives it 30 s, and reads nothing ever after, with the partitions assigned: so Kafka is not asked at all."""
    sought: dict[TP, int] = {}
    monkeypatch.setattr(consumer, "assignment", lambda: {TOPIC})
    monkeypatch.setattr(consumer._thread, "seek", sought.__setitem__)
    monkeypatch.setattr(consumer, "seek_to_committed", asyncio.Event().wait)
    consumer.transport.resume_at = {TOPIC: 7, TP("cell-runs", 1): 3}
    async with asyncio.timeout(1):
        await consumer.perform_seek()
    assert sought == {TOPIC: 7}


async def test_a_full_partition_is_not_fetched_until_it_has_room(consumer: Any) -> None:
    """Back-pressure counts records and bytes, not chunks."""
    limit = consumer.transport.records_inflight_max
    message = deliver(consumer, *range(limit))
    assert consumer._is_full(TOPIC)
    consumer.ack(message)
    assert not consumer._is_full(TOPIC)
    third = b"x" * (consumer.transport.bytes_inflight_max // 3)
    large = Record(limit + 1, value=third, key=third, headers=[("name", third)])
    consumer._to_message(TOPIC, transport._chunk([large]))
    assert consumer._is_full(TOPIC)


async def test_a_held_partition_is_not_fetched_but_the_others_are(
    consumer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An incident pauses its unit only."""
    asked: list[set[TP]] = []

    async def fetch(_: Any, active: set[TP], timeout: float) -> dict[TP, list[Record]]:
        asked.append(active)
        return {tp: [Record(1)] for tp in active}

    monkeypatch.setattr(driver.Consumer, "_getmany", fetch)
    other = TP("cell-runs", 1)
    consumer.held = {TOPIC}
    assert set(await consumer._getmany({TOPIC, other}, 0.01)) == {other}
    assert await consumer._getmany({TOPIC}, 0.01) == {}
    assert asked == [{other}]


async def test_a_chunk_that_nobody_will_acknowledge_is_not_waited_for(consumer: Any) -> None:
    """As one that comes to a unit with an incident: a stop would wait 8 s for it."""
    message = deliver(consumer, 1, 2)
    consumer.forget(message)
    await asyncio.wait_for(consumer.wait_empty(), 1)
    assert consumer._new_offset(TOPIC) is None


def answered(consumer: Any, **said: Any) -> None:
    """As if the broker had answered a fetch of `TOPIC` so."""
    state = SimpleNamespace(**{"highwater": 10, "position": 5, "has_valid_position": True} | said)
    assignment = SimpleNamespace(state_value=lambda tp: state)
    subscription = SimpleNamespace(subscription=SimpleNamespace(assignment=assignment))
    consumer._thread._consumer = SimpleNamespace(assignment=lambda: {TOPIC}, _subscription=subscription)


@pytest.mark.parametrize(
    ("last", "said", "lag"),
    [
        pytest.param(9, {}, 0, id="the_last_record_is_read"),
        pytest.param(6, {}, 3, id="three_are_not_read"),
        pytest.param(8, {"position": 10}, 0, id="only_a_marker_is_behind"),
        pytest.param(8, {"position": 10, "has_valid_position": False}, 1, id="it_seeks"),
        pytest.param(9, {"highwater": None}, None, id="no_answer_yet"),
    ],
)
async def test_where_kafka_ends(consumer: Any, last: int, said: dict[str, Any], lag: int | None) -> None:
    """By the broker's latest answer, a second before it came."""
    assert consumer.lag(TOPIC, last) is None
    answered(consumer, timestamp=1_000_000, **said)
    assert consumer.end_ms(TOPIC, last) == 0, "the first answer may be old"
    answered(consumer, timestamp=1_000_250, **said)
    assert consumer.end_ms(TOPIC, last) == (999_250 if lag == 0 else 0)
    assert consumer.lag(TOPIC, last) == lag


async def test_an_answer_from_before_a_standstill_says_nothing(consumer: Any) -> None:
    """A stopped process dates it by when it woke, and what came meanwhile is not in it."""
    for timestamp, until in ((1_000_000, 0), (1_000_500, 999_500), (1_120_500, 0), (1_120_525, 1_119_525)):
        answered(consumer, timestamp=timestamp)
        assert consumer.end_ms(TOPIC, 9) == until


def raw_batch(codec: int, first: int, *names: bytes) -> bytes:
    """One Kafka record batch with a record for each header name, which may be any bytes."""
    builder = DefaultRecordBatchBuilder(
        magic=2, compression_type=0, is_transactional=0, producer_id=-1, producer_epoch=-1, base_sequence=-1,
        batch_size=1 << 20,
    )  # fmt: skip
    for number, name in enumerate(names):
        builder.append(number, timestamp=1, key=b"ws", value=b"%d" % number, headers=[("h" * len(name), b"x")])
    raw = bytearray(builder.build())
    for name in names:
        raw = raw.replace(b"h" * len(name), name, 1)
    if codec:
        raw = raw[:61] + compress(raw[61:])
        raw[21:23] = struct.pack(">h", codec)
    raw[0:8], raw[8:12] = struct.pack(">q", first), struct.pack(">i", len(raw) - 12)
    raw[17:21] = struct.pack(">I", calc_crc32c(bytes(raw[21:])))
    return bytes(raw)


@pytest.mark.parametrize("codec", [0, 1], ids=["plain", "gzip"])
def test_a_header_name_of_any_bytes_is_read(codec: int) -> None:
    """It comes as escapes, in its place; records around it, in the same fetch, come once."""
    read_any_header()
    raw = raw_batch(codec, 0, b"a", b"b") + raw_batch(codec, 2, b"c", b"\xff\xfe", b"d") + raw_batch(codec, 5, b"e")
    records = PartitionRecords(TOPIC, fetcher.MemoryRecords(raw), None, 1, None, None, True, 1)
    found = list(records)
    assert [record.offset for record in found] == [1, 2, 3, 4, 5]
    assert [record.headers[0][0] for record in found] == ["b", "c", "\\xff\\xfe", "d", "e"]
    assert [record.value for record in found] == [b"1", b"0", b"1", b"2", b"0"]
    assert records.next_fetch_offset == 6


def test_plain_records_are_handed_out_as_they_are() -> None:
    """Building a record object costs 2 to 3 µs, so it is not built."""
    transport.deliver_plain_records()
    record = SimpleNamespace(offset=1)
    assert PartitionRecords._consumer_record(None, TOPIC, record) is record


@pytest.mark.parametrize(
    "suspicion",
    [
        driver.SLOW_PROCESSING_NO_RECENT_COMMIT,
        driver.SLOW_PROCESSING_NO_COMMIT_SINCE_START,
        driver.SLOW_PROCESSING_STREAM_IDLE,
        driver.SLOW_PROCESSING_STREAM_IDLE_SINCE_START,
    ],
)
def test_a_silent_partition_is_no_error_in_the_log(suspicion: str) -> None:
    """Faust takes five minutes without records for a commit that hangs, as soon as there are records again."""
    described = logging_config("json")["filters"]["quiet"]
    said = described["()"]()
    record = logging.LogRecord(
        "faust", logging.ERROR, "", 0, suspicion, (TOPIC, *["long ago"] * (suspicion.count("%") - 1)), None
    )
    assert not said.filter(record)
    other = logging.LogRecord(
        "faust", logging.ERROR, "", 0, driver.SLOW_PROCESSING_NO_RECENT_FETCH, (TOPIC, "now"), None
    )
    assert said.filter(other)
