"""One file of a spool: appended to, synced, read; whatever signals, threads and the disk do."""

import errno
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

READ_BYTES: Final = 256 * 1024
"""How much is read at once; more than the longest line."""


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
        self.is_own = descriptor is not None
        """It lies in the directory of this process."""
        self.is_spoiled = False
        """It has a line that is no run: the file is kept when it has been read."""
        self._descriptor = descriptor
        self._synced = 0
        self._syncing: Final = threading.RLock()
        self._syncs = 0
        """Frames that sync: more than one where the handler of a signal came between."""
        self._is_over = False
        self.failure: OSError | None = None
        """Why a sync failed. The system says so once; what was not synced then may never be."""

    @property
    def is_read(self) -> bool:
        """Whether nothing is left to read."""
        return self.position >= self.length

    @property
    def is_gone(self) -> bool:
        """Whether somebody has removed the file: what is written into it now, nobody will find."""
        return self._descriptor is not None and not os.fstat(self._descriptor).st_nlink

    def append(self, data: bytes, runs: int) -> None:
        """Write whole lines. OSError, or whatever the handler of a signal raises; then none of them counts, and what
        was written of them lies beyond ``length`` until the next append removes it.
        """
        assert self._descriptor is not None
        size = len(data)
        while (start := self._write(self._descriptor, data, size)) != self.length:
            pass  # the handler of a signal has appended meanwhile: now behind that
        # Nothing is called after this look, so no signal comes between.
        self.length = start + size
        self.runs += runs

    def _write(self, descriptor: int, data: bytes, size: int) -> int:
        """Write behind ``length``; where that was. Each look at ``length`` is followed by no other call than the one
        that it is for: what the handler of a signal has appended must not be written over.
        """
        start, written, found = self.length, 0, os.fstat(descriptor)
        if self.length == start and found.st_size > start:
            os.ftruncate(descriptor, start)
        while written < size and self.length == start:
            written += os.pwrite(descriptor, data[written:], start + written)
        return start

    def read(self) -> bytes:
        """A part of what has not been read. OSError, also when the file is shorter than it was."""
        with self.path.open("rb") as file:
            file.seek(self.position)
            data = file.read(min(READ_BYTES, self.length - self.position))
        if not data:
            raise OSError(errno.ENODATA, f"it ends before byte {self.length}")
        return data

    def sync(self, length: int) -> None:
        """Return once this many bytes are on disk. Threads that come together share one fsync. OSError, also when it
        failed for others before.
        """
        try:
            with self._syncing:
                self._syncs += 1
                try:
                    if self._synced < length:
                        self._sync()
                finally:
                    self._syncs -= 1
        finally:
            if self._is_over:
                self._let_go()

    def _sync(self) -> None:
        if self.failure:
            raise self.failure
        if (descriptor := self._descriptor) is None:
            return
        reached = self.length
        try:
            os.fsync(descriptor)
        except OSError as error:
            self.failure = error
            raise
        self._synced = reached

    def close(self, *, synced: bool = False) -> None:
        """No more appends. ``synced``: first what is not on disk yet; else nobody waits for that any more. Waits for
        nobody who syncs: that may be the frame in which the handler of a signal closes.
        """
        if synced and self._synced < self.length:
            with suppress(OSError):  # whoever waits for it hears of it
                self._sync()
        self._is_over = True
        self._let_go()

    def _let_go(self) -> None:
        """Close the file, unless somebody syncs: then he does, at his end."""
        if self._syncing.acquire(blocking=False):
            if not self._syncs and self._descriptor is not None:
                descriptor, self._descriptor = self._descriptor, None
                os.close(descriptor)
            self._syncing.release()

    def after_fork(self) -> None:
        """In the child. Not `close`: its lock may have been taken when the process forked."""
        if self._descriptor is not None:
            with suppress(OSError):  # another thread was closing it
                os.close(self._descriptor)
