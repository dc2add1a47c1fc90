"""Who acts in the demo: simulated workers, one that asks its gate, billing, and a listener for alerts and states."""

import threading
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import uuid4

import msgspec
from confluent_kafka import Consumer, TopicPartition
from uuid_utils.compat import uuid7

from creditstream.client import CellRunProducer, Gate
from creditstream.producing import open_producer
from creditstream.simulate import WORKSPACES, events
from schemas.account import PlanChanged
from schemas.cell_run import CellRun, Outcome
from schemas.codec import encode_account_event
from schemas.credits import parse_credits
from schemas.ledger import Pool
from schemas.limits import LimitAlert, LimitState
from streams.kafka.connection import librdkafka
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, LIMIT_ALERTS, LIMIT_STATES, Broker
from streams.settings import Settings

TRIAL_CREDITS: Final = 1_000
TRIAL_PLAN: Final = "trial"
UPGRADE: Final = "20k"
PLANS: Final = ("100k", "50k", "20k")
ALERTS_SHOWN: Final = 6


class Enrichments(threading.Thread):
    """Simulated enrichment workers: produces at a steady rate until the time is over or it is told to stop."""

    def __init__(self, settings: Settings, seconds: int, rate: int) -> None:
        super().__init__(daemon=True)
        self._settings, self._seconds, self._rate = settings, seconds, rate
        self.produced = 0
        self.enough = threading.Event()

    def run(self) -> None:
        """Produce. A copy, an unknown action and a broken event come along now and then."""
        topic = self._settings.topic(CELL_RUNS)
        producer = open_producer(self._settings)
        stream = events(seed=time.time_ns())
        started = time.monotonic()
        while not self.enough.is_set() and (elapsed := time.monotonic() - started) < self._seconds:
            for _ in range(int(elapsed * self._rate) - self.produced):
                event = next(stream)
                producer.produce(topic, event.value, event.key)
                self.produced += 1
            producer.poll(0.01)
        producer.flush(10)


class TrialWorker(threading.Thread):
    """An enrichment worker as in the README: asks the gate before each run, records the run after it."""

    def __init__(self, settings: Settings, workspace: str, seconds: int) -> None:
        super().__init__(daemon=True)
        self._settings, self._workspace = settings, workspace
        self._rate = max(50, TRIAL_CREDITS * 3 // seconds)
        self.allowed = self.refused = 0
        self.stopped_at: datetime | None = None
        self.freed_at: datetime | None = None
        self.is_upgraded = threading.Event()
        self.enough = threading.Event()

    def run(self) -> None:
        """Run a cell whenever the gate lets it."""
        with (
            Gate(self._settings, on_unknown="allow", on_stale="allow") as gate,
            CellRunProducer(self._settings) as producer,
        ):
            gate.wait_ready()
            while not self.enough.wait(1 / self._rate):
                if gate.check(self._workspace, "enrich_person").allowed:
                    producer.record(self._cell_run())
                    self.allowed += 1
                    if self.stopped_at and self.is_upgraded.is_set():
                        self.freed_at = self.freed_at or datetime.now(UTC)
                else:
                    self.refused += 1
                    self.stopped_at = self.stopped_at or datetime.now(UTC)

    def _cell_run(self) -> CellRun:
        return CellRun(
            run_id=uuid7(), workspace_id=self._workspace, table_id="tbl_leads", column_id="col_person",
            row_id=f"row_{self.allowed:05d}", action="enrich_person", outcome=Outcome.DATA, ran_at=datetime.now(UTC),
            triggered_by="manual",
        )  # fmt: skip


class Billing:
    """The only one that may say who has which plan."""

    def __init__(self, settings: Settings) -> None:
        self._topic = settings.topic(ACCOUNT_EVENTS)
        self._producer = open_producer(settings)

    def set_plan(self, workspace: str, plan: str) -> None:
        """From a minute ago on: at once, whatever the clocks say."""
        at = datetime.now(UTC) - timedelta(minutes=1)
        event = PlanChanged(event_id=uuid4(), workspace_id=workspace, plan=plan, effective_at=at, actor="demo")
        self._producer.produce(self._topic, encode_account_event(event), workspace)
        self._producer.flush(10)

    def begin(self, trial: str) -> None:
        """Everybody gets a plan."""
        for number in range(1, WORKSPACES + 1):
            self.set_plan(f"ws_{number:04d}", PLANS[number % len(PLANS)])
        self.set_plan(trial, TRIAL_PLAN)


class Told(msgspec.Struct, frozen=True):
    """An alert as it came in, and how long after the broker had received the run that caused it."""

    alert: LimitAlert
    came_at: datetime
    after_ms: int


class Listener(threading.Thread):
    """Follows what leaves the meter from now on: alerts and states."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(daemon=True)
        self.states: dict[str, LimitState] = {}
        """Workspace → its enrichment pool."""
        self.overage: dict[str, int] = {}
        """Workspace → the most that it ever was over its allowance, in millicredits."""
        self.told: deque[Told] = deque(maxlen=ALERTS_SHOWN)
        self.alerts = 0
        self.enough = threading.Event()
        self._topics = [settings.topic(name) for name in (LIMIT_ALERTS, LIMIT_STATES)]
        broker = Broker(settings)
        places = [
            TopicPartition(topic, partition, found.end)
            for topic in self._topics
            for partition, found in broker.log_ranges(topic, range(settings.partitions)).items()
        ]
        self._consumer = Consumer(
            librdkafka(settings)
            | {
                "group.id": "creditstream-demo",
                "enable.auto.commit": False,
                "fetch.queue.backoff.ms": 5,
                "log_level": 0,
            }
        )
        self._consumer.assign(places)

    def run(self) -> None:
        """Listen until it is enough."""
        while not self.enough.is_set():
            message = self._consumer.poll(0.1)
            if message is None or message.error() or not (value := message.value()):
                continue
            if message.topic() == self._topics[0]:
                alert, now = msgspec.json.decode(value, type=LimitAlert), datetime.now(UTC)
                self.alerts += 1
                self.told.append(Told(alert, now, (now - alert.at) // timedelta(milliseconds=1)))
            else:
                state = msgspec.json.decode(value, type=LimitState)
                if state.pool == Pool.ENRICHMENT:
                    self.states[state.workspace_id] = state
                    over = max(parse_credits(state.overage), self.overage.get(state.workspace_id, 0))
                    self.overage[state.workspace_id] = over
        self._consumer.close()
