"""The producer of cell runs for enrichment workers: not in the way, and nothing that it accepted is lost."""

import atexit
import logging
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from confluent_kafka import KafkaError, KafkaException, Producer

from creditstream.client.connection import KafkaOptions, connection, options_refused, partitions
from creditstream.client.flag import Flag
from creditstream.client.forking import abandon, await_resolver, survive_forks
from creditstream.client.outbox import Outbox, spool_refused
from creditstream.client.recording import Counts, InvalidRun, OnFull, valid_value
from creditstream.client.spool import Spool, prepare_root
from creditstream.home import Home, settings_of
from creditstream.producing import PRODUCER_CONFIG
from schemas.cell_run import MAX_EVENT_BYTES, CellRun
from schemas.problem import Problem, Unreachable
from streams.kafka.topics import CELL_RUNS
from streams.settings import Settings

MEMORY_S_MAX: Final = 5
SPOOL_MB_MAX: Final = 256
MB: Final = 1024 * 1024
BLOCK_S_MAX: Final = 30
BATCH_BYTES: Final = MAX_EVENT_BYTES
"""No more than the largest event, which every topic must take: one that is refused for its size would be for ever."""
FLUSH_S_MAX: Final = 10
RETRY_S: Final = 0.25
ADOPT_EVERY_S: Final = 10.0
BUSY_POLL_S: Final = 0.02
IDLE_S: Final = 0.5
STOP_S_MAX: Final = 5.0

_OURS: Final = {
    **PRODUCER_CONFIG,
    # librdkafka never gives a run up by itself: the one behind it could still go through, and come in first.
    "message.timeout.ms": 0,
    "message.max.bytes": 1_000_000,  # smaller, it could refuse a run that was accepted
    "queue.buffering.max.kbytes": 64 * 1024,
    "log_level": 0,
}
_log: Final = logging.getLogger("creditstream.client")


class CellRunProducer:
    """Records cell runs, from any thread, until `close`.

    **What accepted means.** When `record` returns, the run is in memory, in the queue of the Kafka client, or synced to
    the spool on disk. Memory is the usual place, for the 10 ms or so until Kafka acknowledges; a run for which memory
    has no room goes to the spool, and so does all of memory when nothing is acknowledged for ``memory_s_max``. An
    ordinary end of the process (also ``sys.exit``; not an unhandled SIGTERM, and not the end of a `multiprocessing`
    child, which must `close`) sends what it can in 10 s and leaves the rest in the spool. So only those ends, a
    ``kill -9`` or a lost machine lose runs, and only those in memory: 10,000 at the most, and `counts` says how many.
    With ``write_ahead`` no end loses any: every run is synced to the spool before `record` returns, at the price of an
    fsync, which threads that record at once share.

    **Order.** First copies of a workspace's runs arrive in the order in which they were recorded by this process.
    After an outage Kafka may have some twice, which the meter does not charge twice.

    ``on_full`` says what `record` does when memory is full: "spool" (the default; it waits for the disk, never for
    Kafka), "block" for up to ``block_s_max``, or "raise". Without "spool" nothing is written to disk, and an outage
    longer than the end of the process loses runs; `close` says how many. ``spool`` is the directory, by default that of
    the home, for one cluster; each process has its own below it, and takes over what dead ones left for the same topic.
    Problem when it cannot be used.

    A forked child has a connection and a spool of its own; what its parent accepted stays with the parent. Where the
    parent was resolving a host name at the fork, glibc resolves none in the child: `trouble` says so, and its runs go
    to the spool. A producer that is made after the fork is safe from that.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        on_full: OnFull = "spool",
        write_ahead: bool = False,
        spool: Path | str | None = None,
        spool_mb_max: int = SPOOL_MB_MAX,
        memory_s_max: int = MEMORY_S_MAX,
        block_s_max: int = BLOCK_S_MAX,
        kafka: KafkaOptions | None = None,
    ) -> None:
        if on_full not in ("spool", "block", "raise"):
            raise ValueError(f'on_full={on_full!r} is not "spool", "block" or "raise"')
        if write_ahead and on_full != "spool":
            raise ValueError("write_ahead needs a spool")
        if min(spool_mb_max, memory_s_max) < 1:
            raise ValueError("spool_mb_max and memory_s_max are 1 or more")
        self._settings: Final = settings or settings_of()
        self._config: Final = connection(self._settings, _OURS, {"batch.size": BATCH_BYTES, **(kafka or {})})
        self._directory: Final = Path(spool or Home.at(self._settings.home).path / "spool").absolute()
        self._bytes_max: Final = spool_mb_max * MB
        self._memory_s_max: Final = memory_s_max
        self._has_spool: Final = on_full == "spool"
        self._options: Final = (block_s_max if on_full == "block" else 0, write_ahead)
        self._candidate: Producer | None = None
        self._prepare()
        survive_forks(self)
        try:
            if self._spool:
                prepare_root(self._directory)
                self._adopt()
            self._start()
        except BaseException as error:
            if self._spool:
                self._spool.close()  # what was adopted is left to others
            if isinstance(error, KafkaException):
                raise _refused(error.args[0]) from error
            raise
        atexit.register(self._at_exit)

    def record(self, run: CellRun) -> None:
        """Accept a run (see the class). RunRefused when it was not accepted; InvalidRun when it never can be.

        Takes some microseconds; while the spool is used, one fsync. With "block", up to ``block_s_max``.
        """
        try:
            value = valid_value(run)
        except InvalidRun as refusal:
            raise self._outbox.refuse(refusal) from refusal.__cause__
        if self._thread is None and not self._outbox.is_closed:
            self._start_in_child()
        ticket = self._outbox.put(value, run.workspace_id)
        self._wake.set()
        if ticket:
            try:
                ticket.segment.sync(ticket.length)
            except OSError as error:
                # It may be sent all the same: harmless, and better than to say that it is safe.
                raise self._outbox.refuse(spool_refused(error), was_accepted=True) from error

    def flush(self, timeout_s: float = FLUSH_S_MAX) -> int:
        """Wait until Kafka has everything, also what can be read of the spool; how many runs it has not when the time
        is over.
        """
        self._wake.set()
        return self._outbox.wait_until_empty(timeout_s)

    def counts(self) -> Counts:
        """What became of the runs so far."""
        return self._outbox.counts()

    @property
    def trouble(self) -> str:
        """Why runs are waiting; empty while all is well."""
        return self._outbox.trouble.reason

    def close(self, timeout_s: float = FLUSH_S_MAX) -> None:
        """Send what can be sent, leave the rest to the spool, and end. Unreachable, with their number, when runs are
        lost: without a spool, or when it cannot be written either.
        """
        if self._outbox.close():
            self._finish(timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def after_fork(self) -> None:
        """In the child: begin anew, at the first run."""
        abandon(self._outbox.producer)
        abandon(self._candidate)
        self._candidate = None
        was_closed = self._outbox.is_closed
        if self._spool:
            self._spool.after_fork()
        self._prepare()
        self._outbox.is_closed = was_closed

    def _finish(self, timeout_s: float) -> None:
        try:
            if self._thread and (self._outbox.producer or self._outbox.in_memory_only):  # else all is on disk: why wait
                self.flush(timeout_s)
        finally:  # also when the wait is interrupted: what is in memory must get to the spool
            self._end()

    def _end(self) -> None:
        self._enough.set()
        self._wake.set()
        try:
            if self._thread:
                self._thread.join(STOP_S_MAX)
        finally:  # whoever is impatient loses nothing
            self._leave()

    def _leave(self) -> None:
        with self._leaving:
            _dispose(self._outbox.take_back())
            lost = self._outbox.in_memory_only
            if self._spool:
                self._spool.close()
            atexit.unregister(self._at_exit)
        if lost:
            raise Unreachable(
                f"{lost:,} accepted runs are lost",
                self.trouble or f"no answer from {self._settings.kafka_bootstrap}",
                "Record them again, under the same run ids.",
            )

    def _prepare(self) -> None:
        topic = self._settings.topic(CELL_RUNS)
        self._spool: Spool | None = Spool(self._directory, topic, self._bytes_max) if self._has_spool else None
        self._outbox = Outbox(topic, self._spool, *self._options)
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._leaving = threading.Lock()
        self._wake = Flag()
        self._enough = Flag()
        self._adopted_s = time.monotonic()

    def _adopt(self) -> None:
        try:
            self._outbox.adopt()
        except OSError as error:
            raise Problem(
                f"the spool {self._directory} cannot be read", error.strerror or str(error), "Check its files."
            ) from error

    def _start(self) -> None:
        # Never waited for: whoever holds it starts the thread, maybe in the frame that a handler of a signal stopped.
        if not self._starting.acquire(blocking=False):
            return
        try:
            if self._thread is None:
                # The first is not asked for an answer: the first run must not wait for one either.
                self._outbox.producer = self._open()
                # Noted before it begins: the handler of a signal that raises must not have a second one begin.
                self._thread = threading.Thread(target=self._work, name="creditstream-producer", daemon=True)
                self._thread.start()
        except RuntimeError:  # no more threads; another one may have recorded meanwhile
            self._thread = None
            _dispose(self._outbox.take_back())
            raise
        finally:
            self._starting.release()

    def _start_in_child(self) -> None:
        """Where it has no more threads, its runs wait, and the next one tries again."""
        try:
            self._start()
        except (KafkaException, RuntimeError) as error:
            self._outbox.trouble.note(error)

    def _open(self) -> Producer:
        return Producer(self._config)

    def _work(self) -> None:
        await_resolver(self._enough, self._on_stuck)
        while not self._enough.is_set:
            with self._outbox.trouble:
                self._step()
                continue
            self._enough.wait(RETRY_S)  # after trouble

    def _on_stuck(self, reason: str) -> None:
        self._outbox.trouble.note(reason)
        abandon(producer := self._outbox.take_back())
        _dispose(producer)

    def _step(self) -> None:
        """One turn of the thread: connect, hand over, collect deliveries, take back, adopt, sleep."""
        outbox = self._outbox
        if outbox.producer is None:
            outbox.producer = self._connected()
        has_more = outbox.hand_over()
        if outbox.producer:
            outbox.producer.poll(BUSY_POLL_S if outbox.is_busy and not has_more else 0)
        if is_silent := outbox.is_silent(self._memory_s_max):
            outbox.trouble.note(f"no acknowledgement for {self._memory_s_max} s")
        if is_silent or outbox.has_failed:
            _dispose(outbox.take_back())
            self._enough.wait(RETRY_S)
        if time.monotonic() - self._adopted_s > ADOPT_EVERY_S:
            self._adopted_s = time.monotonic()
            outbox.adopt()
        if not has_more and not outbox.is_busy:
            self._wake.wait(IDLE_S)
            self._wake.clear()

    def _connected(self) -> Producer | None:
        """A producer whose broker knows the topic. KafkaException when there is none, or not yet."""
        self._candidate = self._candidate or self._open()
        partitions(self._candidate, self._settings.topic(CELL_RUNS))
        producer, self._candidate = self._candidate, None
        return producer

    def _at_exit(self) -> None:
        self._outbox.close()
        try:
            self._finish(FLUSH_S_MAX)  # also where a thread is closing it: a daemon does not come to its end any more
        except Problem as problem:
            _log.error("%s", problem)


def _refused(error: KafkaError) -> Problem:
    if error.code() == KafkaError._INVALID_ARG:
        return options_refused(error)
    return Problem("the producer cannot be created", error.str(), "Allow this process more threads.")


def _dispose(producer: Producer | None) -> None:
    """Have it send nothing more. Its reports are collected, for they hold memory, and heeded by nobody."""
    if producer is not None:
        with suppress(KafkaException):
            producer.purge()
        producer.poll(0)
