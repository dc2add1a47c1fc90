"""The real worker, killed: alerts and states through SIGKILL, SIGSTOP, SIGTERM and two owners.

Every test ends with the same questions: has every crossing left that the ledger implies, does no alert say what no
order of the two topics explains, and is the newest state of every pool what the ledger says?
"""

import itertools
import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import UUID

import pytest

from creditstream.reconcile import Reconciliation
from schemas.account import AccountEvent, LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.cell_run import CellRun, Outcome
from tests.limit_messages import ROWS, Reference, newest_states, published_alerts, stands_by, told_by
from tests.worker_process import Event, WorkerProcess, ask_ledger, cell_run, event_of

NUMBERS: Final = itertools.count(1)
JOIN_S_MAX: Final = 60.0
BACKLOG: Final = 30_000
ROUND: Final = 1_500
SMALL_BATCH: Final = 400
"""Rows: a backlog is many inserts, so that a kill hits every step of one."""
PLANS: Final = """
version = 1
effective_from = 2020-01-01T00:00:00Z
plans = [
    { id = "p200", allowance = "200" },
    { id = "p400", allowance = "400", thresholds = [25, 50, 75, 90] },
    { id = "p900", allowance = "900", remaining_below = "30" },
    { id = "p2500", allowance = "2500" },
]
"""
PLAN_NAMES: Final = ("p200", "p400", "p900", "p2500")
ACTIONS: Final = ("enrich_person", "find_work_email", "job_role_count", "clearbit_enrich_company", "format_date")
WORKSPACES: Final = tuple(f"ws_{number:02d}" for number in range(20))
PLANNED_DAYS_AGO: Final = timedelta(days=3)


class Traffic:
    """Runs and account events of 20 workspaces with small plans, the same for a seed but for the clock."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._started = datetime.now(UTC)
        self.runs: list[CellRun] = []

    def first_plans(self) -> list[AccountEvent]:
        """Of nearly all: two workspaces never have one, one has it late."""
        return [self._plan(name, self._started - PLANNED_DAYS_AGO) for name in WORKSPACES[:-3]]

    def cell_runs(self, count: int) -> Iterator[Event]:
        """The next runs; some are copies, some late for the period."""
        dice = self._dice
        for _ in range(count):
            if self.runs and dice.random() < 0.03:
                yield event_of(dice.choice(self.runs))
                continue
            ago = timedelta(days=10) if dice.random() < 0.05 else timedelta(minutes=dice.randrange(600))
            run = cell_run(
                dice.choice(WORKSPACES),
                run_id=self._id(),
                table_id=f"tbl_{dice.randrange(3)}",
                column_id=f"col_{dice.randrange(5)}",
                action=dice.choice(ACTIONS),
                outcome=dice.choice((Outcome.DATA, Outcome.DATA, Outcome.NO_DATA, Outcome.ERROR)),
                ran_at=self._started - ago,
            )
            self.runs.append(run)
            yield event_of(run)

    def account_events(self, count: int) -> Iterator[AccountEvent]:
        """The next account events: upgrades, reversals, grants, thresholds; some are copies."""
        before: list[AccountEvent] = []
        for _ in range(count):
            event = self._dice.choice(before) if before and self._dice.random() < 0.1 else self._account_event()
            before.append(event)
            yield event

    def _account_event(self) -> AccountEvent:
        dice, name, now = self._dice, self._dice.choice(WORKSPACES[:-2]), datetime.now(UTC)
        fate = dice.random()
        if fate < 0.6 and self.runs:
            run = dice.choice(self.runs[: len(self.runs) // 4])
            unknown = self._id()
            return RunReversed(
                event_id=self._id(),
                workspace_id=run.workspace_id,
                run_id=unknown if fate < 0.05 else run.run_id,
            )
        if fate < 0.75:
            return PremiumGranted(event_id=self._id(), workspace_id=name, effective_at=now, credits="60")
        if fate < 0.85:
            percents = tuple(sorted(dice.sample(range(5, 100), 3)))
            return LimitsChanged(
                event_id=self._id(), workspace_id=name, thresholds=percents, remaining_below=str(dice.randrange(80))
            )
        return self._plan(name, now)

    def _plan(self, name: str, effective_at: datetime) -> PlanChanged:
        plan = self._dice.choice(PLAN_NAMES)
        return PlanChanged(event_id=self._id(), workspace_id=name, effective_at=effective_at, plan=plan)

    def _id(self) -> UUID:
        return UUID(int=self._dice.getrandbits(128))


@pytest.fixture
def prefix() -> str:
    """Topics and group of one test on the session's Kafka."""
    return f"limits-{next(NUMBERS)}-"


@pytest.fixture
def plans_dir(tmp_path: Path) -> str:
    """Plans that a test can use up."""
    directory = tmp_path / "plans"
    directory.mkdir()
    (directory / "small.toml").write_text(PLANS)
    return str(directory)


def assert_told(worker: WorkerProcess, reference: Reference) -> None:
    """What left is what the ledger implies: every crossing, no alert that nothing explains, every pool's state."""
    told: dict[UUID, set[object]] = {}
    published = set()
    for alert in published_alerts(worker.configured):
        told.setdefault(alert.alert_id, set()).add(told_by(alert))
        published.add(told_by(alert))
    implied = reference.crossings()
    assert implied
    assert implied - published == set(), "crossings that nobody was told"
    unexplained = {found for found in published - implied if not reference.explains(found)}
    assert unexplained == set(), "alerts that no order of the two topics explains"

    states = {key: stands_by(state) for key, state in newest_states(worker.configured).items()}
    balances = reference.states()
    assert reference.told_pools() - states.keys() == set(), "pools without a state"
    wrong = {key: (state, balances[key]) for key, state in states.items() if state != balances[key]}
    assert wrong == {}, "states that are not the ledger's balances"


def assert_books_close(books: Reconciliation) -> None:
    """The ledger holds every run once, and nothing else."""
    assert books.closes, [example for book in books.partitions for example in book.examples]
    assert books.behind == 0


def kill_while_it_writes(worker: WorkerProcess, dice: random.Random) -> None:
    """SIGKILL at a random instant of the 0.5 s after its first rows."""
    worker.start()
    worker.wait_until(lambda status: any(status.written.values()), "writing", JOIN_S_MAX)
    time.sleep(dice.uniform(0, 0.5))
    worker.kill()


def kill_while_it_starts(worker: WorkerProcess, dice: random.Random) -> None:
    """SIGKILL at a random instant of its assignment, or of its first takes."""
    worker.start()
    time.sleep(dice.uniform(1.2, 2.6))
    worker.kill()


def test_f1_to_f7_kill_9_loses_no_alert_and_no_state(tmp_path: Path, kafka: str, prefix: str, plans_dir: str) -> None:
    """Ten SIGKILLs while runs and account events are metered: every crossing has left, every state is the ledger's."""
    dice, traffic = random.Random(8), Traffic(8)
    fields = {"instance": "one", "batch_rows_max": SMALL_BATCH, "plans_dir": plans_dir}
    with WorkerProcess(tmp_path / "home", kafka, prefix, **fields) as worker:
        worker.create_topic()
        worker.bill(traffic.first_plans())
        worker.produce(traffic.cell_runs(BACKLOG))
        kills = [kill_while_it_writes] * 6 + [kill_while_it_starts] * 4
        dice.shuffle(kills)
        for kill in kills:
            worker.bill(traffic.account_events(30))
            worker.produce(traffic.cell_runs(ROUND))
            kill(worker, dice)
        worker.start().wait_until_told(JOIN_S_MAX)
        books = worker.reconcile()
        assert worker.stop() == 0
        (rows,) = ask_ledger(f"chdb://{worker.home.ledger}", ROWS)

    assert_books_close(books)
    assert_told(worker, Reference(rows))
