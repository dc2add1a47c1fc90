"""Runs that were accepted and that Kafka has not acknowledged: where each of them is, and in which order they go.

A run is in one of three places. *Waiting*: handed to librdkafka, not acknowledged. *Recalled*: was waiting, is to be
handed over again. *Spooled*: on disk, unread. They are handed over in that order, and a new run goes directly to
librdkafka only while nothing is recalled or unread. So first copies arrive in the order of `Outbox.put`; repetitions
come after them, and the meter charges a run once.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from creditstream.client.recording import Counts, RunRefused, refused_by_closed
from creditstream.client.spool import Entry, Spool, SpoolFull, Ticket
from creditstream.client.trouble import Trouble

QUEUE_RUNS_MAX: Final = 10_000
"""Runs in memory, at the most."""
HAND_OVER_RUNS: Final = 500
"""Runs that are read from the spool at once, under the lock that `put` needs too."""
_SAME_ID: Final = "Record it again, under the same run id."


class _Run(NamedTuple):
    """``entry``: where it lies in the spool; None: in memory only."""

    value: bytes
    workspace_id: str
    entry: Entry | None = None


class Outbox:
    """Thread-safe. ``producer`` is None while Kafka does not answer; whoever sets it calls `hand_over`. Without a spool
    `put` waits for room in memory for up to ``block_s_max``.
    """

    def __init__(self, topic: str, spool: Spool | None, block_s_max: int, write_ahead: bool) -> None:
        self._lock: Final = threading.RLock()
        """Entered by itself: a condition's `__enter__` is Python, and keeps it where the handler of a signal raises."""
        self._changed: Final = threading.Condition(self._lock)
        self.producer: Producer | None = None
        self.trouble: Final = Trouble("cell runs are waiting")
        """Over once a run was delivered."""
        self.is_closed = False
        self.has_failed = False
        """librdkafka reported a failure: it is given nothing more until `take_back`."""
        self._topic, self._spool = topic, spool
        self._block_s_max, self._write_ahead = block_s_max, write_ahead
        self._waiting: dict[int, _Run] = {}
        self._recalled: deque[_Run] = deque()
        self._sequence = 0
        self._progress_s = 0.0
        """When Kafka acknowledged a run last, or was given one while it had none."""
        self._accepted = self._refused = self._delivered = self._spooled = self._adopted = 0

    def put(self, value: bytes, workspace_id: str) -> Ticket | None:
        """Accept a run; a ticket when it is in the spool and must be synced. RunRefused."""
        with self._lock:
            try:
                self._require_open()
                ticket = self._put(value, workspace_id)
                self._require_open()  # the handler of a signal may have closed it in the middle
            except RunRefused:
                self._refused += 1
                raise
            self._accepted += 1
            return ticket

    def refuse(self, refusal: RunRefused, *, was_accepted: bool = False) -> RunRefused:
        """Count a refusal that was found out elsewhere."""
        with self._lock:
            self._refused += 1
            self._accepted -= was_accepted
        return refusal

    def hand_over(self) -> bool:
        """Hand to librdkafka what is due and has room; whether something is left for which there is room."""
        with self._lock:
            if self.producer is None or self.has_failed:
                return False
            if self._spool and not self._recalled and self._has_room:
                entries = self._spool.read(min(HAND_OVER_RUNS, QUEUE_RUNS_MAX - len(self._waiting)))
                self._recalled.extend(_Run(entry.value, entry.workspace_id, entry) for entry in entries)
            while self._recalled and self._hand(self._recalled[0]):  # no more than there was room for
                self._recalled.popleft()
            if not self._undelivered:  # nothing of what was read was a run
                self._changed.notify_all()
            return not self._recalled and self._has_room and bool(self._spool and self._spool.unread)

    def take_back(self) -> Producer | None:
        """Nothing is with librdkafka any more: what was goes to the front of the spool, or stays in memory where that
        is not possible. The producer that had it, which must not deliver any more: a later copy is harmless, a later
        first copy is not.
        """
        with self._lock:
            producer, self.producer, self.has_failed = self.producer, None, False
            runs = [*self._waiting.values(), *self._recalled]
            is_back = not runs or (self._spool is not None and self._put_back(self._spool, runs))
            self._waiting.clear()
            self._recalled.clear()
            if not is_back:
                self._recalled.extend(runs)
            return producer

    def is_silent(self, patience_s: float) -> bool:
        """Whether Kafka has acknowledged none of its runs for so long. How old a run is says nothing: over a slow link
        all of them are, and to send them again would be no faster.
        """
        with self._lock:
            return bool(self._waiting) and time.monotonic() - self._progress_s > patience_s

    def adopt(self) -> None:
        """Take over the spools of dead processes. OSError."""
        if self._spool:
            found = self._spool.find_orphans()  # reads all of them: not under the lock that `put` needs
            with self._lock:
                self._adopted += self._spool.adopt(found)

    def close(self) -> bool:
        """Accept nothing more, not from those either who wait for room; False when it is closed already."""
        with self._lock:
            was_closed, self.is_closed = self.is_closed, True
            self._changed.notify_all()
            return not was_closed

    def wait_until_empty(self, timeout_s: float) -> int:
        """How many runs are not delivered, once there is none or the time is over."""
        with self._lock:
            self._changed.wait_for(lambda: not self._undelivered, timeout_s)
            return self._undelivered

    @property
    def in_memory_only(self) -> int:
        """Runs that are lost if the process ends now."""
        with self._lock:
            return sum(run.entry is None for run in (*self._waiting.values(), *self._recalled))

    @property
    def is_busy(self) -> bool:
        """Whether deliveries are to be expected."""
        return bool(self._waiting)

    def counts(self) -> Counts:
        """The counts of this moment."""
        with self._lock:
            return Counts(
                accepted=self._accepted,
                refused=self._refused,
                delivered=self._delivered,
                spooled=self._spooled,
                adopted=self._adopted,
                waiting_in_memory=self._in_memory,
                waiting_in_spool=self._spool.unread if self._spool else 0,
                spool_bytes=self._spool.size_bytes if self._spool else 0,
                unreadable_segments=self._spool.unreadable if self._spool else 0,
            )

    @property
    def _undelivered(self) -> int:
        return self._in_memory + (self._spool.unread if self._spool else 0)

    @property
    def _in_memory(self) -> int:
        return len(self._waiting) + len(self._recalled)

    @property
    def _has_room(self) -> bool:
        return len(self._waiting) < QUEUE_RUNS_MAX

    def _put(self, value: bytes, workspace_id: str) -> Ticket | None:
        run = _Run(value, workspace_id)
        in_order = not self._recalled and not (self._spool and self._spool.unread) and not self._write_ahead
        if in_order and self._has_room and self._hand(run):
            return None
        if self._spool:
            return self._append(self._spool, value)
        self._wait_for_room()
        if self._recalled or not self._hand(run):
            self._recalled.append(run)
        return None

    def _wait_for_room(self) -> None:
        if not self._changed.wait_for(lambda: self.is_closed or self._in_memory < QUEUE_RUNS_MAX, self._block_s_max):
            why = f"{QUEUE_RUNS_MAX:,} runs wait in memory ({self.trouble.reason or 'Kafka is slow'})"
            raise RunRefused("the run was not recorded", why, _SAME_ID)
        self._require_open()

    def _require_open(self) -> None:
        if self.is_closed:
            raise refused_by_closed()

    def _append(self, spool: Spool, value: bytes) -> Ticket:
        try:
            ticket = spool.append(value)
        except SpoolFull as error:
            why = f"the spool is full ({self.trouble.reason or 'Kafka is slow'})"
            raise RunRefused("the run was not recorded", why, _SAME_ID) from error
        except OSError as error:
            raise spool_refused(error) from error
        self._spooled += 1
        return ticket

    def _hand(self, run: _Run) -> bool:
        if (producer := self.producer) is None or self.has_failed:
            return False
        sequence = self._sequence = self._sequence + 1
        on_delivery = partial(self._deliver, sequence)
        try:
            producer.produce(self._topic, run.value, run.workspace_id, on_delivery=on_delivery)
        except BufferError:
            return False
        except KafkaException as error:
            self._fail(error)
            return False
        if not self._waiting:
            self._progress_s = time.monotonic()
        self._waiting[sequence] = run
        return True

    def _deliver(self, sequence: int, error: KafkaError | None, _: Message) -> None:
        """Called from `Producer.poll`."""
        with self._lock:
            if sequence not in self._waiting:
                return  # was taken back
            if error:
                self._fail(error)
                return
            run = self._waiting.pop(sequence)
            self._delivered += 1
            self._progress_s = time.monotonic()
            self.trouble.end()
            self._changed.notify_all()
            if run.entry and self._spool:
                self._spool.acknowledge(run.entry)

    def _fail(self, error: KafkaError | KafkaException) -> None:
        self.has_failed = True
        self.trouble.note(error)

    def _put_back(self, spool: Spool, runs: Sequence[_Run]) -> bool:
        entries = [run.entry for run in runs if run.entry]
        if len(entries) == len(runs) and spool.rewind(entries):
            return True
        try:
            spool.put_first([run.value for run in runs])
        except OSError as error:
            self.trouble.note(spool_refused(error).why)
            return False
        self._spooled += len(runs) - len(entries)
        return True


def spool_refused(error: OSError) -> RunRefused:
    """The refusal that a failure of the disk means."""
    return RunRefused(
        "the run was not recorded", f"the spool cannot be written: {error.strerror or error}", "Free space on the disk."
    )
