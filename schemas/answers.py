"""What the ledger answers to people and programs: the same records in the read API and in ``--format json``.

Fields are named as in the ledger. Credits are decimal strings, times RFC 3339 in UTC, so that nothing is rounded
between the ledger and a ticket.
"""

from datetime import date, datetime
from enum import StrEnum
from typing import Final

import msgspec

LIST_MAX: Final = 10_000
"""Rows of an answer that lists."""
CELLS_MAX: Final = 10_000_000
"""Cells of a run that is asked for before it starts."""


class By(StrEnum):
    """What usage is summed by."""

    COLUMN = "column"
    TABLE = "table"
    ACTION = "action"
    DAY = "day"
    REASON = "reason"

    @property
    def keys(self) -> tuple[str, ...]:
        """The fields of `UsageRow` that tell the groups apart."""
        match self:
            case By.COLUMN:
                return "table_id", "column_id"
            case By.TABLE:
                return ("table_id",)
            case _:
                return (self.value,)


class UsageRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Credits and runs of one group. Only the fields that the question groups by are there, and ``pool``."""

    table_id: str = ""
    column_id: str = ""
    action: str = ""
    day: date | None = None
    reason: str = ""
    pool: str
    credits: str
    runs: int
    free_runs: int


class EventRow(msgspec.Struct, frozen=True, kw_only=True):
    """One event that carried the id that is asked for: where it lies in Kafka, and what became of it."""

    position: str
    recorded_at: datetime
    kind: str
    reason: str
    credits: str
    detail: str


class BalanceMove(msgspec.Struct, frozen=True, kw_only=True):
    """A pool's balance when a run came, and after it. Negative: overage. Premium has no period."""

    pool: str
    before: str
    after: str
    allowance: str
    plan: str
    period_start: date | None = None
    period_end: date | None = None


class PublishedAlert(msgspec.Struct, frozen=True, kw_only=True):
    """A limit alert that left the meter; see `schemas.limits.LimitAlert`."""

    alert_id: str
    workspace_id: str
    pool: str
    kind: str
    state: str
    used: str
    allowance: str
    thresholds: list[int]
    remaining_below: str | None
    period_start: date | None
    period_end: date | None
    plan: str
    cause: str
    at: datetime
    position: str
    run_id: str
    seeded: bool
    published_at: datetime


class Failure(msgspec.Struct, frozen=True):
    """Why a question has no answer: a `schemas.problem.Problem`. ``exit_code``: what a command would end with."""

    what: str
    why: str
    fix: str
    exit_code: int


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """One metered run, free ones too."""

    run_id: str
    ran_at: datetime
    table_id: str
    column_id: str
    row_id: str
    action: str
    outcome: str
    pool: str
    credits: str
    reason: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run cost what it cost: a sentence for a customer, then the evidence.

    ``ran_at`` of a dead letter is its ``recorded_at``, as in the ledger: when it ran stands in its bytes.
    """

    sentence: str
    run_id: str
    workspace_id: str
    table_id: str
    column_id: str
    row_id: str
    action: str
    action_name: str
    outcome: str
    own_api_key: bool
    ran_at: datetime
    recorded_at: datetime
    triggered_by: str
    actor: str
    kind: str
    pool: str
    credits: str
    reason: str
    rule: str
    rule_text: str
    catalogue: int
    price: str
    not_free_because: list[str]
    runs_of_this_cell: int
    position: str
    deliveries: list[EventRow]
    balance: BalanceMove | None = None
    alert: PublishedAlert | None = None


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An event that could not be metered, as it came. ``raw`` is text where it is UTF-8, else escaped.

    ``closed_by``: the position at which it was sent again; empty while it is open.
    """

    position: str
    recorded_at: datetime
    reason: str
    detail: str
    workspace_id: str
    run_id: str
    raw_key: str
    raw_headers: str
    raw: str
    raw_bytes: int
    closed_by: str


class ParkedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter as it is sent again: ``value`` byte for byte. ``letter`` is its name in a redrive, topic id and
    position. ``closed_by`` as of `DeadLetter`.
    """

    letter: str
    position: str
    topic: str
    reason: str
    value: bytes
    closed_by: str


class Price(msgspec.Struct, frozen=True, kw_only=True):
    """What a run of an action costs, before it is run (R13). ``credits`` counts the own key in."""

    action: str
    name: str
    category: str
    provider: str
    price: str
    pool: str
    charges_no_data: bool
    credits: str
    catalogue: int
    effective_from: datetime


class PinnedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A catalogue version that a worker has loaded, by the hash of what it charges and from when."""

    number: int
    content_hash: str


class PartitionAudit(msgspec.Struct, frozen=True, kw_only=True):
    """One Kafka partition's chain in the ledger, by its rows. ``doubled_runs`` have a debit there and one more in it or
    in another chain of the topic's name.
    """

    topic: str
    topic_id: str
    partition: int
    first: int
    last: int
    rows: int
    distinct_offsets: int
    gaps: int
    doubled_runs: int


class SumAudit(msgspec.Struct, frozen=True, kw_only=True):
    """All credits and rows, summed through the usage projection and over raw rows."""

    credits_projected: str
    credits_raw: str
    rows_projected: int
    rows_raw: int


class LedgerRow(msgspec.Struct, frozen=True, array_like=True):
    """One row in the audit's order; credits in millicredits."""

    offset: int
    kind: str
    reason: str
    pool: str
    credits: int
    workspace_id: str
    run_id: str
    detail: str


class UnitStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One partition of both topics. The marks are the last offsets that have ledger rows; the lags, how many offsets
    Kafka had behind them by its latest answer (None: no answer yet); ``balances`` counts the workspaces in memory.
    """

    partition: int
    mark: int
    event_mark: int
    lag: int | None
    event_lag: int | None
    balances: int
    rows_unwritten: int
    incident: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker does. Since its start: ``written`` counts rows by kind/reason, ``told`` alerts and states."""

    version: str
    ready: bool
    not_ready_because: list[str]
    topic: str
    kafka_bootstrap: str
    units: list[UnitStatus]
    written: dict[str, int]
    told: dict[str, int]
    uptime_s: int
    duplicate_filter_bytes: int


class PoolBalance(msgspec.Struct, frozen=True, kw_only=True):
    """Where one pool of a workspace stands. ``thresholds``: percents that are passed. Premium has no period.

    ``runs_out_on``: when the enrichment credits will be gone at the pace of the last days, if before the period's end.
    """

    workspace_id: str
    pool: str
    state: str
    used: str
    allowance: str
    remaining: str
    overage: str
    thresholds: list[int]
    remaining_below: str | None
    period_start: date | None
    period_end: date | None
    next_allowance: str | None
    plan: str
    runs_out_on: date | None
    as_of: datetime


class PeriodRow(msgspec.Struct, frozen=True, kw_only=True):
    """One billing period of a workspace, whole UTC days [start, end). Before the first plan ``plan`` is empty."""

    workspace_id: str
    period_start: date
    period_end: date
    plan: str
    allowance: str
    used: str
    remaining: str
    overage: str
    is_closed: bool


class StatementLine(msgspec.Struct, frozen=True, kw_only=True):
    """One pool over one billing period: opening + granted - debited + reversed - expired = closing.

    Enrichment opens with 0, is granted the period's allowance, and what is left at its end expires (R10). Premium
    carries over. ``closing`` is summed apart from the others, and ``foots`` says whether they agree; negative: overage.
    """

    workspace_id: str
    pool: str
    period_start: date
    period_end: date
    plan: str
    opening: str
    granted: str
    debited: str
    reversed: str
    expired: str
    closing: str
    runs: int
    is_closed: bool
    foots: bool
    as_of: datetime


class SpendCheck(msgspec.Struct, frozen=True, kw_only=True):
    """May a workspace run an action now? ``reason`` is the gate's own. ``remaining`` None: it does not matter."""

    workspace_id: str
    action: str
    cells: int
    own_api_key: bool
    allowed: bool
    reason: str
    credits: str
    pool: str
    remaining: str | None
    state: str
    period_end: date | None
    as_of: datetime


class ShareOfRuns(msgspec.Struct, frozen=True, kw_only=True):
    """How many runs of a column ended for one reason."""

    reason: str
    runs: int


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """What a bulk run will cost (R14). ``expected`` rests on ``history``, how earlier runs of the column ended with the
    product's key and a price, and is rounded up; without one it is the worst case. ``warning`` empty: it fits.
    """

    workspace_id: str
    action: str
    cells: int
    own_api_key: bool
    table_id: str
    column_id: str
    pool: str
    price: str
    worst_case: str
    expected: str
    remaining: str | None
    fits: bool
    warning: str
    history: list[ShareOfRuns]
    as_of: datetime


class TopBy(StrEnum):
    """What `top` lists first: the largest share of the allowance used, or what will be gone soonest."""

    USED = "used"
    RUNS_OUT = "runs_out"


class TopRow(msgspec.Struct, frozen=True, kw_only=True):
    """A pool that is close to its limit. ``used_percent`` is cut, not rounded."""

    workspace_id: str
    pool: str
    state: str
    used: str
    allowance: str
    remaining: str
    used_percent: int
    period_end: date | None
    plan: str
    runs_out_on: date | None


class PlanRow(msgspec.Struct, frozen=True, kw_only=True):
    """One plan of a workspace's history. Thresholds empty: the default ones."""

    workspace_id: str
    effective_at: datetime
    plan: str
    allowance: str
    restart_period: bool
    thresholds: list[int]
    remaining_below: str | None
    recorded_at: datetime
    in_force: bool


class GrantRow(msgspec.Struct, frozen=True, kw_only=True):
    """Premium credits that a workspace was given. ``in_force``: they count, which they do from ``effective_at`` on."""

    workspace_id: str
    effective_at: datetime
    credits: str
    recorded_at: datetime
    in_force: bool


class LimitsInForce(msgspec.Struct, frozen=True, kw_only=True):
    """At which percents and below how many credits a workspace is told, and who said so: workspace, plan or default."""

    workspace_id: str
    thresholds: list[int]
    thresholds_by: str
    remaining_below: str | None
    remaining_below_by: str
