"""What a notifier knows of its deliveries: what waits, for when, and what is over. Pure: no clock, no I/O.

Memory is bounded by what waits (`WAITING_MAX`, measured 1.8 kB each, so 90 MB) and what is over (`OVER_MAX`, measured
0.7 kB each while it is loaded, so 140 MB).

Of what may wait each endpoint has its share. While that is full no more alerts are read, so that an endpoint that only
catches up loses nothing; but nobody is held up for longer than `PATIENCE_MS`: then the endpoint's oldest deliveries
give way to newer ones, until there is room again.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from schemas.webhook import Delivery, DeliveryState

IN_FLIGHT_MAX: Final = 4
"""Attempts at one endpoint at once. Endpoints share nothing: a dead one holds up nobody else."""

WAITING_MAX: Final = 50_000
"""So many may wait, each endpoint's share of them alike."""

ROOM: Final = 100
"""With room for so many in a share, reading goes on."""

PATIENCE_MS: Final = 10_000
"""How long reading waits for an endpoint whose share became full, until half of it is free again."""

OVER_MAX: Final = 200_000
"""Beyond it the eldest are forgotten early: they would be sent again only if ``limit-alerts`` were read anew from its
beginning. The meter repeats alerts of the last minutes.
"""

KNOWN_MS: Final = 48 * 24 * 3600 * 1000
"""How long an ended delivery stays known: longer than ``limit-alerts`` keeps its alert. That is 40 days, and up to 7
more until Kafka has closed the segment in which it lies.
"""


class Attempt(NamedTuple):
    """One delivery that is tried now. ``assignment`` tells whether its partition was lost in the meantime."""

    partition: int
    assignment: int
    delivery: Delivery


class _Turn(NamedTuple):
    """A place in an endpoint's queue: by time, then in the order of arrival."""

    next_at_ms: int
    number: int
    partition: int
    key: bytes


class _Partition(NamedTuple):
    """``waiting`` by endpoint and key, the oldest first."""

    assignment: int
    waiting: dict[str, dict[bytes, Delivery]]
    over: dict[bytes, int]


class Deliveries:
    """The deliveries of the partitions that this notifier owns."""

    def __init__(self) -> None:
        self._partitions: dict[int, _Partition] = {}
        self._queues: dict[str, list[_Turn]] = {}
        self._in_flight: dict[str, set[tuple[int, bytes]]] = {}
        """Assignment and key of each attempt."""
        self._full_since_ms: dict[str, int] = {}
        self._quiet_until_ms: dict[str, int] = {}
        self._number = 0

    def own(self, partition: int, records: Iterable[Delivery]) -> None:
        """Begin with a partition, from its newest record of each delivery."""
        self.disown(partition)
        self._number += 1
        self._partitions[partition] = _Partition(self._number, {}, {})
        for record in records:
            self.put(partition, record)

    def disown(self, partition: int) -> None:
        """Forget a partition. Its attempts in flight still count at their endpoints until they are `landed`."""
        self._partitions.pop(partition, None)
        for endpoint, turns in list(self._queues.items()):
            self._queues[endpoint] = [turn for turn in turns if turn.partition != partition]
            heapq.heapify(self._queues[endpoint])

    @property
    def partitions(self) -> frozenset[int]:
        """Those that are owned."""
        return frozenset(self._partitions)

    @property
    def waiting(self) -> int:
        """Deliveries that are not over, those in flight included."""
        return sum(self._waiting_for(endpoint) for endpoint in self._endpoints())

    def each_waiting(self) -> Iterator[Delivery]:
        """What is not over, in no order."""
        for owned in self._partitions.values():
            for waiting in owned.waiting.values():
                yield from waiting.values()

    def _waiting_for(self, endpoint: str) -> int:
        return sum(len(owned.waiting.get(endpoint, ())) for owned in self._partitions.values())

    def _endpoints(self) -> set[str]:
        return {endpoint for owned in self._partitions.values() for endpoint in owned.waiting}

    @property
    def in_flight(self) -> int:
        """Attempts that have not landed."""
        return sum(map(len, self._in_flight.values()))

    def knows(self, partition: int, endpoint: str, key: bytes) -> bool:
        """Whether this delivery waits or is over."""
        owned = self._partitions[partition]
        return key in owned.waiting.get(endpoint, ()) or key in owned.over

    def put(self, partition: int, delivery: Delivery) -> None:
        """A delivery's newest record."""
        owned, key = self._partitions[partition], delivery.key
        waiting = owned.waiting.setdefault(delivery.endpoint, {})
        if delivery.state is not DeliveryState.WAITING:
            waiting.pop(key, None)
            owned.over[key] = delivery.ended_at_ms
            return
        waiting[key] = delivery
        self._number += 1
        turn = _Turn(delivery.next_at_ms, self._number, partition, key)
        heapq.heappush(self._queues.setdefault(delivery.endpoint, []), turn)

    def take_due(self, now_ms: int) -> list[Attempt]:
        """What is to be sent now; each counts as in flight until it is `landed`."""
        return [attempt for endpoint in self._queues for attempt in self._due_of(endpoint, now_ms)]

    def _due_of(self, endpoint: str, now_ms: int) -> Iterator[Attempt]:
        queue, in_flight = self._queues[endpoint], self._in_flight.setdefault(endpoint, set())
        quiet = self._quiet_until_ms.get(endpoint, 0) > now_ms
        while queue and queue[0].next_at_ms <= now_ms and len(in_flight) < IN_FLIGHT_MAX and not quiet:
            turn = heapq.heappop(queue)
            owned = self._partitions[turn.partition]
            if found := owned.waiting[endpoint].get(turn.key):
                in_flight.add((owned.assignment, turn.key))
                yield Attempt(turn.partition, owned.assignment, found)

    def landed(self, attempt: Attempt) -> bool:
        """The attempt is over. Whether its outcome counts: False when its partition was given to another notifier."""
        self._in_flight[attempt.delivery.endpoint].discard((attempt.assignment, attempt.delivery.key))
        owned = self._partitions.get(attempt.partition)
        return owned is not None and owned.assignment == attempt.assignment

    def is_crowded(self, share: int, now_ms: int) -> bool:
        """Whether reading should wait: some endpoint's share is full, and became so less than `PATIENCE_MS` ago.

        That begins afresh when half of it is free: a slow endpoint is waited for once, not each time it has some room.
        """
        for endpoint in self._endpoints() | self._full_since_ms.keys():
            waiting = self._waiting_for(endpoint)
            if waiting <= share // 2:
                self._full_since_ms.pop(endpoint, None)
            elif waiting >= share or endpoint in self._full_since_ms:
                # The lesser: after a clock was set back the patience begins anew, and does not last until then.
                self._full_since_ms[endpoint] = min(self._full_since_ms.get(endpoint, now_ms), now_ms)
        return any(
            now_ms - since < PATIENCE_MS and self._waiting_for(endpoint) + ROOM > share
            for endpoint, since in self._full_since_ms.items()
        )

    def giving_way(self, share: int, now_ms: int) -> list[tuple[int, Delivery]]:
        """Partition and delivery of what is too much of endpoints that were waited for in vain; the oldest of it."""
        return [
            found
            for endpoint, since in self._full_since_ms.items()
            if now_ms - since >= PATIENCE_MS and (surplus := self._waiting_for(endpoint) - share) > 0
            for found in itertools.islice(self._oldest(endpoint), surplus)
        ]

    def _oldest(self, endpoint: str) -> Iterator[tuple[int, Delivery]]:
        """What waits for an endpoint and is not in flight, the oldest first, of the partition with most of it first."""
        in_flight = self._in_flight.get(endpoint, set())
        ranked = sorted(self._partitions.items(), key=lambda item: -len(item[1].waiting.get(endpoint, ())))
        for partition, owned in ranked:
            for key, delivery in owned.waiting.get(endpoint, {}).items():
                if (owned.assignment, key) not in in_flight:
                    yield partition, delivery

    def leave_alone(self, endpoint: str, until_ms: int) -> None:
        """Send nothing to an endpoint for a while."""
        self._quiet_until_ms[endpoint] = max(until_ms, self._quiet_until_ms.get(endpoint, 0))

    def wake(self) -> None:
        """Forget which endpoints are left alone."""
        self._quiet_until_ms.clear()

    def forget_old(self, now_ms: int) -> list[tuple[int, bytes]]:
        """Partition and key of what need not be known any longer, forgotten herewith: what ended long ago, and the
        eldest beyond `OVER_MAX`.
        """
        spare = sum(len(owned.over) for owned in self._partitions.values()) - OVER_MAX
        forgotten: list[tuple[int, bytes]] = []
        for partition, owned in self._partitions.items():
            # In the order of their end, but for what an assignment loaded; that waits a little longer.
            eldest = itertools.islice(owned.over, max(0, spare - len(forgotten)))
            expired = itertools.takewhile(lambda entry: entry[1] <= now_ms - KNOWN_MS, owned.over.items())
            keys = dict.fromkeys([*eldest, *(key for key, _ in expired)])
            for key in keys:
                del owned.over[key]
            forgotten += [(partition, key) for key in keys]
        return forgotten
