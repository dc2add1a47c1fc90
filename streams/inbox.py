"""What waits for a unit: chunks of both topics, taken in the order in which the broker received their records."""

import asyncio
import functools
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from streams.rules.limits import FOREVER_MS
from streams.rules.records import Record

BACKLOG_CHUNK: Final = 500
"""A chunk of this many records or more was fetched from a backlog."""
GATHER_S: Final = 0.02
"""How long more chunks of a backlog are waited for."""
SILENCE_S_MAX: Final = 5.0
"""How long one topic waits for records of the other that Kafka has and does not send."""
HELD_S_MAX: Final = 1.0
"""How long account events are held back while the writer is behind: by our clock, and also by the broker's, since
hours of a backlog pass in a second.
"""


async def _not_yet(offset: int) -> None:
    pass


def _to_nobody() -> None:
    pass


class Parcel(msgspec.Struct, frozen=True, eq=False):
    """One chunk as it was delivered, and how to acknowledge it, whole or up to an offset. ``of_account``: account
    events, not cell runs. ``leave``: say that this unit will not take it.
    """

    chunk: list[Record]
    acknowledge: Callable[[], Awaitable[Any]]
    of_account: bool = False
    acknowledge_part: Callable[[int], Awaitable[Any]] = _not_yet
    leave: Callable[[], None] = _to_nobody


Behind = tuple[int | None, int | None]
"""How many offsets Kafka has behind what was read of runs and of account events; None: it has not said."""


class Inbox:
    """Two queues and one order between them: the broker's time decides which topic comes first; on a tie, runs do.

    Records that Kafka still has of one topic may be older than those that wait of the other: they are waited for. A
    chunk of a backlog may span hours: it is split where records of the other topic come in between. The transport
    bounds how much waits here.

    Account events need an insert of their own. While ``is_writer_behind`` they are held back for up to `HELD_S_MAX`, so
    that many share one insert, and the alerts of runs do not wait for it.
    """

    def __init__(self, is_writer_behind: Callable[[], bool], unread: Callable[[], Behind] = lambda: (0, 0)) -> None:
        self._is_writer_behind, self._unread = is_writer_behind, unread
        self._runs: deque[Parcel] = deque()
        self._account_events: deque[Parcel] = deque()
        self._taken_ms = [0, 0]
        """The broker's time of the last record taken of each topic; runs come first, as in `Behind`."""
        self._silent_since: list[float | None] = [None, None]
        self._held_since: float | None = None
        self._arrived = asyncio.Event()
        """Something has come, or `take_runs` was nudged."""
        self._is_nudged = False
        self._is_closed = False

    @property
    def has_account_events(self) -> bool:
        """Whether account events wait, and no run that Kafka still has must come before them."""
        return bool(self._account_events) and (bool(self._runs) or self._precede_what_comes())

    def put(self, parcel: Parcel) -> None:
        """Take over a chunk."""
        if self._is_closed:
            parcel.leave()
            return
        (self._account_events if parcel.of_account else self._runs).append(parcel)
        self._silent_since[parcel.of_account] = None
        self._arrived.set()

    def nudge(self) -> None:
        """Let `take_runs` come back, even without anything."""
        self._is_nudged = True
        self._arrived.set()

    def leave_what_waits(self) -> None:
        """Nothing more is read of Kafka: what only records that come could precede is left to the next owner, and so is
        all that follows it.
        """
        if self._runs:
            waits = not self._account_events and self._runs[0].chunk[0].timestamp > self._last_ms_of_runs()
        else:
            waits = bool(self._account_events) and not self._precede_what_comes()
        if waits:
            self._is_closed = True
            for parcel in (*self._runs, *self._account_events):
                parcel.leave()
            self._runs.clear()
            self._account_events.clear()

    async def take_runs(self, rows_max: int, deadline: float | None) -> list[Parcel]:
        """The next chunks of cell runs, up to ``rows_max`` records or slightly more, and no further than account events
        that come first. What there is, perhaps nothing, at the deadline (loop time) or after a nudge.

        A long chunk is a sign of a backlog: then more are gathered, since each take costs something by itself.
        """
        parcels: list[Parcel] = []
        rows = 0
        try:
            async with asyncio.timeout_at(deadline) as waiting:
                while rows < rows_max and not self._are_account_events_next():
                    if not self._runs or self._runs[0].chunk[0].timestamp > (last_ms := self._last_ms_of_runs()):
                        if self._is_nudged or (parcels and len(parcels[-1].chunk) < BACKLOG_CHUNK):
                            break
                        self._arrived.clear()
                        await self._arrived.wait()
                        continue
                    parcels.append(self._take(self._runs, last_ms))
                    rows += len(parcels[-1].chunk)
                    waiting.reschedule(asyncio.get_running_loop().time() + GATHER_S)
        except TimeoutError:
            pass
        self._is_nudged = False
        return parcels

    def take_account_events(self, rows_max: int) -> list[Parcel]:
        """The chunks of account events that come before the next cell run, up to ``rows_max`` records or slightly more;
        none when a run is next.
        """
        parcels: list[Parcel] = []
        rows = 0
        if self._are_account_events_next():
            last_ms = self._last_ms_of_account_events()
            while rows < rows_max and self._is_account_event_by(last_ms):
                parcels.append(self._take(self._account_events, last_ms))
                rows += len(parcels[-1].chunk)
            # No run passes what is left because a take was full.
            self._held_since = -math.inf if self._is_account_event_by(last_ms) else None
        return parcels

    def _is_account_event_by(self, last_ms: int) -> bool:
        return bool(self._account_events) and self._account_events[0].chunk[0].timestamp <= last_ms

    def _take(self, waiting: deque[Parcel], last_ms: int) -> Parcel:
        parcel = _up_to(last_ms, waiting)
        self._taken_ms[parcel.of_account] = max(self._taken_ms[parcel.of_account], parcel.chunk[-1].timestamp)
        return parcel

    def _last_ms_of_runs(self) -> int:
        """Up to when runs are taken before account events."""
        if not self._account_events:
            return self._known_until_ms(of_account=True)
        held_ms = int(HELD_S_MAX * 1000) if self._is_writer_behind() else 0
        return self._account_events[0].chunk[0].timestamp + held_ms

    def _precede_what_comes(self) -> bool:
        return self._is_account_event_by(self._last_ms_of_account_events())

    def _last_ms_of_account_events(self) -> int:
        """Up to when account events are taken before runs."""
        return (self._runs[0].chunk[0].timestamp if self._runs else self._known_until_ms(of_account=False)) - 1

    def _known_until_ms(self, *, of_account: bool) -> int:
        """Of a topic of which nothing waits: the time before which none of its records can still come. That of its last
        record, or `FOREVER_MS` when Kafka has no more of it, or has sent none for `SILENCE_S_MAX`.
        """
        if self._unread()[of_account] == 0:
            self._silent_since[of_account] = None
            return FOREVER_MS
        now = asyncio.get_running_loop().time()
        since = self._silent_since[of_account]
        if since is None:
            since = self._silent_since[of_account] = now
        return FOREVER_MS if now >= since + SILENCE_S_MAX else self._taken_ms[of_account]

    def _are_account_events_next(self) -> bool:
        if not self._account_events or not self._precede_what_comes():
            return False
        now = asyncio.get_running_loop().time()
        self._held_since = self._held_since or now
        is_held = not self._runs or self._runs[0].chunk[0].timestamp <= self._last_ms_of_runs()
        return not self._is_writer_behind() or not is_held or now >= self._held_since + HELD_S_MAX


def _up_to(last_ms: int, waiting: deque[Parcel]) -> Parcel:
    """The next chunk, up to an instant. The rest of it stays next, and acknowledges the whole chunk. This part does so
    itself, too: if what comes of the other topic behind it were committed before it, a crash would fold it again under
    that.
    """
    parcel = waiting[0]
    number = bisect_right(parcel.chunk, last_ms, key=lambda record: record.timestamp)
    if number == len(parcel.chunk):
        return waiting.popleft()
    part = parcel.chunk[:number]
    del parcel.chunk[:number]
    return Parcel(part, functools.partial(parcel.acknowledge_part, part[-1].offset), parcel.of_account)
