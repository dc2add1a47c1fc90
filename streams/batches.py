"""What a unit gathers for one insert of cell runs, and when it is written."""

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec
import pyarrow as pa

from sinks.ledger import Batch, Chain, batch_month
from streams.inbox import Parcel
from streams.rules.account_events import RatedEvent
from streams.rules.records import bytes_of
from streams.rules.rows import Take, join_takes, ledger_rows

BATCH_BYTES_MAX: Final = 32 * 1024 * 1024
"""Kafka bytes of one batch at the most: large events make shorter batches, not larger ones."""
INSERT_EVERY_S: Final = 0.1
"""How far apart batches of a unit are written, where the linger is not shorter."""
TABLE_ROWS_MIN: Final = 1_000
"""Fewer rows wait for others before they become columns of the ledger."""


class Batching(msgspec.Struct, frozen=True):
    """When a batch is written: at ``rows_max`` rows, or ``linger_s`` seconds after its first."""

    rows_max: int
    linger_s: float

    @property
    def every_s(self) -> float:
        """Batches are written at least this far apart, seconds: each leaves a token for each of its chains, and the
        ledger's table remembers a limited number of tokens.
        """
        return min(self.linger_s, INSERT_EVERY_S)


class AccountBatch(msgspec.Struct, frozen=True, eq=False):
    """Account events that are folded, on their way into the ledger."""

    batch: Batch
    rows: Sequence[RatedEvent]


class OpenBatch:
    """Takes that are gathered for one insert. The rows of small ones are made together: a table has thirty columns, and
    a price whatever its length.
    """

    def __init__(self, after: int) -> None:
        self.after: Final = after
        self.last = after
        self.rows = 0
        self.takes: list[Take] = []
        self.parcels: list[Parcel] = []
        self.followed_by: AccountBatch | None = None
        """Account events that were folded after its rows, and are written after them."""
        self._unmade: list[Take] = []
        self._tables: list[pa.Table] = []
        self._bytes = 0
        self._since = 0.0

    def add(self, take: Take, nbytes: int) -> None:
        """Append a take; ``nbytes`` as it was in Kafka. Its records are let go once its rows are made."""
        if not self.takes:
            self._since = asyncio.get_running_loop().time()
        self.takes.append(take)
        self._unmade.append(take)
        self.rows += len(take.records)
        self.last = take.last
        self._bytes += nbytes
        if sum(len(take.records) for take in self._unmade) >= TABLE_ROWS_MIN:
            self._make()

    def _make(self) -> None:
        if not self._unmade:
            return
        self._tables.append(ledger_rows(join_takes(self._unmade)))
        for take in self._unmade:
            take.records.clear()  # half of the worker's memory, and nobody reads them any more
        self._unmade.clear()

    def deadline(self, batching: Batching) -> float | None:
        """Loop time at which it has lingered enough; None while it is empty."""
        return self._since + batching.linger_s if self.takes else None

    def is_due(self, batching: Batching) -> bool:
        """Whether it has lingered enough."""
        deadline = self.deadline(batching)
        return deadline is not None and asyncio.get_running_loop().time() >= deadline

    def is_full(self, batching: Batching) -> bool:
        """No further row fits."""
        return self.rows >= batching.rows_max or self._bytes >= BATCH_BYTES_MAX

    def close(self, chain: Chain) -> Batch:
        """The batch for the ledger. Its ClickHouse partition follows from its first record alone: a second writer of
        the same place must meet the same deduplication log.
        """
        self._make()
        rows = pa.concat_tables(self._tables)
        month = batch_month(int(self.takes[0].runs.recorded_ms[0]))
        return Batch(
            chain,
            self.after,
            self.last,
            rows.append_column("batch_month", pa.repeat(pa.scalar(month, pa.uint32()), len(rows))),
        )


def chunk_bytes(chunk: Any) -> int:
    """Bytes of its records as Kafka held them. ``nbytes`` is the whole chunk's, so a part of one is counted again."""
    is_whole = getattr(chunk, "records", 0) == len(chunk)
    return chunk.nbytes if is_whole else bytes_of(chunk)
