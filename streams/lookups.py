"""What a unit asks of the ledger in its sequence, and has to wait for."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

from schemas.ledger import Identity
from sinks import accounts
from sinks.accounts import AccountFact, RunToReverse
from streams import recovery
from streams.rules import account_events, facts
from streams.rules.balances import Opening
from streams.rules.duplicates import Original


class Lookups:
    """Of one worker. ``look_up`` (a question of `sinks`, its arguments) → awaitable of the answer."""

    def __init__(self, look_up: Callable[..., Awaitable[Any]]) -> None:
        self._look_up = look_up

    async def runs(self, identities: Sequence[Identity]) -> dict[Identity, Original]:
        """The ledger's debits under these, for those that it has."""
        rows = await self._look_up(accounts.find_runs, identities)
        return {identity: Original(position, substance) for identity, position, substance in rows}

    async def known(self, chunk: Sequence[account_events.Received]) -> account_events.Known:
        """What the ledger knows of a chunk of account events."""
        events: dict[Identity, tuple[str, UUID, str, AccountFact]] = {}
        runs: list[RunToReverse] = []
        if identities := account_events.event_identities(chunk):
            events = await self._look_up(accounts.known_events, identities)
        if identities := account_events.run_identities(chunk):
            runs = await self._look_up(accounts.runs_to_reverse, identities)
        return account_events.known_of(events, runs)

    async def openings(self, names: Sequence[str], now_ms: int) -> dict[str, Opening]:
        """What these workspaces' accounts begin with, as of an instant (Unix ms)."""
        events = await self._look_up(accounts.facts_of, names)
        draws = await self._look_up(accounts.draws_of, names, recovery.first_day(now_ms))
        return facts.openings(names, events, draws)
