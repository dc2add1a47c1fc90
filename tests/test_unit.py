"""A unit: copies that meet on their way to the ledger, the moments around its assignment, what it does at its end."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import pytest
from clickhouse_connect.driver.client import Client

from schemas.problem import Problem
from sinks import queries
from sinks.ledger import ForeignMark, Incident, Ledger
from streams.duplicates import Identity, Original, RunFilter
from streams.rating import RatingTable
from streams.batches import Batching, Event
from streams.unit import Lanes, Unit
from tests.ledger_rows import Chain, assert_books_close
from tests.records import EXAMPLES, Record, event, run_id

CHAIN = Chain("cell-runs", "topic-1", 0)
BATCH_ROWS = 10
SOON_S = 20.0

InWriter = Callable[..., Awaitable[Any]]


class Bench:
    """One unit on a real ledger, with its parts in the test's hand."""

    def __init__(self, client: Client, in_writer: InWriter | None = None, linger_s: float = 0.05) -> None:
        self.client, self.acknowledged = client, 0
        self.incidents: list[Problem] = []
        self.looked_up: list[set[Identity]] = []
        ledger, run_filter = Ledger(client), RunFilter(1 << 20)
        run_filter.add(queries.recent_run_keys(client, CHAIN, 0))
        run_filter.is_complete = True
        lanes = Lanes(
            ledger=ledger,
            rating=RatingTable(EXAMPLES),
            partitions=1,
            batching=Batching(BATCH_ROWS, linger_s),
            find_runs=self._find_runs,
            in_writer=in_writer or asyncio.to_thread,
            written=Counter(),
            on_incident=lambda unit, incident: self.incidents.append(incident),
        )
        self.unit = Unit(ledger.mark(CHAIN), CHAIN, run_filter, lanes)

    async def _find_runs(self, identities: list[Identity]) -> dict[Identity, Original]:
        self.looked_up.append(set(identities))
        rows = await asyncio.to_thread(queries.find_runs, self.client, identities)
        return {Identity(*identity): Original(position, facts) for identity, position, facts in rows}

    def deliver(self, first: int, runs: range) -> None:
        """A chunk with these runs at the offsets from ``first`` on."""
        records = [Record(first + n, event(run_id=str(run_id(run)))) for n, run in enumerate(runs)]
        self.unit.receive(Event(records, self._acknowledge))

    async def _acknowledge(self) -> None:
        self.acknowledged += 1

    async def until(self, condition: Callable[[], bool]) -> None:
        """Run the unit until it is so."""
        task = asyncio.ensure_future(self.unit.run())
        try:
            async with asyncio.timeout(SOON_S):
                while not condition():
                    if task.done():
                        task.result()
                    await asyncio.sleep(0.01)
        finally:
            self.unit.close()
            task.cancel()
            with suppress(asyncio.CancelledError, BaseExceptionGroup):
                await task

    def kinds(self) -> dict[str, int]:
        """Rows of each kind in the ledger."""
        return dict(self.client.query("SELECT toString(kind), count() FROM ledger GROUP BY kind").result_rows)


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

    bench = Bench(client, hold_the_first)
    for number in range(4):
        bench.deliver(number * BATCH_ROWS, range(BATCH_ROWS))
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
    first = Bench(client)
    first.deliver(0, range(5))
    await first.until(lambda: first.acknowledged == 1)
    for _ in range(2):
        lost = Bench(client)
        lost.deliver(5, range(3, 8))
    last = Bench(client)
    last.deliver(5, range(3, 8))
    await last.until(lambda: last.acknowledged == 1)
    assert last.kinds() == {"run": 8, "duplicate": 2}
    assert_books_close(client, CHAIN, range(10))


async def test_f7_another_owner_writes_between_the_assignment_and_the_first_insert(client: Client) -> None:
    """Its state is stale, and it finds out before it could do harm: the process must end."""
    stale, other = Bench(client), Bench(client)
    other.deliver(0, range(7))
    await other.until(lambda: other.acknowledged == 1)
    stale.deliver(0, range(5))
    with pytest.raises(ExceptionGroup) as ended:
        await stale.until(lambda: stale.acknowledged == 1)
    assert ended.group_contains(ForeignMark)
    assert_books_close(client, CHAIN, range(7))


async def test_records_that_come_twice_are_metered_once(client: Client) -> None:
    """A chunk that overlaps what the unit has had is cut, and acknowledged."""
    bench = Bench(client)
    bench.deliver(0, range(6))
    bench.deliver(3, range(3, 9))
    bench.deliver(0, range(6))
    await bench.until(lambda: bench.acknowledged == 3)
    assert bench.kinds() == {"run": 9}
    assert_books_close(client, CHAIN, range(9))


async def test_a_batch_is_written_when_it_has_lingered(client: Client) -> None:
    """A single run does not wait for company."""
    bench = Bench(client, linger_s=0.2)
    bench.deliver(0, range(1))
    await bench.until(lambda: bench.acknowledged == 1)
    assert bench.kinds() == {"run": 1}


async def test_a_unit_that_drains_does_not_linger(client: Client) -> None:
    """A stop writes at once what was read."""
    bench = Bench(client, linger_s=60)
    bench.deliver(0, range(3))
    bench.unit.drain()
    await bench.until(lambda: bench.acknowledged == 1)
    assert bench.kinds() == {"run": 3}


async def test_an_incident_ends_the_unit_quietly_and_is_told(client: Client) -> None:
    """It is for an operator; the other units of the process go on."""

    async def refuse(*_: Any) -> Any:
        raise Incident("cell-runs[0]: the ledger drops what it acknowledges", "", "Raise the epoch.")

    bench = Bench(client, refuse)
    bench.deliver(0, range(3))
    await bench.until(lambda: bool(bench.incidents))
    assert bench.unit.incident is bench.incidents[0]
    assert bench.acknowledged == 0
