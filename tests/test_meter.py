"""What a worker keeps over a rebalance, and in which order it asks at an assignment."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
import pytest
from clickhouse_connect.driver.client import Client
from msgspec.structs import replace

from creditstream.status import not_ready_because
from schemas.cell_run import from_milliseconds
from schemas.ledger import Pool
from schemas.limits import AsOf, state_key
from schemas.problem import Problem
from sinks.ledger import Chain, Mark
from streams import stale_states
from streams.assignment import Assigned, examine
from streams.kafka.topics import LogRange, Topic
from streams.meter import Meter
from streams.settings import read_settings
from streams.stale_states import Heard, answer, foreign_to
from streams.unit import Unit
from tests.account_records import Story, Topics, at
from tests.records import Record, Road, event, write_rows
from tests.unit_bench import CHAINS, NO_KAFKA, SOON_S, Bench

ON_CHDB: Final = pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
LOGS: Final = (LogRange(0, 1 << 40), LogRange(0, 1 << 40))
KEY: Final = ("ws_1", Pool.ENRICHMENT)
LOG: Final = "+".join(chain.topic_id for chain in CHAINS)
STALE: Final = AsOf(log=LOG, cell_runs=0, account_events=0, at=from_milliseconds(0))


def meter_of(bench: Bench, home: Path) -> Meter:
    """A meter that has nothing but this unit, and loads as the bench does."""
    meter = Meter(read_settings({}, home=str(home), partitions=1), NO_KAFKA)
    meter._loader = bench.loader
    meter.publisher = bench  # type: ignore[assignment]  # what it sends by itself
    meter.units[0] = bench.unit
    return meter


async def settled(client: Client) -> Bench:
    """A unit that has metered a plan and three runs, and told of them; it does not run any more."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(3, at("Jan 16"), at("Jan 17"))
    bench = await Bench.open(client)
    task = bench.start()
    chunks = Topics().append(story.steps)
    for of_account, records in chunks:
        bench.deliver(records, of_account=of_account)
    bench.unit.drain()
    await bench.wait(task, lambda: bench.acknowledged == len(chunks) and bench.unit.is_settled)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return bench


async def load_again(meter: Meter, bench: Bench) -> None:
    """As after a rebalance that brings the partition back."""
    marks = await bench.loader.read_mark(CHAINS[0]), await bench.loader.read_mark(CHAINS[1])
    await meter._load(Assigned(CHAINS, marks, LOGS, (marks[0].next, marks[1].next)))


async def told(bench: Bench) -> str:
    """``used`` as it is told next of the workspace's enrichment pool."""
    key = state_key(*KEY)
    async with asyncio.timeout(SOON_S):
        while key not in bench.states:
            await asyncio.sleep(0.01)
    return bench.states[key].used


def test_trouble_lasts_until_who_had_it_is_through(tmp_path: Path) -> None:
    """An insert that succeeds says nothing of alerts that the database does not take."""
    meter = Meter(read_settings({}, home=str(tmp_path), partitions=1), NO_KAFKA)
    meter.assigned = True
    meter.threads.on_trouble("notes", "no space left")
    for _ in range(2):
        meter.threads.on_trouble(CHAINS[0], "")
    assert not_ready_because(meter) == ["ledger: no space left"]
    meter.threads.on_trouble("notes", "")
    assert not_ready_because(meter) == []


@pytest.mark.parametrize(("silent_s", "because"), [(9, []), (11, ["Kafka has answered no heartbeat for 11 s"])])
def test_a_meter_that_does_not_hear_from_kafka_is_not_ready(
    tmp_path: Path, silent_s: float, because: list[str]
) -> None:
    """It meters nothing, and by Kafka's last answer nothing is behind."""
    reading = replace(NO_KAFKA, silent_s=lambda: silent_s)
    meter = Meter(read_settings({}, home=str(tmp_path), partitions=1), reading)
    meter.assigned = True
    assert not_ready_because(meter) == because


@pytest.mark.parametrize(
    ("held", "url", "is_ready"),
    [((0, 1), "", False), ((0, 1, 2), "", True), ((), "", True), ((0, 1), "http://ledger:8123/creditstream", True)],
)
def test_workers_that_share_a_group_share_a_ledger(
    tmp_path: Path, held: tuple[int, ...], url: str, is_ready: bool
) -> None:
    """chDB serves one worker: with two, each has a ledger of half the partitions, which looks whole to itself."""
    meter = Meter(read_settings({}, home=str(tmp_path), partitions=3, ledger_url=url), NO_KAFKA)
    meter.assigned = True
    meter.units.update(dict.fromkeys(held, cast(Any, SimpleNamespace(chain="cell-runs", incident=None))))
    assert (not not_ready_because(meter)) == is_ready
    assert is_ready or "this ledger has 2 of 3 partitions" in not_ready_because(meter)[0]


@ON_CHDB
@pytest.mark.parametrize(("linger_ms", "needed"), [(1_000, 38_400), (60_000, 38_400), (50, 76_800)])
def test_a_worker_refuses_a_token_window_that_is_too_small(
    client: Client, tmp_path: Path, linger_ms: int, needed: int
) -> None:
    """Eight partitions of two topics, ten inserts a second of each, or as many as the linger allows, for 240 s."""
    meter = Meter(read_settings({}, home=str(tmp_path), partitions=8, linger_ms=linger_ms), NO_KAFKA)
    resize = "ALTER TABLE ledger MODIFY SETTING non_replicated_deduplication_window = "
    client.command(f"{resize}{needed - 1}")
    with pytest.raises(Problem) as refused:
        meter._require_token_window(client)
    assert refused.value.fix == f"{resize}{needed}."
    client.command(f"{resize}{needed}")
    meter._require_token_window(client)


@ON_CHDB
async def test_f18_a_rebalance_forgets_no_stale_state(client: Client, tmp_path: Path) -> None:
    """Heard and not yet answered, or heard while the partition had no unit: the next unit answers it."""
    bench = await settled(client)
    meter = meter_of(bench, tmp_path)
    bench.states.clear()
    answer(bench.unit, {KEY: STALE})
    await meter.release()
    assert not bench.states
    await load_again(meter, bench)
    assert await told(bench) == "3"

    await meter.release()
    bench.states.clear()
    hear = meter._hear(asyncio.get_running_loop())
    hear(0, [Heard(KEY[0], KEY[1], "another owner", STALE)])
    await asyncio.sleep(0)
    await load_again(meter, bench)
    assert await told(bench) == "3"
    await meter.release()


@ON_CHDB
async def test_f18_a_rebalance_amid_an_answer_forgets_it_not(client: Client, tmp_path: Path) -> None:
    """The account was evicted and is being loaded to be told: the next unit answers."""
    bench = await settled(client)
    meter = meter_of(bench, tmp_path)
    bench.states.clear()
    await meter.release()
    await load_again(meter, bench)
    del meter.units[0].balances._accounts["ws_1"]
    meter.units[0].balances.knows_all = False
    asked = asyncio.Event()

    async def hang() -> None:
        asked.set()
        await asyncio.sleep(60)

    bench.on_load = hang
    answer(meter.units[0], {KEY: STALE})
    async with asyncio.timeout(SOON_S):
        await asked.wait()
    await meter.release()
    bench.on_load = None
    await load_again(meter, bench)
    assert await told(bench) == "3"
    await meter.release()


async def do_chores(unit: Unit) -> None:
    """Those that wait now, as a tick does."""
    for _ in range(len(unit.chores)):
        await unit.chores.popleft()(unit)


@ON_CHDB
async def test_f18_what_is_older_is_answered_and_nothing_else(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some at a time. What knew more runs and fewer account events is kept in mind until the unit is past it; what is
    as new as the unit, or of deleted topics, is not; what is said again meanwhile is answered again.
    """
    bench = await settled(client)
    unit, premium, key = bench.unit, ("ws_1", Pool.PREMIUM), state_key(*KEY)
    now = unit.voice.as_of(unit.balances, unit.folded)
    ahead = msgspec.structs.replace(now, cell_runs=now.cell_runs + 1, account_events=-1)
    deleted = msgspec.structs.replace(STALE, log="of deleted topics")
    await do_chores(unit)
    bench.states.clear()
    assert foreign_to("me", [Heard(*KEY, "me", STALE), Heard(*premium, "you", deleted)]) == {premium: deleted}
    answer(unit, {KEY: ahead, premium: deleted})
    answer(unit, {("ws_2", Pool.ENRICHMENT): now})
    assert len(unit.chores) == 1
    await do_chores(unit)
    assert (bench.states, unit.voice.unanswered, len(unit.chores)) == ({}, {KEY: ahead}, 1)

    monkeypatch.setattr(stale_states, "LOADED_AT_ONCE", 1)
    unit._folded += 1
    answer(unit, {premium: STALE})
    await do_chores(unit)
    assert bench.states.keys() == {key}
    await do_chores(unit)
    assert (bench.states.keys(), unit.voice.unanswered, len(unit.chores)) == ({key, state_key(*premium)}, {}, 0)

    async def say_again() -> None:
        answer(unit, {KEY: msgspec.structs.replace(STALE, cell_runs=1)})

    bench.states_told.clear()
    del unit.balances._accounts["ws_1"]
    unit.balances.knows_all = False
    bench.on_load = say_again
    answer(unit, {KEY: STALE})
    await do_chores(unit)
    await do_chores(unit)
    assert (bench.states_told[key], unit.voice.unanswered, len(unit.chores)) == (2, {}, 0)


@ON_CHDB
async def test_a_rebalance_keeps_what_is_settled_and_nothing_else(client: Client, tmp_path: Path) -> None:
    """Balances that have something to tell are loaded afresh: what they told last may not be on the topic."""
    bench = await settled(client)
    meter, balances = meter_of(bench, tmp_path), bench.unit.balances
    await meter.release()
    await load_again(meter, bench)
    assert meter.units[0].balances is balances
    balances.moved.add(KEY)
    await meter.release()
    await load_again(meter, bench)
    assert meter.units[0].balances is not balances
    await meter.release()


@ON_CHDB
async def test_f7_a_log_is_not_behind_a_mark_that_moves_meanwhile(client: Client, tmp_path: Path) -> None:
    """Another owner that wakes between the questions writes a row: that is no ledger ahead of Kafka."""
    bench, road = await Bench.open(client), Road()
    meter = meter_of(bench, tmp_path)
    meter.topic, meter.event_topic = (Topic(chain.topic, chain.topic_id, 1, {}) for chain in CHAINS)

    def write() -> None:
        number = road.last + 1
        write_rows(client, CHAINS[0], road.table([Record(number, event(run=number))]))

    class Log:
        """Kafka as it is: the ledger has no row that it does not have."""

        def log_ranges(self, name: str, partitions: Iterable[int]) -> dict[int, LogRange]:
            found = {
                partition: LogRange(0, road.last + 1 if name == CHAINS[0].topic else 0) for partition in partitions
            }
            write()
            return found

        def committed(self, group: str, places: Sequence[tuple[str, int]]) -> dict[tuple[str, int], int | None]:
            return dict.fromkeys(places)

    meter.broker = Log()  # type: ignore[assignment]
    read_mark = bench.loader.read_mark

    async def read_and_write(chain: Chain) -> Mark:
        found = await read_mark(chain)
        await asyncio.to_thread(write)
        return found

    bench.loader.read_mark = read_and_write  # type: ignore[method-assign]
    (place,) = await meter._find_assigned([0], "group")
    assert not any(
        examine(mark, chain, log, "stop")
        for mark, chain, log in zip(place.marks, place.chains, place.logs, strict=True)
    )
    meter.units.clear()


@ON_CHDB
async def test_who_has_an_incident_is_not_asked_for_plans(client: Client, tmp_path: Path) -> None:
    """What its unit has folded may never get into the ledger: periods are looked up there."""
    bench = await settled(client)
    meter = meter_of(bench, tmp_path)
    assert [change.allowance for change in meter.plans_of("ws_1") or ()] == [10_000]
    assert meter.plans_of("ws_2") is None
    bench.unit.incident = Problem("the chain has a hole", "an offset has no row", "Look.")
    assert meter.plans_of("ws_1") is None
