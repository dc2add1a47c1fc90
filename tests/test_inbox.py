"""What waits for a unit is taken in the broker's order, and account events do not make runs wait for a slow writer."""

import asyncio

import pytest

from streams import inbox
from streams.batches import chunk_bytes
from streams.inbox import Inbox, Parcel
from streams.kafka.transport import Chunk
from streams.rules.records import bytes_of
from tests.records import Record


def event(at_ms: int, records: int = 1, *, of_account: bool = False) -> Parcel:
    """A chunk that the broker received at an instant."""
    chunk = [Record(number, b"", b"", at_ms) for number in range(records)]
    return Parcel(chunk, lambda: None, of_account)


def instants(events: list[Parcel]) -> list[int]:
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
    assert box.take_account_events(100) == []
    assert await taken_runs(box) == [1, 2]
    assert instants(box.take_account_events(100)) == [2, 3, 4]
    assert await taken_runs(box) == [5]
    assert instants(box.take_account_events(100)) == [6]
    assert not box.has_account_events


def backlog(*at_ms: int, of_account: bool = False) -> Parcel:
    """One chunk of records that the broker received at these instants."""
    return Parcel([Record(number, b"", b"", ms) for number, ms in enumerate(at_ms)], lambda: None, of_account)


async def everything(box: Inbox) -> list[tuple[bool, list[int]]]:
    """Whether of account, and when received, of all that is taken, in its order."""
    taken = []
    while True:
        box.nudge()
        runs, account_events = await box.take_runs(100, None), box.take_account_events(100)
        if not runs and not account_events:
            return taken
        for events in filter(None, (runs, account_events)):
            taken += [(events[0].of_account, [record.timestamp for event in events for record in event.chunk])]


async def test_chunks_of_a_backlog_are_parted_where_the_other_topic_comes_between() -> None:
    """A plan of Tuesday is no reason to fold Monday's runs after it, nor Wednesday's before it."""
    box = Inbox(lambda: False)
    box.put(backlog(2, 3, 5, 5, 9))
    box.put(backlog(1, 4, 5, 6, 7, 10, of_account=True))
    assert await everything(box) == [
        (True, [1]), (False, [2, 3]), (True, [4]), (False, [5, 5]), (True, [5, 6, 7]), (False, [9]), (True, [10])
    ]  # fmt: skip


async def test_account_events_wait_for_runs_that_kafka_still_has() -> None:
    """While a backlog is fetched nothing of it may wait here for a moment: those of the day before come first."""
    unread = [3, 0]
    box = Inbox(lambda: False, lambda: (unread[0], unread[1]))
    box.put(backlog(5, of_account=True))
    assert await everything(box) == []
    assert not box.has_account_events, "nothing that is to be written waits for them"
    box.put(backlog(1, 4, 5))
    assert box.has_account_events
    assert await everything(box) == [(False, [1, 4, 5])], "another of that instant may follow, and is first"
    box.put(backlog(5, 6))
    assert await everything(box) == [(False, [5]), (True, [5]), (False, [6])]
    box.put(backlog(7, of_account=True))
    unread[0] = 0
    assert box.has_account_events
    assert await everything(box) == [(True, [7])]


async def test_runs_wait_for_account_events_that_kafka_still_has() -> None:
    """Up to the last one that came, they are right without more; what has not been said may be anything."""
    unread: list[int | None] = [0, None]
    box = Inbox(lambda: False, lambda: (unread[0], unread[1]))
    box.put(backlog(3, 4, 8))
    assert await everything(box) == []
    unread[1] = 2
    box.put(backlog(4, of_account=True))
    assert await everything(box) == [(False, [3, 4]), (True, [4])]
    box.put(backlog(8, of_account=True))
    assert await everything(box) == [(False, [8]), (True, [8])]
    box.put(backlog(9, 10, of_account=True))
    assert await everything(box) == [(True, [9, 10])]
    box.put(backlog(10, 11))
    assert await everything(box) == [(False, [10])]
    unread[1] = 0
    assert await everything(box) == [(False, [11])]


async def test_a_topic_of_which_nothing_comes_holds_up_the_other_for_a_bounded_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A partition without a leader, say. As soon as something comes of it, or all of it is known to be here, the time
    begins anew.
    """
    now_s = 1000.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now_s)
    unread = [1, 1]
    box = Inbox(lambda: False, lambda: (unread[0], unread[1]))
    box.put(backlog(3))
    assert await everything(box) == []
    now_s += inbox.SILENCE_S_MAX * 0.9
    assert await everything(box) == []
    now_s += inbox.SILENCE_S_MAX * 0.1
    assert await everything(box) == [(False, [3])]
    box.put(backlog(5, of_account=True))
    assert await everything(box) == []
    now_s += inbox.SILENCE_S_MAX
    assert await everything(box) == [(True, [5])]
    box.put(backlog(9))
    assert await everything(box) == [], "something had come"
    unread[1] = 0
    assert await everything(box) == [(False, [9])]
    unread[1] = 1
    now_s += inbox.SILENCE_S_MAX
    box.put(backlog(10))
    assert await everything(box) == [], "all of it was here"


async def test_a_parted_chunk_is_done_with_its_last_part() -> None:
    """A part is acknowledged up to its own end: Kafka's commit must not pass what is still to be folded."""
    said: list[int | str] = []

    async def acknowledge() -> None:
        said.append("done")

    async def acknowledge_part(offset: int) -> None:
        said.append(offset)

    box = Inbox(lambda: False)
    chunk = [Record(n, b"", b"", ms) for n, ms in enumerate((1, 1, 3))]
    box.put(Parcel(chunk, acknowledge, acknowledge_part=acknowledge_part))
    box.put(backlog(2, of_account=True))
    parts = []
    for _ in range(2):
        box.nudge()
        parts += await box.take_runs(100, None)
        box.take_account_events(100)
    for part, expected in zip(parts, ([1], [1, "done"]), strict=True):
        await part.acknowledge()
        assert said == expected


async def test_the_parts_of_a_chunk_weigh_what_it_weighs() -> None:
    """A batch that is gathered of them is as large as its rows."""
    chunk = Chunk(Record(n, b"value", b"key", ms) for n, ms in enumerate((1, 3, 5)))
    chunk.records, chunk.nbytes = len(chunk), bytes_of(chunk)
    weight = chunk_bytes(chunk)
    box = Inbox(lambda: False)
    box.put(Parcel(chunk, lambda: None))
    for ms in (2, 4):
        box.put(backlog(ms, of_account=True))
    weights = []
    for _ in range(3):
        box.nudge()
        weights += [chunk_bytes(part.chunk) for part in await box.take_runs(100, None)]
        box.take_account_events(100)
    assert weights == [weight // 3] * 3


async def test_a_slow_writer_holds_a_backlogs_account_events_by_the_brokers_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hours of a backlog pass in a second of ours."""
    monkeypatch.setattr(inbox, "HELD_S_MAX", 600.0)
    box = Inbox(lambda: True)
    box.put(backlog(5_000, of_account=True))
    for parts in ((5_001, 600_000), (605_000, 605_001), (700_000,)):
        box.put(backlog(*parts))
    assert await taken_runs(box) == [5_001, 605_000]
    assert instants(box.take_account_events(100)) == [5_000]
    assert await taken_runs(box) == [605_001, 700_000]


async def test_account_events_are_taken_in_parts() -> None:
    """Up to the chunk that fills a take; the others stay next, also where the writer has the first of them to do."""
    behind = False
    box = Inbox(lambda: behind)
    for at_ms in (1, 2, 3):
        box.put(event(at_ms, 2, of_account=True))
    box.put(event(4))
    assert instants(box.take_account_events(3)) == [1, 2]
    behind = True
    assert await taken_runs(box) == []
    assert instants(box.take_account_events(3)) == [3]
    assert await taken_runs(box) == [4]
    box.put(event(5, of_account=True))
    assert box.take_account_events(3) == [], "what comes later is held back"


async def test_account_events_are_held_back_while_the_writer_is_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go on, and what has come meanwhile is taken at once; but not for longer than the bound."""
    monkeypatch.setattr(inbox, "HELD_S_MAX", 600.0)
    behind = True
    box = Inbox(lambda: behind)
    for at_ms in (1, 3, 5):
        box.put(event(at_ms, of_account=True))
        box.put(event(at_ms + 1))
        assert box.take_account_events(100) == []
    assert await taken_runs(box) == [2, 4, 6]
    behind = False
    assert instants(box.take_account_events(100)) == [1, 3, 5]

    behind = True
    monkeypatch.setattr(inbox, "HELD_S_MAX", 0.05)
    await asyncio.sleep(0.06)
    box.put(event(7, of_account=True))
    assert box.take_account_events(100) == [], "they have not been held yet"
    await asyncio.sleep(0.06)
    assert instants(box.take_account_events(100)) == [7]


async def test_a_full_take_and_a_deadline_end_the_waiting() -> None:
    """The rest stays for the next."""
    box = Inbox(lambda: False)
    for at_ms in range(5):
        box.put(event(at_ms, records=40))
    assert instants(await box.take_runs(100, None)) == [0, 1, 2]
    assert instants(await box.take_runs(100, asyncio.get_running_loop().time() + 0.01)) == [3, 4]
    box.nudge()
    assert await box.take_runs(100, None) == []
    deadline = asyncio.get_running_loop().time() + 0.01
    assert await box.take_runs(100, deadline) == []
    assert asyncio.get_running_loop().time() >= deadline, "a nudge is used up"


async def test_who_waits_for_runs_is_called_back() -> None:
    """By a nudge, and by account events that come first."""
    box = Inbox(lambda: False)
    for call in (box.nudge, lambda: box.put(event(1, of_account=True))):
        waiting = asyncio.create_task(box.take_runs(100, None))
        await asyncio.sleep(0.01)
        call()
        async with asyncio.timeout(60):
            assert await waiting == []


async def test_only_a_long_chunk_waits_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells of a backlog; a run of live traffic goes on at once."""
    monkeypatch.setattr(inbox, "GATHER_S", 600.0)
    box = Inbox(lambda: False)
    async with asyncio.timeout(60):
        box.put(event(1))
        assert instants(await box.take_runs(10_000, None)) == [1]
        box.put(event(2, records=inbox.BACKLOG_CHUNK))
        gathering = asyncio.create_task(box.take_runs(10_000, None))
        await asyncio.sleep(0.01)
        box.put(event(3))
        assert instants(await gathering) == [2, 3]
