"""The spool on a real disk: order, torn lines, full disks, the spools of dead processes."""

import errno
import gc
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creditstream import home
from creditstream.client import spool as spools
from creditstream.client.segment import READ_BYTES, Segment
from creditstream.client.spool import Entry, Spool, SpoolFull, prepare_root
from schemas.codec import encode_run
from schemas.problem import Problem
from streams.kafka.topics import CELL_RUNS
from tests.client_kafka import a_run
from tests.records import STEADY

ROOT: Final = Path(__file__).parent.parent
BYTES_MAX: Final = 10_000_000


def values(*numbers: int) -> list[bytes]:
    """Runs as Kafka values."""
    return [encode_run(a_run(number)) for number in numbers]


def numbers(entries: list[Entry]) -> list[bytes]:
    """What was read."""
    return [entry.value for entry in entries]


def adopt(spool: Spool) -> int:
    """How many runs it found in the directories of dead processes."""
    return spool.adopt(spool.find_orphans())


def descriptors() -> int:
    """How many are open."""
    return len(os.listdir("/dev/fd"))


def files(root: Path) -> list[str]:
    """All files below the root."""
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_runs_are_read_in_the_order_in_which_they_were_written(tmp_path: Path) -> None:
    """Several segments, read in pieces, are one sequence; a segment goes once all of it is acknowledged."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    written = values(*range(30_000))
    for value in written:
        spool.append(value)
    assert len(files(tmp_path)) > 2
    assert (spool.unread, spool.size_bytes) == (30_000, sum(len(value) + 1 for value in written))
    read: list[Entry] = []
    while entries := spool.read(700):
        read.extend(entries)
    assert numbers(read) == written
    for entry in read[:-1]:
        spool.acknowledge(entry)
    assert len(files(tmp_path)) == 2
    spool.acknowledge(read[-1])
    assert files(tmp_path) == ["lock"]
    spool.close()
    assert list(tmp_path.iterdir()) == []


def test_what_was_in_memory_goes_in_front(tmp_path: Path) -> None:
    """Runs that were handed over and came back are read before those that were spooled after them."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    one, two, three, four = values(1, 2, 3, 4)
    spool.append(one)
    assert numbers(spool.read(10)) == [one]
    spool.append(three)
    spool.append(four)
    spool.put_first([one, two])
    assert numbers(spool.read(1)) == [one]
    assert numbers(spool.read(10)) == [two]
    assert numbers(spool.read(10)) == [three, four]
    spool.close()
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert adopt(heir) == 5
    assert [value for _ in range(3) for value in numbers(heir.read(10))] == [one, two, one, three, four]


def test_what_goes_in_front_goes_before_all_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many lie there unread; of those that were read nothing is left on disk once it is there, or is read again
    and acknowledged. An heir reads them in the same order.
    """
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 1)
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    written = values(*range(20))
    for value in written[1:]:
        spool.append(value)
    assert numbers(spool.read(1)) == written[1:2]
    spool.put_first(written[:2])
    assert len(files(tmp_path)) == 1 + 19
    entries = [entry for _ in range(3) for entry in spool.read(2)]
    assert numbers(entries) == written[:4]
    spool.rewind(entries)
    spool.close()
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert adopt(heir) == 20
    entries = [entry for _ in range(19) for entry in heir.read(2)]
    assert numbers(entries) == written
    heir.rewind(entries)
    for entry in [entry for _ in range(19) for entry in heir.read(2)]:
        heir.acknowledge(entry)
    assert files(tmp_path) == []


def test_a_file_that_is_full_is_on_disk_before_it_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a run in it is told so at once, and no descriptor is left open. The next one's name is on disk
    before a run is.
    """
    synced: list[int] = []
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    gc.collect()  # those of other tests
    before = descriptors()
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    ticket = spool.append(values(1)[0])
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 1)
    monkeypatch.setattr(os, "fsync", note)
    opened = descriptors()
    tail = spool.append(values(2)[0]).segment.path.stat().st_ino
    assert descriptors() == opened
    assert {path.stat().st_ino for path in (tmp_path, *tmp_path.iterdir())} <= set(synced)
    assert ticket.segment.path.stat().st_ino in synced
    assert tail not in synced
    spool.close()
    assert tail in synced
    assert descriptors() == before


actions = st.lists(st.sampled_from(["append", "read", "acknowledge", "rewind", "front", "heir"]), max_size=40)


@STEADY
@given(actions)
def test_any_history_keeps_the_order_of_first_copies(
    tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    """Whatever is appended, read, acknowledged, taken back and inherited: none is lost, first copies are in order."""
    root = tmp_path_factory.mktemp("spool")
    spool, appended, delivered = Spool(root, CELL_RUNS, BYTES_MAX), 0, []
    pending: list[Entry] = []
    for step in [*steps, "heir", *["read", "acknowledge"] * 60]:
        if step == "append":
            spool.append(values(appended)[0])
            appended += 1
        elif step == "read":
            pending.extend(spool.read(3))
        elif step == "acknowledge" and pending:
            entry = pending.pop(0)
            delivered.append(entry.value)
            spool.acknowledge(entry)
        elif step == "rewind":
            spool.rewind(pending)
            pending = []
        elif step == "front" and pending:
            spool.put_first(numbers(pending))
            pending = []
        elif step == "heir":
            spool.close()
            spool, pending = Spool(root, CELL_RUNS, BYTES_MAX), []
            adopt(spool)
    assert list(dict.fromkeys(delivered)) == values(*range(appended))
    assert spool.unread == 0
    spool.close()
    assert list(root.iterdir()) == []


def test_a_torn_line_was_never_accepted(tmp_path: Path) -> None:
    """What a killed process had half written is not a run; what stands before it is, however much that is."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    *whole, torn = values(*range(2 * READ_BYTES // 200))
    for value in whole:
        spool.append(value)
    spool.close()
    segment = next(tmp_path.rglob("*.ndjson"))
    with segment.open("ab") as file:
        file.write(torn[:50])
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert adopt(heir) == len(whole)
    entries = [entry for _ in range(4) for entry in heir.read(len(whole))]
    assert numbers(entries) == whole
    for entry in entries:
        heir.acknowledge(entry)
    assert not segment.exists()


def test_a_run_may_end_where_a_block_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphan is read in blocks: neither is a run torn by their edges, nor whole what fills more than one of them."""
    one, torn = values(1, 2)
    monkeypatch.setattr(spools, "READ_BYTES", len(one))
    directory = tmp_path / f"00000000000000000001-1-{CELL_RUNS}"
    directory.mkdir()
    (directory / "0000000000000001.ndjson").write_bytes(one + b"\n" + torn)
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert (adopt(heir), read_all(heir), files(directory)) == (1, [one], ["0000000000000001.ndjson", "lock"])
    assert heir.size_bytes == len(one) + 1


@pytest.mark.parametrize(
    "damage",
    [
        b"\0" * 40,
        b"\xff",
        b'{"workspace_id":7}',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"workspace_id":"ws_1"}',
    ],
    ids=["zeros", "no_text", "no_run", "deep"],
)
def test_a_line_that_is_no_run_is_kept_for_a_person(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    """Damage on disk does not stop the runs around it; the file stays, under another name, and the log names it."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    one, two = values(1, 2)
    spool.append(one)
    spool.append(damage)
    spool.append(two)
    entries = spool.read(10)
    assert numbers(entries) == [one, two]
    for entry in entries:
        spool.acknowledge(entry)
    spool.close()
    assert [name.rpartition(".")[2] for name in files(tmp_path)] == ["unreadable"]
    assert f"byte {len(one) + 1}: not a cell run" in caplog.text


def test_a_file_of_nothing_but_damage_is_kept_too(tmp_path: Path) -> None:
    """A block without any line is passed over."""
    directory = tmp_path / f"00000000000000000001-1-{CELL_RUNS}"
    directory.mkdir()
    (directory / "0000000000000001.ndjson").write_bytes(b"\0" * 600_000 + b"\n")
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    adopt(spool)
    while spool.unread:
        assert spool.read(10) == []
    spool.close()
    assert [name.rpartition(".")[2] for name in files(tmp_path)] == ["unreadable"]


def test_a_segment_that_cannot_be_read_holds_up_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A deleted segment, a truncated one and one that the disk does not give are said once, counted and left alone; all
    others are read, also those that are written afterwards; what becomes readable again is read again, and what is gone
    is counted no more.
    """
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 3000)
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    written = values(*range(100))
    for value in written:
        spool.append(value)
    deleted, truncated, hidden, *_, tail = sorted(tmp_path.rglob("*.ndjson"))
    texts = {path: path.read_bytes() for path in (deleted, truncated, hidden, tail)}
    truncated.write_bytes(b"")
    for path in (deleted, hidden, tail):
        path.unlink()
    hidden.mkdir()  # root may read any file, but not a directory

    def drained() -> list[bytes]:
        spool.append(written[0])
        read: list[bytes] = []
        while entries := spool.read(700):
            read += numbers(entries)
            for entry in entries:
                spool.acknowledge(entry)
        return read

    lost = {line for text in texts.values() for line in text.splitlines()}
    tail.write_bytes(b"")
    assert drained() == [*(value for value in written if value not in lost), written[0]]
    assert spool.unreadable == 4
    assert drained() == [written[0]]
    for path in (truncated, tail):
        path.write_bytes(texts[path])
    assert adopt(spool) == 0
    assert drained() == [*texts[truncated].splitlines(), *texts[tail].splitlines(), written[0]]
    assert spool.unreadable == 1
    said = [record.getMessage() for record in caplog.records]
    assert [sum(str(path) in line for line in said) for path in texts] == [1, 1, 1, 1]
    spool.close()
    assert hidden.exists()


def test_what_follows_a_file_that_was_set_aside_goes_to_another(tmp_path: Path) -> None:
    """Also where that is the newest, to which runs were still appended."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    one, two = values(1, 2)
    spool.append(one).segment.path.write_bytes(b"")
    assert (spool.read(10), spool.unreadable) == ([], 1)
    spool.append(two)
    assert (spool.unread, read_all(spool)) == (1, [two])


def test_what_the_process_lacks_is_no_fault_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a descriptor nothing is read, by its writer or an heir; with one again all of it is, in its order."""
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 1)
    spool, heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX), Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    for value in values(1, 2):
        spool.append(value)
    with no_descriptors(0), pytest.raises(OSError, match="Too many open files"):
        spool.read(10)
    assert [*numbers(spool.read(10)), *numbers(spool.read(10))] == values(1, 2)
    spool.close()
    with no_descriptors(1), pytest.raises(OSError, match="Too many open files"):
        heir.find_orphans()
    found, lacking = spools._found, [OSError(errno.EMFILE, os.strerror(errno.EMFILE))]

    def taken_by_another_thread(path: Path) -> Segment:
        if lacking:
            raise lacking.pop()
        return found(path)

    monkeypatch.setattr(spools, "_found", taken_by_another_thread)
    assert adopt(heir) == 0
    with pytest.raises(OSError, match="Too many open files"):
        heir.find_orphans()
    assert adopt(heir) == 0
    assert (adopt(heir), read_all(heir), heir.unreadable) == (2, values(1, 2), 0)


@contextmanager
def no_descriptors(but: int) -> Iterator[None]:
    """The system gives so many more, and then none."""
    spare = [os.dup(0) for _ in range(but + 1)]
    for descriptor in spare:
        os.close(descriptor)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(spare), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_orphan_that_cannot_be_read_holds_up_no_other(tmp_path: Path) -> None:
    """Whoever adopts takes what can be read, comes back for the rest, and leaves alone what cannot be locked."""
    locked = tmp_path / f"99999999999999999999-1-{CELL_RUNS}"
    (locked / "lock").mkdir(parents=True)
    (locked / "0000000000000001.ndjson").write_bytes(values(9)[0] + b"\n")
    dead = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    dead.append(values(1)[0])
    dead.close()
    directory = tmp_path / f"00000000000000000001-1-{CELL_RUNS}"
    (directory / "0000000000000001.ndjson").mkdir(parents=True)
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert (adopt(heir), heir.unreadable) == (1, 1)
    assert numbers(heir.read(10)) == values(1)
    (directory / "0000000000000001.ndjson").rmdir()
    (directory / "0000000000000001.ndjson").write_bytes(values(2)[0] + b"\n")
    adopt(heir)
    assert (numbers(heir.read(10)), heir.unreadable) == (values(2), 0)


def test_orphans_of_another_topic_are_left_to_their_own(tmp_path: Path) -> None:
    """Runs of one topic are never sent to another."""
    for number, topic in enumerate((CELL_RUNS, f"a-{CELL_RUNS}", f"b-{CELL_RUNS}")):
        dead = Spool(tmp_path, topic, BYTES_MAX)
        dead.append(values(number)[0])
        dead.close()
    for number, topic in ((1, f"a-{CELL_RUNS}"), (0, CELL_RUNS), (2, f"b-{CELL_RUNS}")):
        heir = Spool(tmp_path, topic, BYTES_MAX)
        assert adopt(heir) == 1
        assert numbers(heir.read(10)) == values(number)


class TimeIsUp(BaseException):
    """What a worker's own alarm raises, wherever the main thread is."""


def read_all(spool: Spool) -> list[bytes]:
    """Everything that is unread; nothing is acknowledged."""
    read: list[bytes] = []
    while entries := spool.read(700):
        read += numbers(entries)
    return read


def test_an_alarm_between_two_writes_tears_no_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whenever the handler of a signal raises, what was accepted is read in order, by this process and by its heir; the
    run that was interrupted may be among it or not.
    """
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    accepted = values(0)
    spool.append(accepted[0])
    interrupted: set[bytes] = set()

    at_work = False

    def raise_alarm(*_: object) -> None:
        if at_work:
            raise TimeIsUp

    before = signal.signal(signal.SIGALRM, raise_alarm)
    try:
        for number in range(1, 5000):
            value = encode_run(a_run(number, row_id="x" * (1 + number * 37 % 100)))
            try:
                at_work = True
                signal.setitimer(signal.ITIMER_REAL, (1 + number % 60) * 1e-6)
                spool.append(value)
                at_work = False
                accepted.append(value)
            except TimeIsUp:
                at_work = False
                interrupted.add(value)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [value for value in read_all(spool) if value not in interrupted] == accepted
    spool.close()
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    adopt(heir)
    assert [value for value in read_all(heir) if value not in interrupted] == accepted
    assert caplog.messages == []


@pytest.mark.parametrize("cut", [0, 100, 10_000], ids=["nothing", "a_part", "all"])
def test_an_alarm_within_a_write_tears_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cut: int
) -> None:
    """However much of a run the disk has when the handler of a signal raises, the next run takes its place."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    one, two = values(1, 2)
    spool.append(one)
    write = os.pwrite

    def write_a_part(descriptor: int, data: bytes, place: int) -> int:
        write(descriptor, data[:cut], place)
        raise TimeIsUp

    with monkeypatch.context() as alarmed:
        alarmed.setattr(os, "pwrite", write_a_part)
        with pytest.raises(TimeIsUp):
            spool.append(encode_run(a_run(3, row_id="x" * 120)))
    spool.append(two)
    assert (read_all(spool), spool.unread) == ([one, two], 0)
    spool.close()
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert adopt(heir) == 2
    assert read_all(heir) == [one, two]
    assert caplog.messages == []


@pytest.mark.parametrize(("call", "time"), [("fstat", 1), ("fstat", 2), ("pwrite", 1)])
def test_a_handler_that_records_too_loses_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, time: int
) -> None:
    """Whenever in an append the signal comes, and whatever of a run lies there torn or is written when it does: both
    runs are in the spool, whole.
    """
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    one, two, three = values(1, 2, 3)
    with spool.append(one).segment.path.open("ab") as file:
        file.write(three[:50])
    plain, times = getattr(os, call), iter(range(1, 100))

    def interrupted(descriptor: int, data: bytes = b"", *place: int) -> object:
        answer = plain(descriptor, *([data[:10], *place] if place else []))
        if next(times) == time:
            monkeypatch.setattr(os, call, plain)  # one signal
            spool.append(three)
        return answer

    monkeypatch.setattr(os, call, interrupted)
    spool.append(two)
    assert sorted(read_all(spool)) == sorted([one, two, three])
    assert spool.unread == 0


def test_who_closes_in_a_handler_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for the sync in whose frame it runs: that would be for ever. All is on disk, for the heir."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    (one,) = values(1)
    ticket = spool.append(one)
    fsync = os.fsync

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        spool.close()
        raise SystemExit

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(SystemExit):
        ticket.segment.sync(ticket.length)
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert (adopt(heir), read_all(heir)) == (1, [one])


@pytest.mark.parametrize("does", ["records", "closes"])
def test_a_handler_within_a_sync_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str) -> None:
    """A handler that records needs a sync of its own in the middle of one; one that closes leaves the file to that."""
    gc.collect()  # those of other tests
    before = descriptors()
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    one, two = values(1, 2)
    ticket = spool.append(one)
    fsync = os.fsync
    done: list[str] = []

    def interrupted(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        if does == "records":
            late = spool.append(two)
            late.segment.sync(late.length)
        else:
            spool.close()
        done.append(does)
        fsync(descriptor)

    def work() -> None:
        ticket.segment.sync(ticket.length)
        done.append("synced")

    monkeypatch.setattr(os, "fsync", interrupted)
    thread = threading.Thread(target=work, daemon=True)  # the frames of a signal are those of one thread, of any
    thread.start()
    thread.join(10)
    assert done == [does, "synced"]
    spool.close()
    assert descriptors() == before
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    adopt(heir)
    assert read_all(heir) == ([one, two] if does == "records" else [one])


def test_who_acknowledges_waits_for_no_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kafka may have a run before the disk has: its file goes, and is closed by whoever syncs it."""
    gc.collect()  # those of other tests
    before = descriptors()
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    ticket = spool.append(values(1)[0])
    syncs, acknowledged = threading.Event(), threading.Event()
    waited: list[bool] = []

    def slow(_: int) -> None:
        syncs.set()
        waited.append(acknowledged.wait(10))

    monkeypatch.setattr(os, "fsync", slow)
    thread = threading.Thread(target=ticket.segment.sync, args=[ticket.length], daemon=True)
    thread.start()
    assert syncs.wait(10)
    for entry in spool.read(1):
        spool.acknowledge(entry)
    acknowledged.set()
    thread.join(10)
    assert (waited, files(tmp_path)) == ([True], ["lock"])
    spool.close()
    assert descriptors() == before


def test_a_sync_that_failed_once_fails_for_all_that_it_was_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system tells one of them only, and that may be who closes; what comes later goes to another segment."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    first, second = (spool.append(value) for value in values(1, 2))

    def refused(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refused)
        with pytest.raises(OSError, match="Input/output"):
            first.segment.sync(first.length)
    with pytest.raises(OSError, match="Input/output"):
        second.segment.sync(second.length)
    third = spool.append(values(3)[0])
    third.segment.sync(third.length)
    assert third.segment is not second.segment
    late = spool.append(values(4)[0])
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", refused)
        spool.close()
    with pytest.raises(OSError, match="Input/output"):
        late.segment.sync(late.length)


def test_what_dead_processes_left_takes_no_room_from_the_living(tmp_path: Path) -> None:
    """The bound is each process's own: an heir of much refuses nothing for it."""
    runs = values(1, 2)
    bytes_max = sum(len(value) + 1 for value in runs)
    dead = Spool(tmp_path, CELL_RUNS, bytes_max)
    for value in runs:
        dead.append(value)
    dead.close()
    heir = Spool(tmp_path, CELL_RUNS, bytes_max)
    assert adopt(heir) == 2
    for value in runs:
        heir.append(value)
    with pytest.raises(SpoolFull):
        heir.append(runs[0])
    assert heir.unread == 4


def test_what_is_no_spool_is_left_alone(tmp_path: Path) -> None:
    """A directory of another name, whatever it holds, is somebody else's."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "2026-11-exports").mkdir()
    exported = tmp_path / "2026-11-exports" / "june.ndjson"
    exported.write_bytes(values(1)[0] + b"\n")
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert adopt(spool) == 0
    spool.close()
    assert exported.exists()
    assert (tmp_path / "logs").is_dir()


@pytest.mark.parametrize("acknowledged", [True, False])
def test_a_directory_that_was_removed_is_made_again(tmp_path: Path, acknowledged: bool) -> None:
    """By whoever cleans up: one run is refused, those after it are taken, and none is written where nobody finds it."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    one, two = values(1, 2)
    spool.append(one)
    for entry in spool.read(1) if acknowledged else []:
        spool.acknowledge(entry)
    (own,) = tmp_path.iterdir()
    shutil.rmtree(own)
    with pytest.raises(FileNotFoundError):
        spool.append(one)
    spool.append(two)
    assert read_all(spool) == [two]
    assert [path.read_bytes() for path in tmp_path.rglob("*.ndjson")] == [two + b"\n"]


def test_a_root_that_was_removed_has_no_orphans(tmp_path: Path) -> None:
    """Nothing waits there, so there is no trouble; the next run makes it again."""
    root = tmp_path / "spool"
    prepare_root(root)
    spool = Spool(root, CELL_RUNS, BYTES_MAX)
    root.rmdir()
    assert adopt(spool) == 0
    spool.append(values(1)[0])
    assert read_all(spool) == values(1)


def test_a_full_spool_says_so(tmp_path: Path) -> None:
    """Beyond its bytes it takes nothing, and what it has stays whole, and counts also when it was set aside."""
    one, two = values(1, 2)
    with pytest.raises(SpoolFull):
        Spool(tmp_path, CELL_RUNS, len(one)).append(one)
    spool = Spool(tmp_path, CELL_RUNS, len(one) + 1)
    path = spool.append(one).segment.path
    with pytest.raises(SpoolFull):
        spool.append(two)
    path.write_bytes(b"")
    assert (spool.read(10), spool.unreadable) == ([], 1)
    path.write_bytes(one + b"\n")
    adopt(spool)
    with pytest.raises(SpoolFull):
        spool.append(two)
    assert numbers(spool.read(10)) == [one]


LIMITED = """
import resource, sys
from pathlib import Path
from creditstream.client.spool import Spool
from tests.client_kafka import a_run
from schemas.codec import decode_run, encode_run
spool = Spool(Path(sys.argv[1]), "cell-runs", 10**9)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
taken = refused = 0
for number in range(20):
    try:
        spool.append(encode_run(a_run(number)))
        taken += 1
    except OSError:
        refused += 1
try:
    spool.put_first([encode_run(a_run(number)) for number in range(100, 120)])
except OSError:
    refused += 100
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
spool.append(encode_run(a_run(99)))
print(taken, refused, [decode_run(entry.value).run_id.int % 2**64 for entry in spool.read(100)])
"""


def test_a_disk_that_refuses_loses_nothing_it_had_taken(tmp_path: Path) -> None:
    """A write that fails half-way leaves whole lines only, and once there is room the next run follows them."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stderr == ""
    taken, refused, *read = done.stdout.replace("[", "").replace("]", "").replace(",", "").split()
    assert int(taken) > 5
    assert int(refused) == 100 + 20 - int(taken)
    assert [int(number) for number in read] == [*range(int(taken)), 99]


def test_the_spool_of_a_living_process_is_left_alone(tmp_path: Path) -> None:
    """Who lives holds its lock; who is gone, whatever its pid, does not; two heirs never share."""
    living, dead = Spool(tmp_path, CELL_RUNS, BYTES_MAX), Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    living.append(values(1)[0])
    dead.append(values(2)[0])
    heirs = Spool(tmp_path, CELL_RUNS, BYTES_MAX), Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert [adopt(heir) for heir in heirs] == [0, 0]
    dead.close()
    assert [adopt(heir) for heir in heirs] == [1, 0]
    assert numbers(heirs[0].read(10)) == values(2)


def test_an_heir_that_cannot_delete_gives_its_locks_up(tmp_path: Path) -> None:
    """What it found is left to the next one, whatever the disk says."""
    dead = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    dead.append(values(1)[0])
    dead.close()
    (directory,) = tmp_path.iterdir()
    empty = directory / "0000000000000001.ndjson"
    empty.touch()
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    found = heir.find_orphans()
    empty.unlink()
    empty.mkdir()  # which no unlink removes
    with pytest.raises(OSError, match="0000000000000001"):
        heir.adopt(found)
    heir.close()
    empty.rmdir()
    assert adopt(Spool(tmp_path, CELL_RUNS, BYTES_MAX)) == 1


@pytest.mark.parametrize("moment", ["holds", "has_left", "leaves_before_the_lock", "leaves_before_the_file"])
def test_an_heir_that_is_quicker_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Whenever an heir finds a directory that its maker has not locked yet: the run is taken all the same, and nobody
    adopts what lives.
    """
    heir = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    places = {"leaves_before_the_lock": (home, "_try_lock"), "leaves_before_the_file": (os, "open")}
    where, name = places.get(moment, (spools, "lock_file"))
    plain = getattr(where, name)

    def comes_late(*args: object) -> object:
        monkeypatch.setattr(where, name, plain)  # once
        found = heir.find_orphans()
        if moment != "holds":
            heir.adopt(found)
        return plain(*args)

    monkeypatch.setattr(where, name, comes_late)
    spool, another = Spool(tmp_path, CELL_RUNS, BYTES_MAX), Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    spool.append(values(1)[0])
    assert getattr(where, name) is plain
    assert (adopt(another), adopt(heir)) == (0, 0)
    assert numbers(spool.read(10)) == values(1)


KILLED_AT_EACH_STEP = """
import os, signal, sys
from pathlib import Path
from creditstream.client.spool import Spool
from schemas.codec import decode_run, encode_run
from tests.client_kafka import a_run
root = Path(sys.argv[1])

def record(number):
    spool = Spool(root, "cell-runs", 10**9)
    spool.append(encode_run(a_run(number)))
    return spool

def die_at(step):
    events = iter(range(1, step))
    def die(*_):
        if next(events, None) is None:
            signal.raise_signal(signal.SIGKILL)  # of which no hook is told
    one = record(1)
    sys.addaudithook(die)
    two = record(2)
    os._exit(0)

for step in range(1, 100):
    child = os.fork()
    if not child:
        die_at(step)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    heir = Spool(root, "cell-runs", 10**9)
    heir.adopt(heir.find_orphans())
    found = []
    while entries := heir.read(10):
        found += [decode_run(entry.value).run_id.int % 2**64 for entry in entries]
        for entry in entries:
            heir.acknowledge(entry)
    heir.close()
    print(ended, *found, *os.listdir(root), sep=",")
    if ended == 0:
        break
"""


def test_wherever_a_process_is_killed_the_next_one_leaves_nothing_behind(tmp_path: Path) -> None:
    """Killed at any call while it makes a directory or a segment: what it had recorded is adopted, and nothing
    stays on disk for ever.
    """
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EACH_STEP, str(tmp_path)], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.stderr == ""
    *killed, whole = done.stdout.splitlines()
    assert len(killed) > 5
    assert set(killed) == {"-9,1"}
    assert whole == "0,1,2"


def test_a_child_keeps_no_file_of_its_parent(tmp_path: Path) -> None:
    """Neither a lock nor a segment, its own or adopted: what is deleted is to be gone from the disk."""
    dead = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    dead.append(values(1)[0])
    dead.close()
    gc.collect()  # those of other tests
    before = descriptors()
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    assert adopt(spool) == 1
    spool.append(values(2)[0])
    spool.after_fork()  # which a child does with its copy
    assert descriptors() == before


FORKS_WHILE_IT_LEAVES = """
import os, sys
from pathlib import Path
from creditstream.client.spool import Spool
root, count = Path(sys.argv[1]), 0
for number in range(2):
    (root / f"{number:020d}-1-cell-runs").mkdir()
spool, plain = Spool(root, "cell-runs", 10**9), os.rmdir

def fork_at_the_second(path, **place):
    global count
    count += 1
    if count == 2:
        other = os.open("/dev/null", os.O_RDONLY)  # it has the number that the first lock had
        if not (child := os.fork()):
            spool.after_fork()
            os.fstat(other)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    plain(path, **place)

os.rmdir = fork_at_the_second
spool.adopt(spool.find_orphans())
print(*os.listdir(root))
"""


def test_a_fork_while_directories_are_left_closes_nothing_of_others(tmp_path: Path) -> None:
    """The child gives up the locks that are still held, and no file that has the number of one that was."""
    done = subprocess.run(
        [sys.executable, "-c", FORKS_WHILE_IT_LEAVES, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert (done.stdout, done.stderr) == ("0\n\n", "")


def test_a_thread_that_comes_late_shares_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One fsync covers all that was written before it, and nothing that comes while it lasts; what Kafka already has
    needs none.
    """
    synced: list[int] = []
    monkeypatch.setattr(spools.os, "fsync", synced.append)
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    tickets = [spool.append(value) for value in values(1, 2, 3)]
    before = len(synced)

    def records_meanwhile(descriptor: int) -> None:
        synced.append(descriptor)
        monkeypatch.setattr(spools.os, "fsync", synced.append)
        tickets.append(spool.append(values(4)[0]))

    monkeypatch.setattr(spools.os, "fsync", records_meanwhile)
    for ticket in (*reversed(tickets), tickets[-1]):
        ticket.segment.sync(ticket.length)
    assert len(synced) == before + 1
    tickets[-1].segment.sync(tickets[-1].length)
    assert len(synced) == before + 2
    late = spool.append(values(5)[0])
    for entry in spool.read(10):
        spool.acknowledge(entry)
    thread = threading.Thread(target=late.segment.sync, args=[late.length], daemon=True)
    thread.start()
    thread.join(10)
    assert (thread.is_alive(), len(synced)) == (False, before + 2)


def test_a_directory_that_cannot_be_used_is_a_problem(tmp_path: Path) -> None:
    """A path below a file is refused at the start, in one line."""
    (tmp_path / "file").write_text("")
    with pytest.raises(Problem, match=r"the spool .*/file/spool cannot be used: Not a directory\. Choose"):
        prepare_root(tmp_path / "file" / "spool")


def test_segments_are_lines_that_can_be_sent_by_hand(tmp_path: Path) -> None:
    """A segment is what `creditstream send` reads, and nobody else may read it."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    for value in values(1, 2):
        spool.append(value)
    segment = next(tmp_path.rglob("*.ndjson"))
    assert segment.read_bytes().splitlines() == values(1, 2)
    assert os.stat(segment).st_mode & 0o077 == 0


def test_a_directory_that_cannot_be_made_is_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any other: whoever hands runs over keeps them. Nothing is left behind, and the next attempt succeeds."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    gc.collect()  # those of other tests
    before = descriptors()

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            spool.put_first(values(1, 2))
    assert files(tmp_path) == []
    assert descriptors() == before
    with monkeypatch.context() as broken:
        broken.setattr(spools, "_sync_directory", full)
        with pytest.raises(OSError, match="No space left"):
            spool.put_first(values(1, 2))
    assert files(tmp_path) == ["lock"]
    spool.put_first(values(1, 2))
    assert descriptors() == before + 1
    entries = spool.read(10)
    assert numbers(entries) == values(1, 2)
    for entry in entries:
        spool.acknowledge(entry)
    with monkeypatch.context() as broken:
        broken.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left"):
            spool.append(values(3)[0])
    spool.close()
    assert (list(tmp_path.iterdir()), descriptors()) == ([], before)


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_what_cannot_be_put_in_front_stays_with_who_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The disk refuses the file or its sync: whoever hands runs over hears it, and nothing of them is left behind."""
    spool = Spool(tmp_path, CELL_RUNS, BYTES_MAX)
    spool.append(values(3)[0])
    before, plain = files(tmp_path), getattr(os, call)

    def full(descriptor: int, *rest: object) -> object:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(28, "No space left on device")
        return plain(descriptor, *rest)

    with monkeypatch.context() as broken:
        broken.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            spool.put_first(values(1, 2))
    assert files(tmp_path) == before
    spool.put_first(values(1, 2))
    assert read_all(spool) == values(1, 2, 3)
