"""P1 against a real ledger, in process and over HTTP: every fault point, then the books must close.

A fault is injected where the worker meets it: a test drives the protocol's generator step by step and drops it where
the worker crashes, or the server closes, delays, refuses or dies while `Ledger.append` runs.
"""

import asyncio
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import pytest
from clickhouse_connect.driver.client import Client

from schemas.catalogue import Catalogue, read_version
from schemas.cell_run import to_milliseconds
from sinks.clickhouse import DatabaseError, connect
from sinks.ledger import (
    ACKNOWLEDGED_MAX,
    Chain,
    ForeignMark,
    Incident,
    Insert,
    Ledger,
    Mark,
    ReadMark,
    Steps,
    Stopped,
    append_steps,
)
from sinks.queries import find_runs, recent_run_keys
from streams.intake import run_keys
from streams.rating import RatingTable
from streams.rows import ledger_rows, rate_take
from streams.unit import OpenBatch
from tests.clickhouse_server import ClickHouseServer
from tests.conftest import wait_until_grown
from tests.ledger_rows import (
    AUGUST_MS,
    NO_COPIES,
    assert_books_close,
    batch,
    content,
    content_of,
    recorded_ms,
    rows,
    run_id,
)

CHAIN: Final = Chain("cell-runs", "topic-id-1", 3)
LAST: Final = 29
ANSWER_TIMEOUT_S: Final = 1
LATE_S: Final = 1.6

over_http = pytest.mark.parametrize("database_url", ["http"], indirect=True)


@pytest.fixture
def ledger(client: Client) -> Ledger:
    """The writing side, with ten rows written: the faults come in the middle of a chain."""
    ledger = Ledger(client)
    write(ledger, CHAIN, 9)
    return ledger


@pytest.fixture
def impatient(ledger_url: str) -> Iterator[Ledger]:
    """An owner that waits a second for an answer, with ten rows written."""
    with connect(ledger_url, answer_timeout_s=ANSWER_TIMEOUT_S) as client:
        ledger = Ledger(client)
        write(ledger, CHAIN, 9)
        yield ledger


def write(ledger: Ledger, chain: Chain, last: int, rows_max: int = 100) -> Mark:
    """One owner's life: from the mark to ``last``, in batches of ``rows_max`` rows."""
    mark = ledger.mark(chain)
    while mark.last < last:
        mark = ledger.append(batch(chain, mark.last, min(mark.last + rows_max, last)), mark, threading.Event())
    return mark


def form(ledger: Ledger, chain: Chain, last: int, epoch: int = 0) -> tuple[Steps, Insert]:
    """One owner's batch from the mark to ``last``, about to be sent."""
    mark = ledger.mark(chain)
    steps = append_steps(batch(chain, mark.last, last), mark, epoch)
    insert = next(steps)
    assert isinstance(insert, Insert)
    return steps, insert


def take_over(client: Client, ledger: Ledger) -> None:
    """The next owner cuts the log elsewhere and writes the rest; then the ledger must be that of a clean run."""
    write(ledger, CHAIN, LAST, rows_max=7)
    assert_books_close(client, CHAIN, range(LAST + 1))
    assert content(client, CHAIN) == content_of(batch(CHAIN, -1, LAST).rows)


# F1 to F6: the owner crashes, and another one goes on.


def test_f1_crash_before_forming(client: Client, ledger: Ledger) -> None:
    """A mark that was read and not used leaves no trace."""
    ledger.mark(CHAIN)
    take_over(client, ledger)


def test_f2_crash_formed_not_sent(client: Client, ledger: Ledger) -> None:
    """A batch that was formed and not sent is cut anew."""
    form(ledger, CHAIN, 19)
    take_over(client, ledger)


def test_f3_crash_sent_not_executed(client: Client, ledger: Ledger) -> None:
    """A failed insert occupies no token: the next owner writes the place."""
    steps, _ = form(ledger, CHAIN, 19)
    assert isinstance(steps.send(False), ReadMark)
    take_over(client, ledger)


def test_f3_sent_not_executed_is_sent_again(client: Client, ledger: Ledger) -> None:
    """While the mark does not move, the same rows are sent under the same token on a newly read mark."""
    steps, first = form(ledger, CHAIN, 19)
    assert isinstance(steps.send(False), ReadMark)
    again = steps.send(ledger.mark(CHAIN))
    assert isinstance(again, Insert)
    assert (again.batch, again.token) == (first.batch, first.token)
    assert again.mark_read_at > first.mark_read_at
    ledger.insert(again)
    steps.send(True)
    assert finish(steps, ledger).last == 19
    take_over(client, ledger)


def test_f4_executed_not_acknowledged(client: Client, ledger: Ledger) -> None:
    """An insert whose answer is lost is found by the mark and not sent again."""
    steps, insert = form(ledger, CHAIN, 19)
    ledger.insert(insert)
    assert isinstance(steps.send(False), ReadMark)
    assert finish(steps, ledger).last == 19
    take_over(client, ledger)


def test_f4_crash_executed_not_acknowledged(client: Client, ledger: Ledger) -> None:
    """An insert that lands after its owner has gone is the next owner's starting point."""
    _, insert = form(ledger, CHAIN, 19)
    ledger.insert(insert)
    take_over(client, ledger)


def test_f4_lands_under_the_next_owner(client: Client, ledger: Ledger) -> None:
    """The dead owner's insert lands after the next one has read the mark: the second comer is dropped and learns it."""
    _, late = form(ledger, CHAIN, 14)
    steps, insert = form(ledger, CHAIN, 19)
    ledger.insert(late)
    ledger.insert(insert)
    steps.send(True)
    with pytest.raises(ForeignMark, match="the mark is at 14, expected 9 or our 19"):
        finish(steps, ledger)
    take_over(client, ledger)


def test_f5_crash_acknowledged_not_read_back(client: Client, ledger: Ledger) -> None:
    """An acknowledged insert that nobody read back is not written again."""
    steps, insert = form(ledger, CHAIN, 19)
    ledger.insert(insert)
    assert isinstance(steps.send(True), ReadMark)
    take_over(client, ledger)


def test_f6_crash_read_back_not_committed(client: Client, ledger: Ledger) -> None:
    """Kafka's committed offset stays behind, and the next owner does not ask for it: the mark decides."""
    assert write(ledger, CHAIN, 19).last == 19
    parts = level_0_parts(client)
    assert write(ledger, CHAIN, 19).next == 20
    assert level_0_parts(client) == parts
    take_over(client, ledger)


def test_f6_replay_from_a_committed_offset_is_dropped(client: Client, ledger: Ledger) -> None:
    """Even an owner that resumed below the mark adds nothing: its place in the chain is taken."""
    stale = ledger.mark(CHAIN)
    write(ledger, CHAIN, 19)
    with pytest.raises(ForeignMark):
        ledger.append(batch(CHAIN, 9, 14), stale, threading.Event())
    take_over(client, ledger)


def finish(steps: Steps, ledger: Ledger) -> Mark:
    """Answer one `ReadMark`, which must be the last step."""
    with pytest.raises(StopIteration) as done:
        steps.send(ledger.mark(CHAIN))
    mark = done.value.value
    assert isinstance(mark, Mark)
    return mark


# F8: one insert is one part.


def level_0_parts(client: Client) -> list[int]:
    """Rows of each part as it was inserted, merged away or not."""
    client.command("SYSTEM FLUSH LOGS") if False else None
    found = client.query(
        "SELECT rows FROM system.parts WHERE database = currentDatabase() AND table = 'ledger' AND level = 0 "
        "ORDER BY min_block_number"
    )
    return [rows for (rows,) in found.result_rows]


def test_f8_one_part_per_insert(client: Client, ledger: Ledger) -> None:
    """An insert of many rows is one part: all or nothing."""
    write(ledger, CHAIN, 30_009, rows_max=15_000)
    assert level_0_parts(client) == [10, 15_000, 15_000]
    assert_books_close(client, CHAIN, range(30_010))


def month_ends_at(offset: int) -> Mapping[int, int]:
    raise NotImplementedError


MIDNIGHT_MS: Final = to_milliseconds(datetime(2026, 9, 1, tzinfo=UTC))


def recorded_at_months_end(offset: int) -> int:
    """Offset 15 is the first of September."""
    return MIDNIGHT_MS + (offset - 15) * 10


def test_f8_two_owners_at_one_position_over_a_months_end(client: Client, ledger: Ledger) -> None:
    """The one's batch ends in August, the other's in September: their first record is one, so they meet."""
    mark = ledger.mark(CHAIN)
    batches = [batch(CHAIN, 9, last, recorded=recorded_at_months_end) for last in (12, 19)]
    assert [set(one.rows.column("batch_month").to_pylist()) for one in batches] == [{202608}, {202608}]
    ledger.append(batches[0], mark, threading.Event())
    with pytest.raises(ForeignMark):
        ledger.append(batches[1], mark, threading.Event())
    assert_books_close(client, CHAIN, range(13))


def test_f8_a_month_from_the_last_record_would_land_twice(client: Client, ledger: Ledger) -> None:
    """Why the first record decides: deduplication is per ClickHouse partition, one token lands once in each."""
    mark = ledger.mark(CHAIN)
    for last, month in ((12, 202608), (19, 202609)):
        rows = batch(CHAIN, 9, last, recorded=recorded_at_months_end).rows
        place = rows.schema.get_field_index("batch_month")
        months = rows.column("batch_month").combine_chunks().cast("int64")
        del months
        field = rows.schema.field(place)
        moved = rows.set_column(place, field, __import__("pyarrow").array([month] * len(rows), field.type))
        ledger.insert(Insert(msgspec.structs.replace(batch(CHAIN, 9, last), rows=moved), "0/one/3/10", mark.read_at))
    assert not ledger.mark(CHAIN).is_whole
