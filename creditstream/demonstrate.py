"""The demo: everything for real in one command, a live view, and at its end the proof."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from uuid import UUID

import rich_click as click
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from creditstream.asking import WorkerAnswers
from creditstream.cli.options import settings_of
from creditstream.cli.worker import EMBEDDED_INSTANCE
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from creditstream.producing import open_producer
from creditstream.reconcile import Reconciliation, reconcile
from creditstream.simulate import events
from schemas.answers import Status, WorkspaceTotal
from schemas.ledger import FREE_REASONS, Kind, Reason
from schemas.problem import Problem, Unreachable
from streams.settings import Settings
from streams.topics import Broker, cell_runs_topic, ensure_topics

READY_S_MAX: Final = 60.0
CATCH_UP_S_MAX: Final = 60.0
STOP_S_MAX: Final = 15.0
LOOK_S: Final = 0.25
WORKSPACES_SHOWN: Final = 8


def demonstrate(home: str | None, seconds: int, rate: int) -> None:
    """Run the demo. Difference is not raised here: Problem (exit code 1) when the books do not close."""
    console = Console(stderr=False)
    place = Home.at(home)
    say = Console(stderr=True).print
    if worker := place.worker():
        raise Problem(
            "a worker runs in this home", f"process {worker.pid} holds {place.path}", "Stop it, or use --home."
        )
    console.print(f"Apache Kafka, a Faust worker and ClickHouse's engine start in {place.path} ...", soft_wrap=True)
    with EmbeddedKafka(place, say) as kafka:
        settings = settings_of(str(place.path), kafka_bootstrap=kafka.bootstrap)
        ensure_topics(Broker(kafka.bootstrap), settings)
        with _worker(place, kafka.bootstrap) as answers:
            console.print(f"ready: read API and OpenAPI at {place.worker().api_url}/schema\n")  # type: ignore[union-attr]
            produced = _watch(console, answers, settings, seconds, rate)
            books = _close(console, answers, settings)
            example = _example(answers)
    _report(console, books, produced, example, home)


@contextmanager
def _worker(home: Home, bootstrap: str) -> Iterator[WorkerAnswers]:
    """A worker process of its own, which ends with this one."""
    home.logs.mkdir(parents=True, exist_ok=True)
    log = home.logs / "worker.log"
    environment = os.environ | {
        "CREDITSTREAM_KAFKA_BOOTSTRAP": bootstrap,
        "CREDITSTREAM_API_PORT": "0",
        "CREDITSTREAM_INSTANCE": EMBEDDED_INSTANCE,
    }
    command = [sys.executable, "-m", "creditstream", "worker", "--end-with-input", "--home", str(home.path)]
    with log.open("wb") as lines:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=lines, stderr=lines, env=environment, start_new_session=True
        )
    try:
        yield _await_ready(home, process, log)
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(home: Home, process: "subprocess.Popen[bytes]", log: Path) -> WorkerAnswers:
    deadline = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Problem("the worker ended", " ".join(last) or f"exit code {process.returncode}", f"See {log}.")
        if endpoints := home.worker():
            answers = WorkerAnswers(endpoints.api_url)
            try:
                if answers.status().ready:
                    return answers
            except Unreachable:
                pass
        time.sleep(0.1)
    raise Problem("the worker is not ready", f"{READY_S_MAX:.0f} s are over", f"See {log}.")


class _Enrichments(threading.Thread):
    """Simulated enrichment workers: produces at a steady rate until the time is over or it is told to stop."""

    def __init__(self, settings: Settings, seconds: int, rate: int) -> None:
        super().__init__(daemon=True)
        self._settings, self._seconds, self._rate = settings, seconds, rate
        self.produced = 0
        self.enough = threading.Event()

    def run(self) -> None:
        """Produce. A copy, an unknown action and a broken event come along now and then."""
        topic = cell_runs_topic(self._settings)
        producer = open_producer(self._settings.kafka_bootstrap)
        stream = events(seed=time.time_ns())
        started = time.monotonic()
        while not self.enough.is_set() and (elapsed := time.monotonic() - started) < self._seconds:
            for _ in range(int(elapsed * self._rate) - self.produced):
                event = next(stream)
                producer.produce(topic, event.value, event.key)
                self.produced += 1
            producer.poll(0.01)
        producer.flush(10)


def _watch(console: Console, answers: WorkerAnswers, settings: Settings, seconds: int, rate: int) -> int:
    """Produce and show what becomes of it, live."""
    workers = _Enrichments(settings, seconds, rate)
    started, before = time.monotonic(), sum(answers.status().written.values())
    workers.start()
    try:
        with Live(console=console, refresh_per_second=4, transient=not console.is_terminal) as live:
            while workers.is_alive():
                if console.is_terminal:
                    status, totals = answers.status(), answers.workspaces(WORKSPACES_SHOWN)
                    elapsed = time.monotonic() - started
                    live.update(_view(status, totals, workers.produced, before, elapsed, seconds))
                time.sleep(LOOK_S)
    except BaseException:
        workers.enough.set()
        raise
    workers.join()
    return workers.produced


def _view(
    status: Status, totals: list[WorkspaceTotal], produced: int, before: int, elapsed: float, seconds: int
) -> Group:
    written = sum(status.written.values()) - before
    debits = _count(status, Kind.RUN)
    facts = (
        (f"{written / max(elapsed, 0.1):,.0f}", "events/s"),
        (f"{debits:,}", "debits"),
        (f"{max(0, produced - written):,}", "on their way"),
        (f"{_count(status, Kind.DUPLICATE):,}", "duplicates"),
        (f"{_count(status, Kind.DEAD_LETTER):,}", "dead letters"),
    )
    head = Text.assemble(*(part for number, name in facts for part in ((number, "bold"), f" {name}   ")))
    bar = Table.grid()
    bar.add_row(ProgressBar(total=seconds, completed=min(elapsed, seconds), width=60))
    sides = Table.grid(padding=(0, 6))
    sides.add_row(_workspace_table(totals), _free_table(status))
    return Group(bar, head, Text(), sides)


def _count(status: Status, kind: Kind) -> int:
    return sum(number for name, number in status.written.items() if name.startswith(f"{kind}/"))


def _workspace_table(totals: list[WorkspaceTotal]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("credits by workspace")
    table.add_column("credits", justify="right")
    table.add_column("runs", justify="right")
    for total in totals:
        table.add_row(total.workspace_id, total.credits, f"{total.runs:,}")
    return table


def _free_table(status: Status) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("free runs by reason")
    table.add_column("runs", justify="right")
    for reason in FREE_REASONS:
        table.add_row(str(reason), f"{status.written.get(f'{Kind.RUN}/{reason}', 0):,}")
    return table


def _close(console: Console, answers: WorkerAnswers, settings: Settings) -> Reconciliation:
    """Wait until everything is metered, then compare topic and ledger."""
    topic = cell_runs_topic(settings)
    ends = {
        p: found.end
        for p, found in Broker(settings.kafka_bootstrap).log_ranges(topic, range(settings.partitions)).items()
    }
    deadline = time.monotonic() + CATCH_UP_S_MAX
    while any(unit.mark < ends[unit.partition] - 1 for unit in answers.status().units):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    console.print("\nreconciling: Kafka's log against the ledger, every event rated a second time ...")
    return reconcile(answers, settings.kafka_bootstrap, topic, Path(settings.catalogue_dir))


def _example(answers: WorkerAnswers) -> UUID | None:
    """A run worth explaining: the newest one that was charged 2 credits, or any."""
    return answers.example_run(Reason.CHARGED)


def _report(console: Console, books: Reconciliation, produced: int, example: UUID | None, home: str | None) -> None:
    behind = f", {books.behind:,} not metered yet" if books.behind else ""
    console.print(
        f"\n[bold]{produced:,} runs produced now; {books.sentence}{behind}[/bold]", highlight=False, soft_wrap=True
    )
    sums = books.sums
    console.print(
        f"sums through projections {sums.credits_projected}, over raw rows {sums.credits_raw} credits", highlight=False
    )
    for line in (line for book in books.partitions for line in book.examples):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    if not books.closes or books.behind:
        raise Problem("the books do not close", books.sentence, "Keep the home as it is and look at the offsets above.")
    click.echo("\nThe books close. Try next:\n")
    option = f" --home {home}" if home else ""
    if example:
        click.echo(f"  creditstream explain {example}{option}")
    click.echo(f"  creditstream usage ws_0001 --by column{option}")
    click.echo(f"  creditstream dead-letters list{option}")
