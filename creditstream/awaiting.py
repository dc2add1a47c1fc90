"""Waits until records that were delivered by hand have their rows in the ledger."""

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from creditstream.asking import Answers
from schemas.answers import LedgerRow
from schemas.ledger import Position
from schemas.problem import Unreachable

if TYPE_CHECKING:
    from streams.kafka.topics import Topic

WAIT_S_MAX: Final = 30.0
"""Without any new row of a partition."""
QUIET_S: Final = 2.0
"""Then whoever waits is told what for."""
POLL_S: Final = 0.1
PAGE_ROWS: Final = 20_000

_log: Final = logging.getLogger("creditstream.ledger")


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
    after, since, is_told = first - 1, time.monotonic(), False
    while after < last:
        try:
            rows = answers.ledger_rows(topic.id, partition, after, min(PAGE_ROWS, last - after))
        except Unreachable:  # it may answer again while there is time
            if time.monotonic() - since > WAIT_S_MAX:
                raise
            rows = []
        yield from rows
        if rows:
            after, since = rows[-1].offset, time.monotonic()
            continue
        place, waited_s = Position(topic.name, partition, after + 1), time.monotonic() - since
        if waited_s > WAIT_S_MAX:
            raise Unreachable(
                f"{place} has no ledger row after {WAIT_S_MAX:.0f} s", "the worker is not metering", "See its log."
            )
        if waited_s > QUIET_S and not is_told:
            is_told = True
            _log.warning("waiting for a worker to meter %s, up to %.0f s", place, WAIT_S_MAX)
        time.sleep(POLL_S)
