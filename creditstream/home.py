"""The home: the one directory under which everything embedded lies.

Who uses a home is decided by a lock that the operating system drops with its holder, never by a file that a
killed process may leave behind: a pid or an address read here counts only while the lock is held.
"""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from schemas.problem import Problem
from streams.settings import Settings, read_settings, variable

HOLD_WAIT_S = 1.0
"""How long `Home.hold` tries: longer than any `Home.worker` needs the lock to see who has it."""
COMMAND_WAIT_S = 5.0
"""How much longer it tries while the holder publishes no address: that may be a command, done in a few seconds."""
LOCK_POLL_S = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_ERRORS = (*_FULL, errno.EROFS, errno.EIO)
"""What a disk may say of any file, so that it need not be named."""


class Endpoints(msgspec.Struct, frozen=True):
    """Where the process that holds a home can be reached."""

    kafka_bootstrap: str
    api_url: str
    pid: int


class Home(msgspec.Struct, frozen=True):
    """The directory of one embedded installation; made when it is first held."""

    path: Path

    @classmethod
    def at(cls, path: str | Path | None) -> "Home":
        """The home at `path`; without one at $CREDITSTREAM_HOME, else at `.creditstream` here.

        Symbolic links are resolved, so that one directory is one home however it is spelled. Problem where it begins
        with a user whom nobody knows.
        """
        chosen = path or os.environ.get(variable("home")) or Settings().home
        try:
            return cls(Path(chosen).expanduser().resolve())
        except RuntimeError as error:
            raise Problem(f"{chosen} is not a directory", str(error), "Choose another home.") from error

    @property
    def kafka(self) -> Path:
        """Kafka's data and configuration."""
        return self.path / "kafka"

    @property
    def ledger(self) -> Path:
        """chDB's directory; one process at a time may open it."""
        return self.path / "ledger"

    @property
    def logs(self) -> Path:
        """What the embedded processes write about themselves."""
        return self.path / "logs"

    @property
    def endpoints_path(self) -> Path:
        """Where the holder publishes its `Endpoints`, as JSON."""
        return self.path / "endpoints.json"

    @property
    def _lock_path(self) -> Path:
        return self.path / "worker.lock"

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Be the one process that uses this home, until the block ends or the process dies.

        Programs started in the block do not inherit the lock; a bare `os.fork` would.
        Raises `Problem` when another process holds it, with its pid, or when the directory cannot be used: also when
        that shows only in the block, since a disk gets full.
        """
        lock = take_lock(self._lock_path, HOLD_WAIT_S)
        if lock is None and not self.worker():
            lock = take_lock(self._lock_path, COMMAND_WAIT_S)
        if lock is None:
            raise self._held_by_another()
        try:
            self.withdraw()
            yield
        except OSError as error:
            if error.errno not in _DISK_ERRORS and not str(error.filename or "").startswith(f"{self.path}{os.sep}"):
                raise
            raise _unusable(Path(error.filename or self.path), error) from error
        finally:
            with suppress(OSError):  # what it says counts only while the lock is held
                self.withdraw()
            os.close(lock)

    def publish(self, endpoints: Endpoints) -> None:
        """Say where the holder can be reached; a reader sees the old or the new text, never a part."""
        draft = self.endpoints_path.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(endpoints))
        draft.replace(self.endpoints_path)

    def withdraw(self) -> None:
        """Take back what `publish` said."""
        self.endpoints_path.unlink(missing_ok=True)

    def worker(self) -> Endpoints | None:
        """Where the live process that holds this home answers; None without one, or until it publishes."""
        try:
            if (holder := self._holder()) is None:
                return None
            endpoints = msgspec.json.decode(self.endpoints_path.read_bytes(), type=Endpoints)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Problem(
                f"{self.path} cannot be read", error.strerror or "", "Choose a directory that you can read."
            ) from error
        return endpoints if endpoints.pid == holder else None

    def starting(self) -> int | None:
        """The pid of another process that holds this home and does not answer: a worker that starts, or a command."""
        holder = None if self.worker() or not self._lock_path.exists() else self._holder()
        return None if holder == os.getpid() else holder

    def _holder(self) -> int | None:
        with self._lock_path.open("rb") as lock:
            return None if _try_lock(lock.fileno(), fcntl.LOCK_SH) else lock_holder(self._lock_path)

    def _held_by_another(self) -> Problem:
        pid = lock_holder(self._lock_path)
        holder = f"process {pid} holds it" if pid else "another process holds it"
        fix = f"Stop that process{f' (kill {pid})' if pid else ''}"
        if not self.worker():
            holder, fix = f"{holder}: a worker that is starting, or another command", "Try again in a few seconds"
        return Problem(f"the home {self.path} is in use", holder, f"{fix}, or choose another directory with --home.")


def settings_of(home: str | Path | None = None) -> Settings:
    """The settings of this home, with the Kafka of `whose_kafka`. Problem when a variable is out of its bounds."""
    place = Home.at(home)
    owner = whose_kafka(place)
    return read_settings(home=str(place.path), kafka_bootstrap=owner.kafka_bootstrap if owner else None)


def whose_kafka(place: Home) -> Endpoints | None:
    """The process in the home (``creditstream worker`` or ``demo``) whose Kafka commands and clients use; None when
    CREDITSTREAM_KAFKA_BOOTSTRAP names another, which wins.
    """
    return None if variable("kafka_bootstrap") in os.environ else place.worker()


def take_lock(path: Path, wait_s: float) -> int | None:
    """As `lock_file`, for a directory that a person has chosen: `Problem` when it cannot be written."""
    try:
        return lock_file(path, wait_s)
    except OSError as error:
        raise _unusable(path.parent, error) from error


def _unusable(path: Path, error: OSError) -> Problem:
    fix = "Free space on that disk" if error.errno in _FULL else "Choose a directory that you can write to"
    return Problem(f"{path} cannot be used", error.strerror or str(error), f"{fix}.")


def lock_file(path: Path, wait_s: float) -> int | None:
    """An open descriptor that holds the exclusive lock on `path`, or None when it stays taken for `wait_s`.

    Closing the descriptor frees the lock; so does the death of every process that has it open.
    The own pid is written into it, for `lock_holder`. OSError when `path` cannot be written; then nothing is open.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        deadline = time.monotonic() + wait_s
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                os.close(descriptor)
                return None
            time.sleep(LOCK_POLL_S)
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def lock_holder(path: Path) -> int | None:
    """The pid that last signed the lock at `path`; it holds the lock only if the lock is taken."""
    text = path.read_text().strip()
    return int(text) if text.isdigit() else None


def _try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
