"""Overshoot: what a workspace draws beyond its allowance while enrichment workers ask the gate before every cell."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import uuid4

from bench.overshoot import ASKED_ON, WORKERS, Crew
from creditstream.client import Because, CellRunProducer, Gate
from schemas.account import PlanChanged
from schemas.catalogue import Catalogue
from schemas.ledger import Position
from schemas.limits import AlertKind, State
from tests.limit_messages import published_alerts, published_states, small_plans
from tests.worker_process import WorkerProcess

ALLOWANCE: Final = 900
CELL_S: Final = 0.02
"""A cell takes a worker so long: together they draw some 400 credits a second."""


def test_overage_is_what_was_let_through_before_the_gate_knew(tmp_path: Path, kafka: str) -> None:
    """The run that takes the last credit stops everybody: every state from its offset on says so, the first one that
    the gate hears ends it, and whatever is told later opens the gate no more.
    """
    with WorkerProcess(tmp_path / "home", kafka, "overshoot-", plans_dir=small_plans(tmp_path / "plans"),
                       partitions=1) as worker:  # fmt: skip
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
            crew = Crew(gate, producer, "ws_1", CELL_S)
            crew.work()
            assert producer.flush(60) == 0
        worker.wait_until_told()
        assert worker.stop() == 0
    assert {refusal.reason for refusal in crew.refusals} == {Because.EXHAUSTED}
    assert len(crew.refusals) == WORKERS * ASKED_ON
    assert crew.allowed_after_a_no == 0
    states = [state for state in published_states(settings) if state.pool == "enrichment"]
    assert states[-1].used == str(crew.allowed)
    (exhausted,) = [alert for alert in published_alerts(settings) if alert.kind == AlertKind.EXHAUSTED]
    assert exhausted.used == str(ALLOWANCE)
    crossing = Position.parse(exhausted.position).offset
    assert crossing == ALLOWANCE - 1  # each cell drew a credit: what lies behind it is the overage
    assert [state.state == State.EXHAUSTED for state in states] == [s.as_of.cell_runs >= crossing for s in states]
