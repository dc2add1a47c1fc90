"""How long a check takes, and what a gate of a million workspaces costs: time until ready, memory.

    .venv/bin/python -m bench.gate
    .venv/bin/python -m bench.gate --workspaces 100000 --premium 0

The states lie in a real Kafka's compacted topic; each gate runs in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from creditstream.client import Gate
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from creditstream.producing import open_producer
from schemas.ledger import Pool
from schemas.limits import AsOf, LimitState, State, state_key
from streams.kafka.topics import LIMIT_STATES, Broker
from streams.settings import Settings, read_settings

CHECKS = 200_000
REPEATS = 9
QUESTIONS = {
    "one cell, known workspace": ('check("ws_0000042", "enrich_person")', "enough"),
    "a bulk of 1,000 cells": ('check("ws_0000042", "enrich_person", cells=1_000)', "enough"),
    "not enough left": ('check("ws_0000042", "enrich_person", cells=10**9)', "not_enough"),
    "unknown workspace": ('check("nobody", "enrich_person")', "unknown_workspace"),
    "free action": ('check("ws_0000042", "hubspot_send")', "free_action"),
    "the answer in words": ('d = check("ws_0000042", "enrich_person"); d.price; d.remaining; d.as_of; d.age_ms', ""),
}


class Figure(msgspec.Struct):
    """One gate, from its construction on."""

    ready_s: float
    rss_mb: float
    nanoseconds: dict[str, list[float]]


def states(workspaces: int, premium: int) -> Iterator[LimitState]:
    """An enrichment state for every workspace, and a premium state for the first ``premium`` of them."""
    now = datetime.now(UTC)
    for number in range(workspaces + premium):
        index = number % workspaces
        is_premium = number >= workspaces
        yield LimitState(
            workspace_id=f"ws_{index:07d}",
            pool=Pool.PREMIUM if is_premium else Pool.ENRICHMENT,
            state=State.OK,
            used="1250",
            allowance="20000",
            remaining=str(18_750 + index),
            overage="0",
            period_start=None if is_premium else now.date(),
            period_end=None if is_premium else now.date() + timedelta(days=30),
            next_allowance=None if is_premium else "20000",
            plan="" if is_premium else "starter_20k",
            as_of=AsOf(log="w0Jz1p2sT5u/9dKq7nX3bA", cell_runs=number, account_events=7, at=now),
            owner="bench",
        )


def produce(settings: Settings, workspaces: int, premium: int) -> None:
    """Fill the topic."""
    producer, topic = open_producer(settings), settings.topic(LIMIT_STATES)
    for number, state in enumerate(states(workspaces, premium)):
        while True:
            try:
                producer.produce(topic, msgspec.json.encode(state), state_key(state.workspace_id, state.pool))
                break
            except BufferError:
                producer.poll(0.1)
        if number % 1000 == 0:
            producer.poll(0)
    producer.flush(60)


def rss_mb() -> float:
    """Resident memory of this process now."""
    import psutil

    return float(psutil.Process().memory_info().rss) / 1e6


def measure(settings: Settings) -> Figure:
    """One gate: until ready, memory added, nanoseconds of a check without and then with its name for them."""
    before, started = rss_mb(), time.perf_counter()
    with Gate(settings, on_unknown="deny", on_stale="deny") as gate:
        gate.wait_ready(300)
        ready_s, after = time.perf_counter() - started, rss_mb()
        found = {}
        for name, (question, reason) in QUESTIONS.items():
            scope = {"check": gate.check}
            if reason:
                assert eval(question, scope).reason == reason
            found[name] = [
                seconds / CHECKS * 1e9
                for seconds in timeit.repeat(question, globals=scope, number=CHECKS, repeat=REPEATS)
            ]
    return Figure(ready_s, after - before, found)


def report(figure: Figure, say: Console, workspaces: int, premium: int) -> None:
    """Print it."""
    table = Table(title="one check, one thread, the gate following meanwhile", box=None, header_style="bold")
    for column in ("question", "ns, median", "min - max"):
        table.add_column(column, justify="left" if column == "question" else "right")
    for name, nanoseconds in figure.nanoseconds.items():
        spread = f"{min(nanoseconds):,.0f} - {max(nanoseconds):,.0f}"
        table.add_row(name, f"{statistics.median(nanoseconds):,.0f}", spread)
    say.print(table)
    what = f"{workspaces:,} workspaces, {premium:,} of them with a premium state too"
    say.print(f"{what}: ready after {figure.ready_s:.1f} s, {figure.rss_mb:.0f} MB resident added")


def main() -> None:
    """Fill a topic, then measure gates in processes of their own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workspaces", type=int, default=1_000_000)
    parser.add_argument("--premium", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.settings:
        sys.stdout.buffer.write(msgspec.json.encode(measure(msgspec.json.decode(given.settings, type=Settings))))
        return
    say = Console(width=140)
    with (
        tempfile.TemporaryDirectory(prefix="creditstream-bench-") as directory,
        EmbeddedKafka(Home.at(Path(directory)), Console(stderr=True).print) as kafka,
    ):
        settings = read_settings({}, kafka_bootstrap=kafka.bootstrap)
        Broker(settings).ensure(LIMIT_STATES)
        produce(settings, given.workspaces, given.premium)
        argument = msgspec.json.encode(settings).decode()
        for _ in range(given.rounds):
            command = [sys.executable, "-m", "bench.gate", "--settings", argument]
            done = subprocess.run(command, stdout=subprocess.PIPE, timeout=600, check=True)
            report(msgspec.json.decode(done.stdout, type=Figure), say, given.workspaces, given.premium)


if __name__ == "__main__":
    main()
