"""Waits until records that were delivered by hand have their rows in the ledger."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from creditstream.asking import Answers
from schemas.answers import LedgerRow
from schemas.ledger import Position
from schemas.problem import Unreachable

if TYPE_CHECKING:
    from streams.topics import Topic

WAIT_S_MAX: Final = 30.0
"""Without any new row of a partition."""
POLL_S: Final = 0.1
PAGE_ROWS: Final = 20_000


def await_rows(answers: Answers, topic: "Topic", places: Sequence[Position]) -> dict[Position, LedgerRow]:
    """The ledger's row of each place on a topic: of this record, whoever else used its id. Unreachable when none comes
    for a while.
    """
    offsets: dict[int, set[int]] = {}
    for place in places:
        offsets.setdefault(place.partition, set()).add(place.offset)
    return {
        Position(topic.name, partition, row.offset): row
        for partition, wanted in offsets.items()
        for row in _rows_through(answers, topic, partition, min(wanted), max(wanted))
        if row.offset in wanted
    }


def _rows_through(answers: Answers, topic: "Topic", partition: int, first: int, last: int) -> Iterator[LedgerRow]:
    """A partition's rows of the offsets [first, last], as they come."""
    after, deadline = first - 1, time.monotonic() + WAIT_S_MAX
    while after < last:
        try:
            rows = answers.ledger_rows(topic.id, partition, after, min(PAGE_ROWS, last - after))
        except Unreachable:  # it may answer again while there is time
            if time.monotonic() > deadline:
                raise
            rows = []
        yield from rows
        if rows:
            after, deadline = rows[-1].offset, time.monotonic() + WAIT_S_MAX
        elif time.monotonic() > deadline:
            place = Position(topic.name, partition, after + 1)
            raise Unreachable(
                f"{place} has no ledger row after {WAIT_S_MAX:.0f} s", "the worker is not metering", "See its log."
            )
        else:
            time.sleep(POLL_S)
