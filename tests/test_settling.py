"""What is told before a chunk is acknowledged, in which order, and how often."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from datetime import date

import msgspec
import pytest

from schemas.ledger import Pool
from schemas.limits import LimitAlert, state_key
from schemas.problem import Unreachable
from sinks.accounts import TopQuestion
from streams.inbox import Parcel
from streams.rules.balances import NOTHING, Balances
from streams.rules.facts import fold_event
from streams.rules.messages import Source
from streams.settling import STATES_EVERY_S, Settling, Written
from streams.top_columns import AGE_S_MAX, Columns, TopColumns
from streams.voice import Outlets, Voice
from tests.account_records import Story, at
from tests.limit_voices import account_fact_of, debits_of, rated
from tests.unit_bench import CHAINS

USED = state_key("ws_1", Pool.ENRICHMENT)


class World:
    """A unit's balances, its voice and what settles behind it; the loop's clock moves when a test moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now_s)
        self.heard: list[str] = []
        """Everything that leaves, in its order."""
        self.alerts: list[LimitAlert] = []
        self.counts: Counter[str] = Counter()
        self.asked: list[TopQuestion] = []
        self.noting: asyncio.Event | None = None
        self.refusal: Exception | None = None
        self.columns: dict[str, asyncio.Event] = {}
        self.folded = (-1, -1)
        self.story = Story()
        self.balances = Balances(100, 0)
        self.balances.load({"ws_1": NOTHING})
        outlets = Outlets(self._publish, self._flush, TopColumns(self._find), self._note, self._count)
        self.voice = Voice(CHAINS, "me", outlets)
        self.settling = Settling(self.balances, self.voice, lambda: self.folded)
        self.task = asyncio.create_task(self.settling.run())

    def _publish(self, topic: str, partition: int, key: bytes, message: msgspec.Struct) -> None:
        if isinstance(message, LimitAlert):
            self.alerts.append(message)
            self.heard.append(f"alert {message.thresholds}")
        elif key == USED:
            self.heard.append(f"used {message.used}")  # type: ignore[attr-defined]

    async def _flush(self) -> None:
        self.heard.append("flushed")

    async def _note(self, alerts: Sequence[LimitAlert]) -> None:
        if self.noting:
            await self.noting.wait()
        if self.refusal:
            raise self.refusal
        self.heard.append(f"noted {[alert.thresholds for alert in alerts]}")

    def _count(self, what: str, number: int) -> None:
        self.counts[what] += number

    async def _find(self, questions: Sequence[TopQuestion]) -> dict[TopQuestion, Columns]:
        self.asked += questions
        for question in questions:
            if wait := self.columns.get(question.pool):
                await wait.wait()
        return dict.fromkeys(questions, ())

    def fold(self) -> None:
        """The story's next step."""
        record = rated(self.story.steps)[-1]
        runs, events = self.folded
        if row := account_fact_of(record) if record.step.of_account else None:
            self.folded = (runs, events + 1)
            notices = fold_event(self.balances, row)
            sources = [Source(CHAINS[1], notice.row) for notice in notices]
        else:
            self.folded = (runs + 1, events)
            notices = self.balances.fold(debits_of([record]))
            sources = [Source(CHAINS[0], record.offset) for _ in notices]
        self.voice.tell(self.balances, self.folded, list(zip(notices, sources, strict=True)))

    def run(self, number: int, day: str = "Jan 16") -> None:
        """So many cell runs."""
        for _ in range(number):
            self.story.run(at(day))
            self.fold()

    def write(self, name: str, *, at_once: bool = False, folded: tuple[int, int] | None = None) -> None:
        """What was folded is in the ledger, a chunk of this name with it."""

        async def acknowledge() -> None:
            self.heard.append(name)

        self.settling.add(Written(folded or self.folded, [Parcel([], acknowledge)]), at_once=at_once)

    async def after(self, seconds: float, *, tick: bool = True) -> list[str]:
        """What leaves until so much later."""
        self.now_s += seconds
        if tick:
            self.settling.tick()
        for _ in range(20):
            await asyncio.sleep(0)
        heard, self.heard = self.heard, []
        return heard


async def planned(monkeypatch: pytest.MonkeyPatch) -> World:
    """A workspace with a plan of 10 credits, of which everybody has heard."""
    world = World(monkeypatch)
    world.story.plan("10", at("Jan 15"))
    world.fold()
    world.write("plan")
    assert await world.after(0) == ["used 0", "flushed", "plan"]
    return world


async def test_a_chunk_is_acknowledged_once_the_states_rest_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``used`` is told once a second; what was told before says nothing of a chunk, of either topic."""
    world = await planned(monkeypatch)
    world.run(1)
    assert await world.after(STATES_EVERY_S) == ["used 1", "flushed"], "whether it is in the ledger or not"
    world.run(1)
    world.write("runs")
    assert await world.after(STATES_EVERY_S * 0.9) == []
    assert await world.after(STATES_EVERY_S * 0.1) == ["used 2", "flushed", "runs"]
    world.write("a run ahead", folded=(2, 0))
    world.write("an event ahead", folded=(1, 1))
    assert await world.after(STATES_EVERY_S) == []
    world.run(1)
    assert await world.after(STATES_EVERY_S) == ["used 3", "flushed", "a run ahead"]
    world.story.limits(at("Jan 17"), (50,))
    world.fold()
    assert await world.after(STATES_EVERY_S) == ["used 3", "flushed", "an event ahead"]
    assert await world.after(10) == [], "nothing is left to be told"


async def test_what_moved_nothing_waits_for_no_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has anything to hear of it; and a stop waits for none either."""
    world = await planned(monkeypatch)
    world.folded = (0, 0)
    world.write("copies", at_once=True)
    assert await world.after(0) == ["copies"]
    world.run(1)
    world.write("a run", at_once=True)
    assert await world.after(0.1) == []
    world.settling.hurry()
    world.write("copies", at_once=True)
    assert await world.after(0) == ["used 1", "flushed", "a run", "copies"]


async def test_a_second_that_is_over_is_not_waited_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without a tick."""
    world = await planned(monkeypatch)
    world.run(1)
    await world.after(STATES_EVERY_S, tick=False)
    world.write("a run")
    assert await world.after(0, tick=False) == ["used 1", "flushed", "a run"]


async def test_an_alert_is_noted_and_flushed_before_its_chunk_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meanwhile states go on; what is told during a flush waits for the next one."""
    world = await planned(monkeypatch)
    world.run(5)
    world.write("runs")
    assert await world.after(STATES_EVERY_S / 2) == ["used 5", "alert (50,)"], "the database is asked once a second"
    world.noting = asyncio.Event()
    assert await world.after(STATES_EVERY_S / 2) == []
    world.run(3)
    assert await world.after(0) == ["used 8", "alert (80,)"]
    world.run(1)
    assert await world.after(STATES_EVERY_S / 2) == []
    assert await world.after(STATES_EVERY_S / 2) == ["used 9"]
    world.noting.set()
    assert await world.after(0) == ["noted [(50,)]", "flushed", "runs"]
    assert await world.after(STATES_EVERY_S) == ["noted [(80,)]", "flushed"]
    assert world.counts == {"crossed": 2, "states": 2 + 3}


async def test_what_the_database_did_not_take_is_still_to_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that fails says so; the unit counts as one that has something to tell, and the next flush has all."""
    world = await planned(monkeypatch)
    world.task.cancel()
    world.run(5)
    world.refusal = Unreachable("no ledger", "it is away", "Wait.")
    with pytest.raises(Unreachable):
        await world.voice.flush()
    assert world.voice.has_unflushed
    assert "flushed" not in world.heard
    world.run(3)
    world.refusal = None
    await world.voice.flush()
    assert await world.after(0) == ["used 5", "alert (50,)", "used 8", "alert (80,)", "noted [(50,), (80,)]", "flushed"]
    await world.voice.flush()
    assert await world.after(0) == []
    world.voice.publish_alerts(world.alerts[:1])
    await world.voice.flush()
    assert await world.after(0) == ["alert (50,)", "noted [(50,)]", "flushed"], "without a state, too"


async def test_alerts_leave_in_the_order_of_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever has its columns first."""
    world = await planned(monkeypatch)
    world.columns["enrichment"] = asyncio.Event()
    world.run(5)
    world.story.grant("2", at("Jan 17"))
    world.fold()
    assert await world.after(0, tick=False) == ["used 5"]
    world.columns["enrichment"].set()
    assert await world.after(0, tick=False) == ["alert (50,)", "alert ()"]


async def test_a_group_begins_before_anything_is_acknowledged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, and not before all states are told where they are told anew: a commit says that they were."""
    world = World(monkeypatch)

    async def commit() -> None:
        world.heard.append("begun")

    world.settling.commit_begin = commit
    world.settling.is_seeding = True
    world.write("nothing new")
    assert await world.after(0) == []
    world.settling.is_seeding = False
    assert await world.after(STATES_EVERY_S) == ["begun", "nothing new"]
    world.write("nothing new")
    assert await world.after(STATES_EVERY_S) == ["nothing new"]
    world.settling.commit_begin = commit
    assert await world.after(STATES_EVERY_S) == ["begun"], "where nothing comes, too"


async def test_an_alert_says_when_its_credits_will_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 credits are left, and 5 were drawn in 4 days. Premium credits have no period in which they could end."""
    world = await planned(monkeypatch)
    for number, day in ((2, "Jan 16"), (2, "Jan 17"), (1, "Jan 18")):
        world.run(number, day)
    world.story.grant("2", at("Jan 19"))
    world.fold()
    await world.after(0)
    assert [(alert.pool, alert.runs_out_on) for alert in world.alerts] == [
        ("enrichment", date(2026, 1, 22)), ("premium", None)
    ]  # fmt: skip


async def test_the_columns_of_a_pool_that_nears_a_line_are_asked_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the pace of the last second; they are kept fresh while it does, as long as the unit lives."""
    world = await planned(monkeypatch)
    asked = [TopQuestion("ws_1", "enrichment", date(2026, 1, 15), date(2026, 2, 15))]
    world.run(1)
    await world.after(STATES_EVERY_S)
    assert world.asked == []
    world.run(1)
    await world.after(STATES_EVERY_S)
    assert world.asked == asked
    await world.after(AGE_S_MAX)
    world.voice.refresh()
    await world.after(0)
    assert world.asked == 2 * asked
    world.voice.close()
    await world.after(AGE_S_MAX)
    world.voice.refresh()
    await world.after(0)
    assert world.asked == 2 * asked
