"""How fast one worker drains a backlog, side by side with what it stands on and with Faust as it is.

    make bench                      one million cell runs, three rounds
    .venv/bin/python -m bench.throughput --runs 200000 --rounds 1

Each road runs in a process of its own, in turn, on one broker and one topic of 4 partitions; trust the ratios of one
run more than its figures. CPU is the process's, all threads, engine included, without the broker.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
from rich.console import Console
from rich.table import Table

from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from creditstream.producing import open_producer
from creditstream.simulate import bulk_runs
from schemas.account import PlanChanged
from schemas.codec import encode_account_event
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, Broker
from streams.settings import Settings, read_settings

PER_EVENT_RUNS = 50_000
"""Faust an event at a time needs minutes for more."""


class Figure(msgspec.Struct):
    """One road, one round."""

    events: int
    seconds: float
    cpu_seconds: float
    rss_mb: int


class Clock:
    """Counts from the first event to the last: start-up is not throughput."""

    def __init__(self, total: int) -> None:
        self.total, self.seen, self._first = total, 0, 0
        self._started = self._cpu = 0.0

    def add(self, events: int) -> None:
        """Events that are done; prints the figure and ends the process at the last one."""
        if not self.seen:
            self._started, self._cpu, self._first = time.perf_counter(), time.process_time(), events
        self.seen += events
        if self.seen >= self.total:
            self.finish()

    def finish(self) -> None:
        """Print the figure for the parent and end, without the costs of an orderly stop."""
        import resource

        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        spent = time.perf_counter() - self._started, time.process_time() - self._cpu
        figure = Figure(self.seen - self._first, *spent, rss)
        print(msgspec.json.encode(figure).decode(), flush=True)
        os._exit(0)


async def fetch(settings: Settings, clock: Clock, work: Callable[[list[Any]], object]) -> None:
    """aiokafka alone: fetch in chunks, do ``work``, drop."""
    import aiokafka

    from streams.kafka.transport import CHUNK_RECORDS_MAX, FETCH_WAIT_MS_MAX

    consumer = aiokafka.AIOKafkaConsumer(
        bootstrap_servers=settings.kafka_bootstrap, enable_auto_commit=False, fetch_max_wait_ms=FETCH_WAIT_MS_MAX
    )
    await consumer.start()
    topic = settings.topic(CELL_RUNS)
    consumer.assign([aiokafka.TopicPartition(topic, partition) for partition in range(settings.partitions)])
    await consumer.seek_to_beginning()
    while True:
        for chunk in (await consumer.getmany(timeout_ms=1000, max_records=CHUNK_RECORDS_MAX)).values():
            work(chunk)
            clock.add(len(chunk))


def road_fetch(settings: Settings, clock: Clock) -> None:
    """Fetch and drop: the floor under everything in Python."""
    asyncio.run(fetch(settings, clock, len))


def road_decode(settings: Settings, clock: Clock) -> None:
    """Fetch, decode and drop."""
    from schemas.cell_run import CellRun

    decode = msgspec.json.Decoder(CellRun).decode

    def work(chunk: list[Any]) -> None:
        try:
            for record in chunk:
                decode(record.value)
        except msgspec.DecodeError:
            return  # the rest of its chunk stays undecoded: 0.02 % are malformed

    asyncio.run(fetch(settings, clock, work))


def road_creditstream(settings: Settings, clock: Clock) -> None:
    """The worker: exactly once into chDB in the process; counts rows that were read back from the ledger."""
    import faust

    from streams.app import create_app

    app = create_app(settings)
    app.meter.open()

    def look() -> None:
        while True:
            written = sum(app.meter.written.values())
            if written > clock.seen:
                clock.add(written - clock.seen)
            time.sleep(0.02)

    threading.Thread(target=look, daemon=True).start()
    faust.Worker(app, loglevel="error").execute_from_commandline()


def road_without_limits(settings: Settings, clock: Clock) -> None:
    """The same without balances, alerts and states: what limits cost."""
    from streams.unit import Unit

    async def forget(unit: Unit, take: Any) -> None:
        unit._folded = take.last

    Unit._fold = forget  # type: ignore[method-assign]
    road_creditstream(settings, clock)


def road_faust(settings: Settings, clock: Clock) -> None:
    """Faust as its tutorial writes it: an event at a time, decoded and rated, and not even stored."""
    import faust

    from schemas.catalogue import Catalogue
    from schemas.codec import decode_run
    from streams.rules.rating import rate

    actions = Catalogue.load(Path(settings.catalogue_dir)).versions[-1].actions
    app = faust.App(
        f"{settings.topic_prefix}per-event-{os.getpid()}",
        broker=f"kafka://{settings.kafka_bootstrap}",
        value_serializer="raw",
        key_serializer="raw",
        web_enabled=False,
        worker_redirect_stdouts=False,
        topic_disable_leader=True,
        datadir=settings.home,
    )
    totals: dict[str, int] = {}

    @app.agent(app.topic(settings.topic(CELL_RUNS)))
    async def meter(stream: Any) -> None:
        async for value in stream:
            with suppress(msgspec.DecodeError):
                run = decode_run(value)
                debit = rate(actions[run.action], run.outcome, run.own_api_key)
                totals[run.workspace_id] = totals.get(run.workspace_id, 0) + debit.credits
            clock.add(1)

    faust.Worker(app, loglevel="error").execute_from_commandline()


ROADS: dict[str, Callable[[Settings, Clock], None]] = {
    "aiokafka: fetch, drop": road_fetch,
    "aiokafka: fetch, decode, drop": road_decode,
    "creditstream: exactly once into ClickHouse": road_creditstream,
    "creditstream without limits": road_without_limits,
    "Faust, an event at a time: decode, rate, drop": road_faust,
}


def produce(settings: Settings, runs: int) -> None:
    """A bulk run's backlog: 200 active columns, 0.1 % copies, 0.02 % malformed; every workspace has a plan."""
    producer, topic = open_producer(settings), settings.topic(CELL_RUNS)
    for number in range(1, 13):
        plan = PlanChanged(
            event_id=uuid4(),
            workspace_id=f"ws_{number:04d}",
            plan="100k",
            effective_at=datetime(2026, 1, 15, tzinfo=UTC),
        )
        producer.produce(settings.topic(ACCOUNT_EVENTS), encode_account_event(plan), plan.workspace_id)
    for number, event in enumerate(islice(bulk_runs(seed=1), runs)):
        while True:
            try:
                producer.produce(topic, event.value, event.key)
                break
            except BufferError:
                producer.poll(0.1)
        if number % 1000 == 0:
            producer.poll(0)
    producer.flush(60)


def measure(road: str, settings: Settings, runs: int) -> Figure:
    """One road in a process of its own, with a ledger of its own."""
    total = min(runs, PER_EVENT_RUNS) if ROADS[road] is road_faust else runs
    with tempfile.TemporaryDirectory(prefix="creditstream-bench-") as home:
        given = msgspec.json.encode(msgspec.structs.replace(settings, home=home)).decode()
        command = [sys.executable, "-m", "bench.throughput", "--road", road, "--runs", str(total), "--settings", given]
        done = subprocess.run(command, capture_output=True, timeout=900, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith(b"{")]
    if not lines:
        raise SystemExit(f"{road}: {done.stderr.decode()[-2000:]}")
    return msgspec.json.decode(lines[-1], type=Figure)


def report(figures: dict[str, list[Figure]]) -> Table:
    """Median, and minimum to maximum, of each road; the ratio to fetch + decode of the same round."""
    table = Table(title="draining a backlog, one process", box=None, header_style="bold")
    for column in ("road", "events/s", "min - max", "µs CPU an event", "peak MB", "of fetch + decode"):
        table.add_column(column, justify="left" if column == "road" else "right")
    floor = [figure.events / figure.seconds for figure in figures["aiokafka: fetch, decode, drop"]]
    for road, rounds in figures.items():
        rates = [figure.events / figure.seconds for figure in rounds]
        ratios = [rate / base for rate, base in zip(rates, floor, strict=True)]
        cpu = statistics.median(figure.cpu_seconds / figure.events * 1e6 for figure in rounds)
        table.add_row(
            road, f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} - {max(rates):,.0f}", f"{cpu:.1f}",
            str(max(figure.rss_mb for figure in rounds)), f"{statistics.median(ratios):.0%}",
        )  # fmt: skip
    return table


def main() -> None:
    """Produce once, then every road in turn, round after round."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--road", choices=list(ROADS), help=argparse.SUPPRESS)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.road:
        ROADS[given.road](msgspec.json.decode(given.settings, type=Settings), Clock(given.runs))
        return
    say = Console(stderr=True).print
    base = Path(tempfile.mkdtemp(prefix="creditstream-bench-"))
    try:
        with EmbeddedKafka(Home.at(base), say) as kafka:
            settings = read_settings({}, kafka_bootstrap=kafka.bootstrap)
            Broker(settings).ensure_all()
            say(f"producing {given.runs:,} cell runs")
            produce(settings, given.runs)
            figures: dict[str, list[Figure]] = {road: [] for road in ROADS}
            for number in range(given.rounds):
                for road in ROADS:
                    say(f"round {number + 1} of {given.rounds}: {road}")
                    figures[road].append(measure(road, settings, given.runs))
        Console(width=140).print(report(figures))
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
