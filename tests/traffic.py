"""What the crash tests send: traffic at its worst, the same for a seed but for the clock."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import msgspec

from schemas.account import AccountEvent, LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.cell_run import CellRun, Outcome
from schemas.codec import encode_run
from tests.limit_messages import SMALL_PLAN_NAMES
from tests.worker_process import Event, cell_run, event_of

ACTIONS: Final = ("enrich_person", "find_work_email", "job_role_count", "clearbit_enrich_company", "format_date")
UNKNOWN: Final = "an_action_that_nobody_priced"
WORKSPACES: Final = tuple(f"ws_{number:02d}" for number in range(20))
PLANNED_DAYS_AGO: Final = timedelta(days=3)


class WildTraffic:
    """Runs of 40 workspaces without a plan.

    One event in ten is a copy (of the newest events, or of any before: after a restart too), a conflicting copy, or
    one that must become a dead letter.
    """

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._started = datetime.now(UTC)
        self.runs: list[CellRun] = []

    def events(self, count: int) -> Iterator[Event]:
        """The next events."""
        for _ in range(count):
            fate = self._dice.random()
            if fate < 0.9 or not self.runs:
                yield self._first_delivery()
            elif fate < 0.98:
                run = self._dice.choice(self.runs[-20:] if fate < 0.93 else self.runs)
                yield event_of(run)
            elif fate < 0.985:
                yield event_of(msgspec.structs.replace(self._dice.choice(self.runs), row_id="another row"))
            else:
                yield self._unmeterable()

    def _run(self) -> CellRun:
        dice = self._dice
        return CellRun(
            run_id=UUID(int=dice.getrandbits(128)),
            workspace_id=f"ws_{dice.randrange(40):04d}",
            table_id=f"tbl_{dice.randrange(3)}",
            column_id=f"col_{dice.randrange(5)}",
            row_id=f"row_{dice.randrange(100_000)}",
            action=dice.choice(ACTIONS),
            outcome=dice.choice(tuple(Outcome)),
            ran_at=self._started - timedelta(seconds=dice.randrange(40 * 86_400)),
            own_api_key=dice.random() < 0.1,
        )

    def _first_delivery(self) -> Event:
        run = self._run()
        self.runs.append(run)
        return event_of(run)

    def _unmeterable(self) -> Event:
        run, key = self._run(), b"ws_0000"
        year = timedelta(days=366)
        return self._dice.choice(
            (
                Event(key, b'{"run_id": '),
                Event(key, b"\xff\xfe\x00"),
                Event(key, None),
                Event(None, b"", 0),
                Event(key, b'"' + b"x" * 70_000 + b'"'),
                Event(b"another key", encode_run(run)),
                event_of(msgspec.structs.replace(run, action=UNKNOWN)),
                event_of(msgspec.structs.replace(run, ran_at=self._started + year)),
                event_of(msgspec.structs.replace(run, ran_at=self._started - year - year)),
            )
        )


class PlannedTraffic:
    """Runs and account events of 20 workspaces with small plans, the same for a seed but for the clock."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self.started: Final = datetime.now(UTC)
        self.runs: list[CellRun] = []
        self.workspaces = WORKSPACES
        self.billed = WORKSPACES[:-2]

    def first_plans(self) -> list[AccountEvent]:
        """Of nearly all: two workspaces never have one, one has it late."""
        return [self.plan(name, self.started - PLANNED_DAYS_AGO) for name in WORKSPACES[:-3]]

    def cell_runs(self, count: int) -> Iterator[Event]:
        """The next runs; some are copies, some late for the period."""
        dice = self._dice
        for _ in range(count):
            if self.runs and dice.random() < 0.03:
                yield event_of(dice.choice(self.runs))
                continue
            ago = timedelta(days=10) if dice.random() < 0.05 else timedelta(minutes=dice.randrange(600))
            run = cell_run(
                dice.choice(self.workspaces),
                run_id=self._id(),
                table_id=f"tbl_{dice.randrange(3)}",
                column_id=f"col_{dice.randrange(5)}",
                action=dice.choice(ACTIONS),
                outcome=dice.choice((Outcome.DATA, Outcome.DATA, Outcome.NO_DATA, Outcome.ERROR)),
                ran_at=self.started - ago,
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
        dice, name, now = self._dice, self._dice.choice(self.billed), datetime.now(UTC)
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
        return self.plan(name, now)

    def plan(self, name: str, effective_at: datetime) -> PlanChanged:
        plan = self._dice.choice(SMALL_PLAN_NAMES)
        return PlanChanged(event_id=self._id(), workspace_id=name, effective_at=effective_at, plan=plan)

    def _id(self) -> UUID:
        return UUID(int=self._dice.getrandbits(128))
