"""Overshoot: what a workspace draws beyond its allowance while enrichment workers ask the gate before every cell."""

import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4

from creditstream.client import Because, CellRunProducer, Decision, Gate
from schemas.account import PlanChanged
from schemas.catalogue import Catalogue
from tests.limit_messages import newest_states, small_plans
from tests.worker_process import WAIT_S_MAX, WorkerProcess, cell_run

WORKERS: Final = 8
CELL_S: Final = 0.02
"""A cell takes a worker so long: together they draw some 400 credits a second."""
ALLOWANCE: Final = 900


class Crew:
    """Enrichment workers of one workspace, as threads: ask, run the cell, record it; the first no ends a worker."""

    def __init__(self, gate: Gate, producer: CellRunProducer) -> None:
        self._gate, self._producer = gate, producer
        self._lock = threading.Lock()
        self.allowed = 0
        """Credits of cells that the gate has let through."""
        self.in_flight = 0
        """How many of them, the last one included, the state did not know of that let the last one through."""
        self.refusals: list[Decision] = []

    def work(self) -> None:
        """Until everybody was told to stop."""
        threads = [threading.Thread(target=self._run_cells) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S_MAX)
        assert len(self.refusals) == WORKERS

    def _run_cells(self) -> None:
        deadline = time.monotonic() + WAIT_S_MAX
        while time.monotonic() < deadline:
            with self._lock:
                decision = self._gate.check("ws_1", "enrich_person")
                if decision:
                    self.allowed += 1
                    seen = ALLOWANCE - decision.remaining_millicredits // 1000
                    self.in_flight = self.allowed - seen
            if not decision:
                self.refusals.append(decision)
                return
            time.sleep(CELL_S)
            self._producer.record(cell_run("ws_1"))


class Overshoot(NamedTuple):
    """In credits."""

    overage: int
    in_flight: int


def test_overage_is_at_most_what_was_in_flight(tmp_path: Path, kafka: str) -> None:
    """Eight workers spend an allowance: each stops at the first no, and all beyond the allowance was under way."""
    found = overshoot(tmp_path, kafka)
    assert 0 <= found.overage < found.in_flight, f"{WORKERS} workers, {CELL_S * 1000:.0f} ms a cell"


def overshoot(directory: Path, kafka: str) -> Overshoot:
    """Spend one workspace's allowance to its end; what was drawn is what the gate let through.

    The state tells at once that nothing remains, and what remains before that once a second: so ``in_flight`` is up to
    a second's work, and ``overage`` what the workers do until they have heard.
    """
    plans = small_plans(directory / "plans")
    with WorkerProcess(directory / "home", kafka, "overshoot-", plans_dir=plans, partitions=1) as worker:
        worker.create_topic()
        planned = datetime.now(UTC) - timedelta(days=3)
        worker.bill([PlanChanged(event_id=uuid4(), workspace_id="ws_1", plan="p900", effective_at=planned)])
        worker.start().wait_until_told()
        settings = worker.configured
        catalogue = Catalogue.load(Path(settings.catalogue_dir))
        with (
            Gate(settings, on_unknown="deny", on_stale="deny", catalogue=catalogue) as gate,
            CellRunProducer(settings) as producer,
        ):
            gate.wait_ready()
            crew = Crew(gate, producer)
            crew.work()
            assert producer.flush() == 0
        worker.wait_until_told()
        state = newest_states(settings)["ws_1", "enrichment"]
        assert {refusal.reason for refusal in crew.refusals} == {Because.EXHAUSTED}
        assert state.used == str(crew.allowed)
        assert worker.stop() == 0
    return Overshoot(crew.allowed - ALLOWANCE, crew.in_flight)
