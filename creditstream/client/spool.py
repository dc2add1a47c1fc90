"""Cell runs on disk that Kafka has not taken yet: what survives an outage, a full queue and a killed process.

Below the spool's root each process has a directory of its own, locked for as long as it lives; the operating system
drops the lock with the process, and whoever finds a directory unlocked adopts it. A directory holds segments, files of
JSON lines, each line the Kafka value of one run; so a segment can also be sent by hand, by ``creditstream send``. A
segment is deleted once Kafka has all of it. Until then it is sent again from its beginning by whoever adopts it: a
copy is never charged twice.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from creditstream.home import lock_file
from schemas.problem import Problem

SEGMENT_BYTES: Final = 4 * 1024 * 1024
READ_BYTES: Final = 256 * 1024
"""How much is read at once; more than the longest line."""
_MIDDLE: Final = 10**15
"""The number of a directory's first segment: later ones count up, those that must be sent before them count down."""
_log: Final = logging.getLogger("creditstream.client")


class SpoolFull(Exception):
    """The spool holds as many bytes as it may."""


class _Keyed(msgspec.Struct, gc=False):
    workspace_id: str


_decode_key: Final = msgspec.json.Decoder(_Keyed).decode


class Segment:
    """One file. Appended to by one thread at a time, and synced by several at once."""

    def __init__(self, path: Path, descriptor: int | None, length: int = 0, runs: int = 0) -> None:
        self.path: Final = path
        self.length = length
        """Bytes of whole lines."""
        self.runs = runs
        self.position = 0
        """Up to where it has been read."""
        self.runs_read = 0
        self.pending = 0
        """Runs that were read and of which it is not known that Kafka has them."""
        self.is_spoiled = False
        """It has a line that is no run: the file is kept when it has been read."""
        self._descriptor = descriptor
        self._synced = 0
        self._syncing: Final = threading.Lock()

    def append(self, data: bytes, runs: int) -> None:
        """Write whole lines, or nothing: OSError, and the file is as it was."""
        assert self._descriptor is not None
        try:
            written = 0
            while written < len(data):
                written += os.write(self._descriptor, data[written:])
        except OSError:
            with suppress(OSError):
                os.ftruncate(self._descriptor, self.length)
                os.lseek(self._descriptor, self.length, os.SEEK_SET)
            raise
        self.length += len(data)
        self.runs += runs

    @property
    def is_whole(self) -> bool:
        """Whether nothing but whole lines is in the file, so that another may be appended."""
        return self._descriptor is not None and os.fstat(self._descriptor).st_size == self.length

    def sync(self, length: int) -> None:
        """Return once this many bytes are on disk. Threads that come together share one fsync."""
        with self._syncing:
            if self._synced < length and self._descriptor is not None:
                reached = self.length
                os.fsync(self._descriptor)
                self._synced = reached

    def close(self) -> None:
        """No more appends. What nobody waits for any more need not be synced."""
        with self._syncing:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def after_fork(self) -> None:
        """In the child. Not `close`: its lock may have been taken when the process forked."""
        if self._descriptor is not None:
            os.close(self._descriptor)

    @property
    def is_read(self) -> bool:
        """Whether nothing is left to read."""
        return self.position >= self.length


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


class _Directory(NamedTuple):
    path: Path
    lock: int


class Spool:
    """The segments of this process and of those that it adopted, in the order in which they are to be sent.

    Not thread-safe, but for `Segment.sync`. OSError where the disk refuses. ``bytes_max`` bounds what `append` takes.
    """

    def __init__(self, root: Path, bytes_max: int) -> None:
        self._root: Final = root
        self._bytes_max: Final = bytes_max
        self._segments: list[Segment] = []
        self._own: _Directory | None = None
        self._adopted: list[_Directory] = []
        self._tail: Segment | None = None
        self._numbers = (_MIDDLE, _MIDDLE)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum(segment.length for segment in self._segments)

    @property
    def unread(self) -> int:
        """Runs that have not been read since they were written, or since `rewind`."""
        return sum(segment.runs - segment.runs_read for segment in self._segments)

    def append(self, value: bytes) -> Ticket:
        """Write one run at the end. SpoolFull, or OSError, and then nothing was written."""
        if self.size_bytes + len(value) + 1 > self._bytes_max:
            raise SpoolFull
        if self._tail is None or self._tail.length >= SEGMENT_BYTES:
            self._rotate()
        assert self._tail is not None
        try:
            self._tail.append(value + b"\n", 1)
        except OSError:
            if not self._tail.is_whole:
                self._retire_tail()
            raise
        return Ticket(self._tail, self._tail.length)

    def put_first(self, values: Sequence[bytes]) -> None:
        """Write runs so that they are read before all that has not been read; on disk when this returns.

        What was read of the other segments and is still pending must be among them: it is forgotten there.
        """
        first = self._numbers[0] - 1
        segment = self._create(first)
        try:
            segment.append(b"".join(value + b"\n" for value in values), len(values))
            segment.sync(segment.length)
        except OSError:
            segment.close()
            segment.path.unlink()
            raise
        segment.close()
        self._numbers = (first, self._numbers[1])
        for other in self._segments:
            other.pending = 0
        self._segments.insert(0, segment)
        self._remove_sent()

    def read(self, runs_max: int) -> list[Entry]:
        """The next runs, at most this many; each is pending until `settle`, `rewind` or `put_first`."""
        for segment in self._segments:
            if not segment.is_read:
                return self._read_from(segment, runs_max)
        return []

    def settle(self, entry: Entry) -> None:
        """Kafka has it."""
        entry.segment.pending -= 1
        if not entry.segment.pending and entry.segment.is_read:
            self._remove_sent()

    def rewind(self, entries: Iterable[Entry]) -> None:
        """These, all that is pending, are to be read again."""
        first: dict[int, Entry] = {}
        for entry in entries:
            held = first.setdefault(id(entry.segment), entry)
            if entry.position < held.position:
                first[id(entry.segment)] = entry
        for entry in first.values():
            entry.segment.position, entry.segment.runs_read = entry.position, entry.number
            entry.segment.pending = 0

    def adopt(self) -> int:
        """Take over the directories of dead processes; how many runs they hold. OSError when that cannot be known."""
        runs = 0
        for path in sorted(self._root.iterdir()):
            if path.name.startswith(".") or not path.is_dir() or (self._own and path == self._own.path):
                continue
            try:
                lock = lock_file(path / "lock", 0)
            except OSError:
                continue  # another user's
            if lock is None:
                continue
            try:
                found = [_found(segment) for segment in sorted(path.glob("*.ndjson"))]
            except OSError:
                os.close(lock)
                raise
            runs += sum(segment.runs for segment in found)
            self._adopted.append(_Directory(path, lock))
            self._segments.extend(found)
        self._remove_sent()
        return runs

    def close(self) -> None:
        """Leave to the next process what is left, and nothing where nothing is."""
        self._remove_sent()
        for segment in self._segments:
            segment.close()
        for directory in self._directories():
            _leave(directory)
        self._segments, self._adopted, self._own, self._tail = [], [], None, None

    def after_fork(self) -> None:
        """In the child: all of this is the parent's. A lock that the child kept open would outlive the parent."""
        for segment in self._segments:
            segment.after_fork()
        for directory in self._directories():
            os.close(directory.lock)
        self._segments, self._adopted, self._own, self._tail = [], [], None, None
        self._numbers = (_MIDDLE, _MIDDLE)

    def _directories(self) -> list[_Directory]:
        return [*self._adopted, *([self._own] if self._own else [])]

    def _read_from(self, segment: Segment, runs_max: int) -> list[Entry]:
        with segment.path.open("rb") as file:
            file.seek(segment.position)
            data = file.read(min(READ_BYTES, segment.length - segment.position))
        lines = data.split(b"\n")[:-1][:runs_max]
        entries = []
        for line in lines or [data]:
            try:
                workspace_id = _decode_key(line).workspace_id
                entries.append(Entry(line, workspace_id, segment, segment.position, segment.runs_read))
            except (msgspec.DecodeError, UnicodeDecodeError):
                segment.is_spoiled = True
                _log.error("%s, byte %d: not a cell run; the file will be kept", segment.path, segment.position)
            segment.position += len(line) + bool(lines)
            segment.runs_read += bool(lines)
        segment.pending += len(entries)
        if not segment.pending:
            self._remove_sent()
        return entries

    def _rotate(self) -> None:
        self._retire_tail()
        last = self._numbers[1] + 1
        self._tail = self._create(last)
        self._numbers = (self._numbers[0], last)
        self._segments.append(self._tail)

    def _retire_tail(self) -> None:
        if self._tail is not None:
            self._tail.sync(self._tail.length)
            self._tail.close()
        self._tail = None

    def _create(self, number: int) -> Segment:
        if self._own is None:
            self._own = _new_directory(self._root)
        path = self._own.path / f"{number:016d}.ndjson"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            _sync_directory(self._own.path)
        except BaseException:  # else its number would be taken for good
            os.close(descriptor)
            path.unlink(missing_ok=True)
            raise
        return Segment(path, descriptor)

    def _remove_sent(self) -> None:
        """Delete the segments, and the adopted directories, of which Kafka has everything."""
        kept = []
        for segment in self._segments:
            if not segment.is_read or segment.pending:
                kept.append(segment)
                continue
            segment.close()
            if segment is self._tail:
                self._tail = None
            if segment.is_spoiled:
                segment.path.replace(self._root / f"{segment.path.parent.name}-{segment.path.name}.unreadable")
            else:
                segment.path.unlink(missing_ok=True)
        self._segments = kept
        used = {segment.path.parent for segment in kept}
        for directory in self._adopted:
            if directory.path not in used:
                _leave(directory)
        self._adopted = [directory for directory in self._adopted if directory.path in used]


def _new_directory(root: Path) -> _Directory:
    """A directory that is locked before it has the name under which others look for it."""
    name = f"{time.time_ns():020d}-{os.getpid()}"
    draft = root / f".{name}"
    try:
        lock = lock_file(draft / "lock", 0)
    except OSError:  # a full disk, or no descriptor left
        with suppress(OSError):
            (draft / "lock").unlink(missing_ok=True)
            draft.rmdir()
        raise
    assert lock is not None, "nobody else knows this name"
    draft.rename(root / name)
    _sync_directory(root)
    return _Directory(root / name, lock)


def _leave(directory: _Directory) -> None:
    """Remove it where it is empty; give up its lock."""
    if not any(directory.path.glob("*.ndjson")):
        with suppress(OSError):
            (directory.path / "lock").unlink(missing_ok=True)
            directory.path.rmdir()
    os.close(directory.lock)


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
    """Make a new name in a directory durable."""
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
