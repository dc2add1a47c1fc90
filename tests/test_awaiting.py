"""Waiting for the rows of what was sent by hand."""

from typing import Any, Final

import pytest

from creditstream import awaiting
from creditstream.asking import WorkerAnswers
from creditstream.awaiting import await_rows
from schemas.answers import LedgerRow
from schemas.ledger import Position
from schemas.problem import Unreachable
from streams.kafka.topics import Topic


class Restarting(WorkerAnswers):
    """A worker whose first answer is lost."""

    asked = 0

    def ledger_rows(self, *_: Any) -> list[LedgerRow]:
        self.asked += 1
        if self.asked == 1:
            raise Unreachable("the worker does not answer")
        return [LedgerRow(5, "run", "charged", "enrichment", 1000, "ws_1", "", "")]


def test_an_answer_that_is_lost_ends_no_wait() -> None:
    """While there is time, it is asked again."""
    answers, place = Restarting(""), Position("cell-runs", 0, 5)

    assert await_rows(answers, Topic("cell-runs", "id", 1, {}), [place])[place].credits == 1000
    assert answers.asked == 2


KAFKA_HAS: Final = {
    (partition, offset): LedgerRow(offset, "run", "charged", "enrichment", offset, f"ws_{partition}", "", "")
    for partition in range(2)
    for offset in range(10)
}


class Metering(WorkerAnswers):
    """A worker that writes one row more of a partition each time that it is asked, and answers with at most two."""

    def __init__(self) -> None:
        super().__init__("")
        self.asked: list[tuple[int, int, int]] = []

    def ledger_rows(self, topic_id: str, partition: int, after: int, limit: int) -> list[LedgerRow]:
        self.asked.append((partition, after, limit))
        written = 2 + sum(1 for before, *_ in self.asked if before == partition)
        offsets = range(after + 1, min(written, after + 1 + min(limit, 2)))
        return [KAFKA_HAS[partition, offset] for offset in offsets]


def test_answers_in_parts_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each place gets its own row, of whichever answer and partition; rows of others in between are left out, and
    nothing behind the last place is asked for.
    """
    monkeypatch.setattr(awaiting, "POLL_S", 0)
    topic, answers = Topic("cell-runs", "id", 2, {}), Metering()
    places = [Position("cell-runs", *place) for place in ((1, 7), (0, 2), (0, 3), (1, 4), (0, 8))]

    rows = await_rows(answers, topic, places)

    assert rows == {place: KAFKA_HAS[place.partition, place.offset] for place in places}
    for partition, first, last in ((0, 2, 8), (1, 4, 7)):
        mine = [(after, limit) for asked, after, limit in answers.asked if asked == partition]
        assert mine[0][0] == first - 1
        assert len(mine) > 3
        assert all(after + limit == last for after, limit in mine)


def test_a_page_is_no_larger_than_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beyond one answer is asked for behind it."""
    monkeypatch.setattr(awaiting, "PAGE_ROWS", 3)

    class Written(WorkerAnswers):
        def ledger_rows(self, topic_id: str, partition: int, after: int, limit: int) -> list[LedgerRow]:
            return [KAFKA_HAS[partition, offset] for offset in range(after + 1, 10)][:limit]

    places = [Position("cell-runs", 0, offset) for offset in range(10)]
    rows = await_rows(Written(""), Topic("cell-runs", "id", 1, {}), places)
    assert [rows[place].offset for place in places] == list(range(10))


def test_a_wait_ends_when_no_row_comes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """It names the first offset without one, whoever wrote it: those before it have theirs. Before, it says once what
    it waits for.
    """
    monkeypatch.setattr(awaiting, "WAIT_S_MAX", 0.4)
    monkeypatch.setattr(awaiting, "QUIET_S", 0.05)

    class Stopped(WorkerAnswers):
        def ledger_rows(self, topic_id: str, partition: int, after: int, limit: int) -> list[LedgerRow]:
            return [KAFKA_HAS[partition, 0]] if after < 0 else []

    places = [Position("cell-runs", 0, offset) for offset in (0, 4)]
    with pytest.raises(Unreachable, match=r"cell-runs\[0\]@1 has no ledger row after 0 s: the worker is not metering"):
        await_rows(Stopped(""), Topic("cell-runs", "id", 1, {}), places)
    assert [record.getMessage() for record in caplog.records] == [
        "waiting for a worker to meter cell-runs[0]@1, up to 0 s"
    ]
