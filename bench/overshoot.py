"""What a workspace draws beyond its allowance while enrichment workers ask the gate before every cell.

    .venv/bin/python -m bench.overshoot              eight workers, cells of 100, 20 and 5 ms, five workspaces each

Broker, worker with chDB, producer and gate run on this machine. Overage is what was let through before the gate knew:
how long that takes, times what the workers draw meanwhile.
"""

import argparse
import shutil
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table
from uuid_utils.compat import uuid7

from bench.limits import plan_set
from creditstream.child import child_worker
from creditstream.client import CellRun, CellRunProducer, Decision, Gate, Outcome
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from creditstream.producing import open_producer
from streams.kafka.topics import ACCOUNT_EVENTS, Broker
from streams.settings import Settings, read_settings

WORKERS: Final = 8
ASKED_ON: Final = 20
"""How often a worker asks after its first no."""
WAIT_S_MAX: Final = 120.0
ALLOWANCE: Final = 500
PLANS: Final = f"""
version = 1
effective_from = 2020-01-01T00:00:00Z
[[plans]]
id = "small"
allowance = "{ALLOWANCE}"
"""


class Crew:
    """Enrichment workers of one workspace, as threads: ask, run the cell, record it, until told no `ASKED_ON` times.

    Each cell draws 1 credit. Questions are asked one at a time, so that "after the first no" is well defined.
    """

    def __init__(self, gate: Gate, producer: CellRunProducer, workspace_id: str, cell_s: float) -> None:
        self._gate, self._producer, self._workspace_id, self._cell_s = gate, producer, workspace_id, cell_s
        self._lock = threading.Lock()
        self.allowed = 0
        self.allowed_after_a_no = 0
        self.refusals: list[Decision] = []

    def work(self) -> None:
        """Until everybody was told to stop."""
        threads = [threading.Thread(target=self._run_cells) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S_MAX)

    def _run_cells(self) -> None:
        deadline, refused = time.monotonic() + WAIT_S_MAX, 0
        while refused < ASKED_ON and time.monotonic() < deadline:
            is_allowed = self._ask()
            time.sleep(self._cell_s)
            if is_allowed:
                self._producer.record(self._run())
            else:
                refused += 1

    def _ask(self) -> bool:
        with self._lock:
            decision = self._gate.check(self._workspace_id, "enrich_person")
            if decision:
                self.allowed += 1
                self.allowed_after_a_no += bool(self.refusals)
            else:
                self.refusals.append(decision)
            return decision.allowed

    def _run(self) -> CellRun:
        return CellRun(
            run_id=uuid7(), workspace_id=self._workspace_id, table_id="tbl_1", column_id="col_1", row_id="row_1",
            action="enrich_person", outcome=Outcome.DATA, ran_at=datetime.now(UTC),
        )  # fmt: skip


def measure(settings: Settings, cells_s: list[float], times: int) -> list[list[int]]:
    """The overages, in credits, of ``times`` workspaces for each duration of a cell."""
    found = []
    with Gate(settings, on_unknown="deny", on_stale="deny") as gate, CellRunProducer(settings) as producer:
        gate.wait_ready(30)
        billing = open_producer(settings)
        for cell_s in cells_s:
            overages = []
            for number in range(times):
                workspace_id = f"ws_{cell_s}_{number}"
                plan_set(billing, settings.topic(ACCOUNT_EVENTS), workspace_id, "small")
                billing.flush(10)
                while not gate.check(workspace_id, "enrich_person"):
                    time.sleep(0.02)
                crew = Crew(gate, producer, workspace_id, cell_s)
                crew.work()
                overages.append(crew.allowed - ALLOWANCE)
            found.append(overages)
    return found


def report(cells_s: list[float], overages: list[list[int]]) -> Table:
    """Credits over, and how long the workers need for so many."""
    title = f"{WORKERS} workers ask before each cell; allowance {ALLOWANCE} credits"
    table = Table(title=title, box=None, header_style="bold")
    for column in ("a cell takes, ms", "workspaces", "credits over: min", "max", "the most in ms of work"):
        table.add_column(column, justify="right")
    for cell_s, over in zip(cells_s, overages, strict=True):
        cell_ms = cell_s * 1000
        table.add_row(
            f"{cell_ms:.0f}", str(len(over)), str(min(over)), str(max(over)), f"{max(over) * cell_ms / WORKERS:.0f}"
        )
    return table


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cell-ms", type=float, nargs="+", default=[100.0, 20.0, 5.0])
    parser.add_argument("--workspaces", type=int, default=5)
    given = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="creditstream-bench-"))
    (base / "plans").mkdir()
    (base / "plans" / "1.toml").write_text(PLANS)
    cells_s = [cell_ms / 1000 for cell_ms in given.cell_ms]
    try:
        with EmbeddedKafka(Home.at(base / "kafka"), Console(stderr=True).print) as kafka:
            settings = read_settings({}, kafka_bootstrap=kafka.bootstrap)
            Broker(settings).ensure_all()
            worker = {"kafka_bootstrap": kafka.bootstrap, "plans_dir": str(base / "plans")}
            with child_worker(Home.at(base / "worker"), **worker):
                Console(width=140).print(report(cells_s, measure(settings, cells_s, given.workspaces)))
    finally:
        shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    main()
