"""What waits for a unit is taken in the broker's order, and account events do not make runs wait for a slow writer."""

import asyncio

import pytest

from streams import inbox
from streams.inbox import Event, Inbox
from tests.records import Record


def event(at_ms: int, records: int = 1, *, of_account: bool = False) -> Event:
    """A chunk that the broker received at an instant."""
    chunk = [Record(number, b"", b"", at_ms) for number in range(records)]
    return Event(chunk, lambda: None, of_account)


def instants(events: list[Event]) -> list[int]:
    """When the broker received what was taken."""
    return [taken.chunk[0].timestamp for taken in events]


async def taken_runs(box: Inbox) -> list[int]:
    """What is there now."""
    box.nudge()
    return instants(await box.take_runs(100, None))


async def test_the_brokers_time_decides() -> None:
    """Runs up to the account events, these up to the next run; at one instant the run is first."""
    box = Inbox(lambda: False)
    for at_ms in (1, 2, 5):
        box.put(event(at_ms))
    for at_ms in (2, 3, 4, 6):
        box.put(event(at_ms, of_account=True))
    assert box.take_account_events() == []
    assert await taken_runs(box) == [1, 2]
    assert instants(box.take_account_events()) == [2, 3, 4]
    assert await taken_runs(box) == [5]
    assert instants(box.take_account_events()) == [6]
    assert not box.has_account_events


async def test_account_events_are_held_back_while_the_writer_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go on, and what has come meanwhile is taken at once; but not for longer than the bound."""
    monkeypatch.setattr(inbox, "HELD_S_MAX", 600.0)
    behind = True
    box = Inbox(lambda: behind)
    for at_ms in (1, 3, 5):
        box.put(event(at_ms, of_account=True))
        box.put(event(at_ms + 1))
        assert box.take_account_events() == []
    assert await taken_runs(box) == [2, 4, 6]
    behind = False
    assert instants(box.take_account_events()) == [1, 3, 5]

    behind = True
    box.put(event(7, of_account=True))
    assert box.take_account_events() == []
    monkeypatch.setattr(inbox, "HELD_S_MAX", 0.0)
    assert instants(box.take_account_events()) == [7]


async def test_a_full_take_and_a_deadline_end_the_waiting() -> None:
    """The rest stays for the next."""
    box = Inbox(lambda: False)
    for at_ms in range(5):
        box.put(event(at_ms, records=40))
    assert instants(await box.take_runs(100, None)) == [0, 1, 2]
    assert instants(await box.take_runs(100, asyncio.get_running_loop().time() + 0.01)) == [3, 4]
    assert await box.take_runs(100, asyncio.get_running_loop().time() + 0.01) == []
