"""What happens to workspaces, made by hand: account events and cell runs as records, in the order of their times."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

from schemas.account import AccountEvent, LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.cell_run import to_milliseconds
from schemas.codec import encode_account_event
from schemas.plan import PlanLists
from tests.records import Record, fields_of, run_id

SECOND: Final = timedelta(seconds=1)


PLANS_DIR: Final = Path(__file__).parent / "examples" / "plans"
PLANS: Final = PlanLists.load(PLANS_DIR)


def at(text: str) -> datetime:
    """``Jan 15`` or ``Jan 15 14:00:00`` of 2026, UTC; seconds and milliseconds may follow."""
    month, day, *clock = text.split()
    hours = clock[0] if clock else "00:00"
    return datetime.strptime(f"2026 {month} {day}", "%Y %b %d").replace(tzinfo=UTC) + _clock(hours)


def _clock(text: str) -> timedelta:
    parts = (*text.split(":"), "0")
    seconds, _, milliseconds = parts[2].partition(".")
    return timedelta(
        hours=int(parts[0]), minutes=int(parts[1]), seconds=int(seconds), milliseconds=int(milliseconds or 0)
    )


def event_id(number: int) -> UUID:
    """The id of account event ``number``."""
    return UUID(int=0x0190F4A0_0000_7000_9000_000000000000 + number)


def account_record(offset: int, event: AccountEvent, recorded: datetime, **said: Any) -> Record:
    """The event as Kafka holds it; ``said`` replaces any field of the record."""
    plain = {"value": encode_account_event(event), "key": event.workspace_id.encode()}
    return Record(**{"offset": offset, "timestamp": to_milliseconds(recorded)} | plain | said)


class Step(NamedTuple):
    """One Kafka record to be: without an offset, which depends on what else is on the topic."""

    recorded: datetime
    of_account: bool
    workspace_id: str
    value: bytes
    event: AccountEvent | dict[str, Any]
    """What the value says: an account event, or the fields of a cell run."""


class Check(NamedTuple):
    """What must be so of a pool at an instant, after so many steps."""

    after: int
    when: datetime
    pool: str
    used: int
    allowance: int
    state: str
    period: tuple[date, date] | None


class Story:
    """What happens to one workspace. Everything is recorded a second after it ran or took effect, unless said."""

    _numbers = count(1)

    def __init__(self, workspace_id: str = "ws_1") -> None:
        self.workspace_id: Final = workspace_id
        self.steps: list[Step] = []
        self.checks: list[Check] = []
        self.alerts: list[tuple[str, tuple[int, ...]]] = []
        """(kind, thresholds) of every alert that must be told, in order."""
        self.periods: list[tuple[date, date, int, int]] = []
        """(first day, first day no longer in it, used, allowance) of periods, at the end."""

    def plan(self, name: str, effective: datetime, recorded: datetime | None = None, *, restart: bool = False) -> None:
        """The workspace has a plan of ``examples/plans``."""
        self._say(
            PlanChanged(**self._who(), effective_at=effective, plan=name, restart_period=restart),
            recorded or effective + SECOND,
        )

    def grant(self, credits: str, effective: datetime, recorded: datetime | None = None) -> None:
        """Premium credits."""
        self._say(
            PremiumGranted(**self._who(), effective_at=effective, credits=credits), recorded or effective + SECOND
        )

    def limits(self, recorded: datetime, thresholds: Sequence[int] | None = None, below: str | None = None) -> None:
        """Thresholds of its own."""
        percents = None if thresholds is None else tuple(thresholds)
        self._say(LimitsChanged(**self._who(), thresholds=percents, remaining_below=below), recorded)

    def reverse(self, run: int, recorded: datetime) -> None:
        """A run is taken back."""
        self._say(RunReversed(**self._who(), run_id=run_id(run)), recorded)

    def run(self, ran: datetime, action: str = "enrich_person", recorded: datetime | None = None, **said: Any) -> int:
        """One cell run; its number. ``said``: any field; ``run`` the number, to deliver one again."""
        number: int = said.pop("run", None) or next(self._numbers)
        fields = fields_of(
            run=number, ran_ms=to_milliseconds(ran), action=action, workspace_id=self.workspace_id, **said
        )
        value = json.dumps(fields).encode()
        self.steps.append(Step(recorded or ran + SECOND, False, self.workspace_id, value, fields))
        return number

    def runs(self, number: int, first: datetime, last: datetime | None = None, action: str = "enrich_person") -> None:
        """So many cell runs, evenly from ``first`` to ``last``."""
        pause = ((last or first) - first) / max(1, number - 1)
        for n in range(number):
            self.run(first + timedelta(milliseconds=n * pause // timedelta(milliseconds=1)), action)

    def check(
        self, used: int, allowance: int, state: str, *, pool: str = "enrichment",
        when: datetime | None = None, period: tuple[str, str] | None = None,
    ) -> None:  # fmt: skip
        """What must be so now, or at a later instant; ``period`` as for `at`."""
        days = (at(period[0]).date(), at(period[1]).date()) if period else None
        when = when or self.steps[-1].recorded
        self.checks.append(Check(len(self.steps), when, pool, used, allowance, state, days))

    def tells(self, kind: str, *thresholds: int) -> None:
        """The next alert that must be told."""
        self.alerts.append((kind, thresholds))

    def ends_with(self, start: str, end: str, used: int, allowance: int) -> None:
        """What a period must hold at the end, running or closed."""
        self.periods.append((at(start).date(), at(end).date(), used, allowance))

    def _who(self) -> dict[str, Any]:
        return {"workspace_id": self.workspace_id, "event_id": event_id(next(self._numbers))}

    def _say(self, event: AccountEvent, recorded: datetime) -> None:
        self.steps.append(Step(recorded, True, self.workspace_id, encode_account_event(event), event))


class Topics:
    """Both topics of a partition as they fill up: steps become records with offsets."""

    def __init__(self) -> None:
        self.ends = {False: 0, True: 0}

    def append(self, steps: Iterable[Step]) -> list[tuple[bool, list[Record]]]:
        """The records of these steps, in chunks: as long as the topic stays the same."""
        chunks: list[tuple[bool, list[Record]]] = []
        for step in steps:
            record = Record(
                self.ends[step.of_account], step.value, step.workspace_id.encode(), to_milliseconds(step.recorded)
            )
            self.ends[step.of_account] += 1
            if chunks and chunks[-1][0] == step.of_account:
                chunks[-1][1].append(record)
            else:
                chunks.append((step.of_account, [record]))
        return chunks
