"""Which columns drew most: what an alert says beside its crossing, if it can be had without delay.

Asking the ledger costs 10 ms and more beside an insert, so what is likely to be asked for is asked ahead: a pool that
at its present pace reaches a line within the next seconds is watched, and its answer kept fresh. All units of a worker
ask together, since a question costs nearly the same for one workspace as for many.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from typing import Final

from schemas.limits import TopColumn
from sinks.accounts import TopQuestion
from sinks.clickhouse import DatabaseError

WAIT_S_MAX: Final = 0.05
"""How long an alert waits for its columns; without an answer it leaves without."""
AGE_S_MAX: Final = 1.0
FRESH_S: Final = 0.65
"""When a watched answer is this old, all that are half as old are asked for again."""
QUESTIONS_MAX: Final = 20
"""Of one unit at once, at the most: with more alerts than this, none waits."""

Columns = tuple[TopColumn, ...]


class TopColumns:
    """Of one worker. ``find`` asks the ledger where no unit waits for it."""

    def __init__(self, find: Callable[[Sequence[TopQuestion]], Awaitable[dict[TopQuestion, Columns]]]) -> None:
        self._find = find
        self._known: dict[TopQuestion, tuple[float, Columns]] = {}
        self._watched: dict[int, list[TopQuestion]] = {}
        self._asking: asyncio.Task[None] | None = None

    def watch(self, partition: int, questions: Collection[TopQuestion]) -> None:
        """These will probably be asked soon by the unit of this partition; nothing else of it is kept fresh."""
        self._watched[partition] = list(questions)[:QUESTIONS_MAX]
        self.refresh()

    def forget(self, partition: int) -> None:
        """Ask ahead no more for the unit of this partition."""
        self._watched.pop(partition, None)

    def refresh(self) -> None:
        """Ask ahead for what is watched and no longer fresh, unless that is under way."""
        if self._asking and not self._asking.done():
            return
        ages = {question: self._age(question) for watched in self._watched.values() for question in watched}
        if ages and max(ages.values()) > FRESH_S:
            stale = [question for question, age in ages.items() if age > FRESH_S / 2]
            self._asking = asyncio.create_task(self._learn(stale))

    def close(self) -> None:
        """Ask no more."""
        self._watched.clear()
        if self._asking:
            self._asking.cancel()

    async def columns(self, questions: Sequence[TopQuestion]) -> Mapping[TopQuestion, Columns]:
        """What is known within `WAIT_S_MAX`: at once where it was asked ahead."""
        unknown = [question for question in questions if self._age(question) > AGE_S_MAX]
        if unknown and len(unknown) <= QUESTIONS_MAX:
            try:
                async with asyncio.timeout(WAIT_S_MAX):
                    await self._learn(unknown)
            except TimeoutError:
                pass
        return {question: self._known[question][1] for question in questions if self._age(question) <= AGE_S_MAX}

    def _age(self, question: TopQuestion) -> float:
        known = self._known.get(question)
        return asyncio.get_running_loop().time() - known[0] if known else math.inf

    async def _learn(self, questions: Sequence[TopQuestion]) -> None:
        now = asyncio.get_running_loop().time()
        try:
            found = await self._find(questions)
        except DatabaseError:
            return  # a ledger that does not answer holds no alert up
        self._known = {asked: known for asked, known in self._known.items() if now - known[0] <= AGE_S_MAX}
        self._known |= {question: (now, columns) for question, columns in found.items()}
