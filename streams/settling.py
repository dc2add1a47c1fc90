"""What comes after a unit's insert: chunks whose rows are in the ledger are acknowledged once everybody who should know
of them has been told. Steps 8 and 9 of the order of effects (`streams.unit`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from operator import le
from typing import Any, Final, NamedTuple

from streams.inbox import Parcel
from streams.rules.balances import Balances
from streams.rules.records import UpTo
from streams.voice import Voice

STATES_EVERY_S: Final = 1.0
"""States whose ``used`` moved are told once in this time; a chunk is acknowledged once they rest on it."""


class Written(NamedTuple):
    """Chunks whose rows are in the ledger, and what was folded with them."""

    folded: UpTo
    parcels: list[Parcel]


class Settling:
    """Of one unit. Neither its sequence nor its writer waits for it: what it has not acknowledged counts as in flight,
    which is bounded.
    """

    def __init__(self, balances: Balances, voice: Voice, folded: Callable[[], UpTo]) -> None:
        self._balances, self._voice, self._folded = balances, voice, folded
        self._written: list[Written] = []
        self._is_due = asyncio.Event()
        self._is_flushing = self._is_hurried = False
        self._told_at = 0.0
        self._told = folded()
        """Up to which offsets the states on the topic are complete, once they are flushed."""
        self.is_seeding = False
        """Whether the states of all workspaces are being told. A commit would say that they were, so none comes yet."""
        self.commit_begin: Callable[[], Awaitable[Any]] | None = None
        """Awaited once they are, before anything is acknowledged: commits where the unit's group begins."""

    def add(self, written: Written, *, at_once: bool) -> None:
        """These rows are in the ledger. ``at_once``: what was told may be flushed before the second is over."""
        self._written.append(written)
        if at_once or self._are_states_due:
            self._is_due.set()

    def hurry(self) -> None:
        """Wait for no second any more: the worker stops, or the partition moves."""
        self._is_hurried = True

    def tick(self) -> None:
        """The clock's part: states that moved, and chunks that wait for them."""
        waits = self._written or self._balances.moved or self._voice.has_unflushed or self.commit_begin
        if waits and self._are_states_due:
            if self._is_flushing:
                self._tell_moved()  # states do not wait for a database that does not take alerts
            else:
                self._is_due.set()

    async def run(self) -> None:
        """Tell, flush, acknowledge, whenever it is due."""
        while True:
            await self._is_due.wait()
            self._is_due.clear()
            if self._is_hurried or self._is_time_to_tell():
                self._tell_moved()
            told, is_seeding = self._told, self.is_seeding
            self._is_flushing = True
            await self._voice.flush()
            self._is_flushing = False
            if not is_seeding:
                await self._acknowledge(told)

    async def _acknowledge(self, told: UpTo) -> None:
        """What is in the ledger and was folded before the states were told."""
        if self.commit_begin:
            await self.commit_begin()
            self.commit_begin = None
        while self._written and all(map(le, self._written[0].folded, told)):
            for parcel in self._written.pop(0).parcels:
                await parcel.acknowledge()

    @property
    def _are_states_due(self) -> bool:
        return asyncio.get_running_loop().time() - self._told_at >= STATES_EVERY_S

    def _is_time_to_tell(self) -> bool:
        """A workspace's ``used`` is told once a second, however fast batches go."""
        return not self._balances.moved or self._are_states_due

    def _tell_moved(self) -> None:
        self._told_at = asyncio.get_running_loop().time()
        self._voice.tell_moved(self._balances, self._folded())
        self._told = self._folded()
