"""The doubles that authors of workers test with: what they promise, and that they refuse what the real ones refuse."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from creditstream.client import Because, CellRunProducer, InvalidRun, RunRefused
from creditstream.client.testing import MemoryGate, MemoryProducer
from schemas.cell_run import CellRun
from schemas.ledger import Pool
from streams.kafka.topics import CELL_RUNS
from tests.client_kafka import a_run, fresh_settings

pytest_plugins = ["creditstream.client.fixtures"]

Recorder = CellRunProducer | MemoryProducer


@pytest.fixture(params=["memory", "kafka"])
def recorder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Recorder]:
    """The producer and its double."""
    if request.param == "memory":
        yield MemoryProducer()
        return
    settings = fresh_settings(request.getfixturevalue("kafka"), CELL_RUNS, home=str(tmp_path))
    with CellRunProducer(settings, memory_s_max=60) as producer:
        yield producer


def test_a_recorder_accepts_counts_and_refuses_alike(recorder: Recorder) -> None:
    """Valid runs are accepted and delivered, broken ones are not, and a closed recorder takes none."""
    for number in range(3):
        recorder.record(a_run(number))
    with pytest.raises(InvalidRun, match="field `row_id`"):
        recorder.record(a_run(4, row_id=""))
    assert recorder.flush(60) == 0
    counts = recorder.counts()
    assert (counts.accepted, counts.delivered, counts.refused, counts.waiting_in_memory) == (3, 3, 1, 0)
    assert recorder.trouble == ""
    recorder.close()
    recorder.close()
    with pytest.raises(RunRefused, match="the producer is closed"):
        recorder.record(a_run(5))
    assert recorder.counts().refused == 2


def work(workspace_id: str, gate: MemoryGate, runs: MemoryProducer) -> bool:
    """A worker as its author might write it."""
    if not gate.check(workspace_id, "find_work_email"):
        return False
    runs.record(a_run(1, workspace_id, action="find_work_email"))
    return True


def test_a_worker_is_tested_without_kafka(gate: MemoryGate, cell_runs: MemoryProducer) -> None:
    """The plugin's fixtures drive a worker: it runs what may run, and the test reads what it recorded."""
    gate.set("ws_rich", "2")
    gate.set("ws_poor", "1")
    assert work("ws_rich", gate, cell_runs)
    assert not work("ws_poor", gate, cell_runs)
    assert not work("ws_unheard_of", gate, cell_runs)
    assert [(run.workspace_id, run.action) for run in cell_runs.runs] == [("ws_rich", "find_work_email")]


def test_a_test_says_what_the_gate_knows(gate: MemoryGate) -> None:
    """Balances of both pools, no plan, nothing at all, no contact: each can be set."""
    gate.set("ws", "1.5", pool=Pool.PREMIUM)
    assert gate.check("ws", "clearbit_enrich_company").remaining == "1.5"
    gate.set("ws", "0", pool=Pool.PREMIUM)
    assert gate.check("ws", "clearbit_enrich_company").reason == Because.EXHAUSTED
    gate.forget("ws", Pool.PREMIUM)
    assert gate.check("ws", "clearbit_enrich_company").reason == Because.UNKNOWN_WORKSPACE
    gate.set_unknown_plan("ws")
    assert gate.check("ws", "enrich_person").reason == Because.UNKNOWN_PLAN
    with pytest.raises(ValueError, match="-1 credits cannot remain"):
        gate.set("ws", "-1")
    with gate:
        gate.wait_ready()
        assert gate.is_ready
    gate.lose_contact()
    assert not gate.is_ready


def test_a_test_says_when_recording_fails(cell_runs: MemoryProducer) -> None:
    """How a worker behaves when a run is refused can be tried."""
    cell_runs.refuse_with = RunRefused("the run was not recorded", "the spool is full", "Wait.")
    with pytest.raises(RunRefused, match="the spool is full"):
        cell_runs.record(a_run(1))
    runs: list[CellRun] = cell_runs.runs
    assert (runs, cell_runs.counts().refused) == ([], 1)
