"""What an alert says beside its crossing: at once where it was asked ahead, shortly where not, and never late."""

import asyncio
from collections.abc import Sequence

import pytest

from schemas.limits import TopColumn
from sinks.accounts import TopQuestion
from sinks.clickhouse import DatabaseError
from streams.top_columns import AGE_S_MAX, FRESH_S, QUESTIONS_MAX, WAIT_S_MAX, Columns, TopColumns

COLUMN = TopColumn(table_id="tbl_1", column_id="col_1", action="enrich_person", credits="1")


def question(number: int) -> TopQuestion:
    """Of workspace ``number``."""
    return TopQuestion(f"ws_{number}", "premium", None, None)


A, B = question(1), question(2)


class World:
    """The loop's clock, which moves when a test moves it, and a ledger that notes what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        self.asked: list[list[TopQuestion]] = []
        self.release: asyncio.Event | None = None
        self.error: DatabaseError | None = None
        self.top_columns = TopColumns(self._find)
        monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: self.now_s)

    async def _find(self, questions: Sequence[TopQuestion]) -> dict[TopQuestion, Columns]:
        self.asked.append(list(questions))
        if self.release:
            await self.release.wait()
        if self.error:
            raise self.error
        return dict.fromkeys(questions, (COLUMN,))

    async def after(self, seconds: float) -> list[list[TopQuestion]]:
        """What is asked ahead until so much later."""
        self.now_s += seconds
        self.top_columns.refresh()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        asked, self.asked = self.asked, []
        return asked


async def test_what_was_asked_ahead_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a second; then it is too old to be told, and asked for."""
    world = World(monkeypatch)
    world.top_columns.watch(0, [A])
    await asyncio.sleep(0)
    assert world.asked == [[A]]
    world.now_s += AGE_S_MAX
    assert (await world.top_columns.columns([A]), world.asked) == ({A: (COLUMN,)}, [[A]])
    world.now_s += 0.001
    world.error = DatabaseError("gone")
    assert (await world.top_columns.columns([A]), world.asked) == ({}, [[A], [A]])


async def test_what_is_watched_is_kept_fresh_by_few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked while all is fresh, and then all that will soon be stale together, for all units."""
    world = World(monkeypatch)
    world.top_columns.watch(0, [A])
    assert await world.after(0) == [[A]]
    world.now_s += FRESH_S * 0.4
    world.top_columns.watch(1, [B])
    assert await world.after(0) == [[B]]
    assert world.top_columns._known.keys() == {A, B}
    assert await world.after(FRESH_S * 0.5) == []
    assert await world.after(FRESH_S * 0.2) == [[A, B]]
    world.top_columns.watch(0, [])
    world.top_columns.forget(1)
    assert await world.after(AGE_S_MAX * 2) == []
    assert await world.top_columns.columns([question(3)])
    assert world.top_columns._known.keys() == {question(3)}, "what is too old to be told is forgotten"


async def test_a_slow_ledger_is_asked_ahead_one_question_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none at the end."""
    world = World(monkeypatch)
    world.release = asyncio.Event()
    world.top_columns.watch(0, [A])
    assert await world.after(0) == [[A]]
    world.top_columns.watch(0, [A, B])
    assert await world.after(10) == []
    world.release.set()
    assert await world.after(0) == []
    assert await world.after(0) == [[A, B]]
    world.release.clear()
    assert await world.after(10) == [[A, B]]
    world.top_columns.close()
    world.release.set()
    await world.after(0)
    assert await world.after(10) == []
    assert {asked_at for asked_at, _ in world.top_columns._known.values()} == {1010.0}, "it waits for no answer"


async def test_no_alert_waits_long_for_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for a ledger that does not answer, nor among many: what is known is told, the rest left out."""
    world = World(monkeypatch)
    many = [question(number) for number in range(QUESTIONS_MAX + 1)]
    world.top_columns.watch(0, many)
    await world.after(0)
    assert world.top_columns._known.keys() == set(many[:QUESTIONS_MAX])
    more = [question(100 + number) for number in range(QUESTIONS_MAX + 1)]
    assert (await world.top_columns.columns([*many, *more]), world.asked) == (
        dict.fromkeys(many[:QUESTIONS_MAX], (COLUMN,)), []
    )  # fmt: skip
    assert len(await world.top_columns.columns([*many[:5], *more[:QUESTIONS_MAX]])) == 5 + QUESTIONS_MAX
    world.release = asyncio.Event()
    waiting = asyncio.ensure_future(world.top_columns.columns([question(200), A]))
    assert (await world.after(0))[-1] == [question(200)]
    world.now_s += WAIT_S_MAX + 0.01
    assert await waiting == {A: (COLUMN,)}
