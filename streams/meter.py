"""The meter: what one worker process holds, and how partitions come to it and leave it.

`Meter.open` connects and refuses whatever could charge wrongly. `Meter.assign` loads each partition's state from the
ledger and says where to read on; `Meter.release` lets go. Blocking calls run in three threads: one writes, one reads
for the units, one answers people.
"""

import asyncio
import functools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import structlog

from schemas.catalogue import Catalogue
from schemas.problem import Problem
from sinks import queries
from sinks.clickhouse import DatabaseError, connect
from sinks.ledger import TOKEN_WINDOW_S, Chain, Incident, Ledger, Mark
from sinks.migrate import migrate, require_migrated
from streams.duplicates import Identity, Original, RunFilter
from streams.rating import RatingTable
from streams.settings import Settings
from streams.topics import Broker, LogRange, Topic, cell_runs_topic, require_topic
from streams.unit import Batching, Lanes, Unit

EXACT_DAYS: Final = 30
"""Runs recorded within these days are in the filter's exact tier; older ones in its Bloom filter."""
OLDER_KEYS_AT_ONCE: Final = 100_000
"""Keys that go into the Bloom filter between two breaths of the event loop."""

log: Final = structlog.get_logger()


class Meter:
    """One worker's ledger, catalogue and units. Made once per process, opened once."""

    def __init__(self, settings: Settings, on_fatal: Callable[[BaseException], Awaitable[None]] | None = None) -> None:
        self.settings: Final = settings
        self.units: dict[int, Unit] = {}
        self.written: Counter[str] = Counter()
        """Rows by kind and reason since the start."""
        self.started_at: Final = time.time()
        self.on_fatal = on_fatal
        self.hold: Callable[[int], None] = lambda partition: None
        """Told of a partition whose unit has an incident: it is fetched no more."""
        self.is_open = False
        self.assigned = False
        """Whether a first assignment has been loaded; it may hold no partitions, as a standby's does."""
        self.trouble = ""
        """What the ledger said last, while it does not take what it is given."""
        self._writer = ThreadPoolExecutor(1, "ledger-writer")
        self._reader = ThreadPoolExecutor(1, "ledger-reader")
        self._answerer = ThreadPoolExecutor(1, "ledger-answers")
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._loading: set[asyncio.Task[None]] = set()
        self._kept: dict[Chain, tuple[int, RunFilter]] = {}

    def open(self) -> None:
        """Connect and check. Blocking. Problem when topic, ledger or catalogue do not fit."""
        settings = self.settings
        self.catalogue: Catalogue = Catalogue.load(Path(settings.catalogue_dir))
        url = ledger_url(settings)
        self._write_client = connect(url, settings.ledger_password)
        if url.startswith("chdb:"):
            migrate(self._write_client)
        else:
            require_migrated(self._write_client)
        self._look_up_client = connect(url, settings.ledger_password)
        self._answer_client = connect(url, settings.ledger_password)
        queries.pin_catalogue(self._write_client, self.catalogue)
        self.broker = Broker(settings.kafka_bootstrap)
        self.topic: Topic = require_topic(self.broker, cell_runs_topic(settings), settings)
        self._require_token_window()
        self.ledger = Ledger(self._write_client, settings.epoch, self._on_trouble)
        self.lanes = Lanes(
            ledger=self.ledger,
            rating=RatingTable(self.catalogue),
            partitions=settings.partitions,
            batching=Batching(settings.batch_rows_max, settings.linger_ms / 1000),
            find_runs=self._find_runs,
            in_writer=functools.partial(_in_thread, self._writer),
            written=self.written,
            on_incident=self._on_incident,
        )
        self.is_open = True

    def _require_token_window(self) -> None:
        """A deduplication window that forgets a token within 240 s could let a late insert in twice."""
        needed = self.settings.partitions * 2 * TOKEN_WINDOW_S * 1000 // self.settings.linger_ms
        window = queries.token_window(self._write_client)
        if window < needed:
            raise Problem(
                "the ledger's token window is too small",
                f"{window} tokens, {needed} are needed for {self.settings.partitions} partitions",
                f"ALTER TABLE ledger MODIFY SETTING non_replicated_deduplication_window = {needed}.",
            )

    async def assign(self, partitions: set[int]) -> dict[int, int]:
        """Load the state of these partitions: partition → offset to read from. Units with an incident are held.

        Problem when the topic was deleted and made again under this process: its rows would continue the old one's.
        """
        ranges = await _in_thread(self._reader, self.broker.log_ranges, self.topic.name, partitions)
        await _in_thread(self._reader, self._require_same_topic)
        resume: dict[int, int] = {}
        for partition in sorted(partitions):
            unit = await self._load(partition, ranges[partition])
            self.units[partition] = unit
            resume[partition] = max(unit.mark.next, ranges[partition].start)
            if unit.incident:
                self._on_incident(unit, unit.incident)
            else:
                self._start(unit)
        self._kept.clear()
        self.assigned = True
        return resume

    def _require_same_topic(self) -> None:
        found = self.broker.topic(self.topic.name)
        if found and found.id != self.topic.id:
            raise Problem(
                f"topic {self.topic.name} was made again",
                f"its id is {found.id}, this process meters {self.topic.id}",
                "Restart: the new one is metered from its first offset.",
            )

    async def _load(self, partition: int, log_range: LogRange) -> Unit:
        chain = Chain(self.topic.name, self.topic.id, partition)
        mark = await self._read_mark(chain)
        kept_at, run_filter = self._kept.get(chain, (None, None))
        if run_filter is None or kept_at != mark.last:
            run_filter = await self._load_filter(chain)
        unit = Unit(mark, chain, run_filter, self.lanes)
        unit.incident = examine(mark, chain, log_range, self.settings.retention_gap)
        log.info("assigned", chain=str(chain), mark=mark.last, log_end=log_range.end, behind=log_range.end - mark.next)
        return unit

    async def _read_mark(self, chain: Chain) -> Mark:
        closing = asyncio.get_running_loop().time() + 60
        while True:
            try:
                mark: Mark = await _in_thread(self._writer, self.ledger.mark, chain)
                return mark
            except DatabaseError as error:
                if asyncio.get_running_loop().time() > closing:
                    raise
                self._on_trouble(f"{chain}: {error}")
                await asyncio.sleep(1)

    async def _load_filter(self, chain: Chain) -> RunFilter:
        run_filter = RunFilter(self.settings.duplicate_filter_mb_max * 1024 * 1024 // self.settings.partitions)
        since = time.time() - EXACT_DAYS * 86_400
        run_filter.add(await self._look_up(queries.recent_run_keys, chain, since))
        loading = asyncio.create_task(self._load_older(run_filter, chain, since))
        self._loading.add(loading)
        loading.add_done_callback(self._loaded)
        return run_filter

    async def _load_older(self, run_filter: RunFilter, chain: Chain, since: float) -> None:
        """The Bloom tier, month by month; meanwhile every run is a candidate."""
        for month in await self._look_up(queries.months_before, chain, since):
            keys = await self._look_up(queries.older_run_keys, chain, since, month)
            for start in range(0, len(keys), OLDER_KEYS_AT_ONCE):
                run_filter.add_older(keys[start : start + OLDER_KEYS_AT_ONCE])
                await asyncio.sleep(0)
        run_filter.is_complete = True

    def _loaded(self, loading: asyncio.Task[None]) -> None:
        self._loading.discard(loading)
        if not loading.cancelled() and (error := loading.exception()):
            self._fail(error)

    def _start(self, unit: Unit) -> None:
        task = asyncio.create_task(unit.run(), name=f"unit {unit.chain}")
        task.add_done_callback(self._ended)
        self._tasks[unit.chain.partition] = task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if self.on_fatal:
            self._ending = asyncio.ensure_future(self.on_fatal(error))

    async def release(self) -> None:
        """Stop all units. What they have not written is read again by the next owner."""
        for unit in self.units.values():
            unit.close()
        tasks = [*self._tasks.values(), *self._loading]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _in_thread(self._writer, lambda: None)
        for unit in self.units.values():
            if unit.run_filter.is_complete and not unit.rows_unwritten and not unit.incident:
                self._kept[unit.chain] = unit.mark.last, unit.run_filter
        self.units.clear()
        self._tasks.clear()

    def drain(self) -> None:
        """Write at once what has been read: the process stops or the partitions move."""
        for unit in self.units.values():
            unit.drain()

    def close(self) -> None:
        """Let go of threads and connections, after `release`."""
        self._writer.shutdown()
        self._reader.shutdown()
        self._answerer.shutdown()
        for client in (self._write_client, self._look_up_client, self._answer_client) if self.is_open else ():
            client.close()

    async def ask(self, question: Callable[..., Any], *args: Any) -> Any:
        """Answer people: ``question(client, *args)`` in a thread of its own, which no unit waits for."""
        return await _in_thread(self._answerer, question, self._answer_client, *args)

    async def _look_up(self, question: Callable[..., Any], *args: Any) -> Any:
        """Answer a unit, in the reader's thread."""
        return await _in_thread(self._reader, question, self._look_up_client, *args)

    async def _find_runs(self, identities: list[Identity]) -> dict[Identity, Original]:
        rows = await self._look_up(queries.find_runs, identities)
        return {Identity(*identity): Original(position, facts) for identity, position, facts in rows}

    def _on_trouble(self, what: str) -> None:
        self.trouble = what
        if not what:
            return
        log.warning("ledger_trouble", what=what)

    def _on_incident(self, unit: Unit, incident: Problem) -> None:
        self.hold(unit.chain.partition)
        log.error("incident", chain=str(unit.chain), what=incident.what, why=incident.why, fix=incident.fix)


def examine(mark: Mark, chain: Chain, log_range: LogRange, retention_gap: str) -> Incident | None:
    """The audit at assignment: what an operator must look at before this partition may go on."""
    if not mark.is_whole:
        return Incident(
            f"{chain}: the ledger has a hole",
            f"offsets {mark.first} to {mark.last} have {mark.rows} rows that stand for {mark.gaps} offsets",
            "Restore the missing part, or see docs/operations.md.",
        )
    if mark.next > log_range.end:
        return Incident(
            f"{chain}: the ledger is ahead of Kafka",
            f"the mark is at {mark.last}, Kafka's log ends before {log_range.end}",
            "Kafka lost data: restore it, or see docs/operations.md.",
        )
    lost = log_range.start - mark.next
    if mark.rows and lost > 0 and retention_gap == "stop":
        return Incident(
            f"{chain}: Kafka dropped {lost:,} events before they were read",
            f"the mark is at {mark.last}, Kafka's log starts at {log_range.start}",
            "Set CREDITSTREAM_RETENTION_GAP=continue to go on without them; the gap stays visible.",
        )
    return None


def ledger_url(settings: Settings) -> str:
    """Where the ledger is: the setting, else chDB in the home."""
    return settings.ledger_url or f"chdb://{Path(settings.home).resolve() / 'ledger'}"


async def _in_thread(pool: ThreadPoolExecutor, function: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(pool, function, *args)
