"""What leaves the meter: limit alerts for people and programs, limit states for gates.

``limit-alerts`` is a log: one message for one crossing, its id derived from the position of the record that caused it
and from what it crossed, so a replay repeats the id. ``limit-states`` is compacted: the newest state of each workspace
and pool. Both are partitioned as ``cell-runs`` is. Credits are decimal text.
"""

from datetime import date, datetime
from enum import StrEnum
from typing import Annotated, Final
from uuid import UUID

import msgspec
from msgspec import Meta

from schemas.ledger import Pool

FORECAST_DAYS: Final = 7
"""The forecast of the run-out rests on the mean of this many days."""
FORECAST_DAYS_MIN: Final = 3
"""With fewer days of debits there is none."""


class State(StrEnum):
    """May a workspace still run actions of a pool? In order of severity; ``unknown_plan`` stands outside of it."""

    OK = "ok"
    WARNING = "warning"
    EXHAUSTED = "exhausted"
    UNKNOWN_PLAN = "unknown_plan"


class AlertKind(StrEnum):
    """What a limit alert tells."""

    CROSSED = "crossed"
    EXHAUSTED = "exhausted"
    RECOVERED = "recovered"
    PERIOD_STARTED = "period_started"


class Cause(StrEnum):
    """What moved the balance, or its limits, over a threshold."""

    RUN = "run"
    REVERSAL = "reversal"
    PLAN = "plan"
    GRANT = "grant"
    TIME = "time"


class AsOf(msgspec.Struct, frozen=True, kw_only=True):
    """Up to where the meter had folded: the last offset of both topics (-1: none), and its "now".

    ``log`` names the incarnation of both topics: offsets of different logs cannot be compared.
    """

    log: str
    cell_runs: int
    account_events: int
    at: datetime

    def is_older_than(self, other: "AsOf") -> bool:
        """Whether ``other`` has seen all that this has, and more. False for both when neither has."""
        return (
            self.log == other.log
            and self != other
            and self.cell_runs <= other.cell_runs
            and self.account_events <= other.account_events
            and self.at <= other.at
        )


class LimitState(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one pool of one workspace. The premium pool has no period.

    A gate that passes ``period_end`` (the first UTC day that is no longer in the period) goes on by itself with
    ``next_allowance`` and nothing used.
    """

    workspace_id: str
    pool: Pool
    state: State
    used: str
    allowance: str
    remaining: str
    overage: str
    period_start: date | None = None
    period_end: date | None = None
    next_allowance: str | None = None
    plan: str = ""
    thresholds: Annotated[tuple[int, ...], Meta(description="percent thresholds that are passed")] = ()
    remaining_below: Annotated[str | None, Meta(description="the absolute line, where it is passed")] = None
    as_of: AsOf
    owner: Annotated[str, Meta(description="which worker's unit wrote it")] = ""


class TopColumn(msgspec.Struct, frozen=True, kw_only=True):
    """A column that drew much of the period's credits."""

    table_id: str
    column_id: str
    action: str
    credits: str


class LimitAlert(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One crossing. ``thresholds`` lists the lines that it crossed; of a ``recovered`` one, those that still stand.

    ``seeded`` alerts tell a standing state after a start without history, and notify nobody. ``top_columns`` and
    ``runs_out_on`` are a courtesy: at most a second old, sometimes absent, never part of the alert's identity.
    """

    alert_id: UUID
    kind: AlertKind
    workspace_id: str
    pool: Pool
    state: State
    used: str
    allowance: str
    remaining: str
    overage: str
    at: Annotated[datetime, Meta(description="when the record that caused it was received, or the instant that came")]
    cause: Cause
    thresholds: tuple[int, ...] = ()
    remaining_below: str | None = None
    period_start: date | None = None
    period_end: date | None = None
    plan: str = ""
    position: Annotated[str, Meta(description="the record that caused it: topic[partition]@offset; empty: time")] = ""
    run_id: UUID | None = None
    table_id: str = ""
    column_id: str = ""
    action: str = ""
    top_columns: tuple[TopColumn, ...] | None = None
    runs_out_on: date | None = None
    seeded: bool = False
    test: bool = False


DEFAULT_THRESHOLDS: Final = (50, 80, 100)


def state_key(workspace_id: str, pool: Pool) -> bytes:
    """The Kafka key on ``limit-states``: ``enrichment/ws_acme``."""
    return f"{pool}/{workspace_id}".encode()
