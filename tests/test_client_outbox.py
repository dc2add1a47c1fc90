"""Which way a run takes, step by step: memory, disk, and what may not overtake what."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pytest
from confluent_kafka import KafkaError, Producer

from creditstream.client import outbox as outboxes
from creditstream.client import segment as segments
from creditstream.client import spool as spools
from creditstream.client.outbox import Outbox
from creditstream.client.recording import Counts, RunRefused
from creditstream.client.segment import Segment
from creditstream.client.spool import Spool, prepare_root
from schemas.codec import decode_run, encode_run
from streams.kafka.topics import CELL_RUNS
from tests.client_kafka import a_run, wait_until


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """An empty spool."""
    made = Spool(tmp_path, CELL_RUNS, 10_000_000)
    yield made
    made.close()


class Clock:
    """The outbox's clock; it moves when a test moves it."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """On a busy machine a sleep may take any time."""
    clock = Clock()
    monkeypatch.setattr(outboxes, "time", clock)
    return clock


def open_outbox(spool: Spool | None, *, write_ahead: bool = False) -> Outbox:
    """An outbox whose Kafka does not answer yet."""
    return Outbox(CELL_RUNS, spool, 0, write_ahead)


def nowhere(kind: type[Producer] = Producer, **options: int) -> Producer:
    """librdkafka, with nobody to deliver to: it keeps what it is given."""
    made = kind({"bootstrap.servers": "127.0.0.1:1", "log_level": 0, **options})
    _made.append(made)
    return made


_made: Final[list[Producer]] = []


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """librdkafka would keep runs, those that wait for them and its own sockets for the rest of the session."""
    yield
    while _made:
        producer = _made.pop()
        producer.purge()
        producer.poll(0)


def put(outbox: Outbox, *numbers: int) -> None:
    """Runs, as their producer puts them."""
    for number in numbers:
        outbox.put(encode_run(a_run(number)), "ws_1")


def places(outbox: Outbox) -> tuple[int, int]:
    """How many runs are in memory, and how many only on disk."""
    counts = outbox.counts()
    return counts.waiting_in_memory, counts.waiting_in_spool


def numbers(values: list[bytes]) -> list[int]:
    """Which runs these are."""
    return [decode_run(value).run_id.int - (1 << 64) for value in values]


def read(spool: Spool) -> list[bytes]:
    """The rows of all that is unread, in order."""
    values = []
    while spool.unread:
        values += [entry.value for entry in spool.read(100)]
    return values


def test_nothing_overtakes_what_is_spooled(spool: Spool) -> None:
    """While one run lies on disk all newer ones follow it there, also when Kafka is back; then memory is the way."""
    outbox = open_outbox(spool)
    put(outbox, 1)
    assert places(outbox) == (0, 1)
    assert outbox.hand_over() is False
    assert places(outbox) == (0, 1)
    outbox.producer = nowhere()
    put(outbox, 2)
    assert places(outbox) == (0, 2)
    outbox.hand_over()
    put(outbox, 3)
    assert places(outbox) == (3, 0)
    assert outbox.in_memory_only == 1


def test_what_is_taken_back_goes_in_front(spool: Spool) -> None:
    """Runs of memory and of disk that were handed over come back in their order, before what was spooled since."""
    outbox = open_outbox(spool)
    put(outbox, 1)
    outbox.producer = nowhere()
    outbox.hand_over()
    put(outbox, 2)
    taken = outbox.take_back()
    assert taken is not None
    put(outbox, 3)
    assert (outbox.producer, places(outbox), outbox.in_memory_only) == (None, (0, 3), 0)
    assert outbox.counts().spooled == 3
    assert read(spool) == [encode_run(a_run(number)) for number in (1, 2, 3)]


def test_what_lies_on_disk_is_not_written_again(spool: Spool) -> None:
    """An outage that goes on costs no more bytes: spooled runs that come back are read again."""
    outbox = open_outbox(spool)
    put(outbox, 1, 2)
    written = list(spool._root.rglob("*.ndjson"))
    for _ in range(3):
        outbox.producer = nowhere()
        outbox.hand_over()
        assert places(outbox) == (2, 0)
        outbox.take_back()
    assert (places(outbox), outbox.counts().spooled) == ((0, 2), 2)
    assert list(spool._root.rglob("*.ndjson")) == written


def test_what_the_disk_does_not_take_back_stays_in_memory(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka and the disk fail at once: the runs wait where they are, those recorded since behind them, and all are told
    of; Kafka gets them in their order.
    """

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    outbox = open_outbox(spool)
    outbox.producer = nowhere()
    put(outbox, 1, 2)
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        outbox.take_back()
    assert (places(outbox), outbox.in_memory_only, outbox.counts().spooled) == ((2, 0), 2, 0)
    assert outbox.trouble.reason == "the spool cannot be written: No space left on device"
    outbox.producer = nowhere()
    put(outbox, 3)
    assert places(outbox) == (2, 1)
    while outbox.hand_over():
        pass
    assert places(outbox) == (3, 0)
    assert numbers([run.value for run in outbox._waiting.values()]) == [1, 2, 3]


def test_write_ahead_puts_every_run_on_disk_first(spool: Spool) -> None:
    """With Kafka there and nothing waiting, a run still goes over the disk."""
    outbox = open_outbox(spool, write_ahead=True)
    outbox.producer = nowhere()
    put(outbox, 1)
    assert places(outbox) == (0, 1)
    outbox.hand_over()
    assert (places(outbox), outbox.in_memory_only) == ((1, 0), 0)


def test_what_dead_processes_left_holds_up_no_run(
    tmp_path: Path, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long it takes to read it, a run is accepted meanwhile."""
    dead = Spool(tmp_path, CELL_RUNS, 10_000_000)
    dead.append(encode_run(a_run(1)))
    dead.close()
    outbox, found = open_outbox(spool), spools._found
    reads, accepted = threading.Event(), threading.Event()
    meanwhile: list[bool] = []

    def found_slowly(path: Path) -> Segment:
        reads.set()
        meanwhile.append(accepted.wait(60))
        return found(path)

    monkeypatch.setattr(spools, "_found", found_slowly)
    thread = threading.Thread(target=outbox.adopt)
    thread.start()
    assert reads.wait(60)
    put(outbox, 2)
    accepted.set()
    thread.join()
    assert meanwhile == [True]
    assert (outbox.counts().adopted, places(outbox)) == (1, (0, 2))


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("has_spool", [True, False])
def test_a_handler_that_closes_in_the_middle_loses_nothing_unsaid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_spool: bool, moment: str
) -> None:
    """A signal comes right before librdkafka gets the run, or between its answer and our note of it: it is refused."""

    def closes() -> None:
        outbox.close()
        outbox.take_back()

    class Interrupted(Producer):
        def produce(self, *args: Any, **named: Any) -> None:
            super().produce(*args, **named)
            if moment == "after":
                closes()

    def interrupted(*args: Any) -> object:
        if moment == "before":
            closes()
        return partial(*args)

    monkeypatch.setattr(outboxes, "partial", interrupted)
    outbox = open_outbox(Spool(tmp_path, CELL_RUNS, 10_000_000) if has_spool else None)
    outbox.producer = nowhere(Interrupted)
    with pytest.raises(RunRefused, match="the producer is closed"):
        put(outbox, 1)
    assert (outbox.counts().accepted, outbox.counts().refused) == (0, 1)


class TimeIsUp(BaseException):
    """What a worker's own alarm raises."""


def interrupted(call: Callable[[], None], moment: int, handler: Callable[[], None]) -> bool:
    """Call, and run the handler at one of the moments in our code at which Python runs those of signals: a function
    begins, or C has returned. False when there are not so many.
    """
    moments = count(1)
    left = [handler]

    def at(frame: FrameType, event: str, _: object) -> None:
        is_ours = event in ("call", "c_return") and frame.f_globals["__name__"].startswith("creditstream.")
        if is_ours and next(moments) == moment:
            sys.setprofile(None)
            left.pop()()

    try:
        sys.setprofile(at)
        call()
    finally:
        sys.setprofile(None)
    return not left


class Story:
    """What a worker does with one outbox, of which it notes what was accepted and what Kafka got."""

    def __init__(self, root: Path, producer: Producer, *, write_ahead: bool) -> None:
        prepare_root(root)
        self.spool = Spool(root, CELL_RUNS, 10_000_000)
        self.outbox = open_outbox(self.spool, write_ahead=write_ahead)
        self._producer = self.outbox.producer = producer
        self.accepted: list[int] = []
        self.sent: list[bytes] = []

    def records(self, *numbers: int) -> None:
        for number in numbers:
            put(self.outbox, number)
            self.accepted.append(number)

    def flushes(self) -> None:
        while self.outbox.counts().waiting_in_spool or self.outbox.is_busy:
            self.outbox.hand_over()
            for sequence, run in tuple(self.outbox._waiting.items()):
                self.sent.append(run.value)
                self.outbox._deliver(sequence, None, None)  # type: ignore[arg-type]

    def closes(self) -> None:
        self.outbox.close()
        self.outbox.take_back()
        self.spool.close()

    def raises(self) -> None:
        raise TimeIsUp

    def after(self, root: Path) -> list[int]:
        """What Kafka has in the end, when an heir has sent the rest: first copies in their order."""
        heir = Story(root, self._producer, write_ahead=True)
        heir.outbox.adopt()
        heir.flushes()
        heir.closes()
        return numbers(list(dict.fromkeys([*self.sent, *heir.sent])))


@pytest.mark.parametrize("does", ["records", "flushes", "closes", "raises"])
@pytest.mark.parametrize("way", ["memory", "disk", "new_segment", "new_directory"])
def test_whenever_a_signal_comes_its_handler_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, does: str
) -> None:
    """Whether it records, flushes, closes or raises in the middle of a put: what was accepted arrives in its order,
    what was not is refused as after `close`, and no lock stays taken.
    """
    monkeypatch.setattr(os, "fsync", os.fstat)  # returns at once
    if way == "new_segment":
        monkeypatch.setattr(spools, "SEGMENT_BYTES", 1)
    producer = nowhere()
    for moment in count(1):
        root = tmp_path / str(moment)
        story = Story(root, producer, write_ahead=way != "memory")
        story.records(*([] if way == "new_directory" else [0]))
        handler = partial(story.records, 2, 3) if does == "records" else getattr(story, does)
        try:
            if not interrupted(lambda story=story: story.records(1), moment, handler):
                break
        except (RunRefused, TimeIsUp) as said:
            expected = "raises" if isinstance(said, TimeIsUp) else "closes"
            if does != expected or (does == "closes" and "is closed" not in str(said)):
                raise
        if does != "closes":
            story.records(4)
            story.closes()
        arrived = [number for number in story.after(root) if number in story.accepted]
        for others in ({0, 1, 4}, {0, 2, 3, 4}):
            assert [n for n in arrived if n in others] == sorted(others & set(story.accepted))
        if does != "raises":  # of what is just opened nobody knows yet
            assert story.outbox.counts().accepted == len(story.accepted)
            assert list(root.iterdir()) == []
    assert moment > 10


def test_without_a_spool_what_is_taken_back_stays_in_order() -> None:
    """Taken back and new runs wait in memory, and go again in their order."""
    outbox = open_outbox(None)
    put(outbox, 1)
    assert places(outbox) == (1, 0)
    outbox.producer = nowhere()
    outbox.hand_over()
    put(outbox, 2)
    outbox.take_back()
    outbox.producer = nowhere()
    put(outbox, 3)
    assert (outbox.counts(), outbox.in_memory_only) == (Counts(accepted=3, waiting_in_memory=3), 3)
    assert outbox.wait_until_empty(0) == 3
    outbox.adopt()  # of which there is nothing
    outbox.hand_over()
    assert [run.value for run in outbox._waiting.values()] == [encode_run(a_run(number)) for number in (1, 2, 3)]


def test_a_failure_and_silence_are_noticed(spool: Spool, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """A failure at once, silence after its time, neither once it is taken back; of troubles in a row one is logged."""
    outbox = open_outbox(spool)
    outbox.producer = nowhere()
    put(outbox, 1)
    clock.now_s += 5
    assert not outbox.is_silent(5)
    clock.now_s += 0.001
    assert outbox.is_silent(5)
    outbox.take_back()
    assert not outbox.is_silent(5)
    outbox.trouble.note("no acknowledgement")
    outbox.producer = nowhere()
    outbox.hand_over()
    outbox._deliver(2, KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED), None)  # type: ignore[arg-type]
    assert outbox.has_failed
    assert "authorization" in outbox.trouble.reason
    put(outbox, 2)
    assert (outbox.hand_over(), places(outbox), outbox.counts().delivered) == (False, (1, 1), 0)
    outbox.take_back()
    assert (outbox.has_failed, places(outbox)) == (False, (0, 2))
    assert caplog.messages == ["cell runs are waiting: no acknowledgement"]
    outbox.producer = nowhere()
    outbox._deliver(2, KafkaError(KafkaError.TOPIC_AUTHORIZATION_FAILED), None)  # type: ignore[arg-type]
    assert not outbox.has_failed, "that was of a run that was taken back"
    assert read(spool) == [encode_run(a_run(number)) for number in (1, 2)]


@pytest.mark.parametrize(("option", "limit"), [("queue.buffering.max.messages", 1), ("message.max.bytes", 1000)])
def test_what_librdkafka_does_not_take_goes_to_the_spool(spool: Spool, option: str, limit: int) -> None:
    """Whether its queue is full or it refuses the run: it is accepted all the same, and nothing overtakes it."""
    outbox = open_outbox(spool)
    outbox.producer = nowhere(**{option: limit})
    long = b'{"workspace_id":"ws_1"}'.ljust(2000)
    put(outbox, 1)
    outbox.put(long, "ws_1")
    put(outbox, 2)
    assert places(outbox) == (1, 2)
    assert outbox.has_failed == (option == "message.max.bytes")
    outbox.take_back()
    assert read(spool) == [encode_run(a_run(1)), long, encode_run(a_run(2))]


def test_what_is_read_and_not_taken_is_neither_tried_at_once_nor_sent_twice(spool: Spool) -> None:
    """librdkafka is full: its thread sleeps, and what it was given and what not go back to the spool in their order."""
    outbox = open_outbox(spool)
    put(outbox, 1, 2)
    outbox.producer = nowhere(**{"queue.buffering.max.messages": 1})
    assert (outbox.hand_over(), places(outbox)) == (False, (2, 0))
    put(outbox, 3)
    assert (outbox.hand_over(), places(outbox)) == (False, (2, 1))
    outbox.take_back()
    assert places(outbox) == (0, 3)
    assert numbers(read(spool)) == [1, 2, 3]


def test_memory_is_bounded_and_what_left_it_leaves_the_disk(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more is handed over than there is room for; whoever hands over hears whether to go on at once."""
    monkeypatch.setattr(outboxes, "QUEUE_RUNS_MAX", 3)
    monkeypatch.setattr(outboxes, "HAND_OVER_RUNS", 2)
    outbox = open_outbox(spool)
    put(outbox, 1, 2, 3, 4)
    outbox.producer = nowhere()
    assert [outbox.hand_over() for _ in range(3)] == [True, False, False]
    assert (places(outbox), outbox.is_busy) == ((3, 1), True)
    for sequence in (1, 2, 3):
        outbox._deliver(sequence, None, None)  # type: ignore[arg-type]
    assert (outbox.hand_over(), places(outbox)) == (False, (1, 0))
    outbox._deliver(4, None, None)  # type: ignore[arg-type]
    assert (outbox.counts(), outbox.is_busy) == (Counts(accepted=4, spooled=4, delivered=4), False)
    put(outbox, 5, 6, 7, 8)
    assert places(outbox) == (3, 1)


def test_who_waits_for_room_goes_on_once_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when its time is over: the first run that Kafka acknowledges makes room for it."""
    monkeypatch.setattr(outboxes, "QUEUE_RUNS_MAX", 1)
    outbox = Outbox(CELL_RUNS, None, 600, False)
    outbox.producer = nowhere()
    put(outbox, 1)
    patient = threading.Thread(target=put, args=[outbox, 2], daemon=True)
    patient.start()
    wait_until(lambda: outbox._changed._waiters, "waiting")  # type: ignore[attr-defined]
    outbox._deliver(1, None, None)  # type: ignore[arg-type]
    patient.join(10)
    assert (patient.is_alive(), places(outbox)) == (False, (1, 0))


def test_who_waits_for_what_is_no_run_goes_on(spool: Spool) -> None:
    """Once it is read, nothing more can come of it: a close does not take its time for damage on disk."""
    outbox = open_outbox(spool)
    spool.append(b"damage")
    patient = threading.Thread(target=outbox.wait_until_empty, args=[600], daemon=True)
    patient.start()
    wait_until(lambda: outbox._changed._waiters, "waiting")  # type: ignore[attr-defined]
    outbox.producer = nowhere()
    outbox.hand_over()
    patient.join(10)
    assert not patient.is_alive()


def test_a_file_that_goes_while_its_runs_are_in_memory_takes_none_along(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that cannot be read to its end some runs were handed over: they are written again when Kafka fails."""
    monkeypatch.setattr(segments, "READ_BYTES", len(encode_run(a_run(1))) + 1)
    outbox = open_outbox(spool)
    put(outbox, 1, 2)
    outbox.producer = nowhere()
    outbox.hand_over()
    (file,) = spool._root.rglob("*.ndjson")
    file.unlink()
    outbox.hand_over()
    assert (places(outbox), outbox.counts().unreadable_segments) == ((1, 0), 1)
    outbox.take_back()
    assert read(spool) == [encode_run(a_run(1))]


def test_who_is_refused_hears_why(tmp_path: Path) -> None:
    """A full spool, with what keeps Kafka from taking anything; a closed outbox, which keeps nothing."""
    outbox = open_outbox(Spool(tmp_path, CELL_RUNS, 1))
    for reason, said in (("", "Kafka is slow"), ("no answer", "no answer")):
        outbox.trouble.reason = reason
        with pytest.raises(RunRefused, match=rf"the spool is full \({said}\)"):
            put(outbox, 1)
    outbox = open_outbox(Spool(tmp_path, CELL_RUNS, 10_000_000))
    outbox.close()
    with pytest.raises(RunRefused, match="the producer is closed"):
        put(outbox, 1)
    assert outbox.counts() == Counts(refused=1)


def test_a_slow_link_is_not_silence(spool: Spool, clock: Clock) -> None:
    """However old the oldest run is, with acknowledgements coming there is nothing to send again; without, there is."""
    outbox = open_outbox(spool)
    outbox.producer = nowhere()
    put(outbox, *range(6))
    for acknowledged in (6, 5, 4, 3, 2):
        clock.now_s += 4
        outbox._deliver(acknowledged, None, None)  # type: ignore[arg-type]  # what Kafka says of a run is not looked at
        clock.now_s += 4
        assert not outbox.is_silent(5)
    clock.now_s += 2
    put(outbox, 7)  # is no answer
    assert outbox.is_silent(5)


def test_who_waits_long_for_the_next_run_hears_no_silence(spool: Spool, clock: Clock) -> None:
    """Time in which nothing was under way is no time without an acknowledgement."""
    outbox = open_outbox(spool)
    outbox.producer = nowhere()
    put(outbox, 1)
    outbox._deliver(1, None, None)  # type: ignore[arg-type]
    clock.now_s += 60
    put(outbox, 2)
    assert not outbox.is_silent(5)
