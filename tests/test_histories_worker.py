"""Histories through Kafka and a real worker, all at once; and both topics reconciled with its ledger."""

import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final

import pytest

from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS
from tests.account_records import PLANS_DIR, Step, Story
from tests.limit_messages import newest_states, published_alerts
from tests.worker_process import ROOT, Event, WorkerProcess, ask_ledger, creditstream, environment_of

NOW: Final = datetime.now(UTC).replace(microsecond=0)
YESTERDAY: Final = NOW - timedelta(days=1)
E2: Final = "find_work_email"
P1: Final = "clearbit_enrich_company"


class Scene:
    """Stories of many workspaces, told in acts: an act is metered before the next one begins."""

    def __init__(self) -> None:
        self.stories: dict[str, Story] = {}
        self.acts: list[tuple[bool, list[Step]]] = []
        self._told: dict[Story, int] = {}

    def story(self, name: str) -> Story:
        """That of one workspace."""
        return self.stories.setdefault(name, Story(name))

    def act(self) -> None:
        """Everything that was added since the act before; first the account events."""
        new = [step for story in self.stories.values() for step in story.steps[self._told.get(story, 0) :]]
        self._told = {story: len(story.steps) for story in self.stories.values()}
        for of_account in (True, False):
            if part := [step for step in new if step.of_account == of_account]:
                self.acts.append((of_account, part))


def the_scene() -> Scene:
    """What happens; what must come of it is `EXPECTED`."""
    scene = Scene()
    for name, plan in (("line", "4"), ("upgrade", "10"), ("reversed", "4"), ("closed", "10"), ("corrected", "50")):
        back = timedelta(days=40) if name == "closed" else timedelta(days=1)
        scene.story(name).plan(plan, NOW - back)
    scene.story("premium").grant("2", YESTERDAY)
    scene.story("thresholds").plan("10", YESTERDAY)
    scene.story("thresholds").limits(NOW, thresholds=[30], below="5")
    scene.story("waiting").reverse(88_000_001, NOW)
    scene.act()

    scene.story("line").run(NOW)
    scene.story("line").run(NOW, E2)
    scene.story("line").run(NOW)
    scene.story("upgrade").runs(10, NOW)
    scene.story("late_plan").runs(12, NOW)
    first = scene.story("reversed").run(NOW, E2)
    scene.story("reversed").runs(2, NOW)
    scene.story("closed").runs(9, NOW - timedelta(days=35))
    scene.story("corrected").runs(12, NOW)
    scene.story("premium").runs(2, NOW, action=P1)
    scene.story("thresholds").runs(5, NOW)
    scene.act()

    scene.story("upgrade").plan("50", NOW)
    scene.story("late_plan").plan("20", YESTERDAY)
    scene.story("corrected").plan("20", NOW - timedelta(days=1))
    scene.story("reversed").reverse(first, NOW)
    scene.story("reversed").reverse(first, NOW)
    scene.act()

    scene.story("upgrade").runs(15, NOW)
    scene.story("reversed").run(NOW, E2, run=first)
    scene.story("reversed").run(NOW)
    scene.story("reversed").run(NOW)
    scene.act()
    return scene


EXPECTED: Final[dict[str, tuple[str, int, int, str, list[tuple[Any, ...]]]]] = {
    "line": ("enrichment", 4, 4, "exhausted", [("crossed", 50), ("exhausted", 80, 100)]),
    "upgrade": ("enrichment", 25, 50, "warning", [
        ("crossed", 50), ("crossed", 80), ("exhausted", 100), ("recovered",), ("crossed", 50)
    ]),
    "late_plan": ("enrichment", 12, 20, "warning", [("crossed", 50)]),
    "reversed": ("enrichment", 4, 4, "exhausted", [
        ("crossed", 50), ("exhausted", 80, 100), ("recovered", 50), ("exhausted", 80, 100)
    ]),
    "closed": ("enrichment", 0, 10, "ok", []),
    "corrected": ("enrichment", 12, 20, "warning", [("crossed", 50)]),
    "premium": ("premium", 2, 2, "exhausted", [("recovered",), ("crossed", 50), ("exhausted", 80, 100)]),
    "thresholds": ("enrichment", 5, 10, "warning", [("crossed", 30), ("crossed",)]),
}  # fmt: skip
"""Workspace → pool, used, allowance, state; and the alerts (kind, thresholds) in their order."""


@pytest.fixture(scope="module")
def told(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """A worker that has been through the whole scene."""
    home = tmp_path_factory.mktemp("histories") / "home"
    with WorkerProcess(home, kafka, "histories-", plans_dir=str(PLANS_DIR)) as worker:
        worker.create_topic()
        worker.start()
        worker.wait_until_ready()
        for of_account, steps in the_scene().acts:
            if of_account:
                worker.bill([step.event for step in steps if not isinstance(step.event, dict)])
            else:
                worker.produce([Event(step.workspace_id.encode(), step.value) for step in steps])
            worker.wait_until_metered()
        worker.wait_until_told()
        yield worker


@pytest.mark.parametrize("name", EXPECTED)
def test_a_history_through_kafka(told: WorkerProcess, name: str) -> None:
    """Alerts on the topic and the state that gates read are the published ones."""
    pool, used, allowance, state, alerts = EXPECTED[name]
    published = [alert for alert in published_alerts(told.configured) if alert.workspace_id == name]
    assert [(str(alert.kind), *alert.thresholds) for alert in published] == alerts
    newest = newest_states(told.configured)[name, pool]
    assert (newest.used, newest.allowance, newest.state) == (str(used), str(allowance), state)


def test_reconcile_accounts_for_both_topics(told: WorkerProcess) -> None:
    """One row of books for each topic and partition, and all of them close."""
    books = told.reconcile()
    examples = [example for book in books.partitions for example in book.examples]
    assert books.closes, examples
    assert books.behind == 0
    settings = told.configured
    names = [settings.topic(CELL_RUNS), settings.topic(ACCOUNT_EVENTS)]
    assert [(book.topic, book.partition) for book in books.partitions] == [
        (name, partition) for name in names for partition in range(settings.partitions)
    ]
    steps = [step for _, act in the_scene().acts for step in act]
    assert books.events == books.rows == len(steps)
    assert books.credits == books.credits_reference


def test_sql_says_the_same_once_the_worker_has_ended(told: WorkerProcess) -> None:
    """The analysts' view holds what the states said."""
    assert told.stop() == 0
    url = f"chdb://{told.home.ledger}"
    (rows,) = ask_ledger(url, "SELECT workspace_id, pool, toString(used), toString(allowance), state FROM balances")
    found = {(name, pool): (Decimal(used), Decimal(allowance), state) for name, pool, used, allowance, state in rows}
    for name, (pool, used, allowance, state, _) in EXPECTED.items():
        assert found[name, pool] == (used, allowance, state), name


def test_reconcile_finds_a_reversal_that_gives_back_too_much(told: WorkerProcess) -> None:
    """Exit code 3, the topic and the offset."""
    change = "ALTER TABLE ledger UPDATE credits = credits * 2 WHERE kind = 'reversal'"
    script = (
        "import sys\nfrom sinks.clickhouse import connect\n"
        "with connect(sys.argv[1]) as client: client.command(sys.argv[2], settings={'mutations_sync': 1})"
    )
    subprocess.run([sys.executable, "-c", script, f"chdb://{told.home.ledger}", change], cwd=ROOT, check=True)

    done = creditstream("reconcile", settings=environment_of(told))

    assert done.code == 3
    assert f"{told.configured.topic(ACCOUNT_EVENTS)}[" in done.err
    assert "ledger reversal/reversed -4" in done.err
    assert "account-events" in done.out
