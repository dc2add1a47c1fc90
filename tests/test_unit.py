"""A unit: copies that meet on their way to the ledger, the moments around its assignment, what it does at its end."""

import asyncio
from itertools import pairwise
from typing import Any, Final

import pytest
from clickhouse_connect.driver.client import Client
from structlog.testing import capture_logs

from schemas.cell_run import to_milliseconds
from schemas.ledger import Pool
from schemas.limits import AlertKind, Cause, state_key
from sinks.ledger import Batch, ForeignMark, Incident
from streams import batches, settling, top_columns
from streams.batches import INSERT_EVERY_S
from streams.unit import TICK_S, Unit
from tests.account_records import Story, account_record, at
from tests.ledger_rows import assert_books_close
from tests.limit_voices import kafka_record, rated
from tests.records import Record, event, run_id
from tests.unit_bench import BATCH_ROWS, CHAINS, SOON_S, Bench

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
    await bench.wait(task, lambda: held == 1 and bench.unit.rows_unwritten > BATCH_ROWS)
    await asyncio.sleep(0.3)
    assert (held, bench.kinds()) == (1, {})
    assert not bench.looked_up, "what is on its way needs no look-up"
    release.set()
    await task
    assert bench.kinds() == {"run": BATCH_ROWS, "duplicate": 3 * BATCH_ROWS}
    assert_books_close(client, CHAIN, range(4 * BATCH_ROWS))


class Hold:
    """A writer's thread that lets nothing through until it is told to."""

    def __init__(self) -> None:
        self.calls = 0
        self.release: Final = asyncio.Event()

    async def __call__(self, function: Any, *args: Any) -> Any:
        self.calls += 1
        await self.release.wait()
        return await asyncio.to_thread(function, *args)


async def test_a_plan_is_told_before_it_is_written(client: Client) -> None:
    """Who was upgraded may spend at once; runs behind the plan are folded under it, and written behind it."""
    story = Story()
    story.plan("4", at("Jan 15"))
    story.runs(3, at("Jan 16"))
    writer = Hold()
    bench = await Bench.open(client, in_writer=writer)
    records = rated(story.steps)
    bench.deliver([kafka_record(records[0])], of_account=True)
    bench.deliver([kafka_record(record) for record in records[1:]])
    task = bench.start()
    await bench.wait(task, lambda: len(bench.alerts) == 1)
    assert (bench.alerts[0].thresholds, bench.alerts[0].cause) == ((50,), Cause.RUN)
    assert (writer.calls, bench.kinds(), bench.acknowledged) == (1, {}, 0)
    writer.release.set()
    await bench.wait(task, lambda: bench.acknowledged == 2)
    await bench.kill(task)
    ((plan_read, run_read),) = client.query(
        "SELECT maxIf(mark_read_at, kind = 'plan'), minIf(mark_read_at, kind = 'run') FROM ledger"
    ).result_rows
    assert plan_read < run_read


async def test_a_run_that_is_folded_again_under_another_plan_tells_under_another_id(client: Client) -> None:
    """Kafka was silent about the plan, and a crash lost what was folded without it. What the ledger then implies must
    reach those who have seen what was told before.
    """
    story = Story()
    story.plan("10", at("Jan 15"))
    story.plan("own_lines", at("Jan 16"))
    story.runs(8, at("Jan 17"))
    first, second, *runs = [kafka_record(record) for record in rated(story.steps)]
    lives: list[Bench] = []
    for plans in ([first], [first, second]):
        bench = await Bench.open(client, in_writer=Hold())
        bench.deliver(plans, of_account=True)
        bench.deliver(runs)
        task = bench.start()
        await bench.wait(task, lambda bench=bench: bench.unit.read[0] == 7)  # type: ignore[misc]
        await bench.kill(task)
        await bench.unit.voice.flush()
        lives.append(bench)
    told, again = [[(alert.position, alert.thresholds, alert.remaining_below) for alert in life.alerts]
                   for life in lives]  # fmt: skip
    assert told == [(f"{CHAIN}@4", (50,), None), (f"{CHAIN}@7", (80,), None)]
    assert again == [(f"{CHAIN}@2", (30,), None), (f"{CHAIN}@5", (60,), None), (f"{CHAIN}@7", (), "2")]
    assert not {alert.alert_id for alert in lives[0].alerts} & {alert.alert_id for alert in lives[1].alerts}


async def test_states_go_on_while_the_database_takes_no_alerts(client: Client) -> None:
    """Only acknowledgements wait until an alert is noted: a state tells gates what is left, within about a second."""
    story = Story()
    story.plan("4", at("Jan 15"))
    story.runs(3, at("Jan 16"))
    bench = await Bench.open(client)
    asked, noted = asyncio.Event(), asyncio.Event()

    async def note() -> None:
        asked.set()
        await noted.wait()

    bench.on_note = note
    plan, first, second, third = [kafka_record(record) for record in rated(story.steps)]
    bench.deliver([plan], of_account=True)
    bench.deliver([first, second])
    task = bench.start()
    await bench.wait(task, asked.is_set)
    bench.deliver([third])
    await bench.wait(task, lambda: bench.states[state_key(story.workspace_id, Pool.ENRICHMENT)].used == "3")
    assert [alert.thresholds for alert in bench.alerts] == [(50,)]
    await bench.wait(task, lambda: bench.kinds() == {"plan": 1, "run": 3})
    assert bench.acknowledged < 3
    noted.set()
    await bench.wait(task, lambda: bench.acknowledged == 3)
    await bench.kill(task)


async def test_a_unit_that_ends_while_an_alert_waits_still_tells_it(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end comes amid a flush that waits for the alert's columns: the flush ends, the alert leaves."""
    monkeypatch.setattr(top_columns, "WAIT_S_MAX", SOON_S)
    story = Story()
    story.plan("4", at("Jan 15"))
    story.runs(2, at("Jan 16"))
    bench = await Bench.open(client)
    found = asyncio.Event()
    bench.on_columns = found.wait
    plan, *runs = [kafka_record(record) for record in rated(story.steps)]
    bench.deliver([plan], of_account=True)
    bench.deliver(runs)
    task = bench.start()
    await bench.wait(task, lambda: bench.kinds() == {"plan": 1, "run": 2} and not bench.unit.voice.has_unflushed)
    await bench.kill(task)
    assert (bench.alerts, bench.unit.voice.has_unflushed) == ([], True), "the next owner is to tell it again"
    found.set()
    await bench.unit.voice.flush()
    assert [alert.thresholds for alert in bench.alerts] == [(50,)]


async def test_used_is_told_once_a_second_however_fast_batches_go(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk is acknowledged once the states rest on it, so the commit never passes what has been told."""
    monkeypatch.setattr(settling, "STATES_EVERY_S", 2 * SOON_S)
    bench = await Bench.open(client)
    task = bench.start()
    await bench.wait(task, lambda: not bench.unit.chores)
    for number in range(4):
        bench.deliver(chunk(number * BATCH_ROWS, range(number * BATCH_ROWS, (number + 1) * BATCH_ROWS)))
        await bench.wait(task, lambda number=number: bench.unit.mark.last == (number + 1) * BATCH_ROWS - 1)  # type: ignore[misc]
    await asyncio.sleep(2 * TICK_S)
    told = bench.states_told[state_key("ws_1", Pool.ENRICHMENT)], bench.acknowledged
    bench.unit.drain()
    bench.deliver(chunk(4 * BATCH_ROWS, range(4 * BATCH_ROWS, 5 * BATCH_ROWS)))
    await bench.wait(task, lambda: bench.acknowledged == 5)
    await bench.kill(task)
    assert told <= (1, 1)
    assert bench.states[state_key("ws_1", Pool.ENRICHMENT)].used == str(5 * BATCH_ROWS)


async def test_inserts_of_a_chain_are_no_faster_than_the_ledger_remembers_their_tokens(client: Client) -> None:
    """However small batches are, and however many account events come one by one: the check at the start counts so."""
    begun: dict[str, list[float]] = {}

    async def note(function: Any, *args: Any) -> Any:
        if args and isinstance(args[0], Batch):
            begun.setdefault(args[0].chain.topic, []).append(asyncio.get_running_loop().time())
        return await asyncio.to_thread(function, *args)

    story = Story()
    for hour in range(4):
        story.plan("4", at(f"Jan 15 0{hour}:00"))
    bench = await Bench.open(client, in_writer=note, batch_rows=1, linger_s=0.5)
    task = bench.start()
    for number, record in enumerate(rated(story.steps)):
        bench.deliver([kafka_record(record)], of_account=True)
        bench.deliver(chunk(number, range(number, number + 1)))
        await bench.wait(task, lambda number=number: bench.unit.read == (number, number))  # type: ignore[misc]
    bench.unit.drain()
    await bench.wait(task, lambda: bench.acknowledged == 8)
    await bench.kill(task)
    assert len(begun[CHAINS[0].topic]) == 4
    assert len(begun) == 2
    for instants in begun.values():
        assert all(later - earlier >= INSERT_EVERY_S for earlier, later in pairwise(instants))


async def test_what_inserts_nothing_delays_no_insert(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reversal is a barrier: where nothing is before it to be written, it does not wait for a pace."""
    monkeypatch.setattr(batches, "INSERT_EVERY_S", 1000.0)
    story = Story()
    story.reverse(1, at("Jan 15"))
    bench = await Bench.open(client, linger_s=1000.0)
    task = bench.start()
    bench.deliver([kafka_record(record) for record in rated(story.steps)], of_account=True)
    await bench.wait(task, lambda: bench.unit.event_mark.last == 0)
    await bench.kill(task)
    assert bench.kinds() == {"dead_letter": 1}


async def test_a_backlog_of_account_events_is_taken_in_parts(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that waited at once, 100,000 of a partition, took hundreds of megabytes and stood still for seconds."""
    monkeypatch.setattr("streams.unit.TAKE_ROWS_MAX", 4)
    story = Story()
    for day in range(1, 13):
        story.plan("10", at(f"Jan {day}"))
    records = [kafka_record(record) for record in rated(story.steps)]
    bench = await Bench.open(client, linger_s=0.01)
    for first in range(0, 12, 3):
        bench.deliver(records[first : first + 3], of_account=True)
    await bench.until(lambda: bench.acknowledged == 4)
    inserts = "SELECT count() FROM ledger GROUP BY mark_read_at ORDER BY min(kafka_offset)"
    assert client.query(inserts).result_rows == [(6,), (6,)]


async def test_f17_copies_of_an_account_event_while_its_insert_is_held(client: Client) -> None:
    """An event on its way is a known event."""
    story = Story()
    story.plan("4", at("Jan 15"))
    story.plan("20", at("Jan 15 12:00"))
    first, second = (step.event for step in story.steps)
    writer = Hold()
    bench = await Bench.open(client, in_writer=writer)
    bench.deliver([account_record(0, first, at("Jan 15"))], of_account=True)
    task = bench.start()
    await bench.wait(task, lambda: writer.calls == 1)
    bench.deliver([account_record(1, first, at("Jan 15"))], of_account=True)
    await bench.wait(task, lambda: bench.unit.read == (-1, 1))
    bench.deliver([account_record(2, second, at("Jan 16")), account_record(3, first, at("Jan 16"))], of_account=True)
    writer.release.set()
    await bench.wait(task, lambda: bench.acknowledged == 3)
    await bench.kill(task)
    assert bench.kinds() == {"plan": 2, "duplicate": 2}
    assert client.query("SELECT count() FROM duplicates").result_rows == [(0,)], "they are no copies of runs"
    assert_books_close(client, CHAINS[1], range(4))


async def test_a_reversal_waits_for_its_run(client: Client) -> None:
    """What it gives back is read from the ledger, where the run must be before."""
    story = Story()
    story.plan("4", at("Jan 15"))
    run = story.run(at("Jan 16"))
    story.reverse(run, at("Jan 17"))
    writer = Hold()
    bench = await Bench.open(client, in_writer=writer)
    plan, drawn, reversal = rated(story.steps)
    for record in (plan, drawn, reversal):
        bench.deliver([kafka_record(record)], of_account=record.step.of_account)
    task = bench.start()
    await bench.wait(task, lambda: writer.calls == 1 and bench.unit.read[0] == 0)
    await asyncio.sleep(0.1)
    assert bench.unit.read == (0, 0)
    writer.release.set()
    await bench.wait(task, lambda: bench.acknowledged == 3)
    await bench.kill(task)
    assert bench.kinds() == {"plan": 1, "run": 1, "reversal": 1}
    assert bench.unit.balances["ws_1"].enrichment.used == 0


async def test_what_a_reversal_was_found_to_be_is_written_before_it_is_told(client: Client) -> None:
    """After a crash its run may have come, and it would be something else. A plan is what it is."""
    story = Story()
    story.plan("4", at("Jan 15"))
    story.reverse(1, at("Jan 16"))
    taken: list[int] = []

    async def look(function: Any, batch: Any, *args: Any) -> Any:
        if batch.chain == CHAINS[1]:
            taken.append(bench.unit.folded[1] - batch.last)
        return await asyncio.to_thread(function, batch, *args)

    bench = await Bench.open(client, in_writer=look)
    task = bench.start()
    for number, record in enumerate(rated(story.steps)):
        bench.deliver([kafka_record(record)], of_account=True)
        await bench.wait(task, lambda done=number + 1: bench.acknowledged == done)  # type: ignore[misc]
    await bench.kill(task)
    assert bench.kinds() == {"plan": 1, "dead_letter": 1}
    assert taken == [0, -1], "the plan is folded when it is written, the reversal not yet"


@pytest.mark.parametrize("are_events_read", [True, False])
async def test_time_is_told_while_a_backlog_drains(client: Client, are_events_read: bool) -> None:
    """By the least instant up to which both topics were read: no workspace waits for the end of another's backlog."""
    warned, other = Story("ws_a"), Story("ws_b")
    warned.plan("10", at("Jan 15"))
    warned.runs(10, at("Jan 16"))
    other.run(at("Feb 15 01:00"))
    bench = await Bench.open(client)
    bench.ends_ms = 0, to_milliseconds(at("Mar 1")) if are_events_read else 0
    for record in rated([*warned.steps, *other.steps]):
        bench.deliver([kafka_record(record)], of_account=record.step.of_account)
    task = bench.start()
    await bench.wait(task, lambda: bench.acknowledged == 12)
    if are_events_read:
        await bench.wait(task, lambda: any(alert.cause == Cause.TIME for alert in bench.alerts))
    await asyncio.sleep(2 * TICK_S)
    await bench.unit.voice.flush()
    await bench.kill(task)
    told = [alert.kind for alert in bench.alerts if alert.cause == Cause.TIME]
    assert told == ([AlertKind.PERIOD_STARTED] if are_events_read else [])


async def test_runs_wait_for_one_chore_and_not_for_all(client: Client) -> None:
    """A million states that are told anew at an assignment hold up no alert."""
    bench = await Bench.open(client)
    folded: list[int] = []

    async def deliver(unit: Unit) -> None:
        bench.deliver(chunk(len(folded), range(len(folded), len(folded) + 1)))

    async def look(unit: Unit) -> None:
        folded.append(unit.folded[0])

    bench.unit.chores += [deliver, look, deliver, look]
    task = bench.start()
    await bench.wait(task, lambda: len(folded) == 2)
    await bench.kill(task)
    assert folded == [0, 1]


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


async def test_what_was_read_before_is_acknowledged_without_new_records(client: Client) -> None:
    """Nothing of it is written again, so nothing is waited for."""
    bench = await Bench.open(client, linger_s=0.05)
    bench.deliver(chunk(0, range(6)))
    task = bench.start()
    await bench.wait(task, lambda: bench.acknowledged == 1)
    bench.deliver(chunk(0, range(6)))
    await bench.wait(task, lambda: bench.acknowledged == 2)
    await bench.kill(task)
    assert bench.kinds() == {"run": 6}


async def test_a_batch_is_written_when_it_has_lingered(client: Client) -> None:
    """A single run does not wait for company."""
    bench = await Bench.open(client, linger_s=0.2)
    bench.deliver(chunk(0, range(1)))
    await bench.until(lambda: bench.acknowledged == 1)
    assert bench.kinds() == {"run": 1}


async def test_dead_letters_are_logged_once_an_insert(client: Client) -> None:
    """However many takes it was gathered from: a producer that sends nonsense must not fill the log, too."""
    bench = await Bench.open(client, linger_s=0.3)
    task = bench.start()
    with capture_logs() as logged:
        for last in range(3):
            bench.deliver([Record(last, b"nonsense")])
            await bench.wait(task, lambda last=last: bench.unit.read == (last, -1))  # type: ignore[misc]
        await bench.wait(task, lambda: bench.acknowledged == 3)
    await bench.kill(task)
    letters = [line for line in logged if line["event"] == "dead_letters"]
    assert [(line["mark"], line["dead_letter/malformed"]) for line in letters] == [(2, 3)]


async def test_a_unit_that_drains_does_not_linger(client: Client) -> None:
    """A stop writes at once what was read."""
    bench = await Bench.open(client, linger_s=60)
    bench.deliver(chunk(0, range(3)))
    bench.unit.drain()
    await bench.until(lambda: bench.acknowledged == 1)
    assert bench.kinds() == {"run": 3}


async def test_a_unit_that_drains_leaves_what_waits_for_the_other_topic(client: Client) -> None:
    """Kafka has an upgrade that is read no more: nobody is told that credits are gone which it gave. Nor is anything
    taken behind a gap.
    """
    story = Story()
    story.plan("4", at("Jan 15"))
    story.plan("20", at("Jan 16"))
    story.runs(4, at("Jan 17"))
    first, _, *runs = [kafka_record(record) for record in rated(story.steps)]
    bench = await Bench.open(client)
    bench.unread = lambda read: (0, 1 - read[1])
    task = bench.start()
    bench.deliver([first], of_account=True)
    await bench.wait(task, lambda: bench.acknowledged == 1)
    bench.deliver(runs[:3])
    bench.unit.drain()
    await bench.wait(task, lambda: bench.left == 1)
    bench.unread = lambda read: (0, 0)
    bench.deliver(runs[3:])
    await asyncio.sleep(2 * TICK_S)
    await bench.kill(task)
    assert (bench.left, bench.kinds(), bench.alerts) == (2, {"plan": 1}, [])


async def test_an_incident_ends_the_unit_quietly_and_is_told(client: Client) -> None:
    """It is for an operator; the other units of the process go on."""

    async def refuse(*_: Any) -> Any:
        raise Incident("cell-runs[0]: the ledger drops what it acknowledges", "", "Raise the epoch.")

    bench = await Bench.open(client, in_writer=refuse)
    bench.deliver(chunk(0, range(3)))
    await bench.until(lambda: bool(bench.incidents))
    assert bench.unit.incident is bench.incidents[0]
    assert bench.acknowledged == 0
