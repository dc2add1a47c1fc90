"""The README's lines for enrichment workers, as they stand there."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Final, get_args, get_type_hints

import pytest

from creditstream import client
from streams.kafka.topics import CELL_RUNS, LIMIT_STATES
from tests.client_kafka import complaints, fresh_settings, limit_state, publish, record_of, recorded

ROOT: Final = Path(__file__).parent.parent
BETWEEN: Final = re.compile(r"<!-- client -->\s*```python\n(.*?)```\s*<!-- /client -->", re.DOTALL)
LINES_MAX: Final = 10


@pytest.mark.parametrize(("remaining", "runs"), [("2", 1), ("1", 0)])
def test_the_readmes_worker_runs_as_it_stands(kafka: str, tmp_path: Path, remaining: str, runs: int) -> None:
    """Ten lines ask the gate and record the run where credits remain, and record nothing where they do not."""
    found = BETWEEN.search((ROOT / "README.md").read_text())
    assert found, "README.md has no lines between <!-- client --> and <!-- /client -->"
    assert len([line for line in found[1].splitlines() if line.strip()]) <= LINES_MAX
    settings = fresh_settings(kafka, CELL_RUNS, LIMIT_STATES)
    publish(settings, [record_of(limit_state("ws_0001", remaining))])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", found[1]],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ
        | {
            "CREDITSTREAM_KAFKA_BOOTSTRAP": kafka,
            "CREDITSTREAM_TOPIC_PREFIX": settings.topic_prefix,
            "CREDITSTREAM_HOME": str(tmp_path),
        },
    )
    assert (done.returncode, complaints(done)) == (0, [])
    found_runs = [run for partition in recorded(settings).values() for run in partition]
    assert [(run.workspace_id, run.action) for run in found_runs] == [("ws_0001", "find_work_email")] * runs


def test_what_the_client_raises_can_be_caught_by_what_it_exports() -> None:
    """By the names that the README and the docstrings say: who catches them need not know our other packages."""
    table = (ROOT / "README.md").read_text().partition("**What if something fails?**")[2].partition("**Your tests**")[0]
    raised = set(re.findall(r"raises `(\w+)`", table)) | {"Problem", "InvalidRun"}
    assert raised == {"Unreachable", "RunRefused", "Problem", "InvalidRun"}
    assert raised <= set(client.__all__)
    assert all(issubclass(getattr(client, name), client.Problem) for name in raised)


@pytest.mark.parametrize("made", [client.Gate, client.CellRunProducer])
def test_what_the_client_takes_is_exported(made: type) -> None:
    """Who passes settings or a catalogue need not know our other packages either."""
    hints = get_type_hints(made.__init__)
    ours = {
        each.__name__
        for hint in hints.values()
        for each in (hint, *get_args(hint))
        if getattr(each, "__module__", "").split(".")[0] in ("creditstream", "schemas", "streams")
    }
    assert "Settings" in ours
    assert ours <= set(client.__all__)
    assert client.read_settings(kafka_bootstrap="host:9").kafka_bootstrap == "host:9"
