"""The Faust application: two agents, the batch transport, and the hooks by which partitions come and go.

``creditstream worker`` runs it; so does ``faust -A streams.app worker``, without the read API.
"""

import asyncio
import functools
import gc
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import faust
import mode
import structlog
from faust.tables.manager import TableManager
from faust.types import TP

from schemas.problem import Problem
from sinks.ledger import ForeignMark
from streams.batches import BATCH_BYTES_MAX
from streams.inbox import Parcel
from streams.kafka.connection import faust_credentials
from streams.kafka.lenient_headers import read_any_header
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS
from streams.kafka.transport import CHUNK_RECORDS_MAX, Consumer, Transport, deliver_plain_records
from streams.meter import Meter
from streams.reading import Offsets, Reading
from streams.rules.records import UpTo
from streams.settings import Settings, read_settings

SESSION_TIMEOUT_S: Final = 10.0
GC_THRESHOLDS: Final = (200_000, 20, 100)
EXIT_RESTART: Final = 75
"""The process must be started afresh (sysexits' EX_TEMPFAIL): another writer was here, or a part of it failed."""

log: Final = structlog.get_logger()

T = TypeVar("T")


class NoTables(TableManager):
    """Faust's table manager without its second of sleep: there are no tables to wait for."""

    async def on_start(self) -> None:
        """Start what assignment needs."""
        await self._update_channels()
        await self.recovery.start()


class MeterApp(faust.App):
    """Faust, given a meter: its lifecycle is the meter's."""

    meter: Meter
    fatal: BaseException | None = None
    """What ended the process, where something did."""

    async def on_first_start(self) -> None:
        """Open the meter unless the command line has done so."""
        if not self.meter.is_open:
            await asyncio.to_thread(self.meter.open)
        # A chunk is thousands of objects that hold no cycles; looking for cycles among them cost a quarter of the CPU.
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GC_THRESHOLDS)
        await super().on_first_start()

    async def on_stop(self) -> None:
        """Let go of the units and of the ledger, after the last chunk in flight."""
        await super().on_stop()
        await self.meter.release()
        await asyncio.to_thread(self.meter.close)

    async def on_fatal(self, error: BaseException) -> None:
        """End the process: its state can no longer be trusted, and a fresh one reads the mark."""
        self.fatal = self.fatal or error
        instance = {"instance": self.meter.settings.instance} if self.meter.settings.instance else {}
        told = str(error) or type(error).__name__
        log.error("fatal", error=told, foreign_mark=isinstance(error, ForeignMark), **instance)
        await self.crash(error)

    def on_lost_membership(self) -> None:
        """The group knows this static member no more. Called in the consumer's thread."""
        instance = self.meter.settings.instance
        problem = Problem(
            f"this worker is no longer the group's member {instance!r}",
            "another process has joined under the same CREDITSTREAM_INSTANCE, or this one or Kafka stood still for "
            f"{SESSION_TIMEOUT_S:.0f} s",
            "Start it again; each worker needs a CREDITSTREAM_INSTANCE of its own, or none.",
        )
        self.loop.call_soon_threadsafe(self._end_without_membership, problem)

    def _end_without_membership(self, problem: Problem) -> None:
        if not self.fatal:
            self.fatal = problem
            self._ending = asyncio.ensure_future(self.on_fatal(problem))

    def reading(self) -> Reading:
        """What the meter asks of the transport, and wants done there."""
        return Reading(
            ends_ms=lambda *of: self._of_both(self.chunks.end_ms, *of),
            unread=lambda *of: self._of_both(self.chunks.unread, *of),
            lags=lambda *of: self._of_both(self.chunks.lag, *of),
            silent_s=lambda: cast(Transport, self.transport).silent_s,
            commit=self._commit_start,
            hold=self._hold,
            on_fatal=self.on_fatal,
        )

    def _hold(self, partition: int) -> None:
        for topic in (self.meter.topic, self.meter.event_topic):
            self.chunks.hold(TP(topic.name, partition))

    def _of_both(self, question: Callable[[TP, int], T], partition: int, read: UpTo) -> tuple[T, T]:
        run, event = read
        return (
            question(TP(self.meter.topic.name, partition), run),
            question(TP(self.meter.event_topic.name, partition), event),
        )

    @property
    def chunks(self) -> Consumer:
        """The batch transport's consumer."""
        return cast(Consumer, self.consumer)

    async def load_units(self) -> None:
        """After an assignment, before the first fetch: read the marks and the state behind them."""
        await self.meter.release()
        assignment = self.consumer.assignment()  # once: the consumer's thread may change it meanwhile
        runs, events = (
            {tp.partition for tp in assignment if tp.topic == topic.name}
            for topic in (self.meter.topic, self.meter.event_topic)
        )
        if runs != events:
            raise Problem(
                "the two topics are not assigned together",
                f"cell runs {sorted(runs)}, account events {sorted(events)}",
                "Run the same version with the same topics in every worker of the group.",
            )
        self.chunks.held.clear()
        resume, commit = await self.meter.assign(runs, self.conf.id)
        cast(Transport, self.transport).resume_at = {TP(*place): offset for place, offset in resume.items()}
        await self._commit_start(commit)

    async def _commit_start(self, offsets: Offsets) -> None:
        await self.chunks.commit_start({TP(*place): offset for place, offset in offsets.items()})


def create_app(settings: Settings) -> MeterApp:
    """The application for these settings. Nothing is connected before it starts."""
    deliver_plain_records()
    read_any_header()
    app = MeterApp(
        f"{settings.topic_prefix}creditstream",
        **_faust_settings(settings),
        TableManager=NoTables,
    )
    app.meter = Meter(settings, app.reading())
    app.transport = Transport(
        app.conf.broker_consumer,
        app,
        records_inflight_max=settings.batch_rows_max * 5 // 2 + CHUNK_RECORDS_MAX,
        bytes_inflight_max=BATCH_BYTES_MAX * 5 // 2,
    )
    app.transport.on_drain = app.meter.drain
    app.transport.on_lost_membership = app.on_lost_membership
    runs = app.topic(settings.topic(CELL_RUNS), key_serializer="raw", value_serializer="raw")
    events = app.topic(settings.topic(ACCOUNT_EVENTS), key_serializer="raw", value_serializer="raw")

    @app.agent(runs)
    async def meter_cell_runs(stream: Any) -> None:
        """Hand each chunk to its unit; the logic is there."""
        await _hand_over(app, stream, of_account=False)

    @app.agent(events)
    async def meter_account_events(stream: Any) -> None:
        """Likewise."""
        await _hand_over(app, stream, of_account=True)

    app.on_rebalance_complete.connect(lambda *_, **__: app.load_units())
    return app


async def _hand_over(app: MeterApp, stream: Any, of_account: bool) -> None:
    async for event in stream.noack().events():
        unit = app.meter.units.get(event.message.partition)
        # A chunk of an earlier assignment would leave a gap before it: its offsets are read again.
        is_current = event.message.generation_id == app.consumer_generation_id
        if unit and is_current and not unit.incident:
            done = functools.partial(stream.ack, event)
            part_done = functools.partial(app.chunks.ack_part, event.message)
            leave = functools.partial(app.chunks.forget, event.message)
            unit.receive(Parcel(event.value, done, of_account, part_done, leave))
        else:
            app.chunks.forget(event.message)


def _faust_settings(settings: Settings) -> dict[str, Any]:
    brokers = [f"kafka://{place.strip()}" for place in settings.kafka_bootstrap.split(",")]
    return {
        "env_prefix": "CREDITSTREAM_FAUST_",
        "broker": brokers,
        "broker_credentials": faust_credentials(settings),
        "consumer_group_instance_id": settings.instance or None,
        "key_serializer": "raw",
        "value_serializer": "raw",
        "datadir": f"{settings.home}/faust",
        "store": "memory://",
        "topic_disable_leader": True,
        "topic_allow_declare": False,
        "table_standby_replicas": 0,
        "broker_max_poll_records": CHUNK_RECORDS_MAX,
        "broker_max_poll_interval": 86_400.0,
        "broker_session_timeout": SESSION_TIMEOUT_S,
        "broker_heartbeat_interval": 1.0,
        "broker_request_timeout": 30.0,
        "broker_rebalance_timeout": 60.0,
        "broker_commit_interval": 1.0,
        "agent_supervisor": mode.CrashingSupervisor,
        "web_enabled": False,
        "worker_redirect_stdouts": False,
    }


def __getattr__(name: str) -> Any:
    """``streams.app.app`` for ``faust -A streams.app``: made from the environment when it is asked for."""
    if name == "app":
        globals()["app"] = create_app(read_settings())
        return globals()["app"]
    raise AttributeError(name)
