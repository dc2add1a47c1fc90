"""What a meter asks of whoever reads Kafka for it (`streams.app`), and wants done there."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from streams.inbox import Behind
from streams.rules.records import UpTo

Offsets = dict[tuple[str, int], int]
"""(topic, partition) → offset."""


class Reading(msgspec.Struct, frozen=True):
    """Of one worker, for all of its partitions."""

    ends_ms: Callable[[int, UpTo], tuple[int, int]]
    """Until when (Unix ms) Kafka had nothing in a partition of both topics behind what was read; 0: it has more, or has
    not said.
    """
    unread: Callable[[int, UpTo], Behind]
    """How many offsets Kafka can hand out behind what was read."""
    lags: Callable[[int, UpTo], Behind]
    """How many offsets Kafka had behind what was read; None: it has not said."""
    silent_s: Callable[[], float]
    """Seconds since Kafka answered the group's member last; 0 before it was first asked."""
    commit: Callable[[Offsets], Awaitable[Any]]
    """Commit where a group begins: what is behind it has been told."""
    hold: Callable[[int], None]
    """A partition's unit has an incident: fetch it no more."""
    on_fatal: Callable[[BaseException], Awaitable[None]]
    """A part of the meter has failed."""
