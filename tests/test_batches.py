"""What a unit gathers for one insert: when it is full, how long it lingers, and what is in it."""

import asyncio

import pytest

from streams import batches
from streams.batches import TABLE_ROWS_MIN, Batching, OpenBatch
from streams.rules.intake import read_chunk
from streams.rules.rating import RatingTable
from streams.rules.rows import Take, rate_take
from tests.records import EXAMPLES, Record, event
from tests.unit_bench import CHAINS

CHAIN = CHAINS[0]
BATCHING = Batching(10, 2.0)


def take(offsets: range) -> Take:
    """Runs at these offsets, rated."""
    records = [Record(offset, event(run=offset)) for offset in offsets]
    return rate_take(CHAIN, offsets[0] - 1, [records], [read_chunk(records, CHAIN.partition, 1)], RatingTable(EXAMPLES))


async def test_a_batch_is_full_at_its_rows_or_at_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large events make shorter batches."""
    monkeypatch.setattr(batches, "BATCH_BYTES_MAX", 100)
    many, large = OpenBatch(-1), OpenBatch(-1)
    for offset in range(9):
        many.add(take(range(offset, offset + 1)), 1)
    assert not many.is_full(BATCHING)
    many.add(take(range(9, 10)), 1)
    assert many.is_full(BATCHING)
    large.add(take(range(1)), 50)
    assert not large.is_full(BATCHING)
    large.add(take(range(1, 2)), 50)
    assert large.is_full(BATCHING)


async def test_a_batch_lingers_from_its_first_take_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many follow: what trickles in is written, too."""
    now_s = 1000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now_s)
    batch = OpenBatch(-1)
    assert (batch.deadline(BATCHING), batch.is_due(BATCHING)) == (None, False)
    for offset in range(2):
        batch.add(take(range(offset, offset + 1)), 1)
        now_s += 1.5
        assert (batch.deadline(BATCHING), batch.is_due(BATCHING)) == (1002.0, offset == 1)


@pytest.mark.parametrize(
    ("cuts", "kept"),
    [((TABLE_ROWS_MIN,), [0]), ((3, 4, TABLE_ROWS_MIN, 5), [0, 0, 0, 5]), ((3, TABLE_ROWS_MIN - 4), [3, 996])],
    ids=["one", "several", "few"],
)
async def test_its_rows_are_the_same_however_they_came(cuts: tuple[int, ...], kept: list[int]) -> None:
    """In takes of any size; and the records of those whose rows are made are let go meanwhile."""
    batch, whole, first = OpenBatch(-1), OpenBatch(-1), 0
    for number in cuts:
        batch.add(take(range(first, first + number)), 1)
        first += number
    whole.add(take(range(first)), 1)
    assert [len(part.records) for part in batch.takes] == kept
    made = batch.close(CHAIN)
    assert (made.after, made.last, batch.rows) == (-1, first - 1, first)
    assert made.rows.combine_chunks() == whole.close(CHAIN).rows.combine_chunks()
