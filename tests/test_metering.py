"""Waiting for the rows of what was sent by hand."""

from typing import Any

from creditstream.asking import WorkerAnswers
from creditstream.metering import await_rows
from schemas.answers import LedgerRow
from schemas.ledger import Position
from schemas.problem import Unreachable
from streams.topics import Topic


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
