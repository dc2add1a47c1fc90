"""A database that does not answer is asked again, and what it said is taken back once it answers."""

import asyncio

import pytest
from clickhouse_connect.driver.exceptions import OperationalError

from streams import patience
from streams.patience import patiently


class Database:
    """Refuses so many times, then answers."""

    def __init__(self, refusals: int) -> None:
        self.refusals, self.asked = refusals, 0

    async def ask(self) -> str:
        """One attempt."""
        self.asked += 1
        if self.asked <= self.refusals:
            raise OperationalError("connection refused\nits stack")
        return "the mark"


@pytest.mark.parametrize("refusals", [0, 1, 3])
async def test_trouble_is_told_and_taken_back(monkeypatch: pytest.MonkeyPatch, refusals: int) -> None:
    """Whoever looks at /readyz in between sees why; afterwards nothing is left of it."""
    monkeypatch.setattr(patience, "TROUBLE_WAIT_S", 0.001)
    database, told = Database(refusals), list[str]()
    assert await patiently(database.ask, told.append, "cell-runs[3]: ") == "the mark"
    assert told == ["cell-runs[3]: connection refused"] * refusals + [""] * bool(refusals)


async def test_a_bound_ends_the_waiting() -> None:
    """The database's own error then, not the trouble of it."""
    database, told = Database(2), list[str]()
    with pytest.raises(OperationalError):
        await patiently(database.ask, told.append, s_max=-1)
    assert (database.asked, told) == (1, [])


async def test_trouble_ends_with_who_had_it() -> None:
    """A unit that is released while it waits takes it along: whoever asks next has no trouble, and tells of none."""
    database, told = Database(1), list[str]()
    waiting = asyncio.create_task(patiently(database.ask, told.append))
    while not told:
        await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert (waiting.cancelled(), told) == (True, ["connection refused", ""])
