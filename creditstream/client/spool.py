"""Cell runs on disk that Kafka has not taken yet: what survives an outage, a full queue and a killed process.

Below the spool's root each process has a directory of its own, locked for as long as it lives; the operating system
drops the lock with the process, and whoever finds a directory unlocked adopts it, if it sends to the topic that the
directory's name ends with. A directory holds segments, files of JSON lines, each line the Kafka value of one run; so a
segment can also be sent by hand, by ``creditstream send``. A segment is deleted once Kafka has all of it. Until then it
is sent again from its beginning by whoever adopts it: a copy is never charged twice.
"""

import errno
import logging
import os
import re
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from creditstream.client.segment import READ_BYTES, Segment
from creditstream.home import lock_file
from schemas.problem import Problem

SEGMENT_BYTES: Final = 4 * 1024 * 1024
_MIDDLE: Final = 10**15
"""Segments have numbers above it in the order of writing; those that must be sent before them count down from it."""
_LACKING: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""What the process lacks, and no fault of the file: were that set aside, what is behind it would overtake it."""
_log: Final = logging.getLogger("creditstream.client")


class SpoolFull(Exception):
    """The spool holds as many bytes as it may."""


class _Keyed(msgspec.Struct, gc=False):
    workspace_id: str


_decode_key: Final = msgspec.json.Decoder(_Keyed).decode
_NO_RUN: Final = (ValueError, RecursionError)
"""What decoding raises; msgspec's errors are ValueErrors."""


class Ticket(NamedTuple):
    """What `Spool.append` wrote; on disk once ``segment.sync(length)`` has returned."""

    segment: Segment
    length: int


class Entry(NamedTuple):
    """One run as it was read from a segment."""

    value: bytes
    workspace_id: str
    segment: Segment
    position: int
    number: int


class Orphans(NamedTuple):
    """Segments that nobody sends, and why others cannot be read."""

    segments: list[Segment]
    unreadable: dict[Path, OSError]


class _Directory(NamedTuple):
    path: Path
    lock: int


class Spool:
    """The segments of this process and of those that it adopted, in the order in which they are to be sent.

    A segment that cannot be read is set aside: said in the log, left where it is, and tried again with the orphans.
    Not thread-safe, but for `Segment.sync` and `find_orphans`. OSError where the disk refuses. ``bytes_max`` bounds
    this process's own.
    """

    def __init__(self, root: Path, topic: str, bytes_max: int) -> None:
        self._root: Final = root
        self._topic: Final = topic
        self._bytes_max: Final = bytes_max
        self._segments: list[Segment] = []
        self._aside: set[Path] = set()
        self._own: _Directory | None = None
        self._adopted: list[_Directory] = []
        self._tail: Segment | None = None
        self._appends = 0
        """Frames that append: more than one where the handler of a signal came between. Until they end, what they write
        into stays, and a `close` waits for them, not they for it.
        """
        self._is_over = False
        self._first = self._last = _MIDDLE

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum(segment.length for segment in self._segments)

    @property
    def unread(self) -> int:
        """Runs that have not been read since they were written, or since `rewind`."""
        return sum(segment.runs - segment.runs_read for segment in self._segments)

    @property
    def unreadable(self) -> int:
        """Segments that are set aside."""
        return len(self._aside)

    def append(self, value: bytes) -> Ticket:
        """Write one run at the end. SpoolFull, or OSError, and then it does not count."""
        self._appends += 1
        try:
            return self._append(value)
        finally:
            self._appends -= 1
            if self._is_over:
                self.close()

    def _append(self, value: bytes) -> Ticket:
        own = sum(segment.length for segment in self._segments if segment.is_own)
        if own + len(value) + 1 > self._bytes_max:
            raise SpoolFull
        tail = self._tail
        is_full = tail is not None and tail.length >= SEGMENT_BYTES and self._appends == 1
        if tail is None or is_full or tail.failure or tail.is_gone:
            self._rotate()
        assert self._tail is not None
        self._tail.append(value + b"\n", 1)
        return Ticket(self._tail, self._tail.length)

    def put_first(self, values: Sequence[bytes]) -> None:
        """Write runs so that they are read before all that has not been read; on disk when this returns.

        What was read of the other segments and is still pending must be among them: it is forgotten there.
        """
        self._first -= 1
        segment = self._create(self._first)
        try:
            segment.append(b"".join(value + b"\n" for value in values), len(values))
            segment.sync(segment.length)
        except OSError:
            segment.close()
            segment.path.unlink()
            raise
        segment.close()
        for other in self._segments:
            other.pending = 0
        self._segments.insert(0, segment)
        self._remove_sent()

    def read(self, runs_max: int) -> list[Entry]:
        """The next runs, at most this many; each is pending until `acknowledge`, `rewind` or `put_first`."""
        for segment in tuple(self._segments):
            if segment.is_read:
                continue
            try:
                data = segment.read()
            except OSError as error:
                if error.errno in _LACKING:
                    raise
                self._segments.remove(segment)
                self._set_aside(segment.path, error)
                if segment is self._tail:
                    self._retire_tail()
            else:
                return self._entries(segment, data, runs_max)
        return []

    def acknowledge(self, entry: Entry) -> None:
        """Kafka has it."""
        entry.segment.pending -= 1
        if not entry.segment.pending and entry.segment.is_read:
            self._remove_sent()

    def rewind(self, entries: Iterable[Entry]) -> bool:
        """These, all that is pending, in the order of their reading, are to be read again. False where a file of theirs
        was set aside meanwhile, from which nothing can be: then nothing is done.
        """
        first: dict[int, Entry] = {}
        for entry in entries:
            first.setdefault(id(entry.segment), entry)
        if not first.keys() <= set(map(id, self._segments)):
            return False
        for entry in first.values():
            entry.segment.position, entry.segment.runs_read = entry.position, entry.number
            entry.segment.pending = 0
        return True

    def find_orphans(self) -> Orphans:
        """Lock the directories of dead processes and read them, and what is set aside: for `adopt`. OSError for the
        root. This may take long; runs may be appended meanwhile.
        """
        paths = sorted(self._aside)
        for directory in sorted(self._root.iterdir()) if self._root.exists() else ():  # else somebody has removed it
            if not self._may_adopt(directory.name):
                continue
            try:
                lock = _lock(directory)
            except OSError:
                continue  # another user's
            if lock is not None:
                self._adopted.append(_Directory(directory, lock))
                paths += sorted(directory.glob("*.ndjson"))
        found = Orphans([], {})
        for path in paths:
            try:
                found.segments.append(_found(path))
            except FileNotFoundError:
                pass  # a person has removed it
            except OSError as error:
                if error.errno in _LACKING:
                    raise
                found.unreadable[path] = error
        return found

    def adopt(self, found: Orphans) -> int:
        """Take over what `find_orphans` found; how many runs of dead processes can be read."""
        adopted = sum(segment.runs for segment in found.segments if segment.path not in self._aside)
        self._aside &= found.unreadable.keys()
        for path, error in found.unreadable.items():
            self._set_aside(path, error)
        for segment in found.segments:
            segment.is_own = self._is_own(segment.path.parent)
        self._segments += found.segments
        self._remove_sent()
        return adopted

    def close(self) -> None:
        """Leave to the next process what is left, and nothing where nothing is. Within an append, in the handler of a
        signal, that is done at its end.
        """
        self._is_over = True
        if self._appends:
            return
        with suppress(OSError):  # what cannot be deleted is left, too: a copy is never charged twice
            self._remove_sent()
        for segment in self._segments:
            segment.close(synced=True)
        for directory in self._directories():
            self._leave(directory)
        self._segments, self._tail = [], None

    def after_fork(self) -> None:
        """In the child: all of this is the parent's. A lock that the child kept open would outlive the parent."""
        for segment in self._segments:
            segment.after_fork()
        for directory in self._directories():
            os.close(directory.lock)

    def _directories(self) -> list[_Directory]:
        return [*self._adopted, *([self._own] if self._own else [])]

    def _may_adopt(self, name: str) -> bool:
        shape = _NAME.fullmatch(name)
        return shape is not None and shape["topic"] == self._topic and not self._is_own(self._root / name)

    def _is_own(self, directory: Path) -> bool:
        return self._own is not None and directory == self._own.path

    def _entries(self, segment: Segment, data: bytes, runs_max: int) -> list[Entry]:
        lines = data.split(b"\n")[:-1][:runs_max]
        entries = []
        position, number = segment.position, segment.runs_read
        for line in lines or [data]:
            try:
                entries.append(Entry(line, _decode_key(line).workspace_id, segment, position, number))
            except _NO_RUN:
                segment.is_spoiled = True
                _log.error("%s, byte %d: not a cell run; the file will be kept", segment.path, position)
            position += len(line) + bool(lines)
            number += bool(lines)
        segment.position, segment.runs_read = position, number
        segment.pending += len(entries)
        return entries

    def _set_aside(self, path: Path, error: OSError) -> None:
        if path not in self._aside:
            _log.error(
                "%s cannot be read: %s. Its runs wait, all others go on. Repair it: it will be tried again",
                path,
                error.strerror or error,
            )
        self._aside.add(path)

    def _rotate(self) -> None:
        self._retire_tail()
        self._last += 1
        tail = self._create(self._last)
        if self._tail:  # the handler of a signal was quicker, and what was recorded since must not come before its run
            tail.close()
            tail.path.unlink()
            return
        self._tail = tail
        self._segments.append(tail)

    def _retire_tail(self) -> None:
        tail, self._tail = self._tail, None
        if tail:
            if not tail.failure:  # else whoever waited for it has heard
                tail.sync(tail.length)
            tail.close()

    def _create(self, number: int) -> Segment:
        if self._own is None:
            made = _new_directory(self._root, self._topic)
            if self._own is None:
                self._own = made
            else:  # the handler of a signal was quicker
                self._adopted.append(made)
                self._leave(made)
        path = self._own.path / f"{number:016d}.ndjson"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileNotFoundError:  # somebody has removed it: the next append makes another one
            self._forget(self._own)
            raise
        try:
            for directory in (self._own.path, self._root):
                _sync_directory(directory)
        except BaseException:
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return Segment(path, descriptor)

    def _remove_sent(self) -> None:
        """Delete the segments, and the adopted directories, of which Kafka has everything."""
        kept = []
        for segment in self._segments:
            if not segment.is_read or segment.pending or self._appends:
                kept.append(segment)
                continue
            segment.close()
            if segment is self._tail:
                self._tail = None
            with suppress(FileNotFoundError):
                if segment.is_spoiled:
                    segment.path.rename(self._root / f"{segment.path.parent.name}-{segment.path.name}.unreadable")
                else:
                    segment.path.unlink()
        self._segments = kept
        used = {path.parent for path in (*self._aside, *(segment.path for segment in kept))}
        for directory in [each for each in self._adopted if each.path not in used]:
            self._leave(directory)

    def _leave(self, directory: _Directory) -> None:
        """Remove it where it is empty; give up its lock, whatever the disk says."""
        with suppress(OSError):
            if not any(directory.path.glob("*.ndjson")):
                (directory.path / "lock").unlink(missing_ok=True)
                directory.path.rmdir()
        self._forget(directory)

    def _forget(self, directory: _Directory) -> None:
        if self._is_own(directory.path):
            self._own = None
        else:
            self._adopted.remove(directory)
        os.close(directory.lock)  # last: a child that is forked before must not close what has this number by then


_NAME: Final = re.compile(r"[0-9]{20}-[0-9]+-(?P<topic>.+)")


def _new_directory(root: Path, topic: str) -> _Directory:
    """A directory of its own, locked. An heir that finds it before that takes it for a dead process's: then another."""
    while True:
        path = root / f"{time.time_ns():020d}-{os.getpid()}-{topic}"
        try:
            lock = _lock(path)  # which makes it
        except (FileNotFoundError, FileExistsError):  # it has gone, or just then
            continue
        except OSError:  # a full disk, or no descriptor left
            with suppress(OSError):
                (path / "lock").unlink(missing_ok=True)
                path.rmdir()
            raise
        if lock is not None:
            return _Directory(path, lock)


def _lock(directory: Path) -> int | None:
    """The lock of a directory; None while another has it, or has removed it: a file that is gone locks nothing."""
    path = directory / "lock"
    lock = lock_file(path, 0)
    if lock is None:
        return None
    is_there = False
    try:
        with suppress(FileNotFoundError):
            is_there = os.path.samestat(os.fstat(lock), path.stat())
    finally:
        if not is_there:
            os.close(lock)
    return lock if is_there else None


def _found(path: Path) -> Segment:
    """A segment of a dead process. A line without its end was never accepted."""
    length = runs = position = 0
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            runs += data.count(b"\n")
            if (end := data.rfind(b"\n")) >= 0:
                length = position + end + 1
            position += len(data)
    return Segment(path, None, length, runs)


def _sync_directory(path: Path) -> None:
    """Make new names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare_root(root: Path) -> None:
    """Make the directory below which spools lie. Problem when it cannot be written."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not os.access(root, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(0, "no permission to write")
    except OSError as error:
        raise Problem(
            f"the spool {root} cannot be used", error.strerror or str(error), "Choose a directory with `spool=`."
        ) from error
