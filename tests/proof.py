"""The crash proof: the whole pipeline at work, killed again and again, and the count of what that lost or doubled.

    python -m tests.proof                                  210 faults, 20 to 30 minutes
    python -m tests.proof --faults 24 --seed 7

A real worker meters cell runs and account events from a real Kafka into a ClickHouse that is reached over HTTP (chDB
behind `tests.clickhouse_http`, which can be told to fail). Every fault is one round: new workspaces get a plan, their
runs and those of older ones arrive, with copies, late runs and what no meter can read among them, and amid the work
one process is killed, stopped or cut off. Nothing is compared before the end. Then everything is: each Kafka offset
with its ledger row and a second rater's charge, sums through projections with sums over raw rows, every alert and
every state with a second fold.
"""

import argparse
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Final, NamedTuple

import psutil
from rich.console import Console

from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from creditstream.reconcile import Reconciliation
from schemas.problem import Unreachable
from sinks.clickhouse import connect
from sinks.migrate import create_database, migrate
from streams.app import EXIT_RESTART
from tests.clickhouse_server import ClickHouseServer
from tests.ledger_rows import INVARIANTS, wait_until_grown
from tests.limit_messages import ROWS, Reference, Verdict, judge, small_plans
from tests.traffic import PLANNED_DAYS_AGO, PlannedTraffic, WildTraffic
from tests.worker_process import WorkerProcess, kafka_processes

FAULTS: Final = 210
RUNS_A_ROUND: Final = 1_000
WILD_A_ROUND: Final = 200
EVENTS_A_ROUND: Final = 12
NEW_A_ROUND: Final = 2
"""Workspaces; with as many of the rounds before it."""
BATCH_ROWS: Final = (100, 600)
"""A round is several inserts, so that a fault hits every step of one; each worker cuts them in its own way."""
ENDS: Final = (None, 0, EXIT_RESTART, Unreachable.exit_code, -signal.SIGKILL)
"""How a worker may have ended before the next one starts: unreachable where it began amid an outage; None: none was."""
RECOVERY_S_MAX: Final = 120.0
SESSION_S: Final = 10.0


class Stage(NamedTuple):
    """Everything that can be killed."""

    kafka: EmbeddedKafka
    kafka_home: Home
    clickhouse: ClickHouseServer
    worker: WorkerProcess
    dice: random.Random

    def start_worker(self) -> None:
        """The next one, which cuts its batches in another way. AssertionError when the last one ended as none should:
        a supervisor would start it again, and hide it.
        """
        assert self.worker.ended in ENDS, f"the worker ended with exit code {self.worker.ended}: {self.worker.log}"
        self.worker.settings["batch_rows_max"] = self.dice.randint(*BATCH_ROWS)
        self.worker.start()

    def pause(self, least_s: float, most_s: float) -> None:
        """A random while."""
        time.sleep(self.dice.uniform(least_s, most_s))


def kill_worker(stage: Stage) -> None:
    """SIGKILL while it works."""
    stage.pause(0, 0.8)
    stage.worker.kill()


def kill_worker_at_start(stage: Stage) -> None:
    """SIGKILL, and again between the next one's first instruction and its first rows."""
    stage.worker.kill()
    stage.start_worker()
    stage.pause(0.5, 3.5)
    stage.worker.kill()


def terminate_worker(stage: Stage) -> None:
    """SIGTERM while it works: it hands over."""
    stage.pause(0, 0.8)
    assert stage.worker.stop() in (0, EXIT_RESTART)


def freeze_worker(stage: Stage) -> None:
    """SIGSTOP for longer than the session that Kafka grants: it wakes, finds that it is nobody any more, and ends."""
    stage.pause(0, 0.5)
    stage.worker.signal(signal.SIGSTOP)
    time.sleep(SESSION_S + 2)
    stage.worker.signal(signal.SIGCONT)
    assert stage.worker.wait() == EXIT_RESTART


def kill_worker_with_an_insert_on_the_wire(stage: Stage) -> None:
    """The insert of a dead worker lands after its successor has begun."""
    stage.clickhouse.fault("hold")
    wait_until(stage, lambda: has_met(stage, "hold", "waiting"))
    stage.worker.kill()
    stage.start_worker()
    stage.pause(0, 6)
    stage.clickhouse.release()


def kill_clickhouse(stage: Stage) -> None:
    """SIGKILL at any instant."""
    stage.pause(0, 0.8)
    stage.clickhouse.kill()
    stage.pause(0, 2)
    stage.clickhouse.start()


def kill_clickhouse_at_an_insert(fault: str) -> Callable[[Stage], None]:
    """SIGKILL right before or right after it executes the next insert."""

    def inject(stage: Stage) -> None:
        server = psutil.Process(stage.clickhouse.pid)
        stage.clickhouse.fault(fault)
        wait_until(stage, lambda: server.status() == psutil.STATUS_ZOMBIE)
        stage.clickhouse.wait_until_down()
        stage.pause(0, 2)
        stage.clickhouse.start()

    return inject


def break_an_insert(fault: str, state: str) -> Callable[[Stage], None]:
    """The next insert meets that fault, once."""

    def inject(stage: Stage) -> None:
        stage.clickhouse.fault(fault)
        wait_until(stage, lambda: has_met(stage, fault, state))

    return inject


def has_met(stage: Stage, fault: str, state: str) -> bool:
    """Whether an insert has met the planned fault, and has come so far."""
    return any((line["fault"], line["state"]) == (fault, state) for line in stage.clickhouse.log("insert"))


def kill_kafka(stage: Stage) -> None:
    """SIGKILL of the broker at any instant, and a new one on its files."""
    stage.pause(0, 0.8)
    _, broker = kafka_processes(stage.kafka_home)
    broker.kill()
    stage.kafka.stop()
    stage.pause(0, 2)
    stage.kafka.start()


KINDS: Final[dict[str, tuple[int, Callable[[Stage], None]]]] = {
    "worker: SIGKILL while it works": (6, kill_worker),
    "worker: SIGKILL, and again while its successor starts": (4, kill_worker_at_start),
    "worker: SIGKILL, its last insert lands after its successor has begun": (3, kill_worker_with_an_insert_on_the_wire),
    "worker: SIGSTOP for longer than its session": (1, freeze_worker),
    "worker: SIGTERM while it works": (2, terminate_worker),
    "ClickHouse: SIGKILL at any instant": (2, kill_clickhouse),
    "ClickHouse: SIGKILL before it executes an insert": (2, kill_clickhouse_at_an_insert("kill_before")),
    "ClickHouse: SIGKILL after it has executed an insert": (2, kill_clickhouse_at_an_insert("kill_after")),
    "connection cut before an insert is executed": (2, break_an_insert("close_before", "refused")),
    "connection cut after an insert was executed": (2, break_an_insert("close_after", "executed")),
    "an insert is answered with 503": (1, break_an_insert("status_503", "refused")),
    "Kafka: SIGKILL of the broker": (3, kill_kafka),
}
"""Kind → how often among thirty, and how."""


def play(stage: Stage, seed: int, kinds: Sequence[str], say: Callable[[str], None]) -> None:
    """One round for every kind."""
    traffic, wild = PlannedTraffic(seed), WildTraffic(seed)
    for number, kind in enumerate(kinds, 1):
        say(f"{number} of {len(kinds)}  {kind}")
        new = tuple(f"ws_{number:03d}_{place}" for place in range(NEW_A_ROUND))
        traffic.workspaces = traffic.billed = (*traffic.workspaces[-NEW_A_ROUND:], *new)
        plans = [traffic.plan(name, traffic.started - PLANNED_DAYS_AGO) for name in new]
        wait_until_ready(stage)
        stage.clickhouse.forget_log()
        stage.worker.bill([*plans, *traffic.account_events(EVENTS_A_ROUND)])
        stage.worker.produce((*traffic.cell_runs(RUNS_A_ROUND), *wild.events(WILD_A_ROUND)))
        KINDS[kind][1](stage)


def wait_until(stage: Stage, condition: Callable[[], object]) -> None:
    """Supervise the worker until then: what has ended is started again. AssertionError when it takes too long."""
    deadline = time.monotonic() + RECOVERY_S_MAX
    while not condition():
        assert time.monotonic() < deadline, f"not recovered after {RECOVERY_S_MAX:.0f} s: {stage.worker.status}"
        if not stage.worker.is_alive:
            stage.start_worker()
        time.sleep(0.05)


def wait_until_ready(stage: Stage) -> None:
    """Until the worker meters everything that it should."""
    wait_until(stage, lambda: (status := stage.worker.status) and status.ready)


def settled(stage: Stage) -> tuple[Reconciliation, Verdict, int]:
    """Everything is metered and told in peace: the books, what was told, and rows that break an invariant."""
    wait_until_ready(stage)
    wait_until(stage, lambda: not stage.worker.behind())
    books = stage.worker.reconcile()
    assert stage.worker.stop() == 0
    with connect(str(stage.worker.settings["ledger_url"])) as client:
        verdict = judge(stage.worker.configured, Reference(client.query(ROWS).result_rows))
        broken = sum(len(client.query(sql).result_rows) for sql in INVARIANTS)
    return books, verdict, broken


def dealt(faults: int, seed: int) -> list[str]:
    """So many faults: each kind as often as it stands in `KINDS`, in any order."""
    deck = [kind for kind, (often, _) in KINDS.items() for _ in range(often)]
    dice = random.Random(seed)
    return [kind for _ in range(-(-faults // len(deck))) for kind in dice.sample(deck, len(deck))][:faults]


def prove(directory: Path, kinds: Sequence[str], seed: int, say: Callable[[str], None]) -> "Proof":
    """A fault of each of these kinds, on files in this directory."""
    began = time.monotonic()
    home = Home.at(directory / "kafka")
    with home.hold(), EmbeddedKafka(home, say) as kafka, ClickHouseServer(directory / "clickhouse") as clickhouse:
        url = f"{clickhouse.url}/proof"
        create_database(url)
        with connect(url) as client:
            migrate(client)
            wait_until_grown(client)
        fields = {"ledger_url": url, "plans_dir": small_plans(directory / "plans")}
        with WorkerProcess(directory / "worker", kafka.bootstrap, "", instance="one", **fields) as worker:
            worker.create_topic()
            stage = Stage(kafka, home, clickhouse, worker, random.Random(seed))
            play(stage, seed, kinds, say)
            say("metering what is left, and comparing everything")
            return Proof(Counter(kinds), *settled(stage), seed, time.monotonic() - began)


class Proof(NamedTuple):
    """What was injected, and what was found."""

    faults: Counter[str]
    books: Reconciliation
    verdict: Verdict
    broken: int
    seed: int
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether nothing was lost, doubled or told wrongly."""
        return not any(wrong for _, _, wrong in self.findings if wrong is not None)

    @property
    def findings(self) -> list[tuple[str, str, int | None]]:
        """What was counted, how many there were, and how many of them are wrong; None: just a number."""
        books, told = self.books, self.verdict
        sums, credits = books.sums, books.credits == books.credits_reference
        projected = (sums.credits_projected, sums.rows_projected) == (sums.credits_raw, sums.rows_raw)
        return [
            ("events in Kafka without a ledger row", f"{books.events:,}", books.missing + books.behind),
            ("offsets with more than one ledger row, or runs with two debits", f"{books.rows:,}", books.doubled),
            ("ledger rows that the second rater charges differently", f"{books.rows:,}", books.different),
            ("credits that differ from the second rater's sum", f"{Decimal(books.credits):,f}", int(not credits)),
            ("credits that differ between projections and raw rows", f"{Decimal(sums.credits_raw):,f}",
             int(not projected)),
            ("rows that break an invariant in SQL", f"{books.rows:,}", self.broken),
            ("crossings that the ledger implies and no alert reported", f"{told.implied:,}", len(told.untold)),
            ("alerts that nothing explains", f"{told.alerts:,}", len(told.unexplained)),
            ("alert ids that stand for two crossings, or share one", f"{told.alerts:,}", len(told.ambiguous_ids)),
            ("pools whose newest state differs from the ledger's balance", f"{told.pools:,}",
             len(told.wrong_states) + len(told.without_state)),
        ]  # fmt: skip


def tables(proof: Proof) -> str:
    """The proof in Markdown."""
    injected = [f"| {kind} | {proof.faults[kind]} |" for kind in KINDS]
    found = [f"| {what} | {count} | {wrong} |" for what, count, wrong in proof.findings]
    return "\n".join(
        [
            f"{datetime.now(UTC):%Y-%m-%d}, seed {proof.seed}: {proof.faults.total()} faults in "
            f"{proof.seconds / 60:.0f} minutes.", "",
            "| fault | times |", "|---|---:|", *injected, "",
            "| what we looked for | among | found |", "|---|---:|---:|", *found, "",
        ]
    )  # fmt: skip


def main() -> int:
    """The command; 0 when the proof holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=FAULTS)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    console = Console(stderr=True)
    kinds = dealt(options.faults, options.seed)
    with tempfile.TemporaryDirectory(prefix="creditstream-proof-") as directory, console.status("") as status:
        proof = prove(Path(directory), kinds, options.seed, status.update)
    sys.stdout.write(tables(proof))
    if not proof.holds:
        console.print(proof.books, proof.verdict)
    return 0 if proof.holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
