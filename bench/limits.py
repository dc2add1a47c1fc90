"""How soon limits are known, beside runs and inserts: alerts, the gate's no, the gate's yes after an upgrade.

    .venv/bin/python -m bench.limits                    20 s at 1,000 runs/s, then a ledger of a million workspaces
    .venv/bin/python -m bench.limits --seconds 60 --workspaces 100000

Everything runs on this machine: broker, worker with chDB, the producer, the reader of alerts and the gate. Times are
from the call of the producer to the moment at which the reader, or the gate, knows. In the second half of the stream
workspaces that are out of credits are upgraded, two a second.
"""

import argparse
import math
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import quantiles
from typing import Final
from uuid import UUID, uuid4

import msgspec
from confluent_kafka import Consumer, TopicPartition
from rich.console import Console
from rich.table import Table
from uuid_utils.compat import uuid7

from creditstream.child import child_worker
from creditstream.client import Gate
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from creditstream.producing import open_producer
from schemas.account import PlanChanged
from schemas.catalogue import EXAMPLE_CATALOGUES, Catalogue
from schemas.cell_run import CellRun, Outcome
from schemas.codec import encode_account_event, encode_run
from schemas.limits import LimitAlert
from sinks.catalogue_versions import pin_catalogue
from sinks.clickhouse import connect
from sinks.ledger import YOUNG_SERVER_S
from sinks.migrate import migrate
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, Broker
from streams.settings import Settings, read_settings

RATE = 1_000
ALLOWANCE = 100
ACTIVE = 50
UPGRADE_EVERY_S = 0.5
PLANS = """
version = 1
effective_from = 2020-01-01T00:00:00Z
[[plans]]
id = "small"
allowance = "100"
[[plans]]
id = "large"
allowance = "1000000"
"""


class Clocks:
    """When things were sent and when they were known; seconds of one monotonic clock."""

    def __init__(self) -> None:
        self.sent: dict[UUID, float] = {}
        self.alert_known: dict[UUID, float] = {}
        self.exhausting: dict[str, float] = {}
        self.upgraded: dict[str, float] = {}
        self.no: dict[str, float] = {}
        self.yes: dict[str, float] = {}
        self.enough = threading.Event()
        self.upgrades_from = math.inf
        """From then on there are upgrades beside the stream."""

    def alerts(self) -> list[float]:
        """Milliseconds from a run to its alert."""
        times = ((self.sent[run], known) for run, known in self.alert_known.items())
        return [(known - sent) * 1000 for sent, known in times if sent < self.upgrades_from]

    def noes(self) -> list[float]:
        """Milliseconds from a run to the gate's no."""
        times = ((self.exhausting[name], known) for name, known in self.no.items())
        return [(known - sent) * 1000 for sent, known in times if sent < self.upgrades_from]


def produce(settings: Settings, clocks: Clocks, seconds: int) -> None:
    """A steady stream over fifty workspaces at a time; one whose credits are gone makes way for the next."""
    producer, topic = open_producer(settings), settings.topic(CELL_RUNS)
    started, sent, dice = time.monotonic(), 0, random.Random(1)
    clocks.upgrades_from = started + seconds / 2
    total, active, ran = seconds * RATE, list(range(ACTIVE)), Counter[int]()
    while sent < total:
        for _ in range(min(total, int((time.monotonic() - started) * RATE)) - sent):
            place = dice.randrange(ACTIVE)
            number = active[place]
            workspace = f"ws_{number}"
            ran[number] += 1
            run = CellRun(
                run_id=uuid7(), workspace_id=workspace, table_id="tbl_1", column_id=f"col_{sent % 7}",
                row_id=f"row_{sent}", action="enrich_person", outcome=Outcome.DATA, ran_at=datetime.now(UTC),
            )  # fmt: skip
            now = time.monotonic()
            clocks.sent[run.run_id] = now
            if ran[number] == ALLOWANCE:
                clocks.exhausting[workspace] = now
                active[place] = max(active) + 1
            producer.produce(topic, encode_run(run), workspace)
            sent += 1
        producer.poll(0)
        time.sleep(0.001)
    producer.flush(30)
    clocks.enough.set()


def read_alerts(settings: Settings, clocks: Clocks) -> None:
    """Whoever waits for `limit-alerts`."""
    consumer = Consumer(
        {"bootstrap.servers": settings.kafka_bootstrap, "group.id": "bench", "fetch.queue.backoff.ms": 5}
    )
    consumer.assign([TopicPartition("limit-alerts", partition, 0) for partition in range(settings.partitions)])
    decode = msgspec.json.Decoder(LimitAlert).decode
    quiet = 0.0
    while quiet < 3.0:
        message = consumer.poll(0.1)
        if message is None or message.error():
            quiet = quiet + 0.1 if clocks.enough.is_set() else 0.0
            continue
        known, quiet = time.monotonic(), 0.0
        alert = decode(message.value() or b"")
        if alert.run_id in clocks.sent:
            clocks.alert_known.setdefault(alert.run_id, known)
    consumer.close()


def ask_gate(settings: Settings, gate: Gate, clocks: Clocks) -> None:
    """A worker that may no longer run, and then may again."""
    producer, topic = open_producer(settings), settings.topic(ACCOUNT_EVENTS)
    deadline, upgraded_at = None, 0.0
    while deadline is None or time.monotonic() < deadline:
        now = time.monotonic()
        for workspace in [name for name in list(clocks.exhausting) if name not in clocks.no]:
            if not gate.check(workspace, "enrich_person").allowed:
                clocks.no[workspace] = now
                if now > max(clocks.upgrades_from, upgraded_at + UPGRADE_EVERY_S):
                    clocks.upgraded[workspace] = upgraded_at = time.monotonic()
                    plan_set(producer, topic, workspace, "large")
        for workspace in [name for name in clocks.upgraded if name not in clocks.yes]:
            if gate.check(workspace, "enrich_person").allowed:
                clocks.yes[workspace] = time.monotonic()
        producer.poll(0)
        if clocks.enough.is_set():
            deadline = deadline or now + 3.0
        time.sleep(0.001)


def plan_set(producer: object, topic: str, workspace: str, plan: str) -> None:
    """As billing does it."""
    at = datetime.now(UTC) - timedelta(seconds=1)
    event = PlanChanged(event_id=uuid4(), workspace_id=workspace, plan=plan, effective_at=at)
    producer.produce(topic, encode_account_event(event), workspace)  # type: ignore[attr-defined]


def measure(settings: Settings, home: Home, plans: Path, seconds: int) -> Clocks:
    """The stream, with a worker, a reader and a gate beside it."""
    clocks = Clocks()
    with child_worker(home, kafka_bootstrap=settings.kafka_bootstrap, plans_dir=str(plans)) as answers:
        producer = open_producer(settings)
        for place in range(seconds * RATE // ALLOWANCE + ACTIVE):
            plan_set(producer, settings.topic(ACCOUNT_EVENTS), f"ws_{place}", "small")
        producer.flush(30)
        while answers.status().written.get("plan/plan_changed", 0) < seconds * RATE // ALLOWANCE + ACTIVE:
            time.sleep(0.1)
        with Gate(settings, on_unknown="allow", on_stale="allow") as gate:
            gate.wait_ready(30)
            threads = [
                threading.Thread(target=read_alerts, args=(settings, clocks)),
                threading.Thread(target=produce, args=(settings, clocks, seconds)),
            ]
            for thread in threads:
                thread.start()
            ask_gate(settings, gate, clocks)
            for thread in threads:
                thread.join()
    return clocks


class Start(msgspec.Struct, frozen=True):
    """How a worker comes up on a ledger of many workspaces; seconds from its start, MB."""

    ready_s: float
    durable_s: float
    rss_mb: int


_MANY: Final = """
INSERT INTO ledger (topic, topic_id, kafka_partition, kafka_offset, recorded_at, kind, run_id, workspace_id, table_id,
    column_id, row_id, action, outcome, ran_at, pool, credits, reason, catalogue, batch_month, mark_read_at, event_id,
    effective_at, plan, allowance)
SELECT '{topic}', 'an earlier one', bitAnd(kafkaMurmurHash(concat('many_', toString(number))), 0x7FFFFFFF) % 4, number,
    now64(3) - toIntervalDay(5), '{kind}', generateUUIDv4(), concat('many_', toString(number)), 'tbl_1', 'col_1',
    'row_1', 'enrich_person', '{outcome}', now64(3) - toIntervalDay(5), 'enrichment', {credits}, '{reason}', 1,
    toYYYYMM(now()), now64(3), generateUUIDv4(), now64(3) - toIntervalDay(number % 300 + 5), '20k', {allowance}
FROM numbers({count})
"""


def fill(home: Home, workspaces: int) -> None:
    """A ledger in which each workspace has a plan and a run; one in a hundred has used all that it had."""
    with connect(f"chdb://{home.ledger}") as client:
        migrate(client)
        pin_catalogue(client, Catalogue.load(EXAMPLE_CATALOGUES))
        while client.query("SELECT uptime()").result_rows[0][0] < YOUNG_SERVER_S + 1:
            time.sleep(0.1)
        plan = {"topic": "account-events", "kind": "plan", "outcome": "", "reason": "plan_changed"}
        client.command(_MANY.format(**plan, credits=0, allowance=20_000, count=workspaces))
        run = {"topic": "cell-runs", "kind": "run", "outcome": "data", "reason": "charged"}
        client.command(_MANY.format(**run, credits="if(number % 100 = 0, 20000, 1)", allowance=0, count=workspaces))


def start(settings: Settings, home: Home) -> Start:
    """One start: until it is ready, until a run that waited for it is durable, and its memory some seconds later."""
    producer = open_producer(settings)
    run = CellRun(
        run_id=uuid7(), workspace_id="many_17", table_id="tbl_1", column_id="col_1", row_id="row_1",
        action="enrich_person", outcome=Outcome.DATA, ran_at=datetime.now(UTC),
    )  # fmt: skip
    producer.produce(settings.topic(CELL_RUNS), encode_run(run), run.workspace_id)
    producer.flush(10)
    began = time.monotonic()
    with child_worker(home, kafka_bootstrap=settings.kafka_bootstrap) as answers:
        ready = time.monotonic() - began
        while not answers.status().written.get("run/charged"):
            time.sleep(0.02)
        durable = time.monotonic() - began
        time.sleep(5)
        worker = home.worker()
        assert worker is not None
        lines = Path(f"/proc/{worker.pid}/status").read_text().splitlines()
        rss_kb = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    return Start(ready, durable, rss_kb // 1024)


def report_starts(starts: list[Start], workspaces: int) -> Table:
    """Each start."""
    table = Table(title=f"a worker's start, {workspaces:,} workspaces with plans", box=None, header_style="bold")
    for column in ("ready, s", "first row durable, s", "peak MB"):
        table.add_column(column, justify="right")
    for one in starts:
        table.add_row(f"{one.ready_s:.1f}", f"{one.durable_s:.1f}", f"{one.rss_mb:,}")
    return table


def report(clocks: Clocks) -> Table:
    """Milliseconds: minimum, median, 99 %, maximum."""
    table = Table(title=f"{RATE:,} runs/s, inserts beside them; milliseconds", box=None, header_style="bold")
    for column in ("from the producer's call to", "times", "min", "p50", "p99", "max"):
        table.add_column(column, justify="left" if column.startswith("from") else "right")
    rows = {
        "the alert, read on limit-alerts": clocks.alerts(),
        "the gate's no": clocks.noes(),
        "the gate's yes, after an upgrade (two a second)": [
            (known - clocks.upgraded[name]) * 1000 for name, known in clocks.yes.items()
        ],
    }
    for name, found in rows.items():
        if len(found) < 2:
            table.add_row(name, str(len(found)))
            continue
        cuts = quantiles(found, n=100)
        table.add_row(
            name, f"{len(found):,}", *(f"{value:.0f}" for value in (min(found), cuts[49], cuts[98], max(found)))
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--workspaces", type=int, default=1_000_000)
    parser.add_argument("--starts", type=int, default=3)
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="creditstream-bench-"))
    (base / "plans").mkdir()
    (base / "plans" / "1.toml").write_text(PLANS)
    try:
        with EmbeddedKafka(Home.at(base / "kafka"), Console(stderr=True).print) as kafka:
            settings = read_settings({}, kafka_bootstrap=kafka.bootstrap)
            Broker(settings).ensure_all()
            say = Console(width=140).print
            if given.seconds:
                say(report(measure(settings, Home.at(base / "worker"), base / "plans", given.seconds)))
            if given.starts:
                many = Home.at(base / "many")
                fill(many, given.workspaces)
                say(report_starts([start(settings, many) for _ in range(given.starts)], given.workspaces))
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
