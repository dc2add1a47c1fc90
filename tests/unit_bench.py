"""A real unit on a real ledger, loaded as a worker loads it, with its surroundings in the test's hand: records whose
times the test chooses, Kafka's commits, the writer's thread, and everything that it publishes.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, Self
from uuid import UUID

import msgspec
from clickhouse_connect.driver.client import Client

from schemas.ledger import Identity
from schemas.limits import LimitAlert, LimitState
from schemas.problem import Problem
from sinks import accounts
from sinks.alerts import note_alerts
from sinks.ledger import Chain, Ledger
from streams.assignment import Assigned, Loader
from streams.batches import Batching
from streams.inbox import Behind, Parcel
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, LogRange
from streams.lookups import Lookups
from streams.reading import Reading
from streams.rules import account_events
from streams.rules.balances import Opening
from streams.rules.duplicates import Original
from streams.rules.rating import RatingTable
from streams.rules.records import UpTo
from streams.settings import Settings
from streams.top_columns import TopColumns
from streams.unit import Shared, Unit
from streams.voice import Outlets
from tests.account_records import PLANS
from tests.records import EXAMPLES, Record

CHAINS: Final = (Chain(CELL_RUNS, "topic-1", 0), Chain(ACCOUNT_EVENTS, "topic-2", 0))
BATCH_ROWS: Final = 10
SOON_S: Final = 60.0
Commits = tuple[int | None, int | None]

InWriter = Callable[..., Awaitable[Any]]


class Sent(msgspec.Struct, frozen=True):
    """What the unit handed to Kafka by itself: a redriven dead letter."""

    topic: str
    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]


class WatchedLookups(Lookups):
    """The real ones; the bench notes what is asked."""

    def __init__(self, bench: "Bench") -> None:
        super().__init__(bench.look_up)
        self._bench = bench

    async def runs(self, identities: Sequence[Identity]) -> dict[Identity, Original]:
        """See `Lookups`."""
        self._bench.looked_up.append(set(identities))
        return await super().runs(identities)

    async def known(self, chunk: Sequence[account_events.Received]) -> account_events.Known:
        """See `Lookups`."""
        self._bench.events_looked_up.append({event_id for _, event_id in account_events.event_identities(chunk)})
        return await super().known(chunk)

    async def openings(self, names: Sequence[str], now_ms: int) -> dict[str, Opening]:
        """See `Lookups`."""
        self._bench.loads += 1
        if self._bench.on_load:
            await self._bench.on_load()
        return await super().openings(names, now_ms)


NOT_AT_END: Final = (0, 0)
"""Kafka has more of both topics, or has not said."""


async def _to_nobody(what: object) -> None:
    pass


NO_KAFKA: Final = Reading(
    ends_ms=lambda *_: NOT_AT_END,
    unread=lambda *_: (0, 0),
    lags=lambda *_: (None, None),
    silent_s=lambda: 0,
    commit=_to_nobody,
    hold=lambda _: None,
    on_fatal=_to_nobody,
)
"""Of what reads nothing."""


class Bench:
    """One life of a unit. Make it with `open`; the ledger outlives it."""

    def __init__(self, client: Client, settings: Settings, chains: tuple[Chain, Chain], shared: dict[str, Any]) -> None:
        self.client, self.chains = client, chains
        self.acknowledged = self.left = 0
        """Chunks that are done, and chunks that the unit left to the next owner."""
        self.committed: list[int | None] = [None, None]
        """What a Kafka commit of all that is acknowledged would say: next offsets."""
        self.incidents: list[Problem] = []
        self.looked_up: list[set[Identity]] = []
        self.events_looked_up: list[set[UUID]] = []
        self.loads = 0
        self.alerts: list[LimitAlert] = []
        self.states: dict[bytes, LimitState] = {}
        self.states_told: Counter[bytes] = Counter()
        self.sent: list[Sent] = []
        self.on_load: Callable[[], Awaitable[None]] | None = None
        self.on_note: Callable[[], Awaitable[None]] | None = None
        self.on_columns: Callable[[], Awaitable[object]] | None = None
        self.on_look_aside: Callable[[], Awaitable[None]] | None = None
        self.ends_ms: tuple[int, int] = NOT_AT_END
        self.unread: Callable[[UpTo], Behind] = lambda read: (0, 0)
        self._writer: Final = ThreadPoolExecutor(1)
        self.in_writer: InWriter = self._in_thread
        self._background: set[asyncio.Future[None]] = set()
        self.shared: Final = Shared(**self._own_shared() | shared)
        self.loader: Final = Loader(
            settings,
            self.shared,
            self._outlets(),
            self.look_up,
            self.look_aside,
            lambda _: None,
            self._in_background,
        )
        self.unit: Unit

    @classmethod
    async def open(
        cls,
        client: Client,
        *,
        in_writer: InWriter | None = None,
        linger_s: float = 0.05,
        batch_rows: int = BATCH_ROWS,
        chains: tuple[Chain, Chain] = CHAINS,
        committed: Sequence[int | None] = (None, None),
        accounts_max: int = 1_000,
        on_look_aside: Callable[[], Awaitable[None]] | None = None,
        rating: RatingTable | None = None,
    ) -> Self:
        """A unit at the ledger's marks; ``committed``: Kafka's next offsets. What is loaded in the background is there,
        unless ``on_look_aside`` is to be awaited before it is asked for.
        """
        shared = {
            "rating": rating or RatingTable(EXAMPLES), "plans": PLANS, "batching": Batching(batch_rows, linger_s),
        }  # fmt: skip
        settings = Settings(partitions=1, balances_max=accounts_max, duplicate_filter_mb_max=8)
        bench = cls(client, settings, chains, shared)
        bench.on_look_aside = on_look_aside
        runs, events = committed
        bench.committed = [runs, events]
        marks = await bench.loader.read_mark(chains[0]), await bench.loader.read_mark(chains[1])
        place = Assigned(chains, marks, (LogRange(0, 1 << 40), LogRange(0, 1 << 40)), (runs, events))
        bench.unit = await bench.loader.load(place, None)
        if not on_look_aside:
            await asyncio.gather(*bench._background)
        bench.in_writer = in_writer or bench.in_writer
        return bench

    def _own_shared(self) -> dict[str, Any]:
        return {
            "ledger": Ledger(self.client),
            "partitions": 1,
            "lookups": WatchedLookups(self),
            "in_writer": self._write,
            "read_mark": lambda chain: self._in_thread(self.shared.ledger.mark, chain),
            "written": Counter(),
            "reading": msgspec.structs.replace(
                NO_KAFKA, ends_ms=lambda *_: self.ends_ms, unread=lambda _, read: self.unread(read)
            ),
            "on_incident": lambda unit, incident: self.incidents.append(incident),
        }

    def _outlets(self) -> Outlets:
        return Outlets(
            publish=self._publish,
            flush=_nothing,
            top_columns=TopColumns(self._find_columns),
            note_alerts=self._note_alerts,
            told=lambda name, number: None,
        )

    def _publish(self, topic: str, partition: int, key: bytes, message: msgspec.Struct) -> None:
        if isinstance(message, LimitAlert):
            self.alerts.append(message)
        elif isinstance(message, LimitState):
            self.states[key] = message
            self.states_told[key] += 1

    async def _find_columns(self, questions: Sequence[accounts.TopQuestion]) -> Any:
        if self.on_columns:
            await self.on_columns()
        return await self.look_up(accounts.top_columns, questions)

    async def _note_alerts(self, alerts: Sequence[LimitAlert]) -> None:
        if self.on_note:
            await self.on_note()
        await self.look_up(note_alerts, alerts)

    def send(
        self, topic: str, partition: int, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]] = ()
    ) -> None:
        self.sent.append(Sent(topic, key, value, list(headers)))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        self._background.add(asyncio.ensure_future(work))

    async def _write(self, *call: Any) -> Any:
        return await self.in_writer(*call)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._writer, function, *args)

    async def look_up(self, question: Callable[..., Any], *args: Any) -> Any:
        """Ask the ledger in a thread."""
        return await asyncio.to_thread(question, self.client, *args)

    async def look_aside(self, question: Callable[..., Any], *args: Any) -> Any:
        if self.on_look_aside:
            await self.on_look_aside()
        return await self.look_up(question, *args)

    def deliver(self, records: Sequence[Record], *, of_account: bool = False) -> None:
        """One fetched chunk of one topic."""
        last = records[-1].offset

        async def acknowledge() -> None:
            self.acknowledged += 1
            self.committed[of_account] = last + 1

        async def acknowledge_part(offset: int) -> None:
            self.committed[of_account] = offset + 1

        def leave() -> None:
            self.left += 1

        self.unit.receive(Parcel(list(records), acknowledge, of_account, acknowledge_part, leave))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Run the unit until it is so; then it is gone, as after a kill."""
        task = self.start()
        try:
            await self.wait(task, condition)
        finally:
            await self.kill(task)

    def start(self) -> "asyncio.Task[None]":
        """Let the unit run."""
        return asyncio.create_task(self.unit.run())

    async def wait(self, task: "asyncio.Task[None]", condition: Callable[[], bool]) -> None:
        """Until it is so. Raises what the unit raises."""
        async with asyncio.timeout(SOON_S):
            while not condition():
                if task.done():
                    task.result()
                await asyncio.sleep(0.005)

    async def kill(self, task: "asyncio.Task[None]") -> None:
        """End the unit wherever it is; returns once an insert that was sent has arrived."""
        self.unit.close()
        task.cancel()
        with suppress(asyncio.CancelledError, BaseExceptionGroup):
            await task
        await asyncio.to_thread(self._writer.shutdown)

    def kinds(self) -> dict[str, int]:
        """Rows of each kind in the ledger."""
        return dict(self.client.query("SELECT toString(kind), count() FROM ledger GROUP BY kind").result_rows)


async def _nothing() -> None:
    pass
