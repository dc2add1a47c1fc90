"""The meter: what one worker process holds, and how partitions come to it and leave it.

`Meter.open` connects and refuses whatever could charge wrongly. `Meter.assign` loads each partition's state from the
ledger and says where to read on; `Meter.release` lets go. What blocks runs in threads (`streams/threads.py`).
"""

import asyncio
import functools
import math
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import structlog
from clickhouse_connect.driver.client import Client

from schemas.catalogue import Catalogue
from schemas.limits import AsOf
from schemas.plan import PlanLists
from schemas.problem import Problem, Unreachable
from sinks import accounts
from sinks.alerts import note_alerts
from sinks.catalogue_versions import pin_catalogue
from sinks.ledger import TOKEN_WINDOW_S, Chain, Ledger, mark_of, token_window
from sinks.migrate import migrate, require_migrated
from streams.assignment import Assigned, Kept, Loader
from streams.batches import Batching
from streams.kafka.publisher import Publisher
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, LIMIT_ALERTS, LIMIT_STATES, Broker, LogRange, Topic
from streams.lookups import Lookups
from streams.reading import Offsets, Reading
from streams.redriving import keep_redriving
from streams.rules.balances import Key
from streams.rules.periods import PlanChange
from streams.rules.rating import RatingTable
from streams.rules.records import partition_of
from streams.settings import Settings
from streams.stale_states import Follower, Heard, answer, foreign_to
from streams.threads import Threads
from streams.top_columns import TopColumns
from streams.unit import Shared, Unit
from streams.voice import Outlets

P = ParamSpec("P")
T = TypeVar("T")

log: Final = structlog.get_logger()


class Meter:
    """One worker's ledger, catalogue and units. Made once per process, opened once."""

    def __init__(self, settings: Settings, reading: Reading) -> None:
        self.settings: Final = settings
        self.reading: Final = reading
        self.units: dict[int, Unit] = {}
        self.written: Counter[str] = Counter()
        """Rows by kind and reason since the start."""
        self.told: Counter[str] = Counter()
        """Alerts by kind, and states, since the start."""
        self.started_at: Final = time.time()
        self.is_open = False
        """Between `open` and `close`."""
        self.assigned = False
        """Whether a first assignment has been loaded; it may hold no partitions, as a standby's does."""
        self.threads: Final = Threads()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._kept: dict[Chain, Kept] = {}
        self._unanswered: dict[int, dict[Key, AsOf]] = {}
        """What others have said of a partition that has no unit at the moment, or that its unit has not answered."""
        self._look_up_aside = functools.partial(self.threads.ask_patiently, "aside")
        self._batching = Batching(settings.batch_rows_max, settings.linger_ms / 1000)
        self._top_columns = TopColumns(lambda questions: self.threads.ask("aside", accounts.top_columns, questions))
        self._follower: Follower | None = None

    def open(self) -> None:
        """Connect and check. Blocking. Problem when topics, ledger, catalogue or plan lists do not fit."""
        settings = self.settings
        self.catalogue: Catalogue = Catalogue.load(Path(settings.catalogue_dir))
        self.plans: PlanLists = PlanLists.load(Path(settings.plans_dir))
        self._writer = self.threads.open(settings.ledger, settings.ledger_password, self._prepare)
        self.broker = Broker(settings)
        self.topic: Topic = self.broker.require(CELL_RUNS)
        self.event_topic: Topic = self.broker.require(ACCOUNT_EVENTS)
        for name in (LIMIT_ALERTS, LIMIT_STATES):
            self.broker.require(name)
        self.publisher = Publisher(settings)
        self.shared = self._shared()
        self._loader = Loader(
            settings,
            self.shared,
            self._outlets(),
            functools.partial(self.threads.ask, "reader"),
            self._look_up_aside,
            functools.partial(self.threads.on_trouble, "assignment"),
            self._in_background,
        )
        self.is_open = True

    def _prepare(self, client: Client) -> None:
        if self.settings.is_ledger_in_process:
            migrate(client)
        else:
            require_migrated(client)
        pin_catalogue(client, self.catalogue)
        self._require_token_window(client)

    def _shared(self) -> Shared:
        settings = self.settings
        return Shared(
            ledger=Ledger(self._writer, settings.epoch, self.threads.on_trouble),
            rating=RatingTable(self.catalogue),
            plans=self.plans,
            partitions=settings.partitions,
            batching=self._batching,
            lookups=Lookups(functools.partial(self.threads.ask_patiently, "reader")),
            in_writer=functools.partial(self.threads.run, "writer"),
            read_mark=lambda chain: self.threads.ask_patiently("writer", mark_of, chain),
            written=self.written,
            reading=self.reading,
            on_incident=self._on_incident,
        )

    def _outlets(self) -> Outlets:
        return Outlets(
            publish=self.publisher.publish,
            flush=self.publisher.flush,
            top_columns=self._top_columns,
            note_alerts=lambda alerts: self.threads.ask_patiently("notes", note_alerts, alerts),
            told=lambda name, number: self.told.update({name: number}),
        )

    def _require_token_window(self, client: Client) -> None:
        """A deduplication window that forgets a token within 240 s could let a late insert in twice."""
        inserts = math.ceil(TOKEN_WINDOW_S / self._batching.every_s)  # of one chain
        needed = self.settings.partitions * 2 * inserts
        window = token_window(client)
        if window < needed:
            raise Problem(
                "the ledger's token window is too small",
                f"{window} tokens, {needed} are needed for {self.settings.partitions} partitions",
                f"ALTER TABLE ledger MODIFY SETTING non_replicated_deduplication_window = {needed}.",
            )

    async def assign(self, partitions: set[int], group: str) -> tuple[Offsets, Offsets]:
        """Load the state of these partitions: where each is read from, and what ``group`` should commit now, since its
        commits say what has been told: the rows behind its last one were told again. Units with an incident are held.

        Problem when a topic was deleted and made again under this process: its rows would continue the old one's.
        """
        for topic in (self.topic, self.event_topic):
            await self.threads.run("reader", self._require_same_topic, topic)
        states = await self.threads.run("reader", self.broker.log_ranges, self.settings.topic(LIMIT_STATES), partitions)
        resume: Offsets = {}
        commit: Offsets = {}
        for assigned in await self._find_assigned(sorted(partitions), group):
            unit = await self._load(assigned)
            begin = {
                (chain.topic, chain.partition): max(mark.next, found.start)
                for chain, mark, found in zip(assigned.chains, assigned.marks, assigned.logs, strict=True)
            }
            resume |= begin
            if unit.settling.is_seeding:
                unit.settling.commit_begin = functools.partial(self.reading.commit, begin)
            elif not unit.incident:
                commit |= begin
        self._follow(states)
        self._kept.clear()
        self._unanswered.clear()
        self.assigned = True
        if why := self.parted:
            log.error("ledger_parted", why=why)
        return resume, commit

    @property
    def parted(self) -> str:
        """Why a ledger in this process is the wrong one, and what to do; empty when it is not. Its rows are right, but
        other partitions' are in another ledger, and begin there anew.
        """
        held, all_of_them = len(self.units), self.settings.partitions
        if not self.settings.is_ledger_in_process or held in (0, all_of_them):
            return ""
        return (
            f"this ledger has {held} of {all_of_them} partitions: another worker of the group meters the others into "
            "one of its own. End one of them, or set CREDITSTREAM_LEDGER_URL on both"
        )

    async def _find_assigned(self, partitions: Sequence[int], group: str) -> list[Assigned]:
        """The marks first: a log that is read after its mark is not behind it, whoever writes meanwhile."""
        topics = self.topic, self.event_topic
        pairs = [(Chain(topics[0].name, topics[0].id, p), Chain(topics[1].name, topics[1].id, p)) for p in partitions]
        marks = {chain: await self._loader.read_mark(chain) for pair in pairs for chain in pair}
        logs = [await self.threads.run("reader", self.broker.log_ranges, topic.name, partitions) for topic in topics]
        committed = await self.threads.run(
            "reader", self.broker.committed, group, [(chain.topic, chain.partition) for chain in marks]
        )
        return [
            Assigned(
                (runs, events),
                (marks[runs], marks[events]),
                (logs[0][runs.partition], logs[1][runs.partition]),
                (committed[runs.topic, runs.partition], committed[events.topic, events.partition]),
            )
            for runs, events in pairs
        ]

    async def _load(self, assigned: Assigned) -> Unit:
        chain = assigned.chains[0]
        unit = await self._loader.load(assigned, self._kept.pop(chain, None))
        self.units[chain.partition] = unit
        answer(unit, self._unanswered.pop(chain.partition, {}))
        log.info(
            "assigned", chain=str(chain), mark=unit.mark.last, event_mark=unit.event_mark.last,
            behind=assigned.logs[0].end - unit.mark.next, accounts=len(unit.balances),
        )  # fmt: skip
        if unit.incident:
            self._on_incident(unit, unit.incident)
        else:
            self._start(unit)
        return unit

    def _require_same_topic(self, topic: Topic) -> None:
        found = self.broker.topic(topic.name)
        if found and found.id != topic.id:
            raise Problem(
                f"topic {topic.name} was recreated",
                f"its id is {found.id}, this process meters {topic.id}",
                "Restart the worker; it meters the new topic from its first offset.",
            )

    def _follow(self, states: Mapping[int, LogRange]) -> None:
        """Hear what others have said on `limit-states`, now that there are units to answer it."""
        if self._follower is None:
            self._follower = Follower(self.settings, self._hear(asyncio.get_running_loop()))
        self._follower.follow(states)

    def _hear(self, loop: asyncio.AbstractEventLoop) -> Callable[[int, list[Heard]], None]:
        def in_loop(partition: int, states: list[Heard]) -> None:
            if unit := self.units.get(partition):
                answer(unit, foreign_to(unit.voice.owner, states))
            else:
                self._unanswered.setdefault(partition, {}).update(foreign_to("", states))

        return lambda partition, states: _unless_closed(loop, in_loop, partition, states)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(self._ended)

    def _start(self, unit: Unit) -> None:
        task = asyncio.create_task(unit.run(), name=f"unit {unit.chain}")
        task.add_done_callback(self._ended)
        self._tasks[unit.chain.partition] = task
        self._in_background(keep_redriving(unit, self._look_up_aside, self.publisher.send))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        self._ending = asyncio.ensure_future(self.reading.on_fatal(error))

    async def release(self) -> None:
        """Stop all units. What they have not written is read again by the next owner."""
        for unit in self.units.values():
            unit.close()
        self._top_columns.close()
        tasks = [*self._tasks.values(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.threads.run("writer", lambda: None)
        for partition, unit in self.units.items():
            self._unanswered[partition] = unit.voice.unanswered
            if unit.is_settled and unit.filters.are_complete and not unit.incident:
                self._kept[unit.chain] = Kept(unit.folded, unit.filters, unit.balances)
        self.units.clear()
        self._tasks.clear()

    def drain(self) -> None:
        """Write at once what has been read: the process stops or the partitions move."""
        for unit in self.units.values():
            unit.drain()

    def close(self) -> None:
        """Let go of threads and connections, after `release`."""
        was_open, self.is_open = self.is_open, False
        if self._follower:
            self._follower.close()
        self.threads.close()
        if was_open:
            self.publisher.close()

    async def ask(self, question: Callable[Concatenate[Client, P], T], *args: P.args, **named: P.kwargs) -> T:
        """Answer people: ``question(client, *args, **named)`` in a thread of its own, which no unit waits for.

        Unreachable after `close`: the API answers on until it has ended, too.
        """
        if not self.is_open:
            raise Unreachable("the worker is stopping", "it has closed the ledger", "Ask again in a few seconds.")
        return await self.threads.ask("answers", question, *args, **named)

    def plans_of(self, workspace_id: str) -> Sequence[PlanChange] | None:
        """A workspace's plans as its unit has folded them; None when no unit of this worker that goes on holds its
        account: what one with an incident has folded may never get into the ledger.
        """
        unit = self.units.get(partition_of(workspace_id, self.settings.partitions))
        if not unit or unit.incident or workspace_id not in unit.balances:
            return None
        return unit.balances[workspace_id].facts.plans

    def _on_incident(self, unit: Unit, incident: Problem) -> None:
        self.reading.hold(unit.chain.partition)
        log.error("incident", chain=str(unit.chain), what=incident.what, why=incident.why, fix=incident.fix)


def _unless_closed(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
