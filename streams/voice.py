"""A unit's voice: hands alerts and states to the producer in the order of the fold, and knows when Kafka has them.

States leave at once, alerts when they have what `streams.top_columns` can tell. Published alerts are also noted in the
ledger's database, for the view ``alerts``: before Kafka's commit, so none is missing there, and after a crash one may
be noted twice.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
import structlog

from schemas.cell_run import from_milliseconds
from schemas.ledger import Pool
from schemas.limits import AsOf, LimitAlert, state_key
from sinks.accounts import TopQuestion
from sinks.ledger import Chain
from streams.kafka.topics import LIMIT_ALERTS, LIMIT_STATES
from streams.rules.balances import Account, Balances, Key, Notice
from streams.rules.messages import Source, alert_of, runs_out_on, state_of
from streams.rules.periods import to_date
from streams.rules.records import UpTo
from streams.top_columns import TopColumns

log: Final = structlog.get_logger()


class Outlets(msgspec.Struct, frozen=True):
    """Where a voice goes, shared by all units of a worker."""

    publish: Callable[[str, int, bytes, msgspec.Struct], None]
    """Hand one message over: topic, partition, key, message."""
    flush: Callable[[], Awaitable[None]]
    """Return once Kafka has everything that was handed over."""
    top_columns: TopColumns
    """What an alert says beside its crossing."""
    note_alerts: Callable[[Sequence[LimitAlert]], Awaitable[None]]
    """Write them down in the database."""
    told: Callable[[str, int], None]
    """Count alerts (by kind) and states."""


class Voice:
    """Of one unit. ``owner`` names the unit's life; states carry it."""

    def __init__(self, chains: tuple[Chain, Chain], owner: str, outlets: Outlets) -> None:
        self._partition = chains[0].partition
        self._log = "+".join(chain.topic_id for chain in chains)
        self.owner: Final = owner
        self._outlets = outlets
        self._pending: asyncio.Task[None] | None = None
        self._unnoted: list[LimitAlert] = []
        self.has_unflushed = False
        self.unanswered: dict[Key, AsOf] = {}
        """What other owners have said last of each pool, where this unit may still have to answer."""

    def as_of(self, balances: Balances, folded: UpTo) -> AsOf:
        """What the unit's states rest on now."""
        runs, events = folded
        return AsOf(log=self._log, cell_runs=runs, account_events=events, at=from_milliseconds(balances.now_ms))

    def tell(self, balances: Balances, folded: UpTo, told: Sequence[tuple[Notice, Source | None]]) -> None:
        """Hand over the alerts of a fold, and the states that changed by it."""
        alerts = [
            alert_of(notice, source, runs_out_on(balances[notice.workspace_id], notice.at_ms)
                     if notice.standing.terms.pool == Pool.ENRICHMENT else None)
            for notice, source in told
        ]  # fmt: skip
        if alerts:
            self.publish_alerts(alerts)
        keys = list(balances.urgent)
        balances.urgent.clear()
        self._publish_states(balances, folded, keys)

    def tell_moved(self, balances: Balances, folded: UpTo) -> None:
        """Hand over the states of which only ``used`` has moved, and ask ahead for pools that near a line."""
        near = [(name, pool) for name, pool in balances.moved if balances[name].look_ahead(pool)]
        self._outlets.top_columns.watch(self._partition, [_top_question(balances[name], pool) for name, pool in near])
        self._publish_states(balances, folded, list(balances.moved))

    def refresh(self) -> None:
        """Now and then: keep what was asked ahead fresh."""
        self._outlets.top_columns.refresh()

    def publish_alerts(self, alerts: Sequence[LimitAlert]) -> None:
        """Hand alerts over, behind those that still wait for their columns."""
        self.has_unflushed = True
        self._pending = asyncio.create_task(self._publish(alerts, self._pending))

    def close(self) -> None:
        """The unit is released: nothing is asked ahead any more."""
        self._outlets.top_columns.forget(self._partition)

    async def flush(self) -> None:
        """Return once Kafka has everything, and the database every alert. Raises what went wrong with any of it."""
        if not self.has_unflushed:
            return
        self.has_unflushed = False
        try:
            if self._pending:
                await asyncio.shield(self._pending)  # whoever ends the unit here ends the waiting, not the telling
            if self._unnoted:
                noted = list(self._unnoted)
                await self._outlets.note_alerts(noted)
                del self._unnoted[: len(noted)]
            await self._outlets.flush()
        except BaseException:
            self.has_unflushed = True  # also when the unit is released meanwhile: what it told is then told again
            raise

    def _publish_states(self, balances: Balances, folded: UpTo, keys: Sequence[Key]) -> None:
        if not keys:
            return
        as_of = self.as_of(balances, folded)
        for name, pool in keys:
            balances.moved.discard((name, pool))  # an account that has something to tell is never let go
            self._publish_state(balances[name], pool, as_of)
        self.has_unflushed = True
        self._outlets.told("states", len(keys))

    def _publish_state(self, account: Account, pool: Pool, as_of: AsOf) -> None:
        state = state_of(account, pool, as_of, self.owner)
        self._outlets.publish(LIMIT_STATES, self._partition, state_key(account.name, pool), state)

    async def _publish(self, alerts: Sequence[LimitAlert], before: "asyncio.Task[None] | None") -> None:
        alerts = await self._with_columns(alerts)
        if before:
            await before
        for alert in alerts:
            self._outlets.publish(LIMIT_ALERTS, self._partition, alert.workspace_id.encode(), alert)
            self._outlets.told(alert.kind, 1)
        self._unnoted += alerts

    async def _with_columns(self, alerts: Sequence[LimitAlert]) -> Sequence[LimitAlert]:
        questions = [TopQuestion(a.workspace_id, str(a.pool), a.period_start, a.period_end) for a in alerts]
        columns = await self._outlets.top_columns.columns(questions)
        return [
            msgspec.structs.replace(alert, top_columns=columns.get(question))
            for alert, question in zip(alerts, questions, strict=True)
        ]


def _top_question(account: Account, pool: Pool) -> TopQuestion:
    period = account.standing(pool).terms.period
    days = (to_date(period.start), to_date(period.end)) if period else (None, None)
    return TopQuestion(account.name, str(pool), *days)
