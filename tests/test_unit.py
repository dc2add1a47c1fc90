"""A unit: copies that meet on their way to the ledger, the moments around its assignment, what it does at its end."""

import asyncio
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client

from sinks.ledger import ForeignMark, Incident
from tests.ledger_rows import assert_books_close
from tests.records import Record, event, run_id
from tests.unit_bench import BATCH_ROWS, CHAINS, Bench

CHAIN = CHAINS[0]


def chunk(first: int, runs: range) -> list[Record]:
    """These runs at the offsets from ``first`` on."""
    return [Record(first + n, event(run_id=str(run_id(run)))) for n, run in enumerate(runs)]


async def test_f17_copies_in_adjacent_batches_while_the_first_insert_is_held(client: Client) -> None:
    """A run whose row is in flight, in a prepared batch or in the open one is a known run: its copy is a duplicate."""
    release = asyncio.Event()
    held = 0

    async def hold_the_first(function: Any, *args: Any) -> Any:
        nonlocal held
        held += 1
        if held == 1:
            await release.wait()
        return await asyncio.to_thread(function, *args)

    bench = await Bench.open(client, in_writer=hold_the_first)
    for number in range(4):
        bench.deliver(chunk(number * BATCH_ROWS, range(BATCH_ROWS)))
    task = asyncio.ensure_future(bench.until(lambda: bench.acknowledged == 4))
    await asyncio.sleep(0.5)
    assert (held, bench.kinds()) == (1, {})
    assert bench.unit.rows_unwritten > BATCH_ROWS
    assert not bench.looked_up, "what is on its way needs no look-up"
    release.set()
    await task
    assert bench.kinds() == {"run": BATCH_ROWS, "duplicate": 3 * BATCH_ROWS}
    assert_books_close(client, CHAIN, range(4 * BATCH_ROWS))


async def test_f7_an_owner_that_dies_after_its_assignment_changes_nothing(client: Client) -> None:
    """State that was loaded and lost leaves no trace: the next owner writes what a single one would have."""
    first = await Bench.open(client)
    first.deliver(chunk(0, range(5)))
    await first.until(lambda: first.acknowledged == 1)
    for _ in range(2):
        lost = await Bench.open(client)
        lost.deliver(chunk(5, range(3, 8)))
    last = await Bench.open(client)
    last.deliver(chunk(5, range(3, 8)))
    await last.until(lambda: last.acknowledged == 1)
    assert last.kinds() == {"run": 8, "duplicate": 2}
    assert_books_close(client, CHAIN, range(10))


async def test_f7_another_owner_writes_between_the_assignment_and_the_first_insert(client: Client) -> None:
    """Its state is stale, and it finds out before it could do harm: the process must end."""
    stale, other = await Bench.open(client), await Bench.open(client)
    other.deliver(chunk(0, range(7)))
    await other.until(lambda: other.acknowledged == 1)
    stale.deliver(chunk(0, range(5)))
    with pytest.raises(ExceptionGroup) as ended:
        await stale.until(lambda: stale.acknowledged == 1)
    assert ended.group_contains(ForeignMark)
    assert_books_close(client, CHAIN, range(7))


async def test_records_that_come_twice_are_metered_once(client: Client) -> None:
    """A chunk that overlaps what the unit has had is cut, and acknowledged."""
    bench = await Bench.open(client)
    bench.deliver(chunk(0, range(6)))
    bench.deliver(chunk(3, range(3, 9)))
    bench.deliver(chunk(0, range(6)))
    await bench.until(lambda: bench.acknowledged == 3)
    assert bench.kinds() == {"run": 9}
    assert_books_close(client, CHAIN, range(9))


async def test_a_batch_is_written_when_it_has_lingered(client: Client) -> None:
    """A single run does not wait for company."""
    bench = await Bench.open(client, linger_s=0.2)
    bench.deliver(chunk(0, range(1)))
    await bench.until(lambda: bench.acknowledged == 1)
    assert bench.kinds() == {"run": 1}


async def test_a_unit_that_drains_does_not_linger(client: Client) -> None:
    """A stop writes at once what was read."""
    bench = await Bench.open(client, linger_s=60)
    bench.deliver(chunk(0, range(3)))
    bench.unit.drain()
    await bench.until(lambda: bench.acknowledged == 1)
    assert bench.kinds() == {"run": 3}


async def test_an_incident_ends_the_unit_quietly_and_is_told(client: Client) -> None:
    """It is for an operator; the other units of the process go on."""

    async def refuse(*_: Any) -> Any:
        raise Incident("cell-runs[0]: the ledger drops what it acknowledges", "", "Raise the epoch.")

    bench = await Bench.open(client, in_writer=refuse)
    bench.deliver(chunk(0, range(3)))
    await bench.until(lambda: bool(bench.incidents))
    assert bench.unit.incident is bench.incidents[0]
    assert bench.acknowledged == 0
