"""The demo: everything for real in one command, a live view, and at its end the proof."""

import os
import time
from datetime import UTC, datetime, timedelta
from typing import Final, Self
from uuid import UUID

from rich.console import Console
from rich.live import Live

from creditstream.asking import WorkerAnswers
from creditstream.child import child_worker
from creditstream.cli.terminal import say, suggested, write
from creditstream.demo_scene import UPGRADE, Billing, Enrichments, Listener, TrialWorker
from creditstream.demo_view import Look, alert_line, live_view
from creditstream.embedded import INSTANCE, EmbeddedKafka
from creditstream.home import Home
from creditstream.reconcile import Reconciliation, reconcile
from schemas.credits import format_credits, group_credits, parse_credits
from schemas.ledger import Reason
from schemas.problem import Problem
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, Broker
from streams.settings import DEBUG_VARIABLE, PREFIX, Settings, read_settings, variable

CATCH_UP_S_MAX: Final = 60.0
LOOK_S: Final = 0.25
STOPPED_SHARE: Final = 6
"""The trial workspace stays stopped for this part of the demo before it is upgraded."""


def demonstrate(home: str | None, seconds: int, rate: int) -> None:
    """Run the demo in the home, whatever the environment says of other places. Problem when the books do not close."""
    console = Console()
    place = Home.at(home)
    if worker := place.worker():
        raise Problem(
            "a worker is running in this home", f"process {worker.pid} holds {place.path}", "Stop it, or use --home."
        )
    console.print(
        f"Apache Kafka, a Faust worker and ClickHouse's engine are starting in {place.path} ...", soft_wrap=True
    )
    with EmbeddedKafka(place, Console(stderr=True).print) as kafka:
        settings = read_settings({}, home=str(place.path), **kafka.settings)
        Broker(settings).ensure_all()
        with child_worker(place, instance=INSTANCE, **kafka.settings) as answers:
            console.print(f"ready: read API and OpenAPI at {place.worker().api_url}/schema\n")  # type: ignore[union-attr]
            with _Scene(settings, seconds, rate) as scene:
                _play(console, answers, scene)
                books = _close(console, answers, settings)
            example = answers.example_run(Reason.CHARGED)
    _report(console, books, scene, example)


class _Scene:
    """Everybody who acts, and the workspace whose credits run out."""

    def __init__(self, settings: Settings, seconds: int, rate: int) -> None:
        self.seconds = seconds
        self._patience = timedelta(seconds=seconds) / STOPPED_SHARE
        self.trial = f"trial_{datetime.now(UTC):%H%M%S}"
        self.billing = Billing(settings)
        self.enrichments = Enrichments(settings, seconds, rate)
        self.worker = TrialWorker(settings, self.trial, seconds)
        self.listener = Listener(settings)

    def __enter__(self) -> Self:
        self.listener.start()
        self.billing.begin(self.trial)
        self.enrichments.start()
        self.worker.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Everybody has gone when Kafka goes, also after Ctrl-C."""
        self.stop()
        self.listener.enough.set()
        self.listener.join()

    def go_on(self) -> None:
        """Billing upgrades whoever has been stopped for a while."""
        stopped, upgraded = self.worker.stopped_at, self.worker.is_upgraded
        if stopped and not upgraded.is_set() and datetime.now(UTC) - stopped > self._patience:
            self.billing.set_plan(self.trial, UPGRADE)
            upgraded.set()

    def stop(self) -> None:
        """No more runs; alerts may still come."""
        for thread in (self.enrichments, self.worker):
            thread.enough.set()
            thread.join()


def _play(console: Console, answers: WorkerAnswers, scene: _Scene) -> None:
    """Let everybody act, and show what becomes of it: live on a terminal, else a line for each alert."""
    started, before, said = time.monotonic(), sum(answers.status().written.values()), 0
    with Live(console=console, refresh_per_second=4, transient=not console.is_terminal) as live:
        while scene.enrichments.is_alive():
            scene.go_on()
            if console.is_terminal:
                produced = scene.enrichments.produced + scene.worker.allowed
                look = Look(answers.status(), before, produced, time.monotonic() - started, scene.seconds)
                live.update(live_view(look, scene.listener, scene.worker, scene.trial))
            else:
                said = _say_alerts(console, scene.listener, said)
            time.sleep(LOOK_S)
    scene.stop()
    if not console.is_terminal:
        _say_alerts(console, scene.listener, said)


def _say_alerts(console: Console, listener: Listener, said: int) -> int:
    total, told = listener.alerts, list(listener.told)
    for one in told[max(0, len(told) - (total - said)) :]:
        console.print(alert_line(one), highlight=False, soft_wrap=True)
    return total


def _close(console: Console, answers: WorkerAnswers, settings: Settings) -> Reconciliation:
    """Wait until everything is metered, then compare topic and ledger."""
    topic, events = settings.topic(CELL_RUNS), settings.topic(ACCOUNT_EVENTS)
    broker, partitions = Broker(settings), range(settings.partitions)
    runs_end, events_end = broker.log_ranges(topic, partitions), broker.log_ranges(events, partitions)
    deadline = time.monotonic() + CATCH_UP_S_MAX
    while time.monotonic() < deadline and any(
        unit.mark < runs_end[unit.partition].end - 1 or unit.event_mark < events_end[unit.partition].end - 1
        for unit in answers.status().units
    ):
        time.sleep(0.1)
    console.print("\nreconciling: Kafka's log against the ledger, every event rated a second time ...")
    return reconcile(answers, settings)


def _report(console: Console, books: Reconciliation, scene: _Scene, example: UUID | None) -> None:
    produced = scene.enrichments.produced + scene.worker.allowed
    _tell_of_the_gate(console, scene)
    console.print(f"\n[bold]{produced:,} runs produced now; {books.sentence}[/bold]", highlight=False, soft_wrap=True)
    console.print(books.sums_sentence, highlight=False, soft_wrap=True)
    for line in (line for book in books.partitions for line in book.examples):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
    if not books.closes or books.behind:
        raise Problem("the books do not close", books.sentence, "Keep the home as it is and look at the offsets above.")
    _say_what_next(scene.trial, example)


def _say_what_next(trial: str, example: UUID | None) -> None:
    """Commands that ask the demo's own ledger: it did without the environment's settings, and so must they."""
    words = [
        f"balance {trial}", f"statement {trial}", f"check {trial} find_work_email --cells 500",
        "alerts list", "usage ws_0001 --by column", "runs ws_0001 --limit 5", "dead-letters list",
    ]  # fmt: skip
    words = [f"explain {example}", *words] if example else words
    kept = variable("home"), DEBUG_VARIABLE
    unset = "".join(f"-u {name} " for name in sorted(os.environ) if name.startswith(PREFIX) and name not in kept)
    apart, why = (f"env {unset}", ", without the environment's settings, as the demo") if unset else ("", "")
    starts = f"{apart}{suggested('worker --embedded')}"
    say("", f"The books close, and Kafka and the worker have ended. Try next{why}:", "")
    say(*(f"  {apart}{suggested(each)}" for each in words))
    # Not by `say`, which would make of it what it is already.
    write(f"\n`{starts}` starts them again: `send`, `plan set` and `grant` need them.\n")


def _tell_of_the_gate(console: Console, scene: _Scene) -> None:
    worker, state = scene.worker, scene.listener.states.get(scene.trial)
    if not worker.stopped_at:
        return
    used = group_credits(parse_credits(state.used)) if state else "?"
    freed = f", upgraded to {UPGRADE}, and freed at {worker.freed_at:%H:%M:%S}" if worker.freed_at else ""
    over = format_credits(scene.listener.overage.get(scene.trial, 0))
    over += " credit over" if over == "1" else " credits over"
    console.print(
        f"\n{scene.trial}: {worker.allowed:,} runs allowed by its gate, stopped at {worker.stopped_at:%H:%M:%S} with "
        f"{over} ({worker.refused:,} runs refused){freed}; {used} credits used",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
