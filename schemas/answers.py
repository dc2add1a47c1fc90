"""What the ledger answers to people and programs: the same records in the read API and in ``--format json``.

Fields are named as in the ledger. Credits are decimal strings, times RFC 3339 in UTC, so that nothing is rounded
between the ledger and a ticket.
"""

from datetime import date, datetime
from enum import StrEnum

import msgspec


class By(StrEnum):
    """What usage is summed by."""

    COLUMN = "column"
    TABLE = "table"
    ACTION = "action"
    DAY = "day"
    REASON = "reason"


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


class WorkspaceTotal(msgspec.Struct, frozen=True, kw_only=True):
    """Credits and runs of a workspace since the ledger began."""

    workspace_id: str
    credits: str
    runs: int


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One event that carried the run id, where it lies in Kafka, and what became of it."""

    position: str
    recorded_at: datetime
    kind: str
    reason: str
    credits: str
    detail: str


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run cost what it cost: a sentence for a customer, then the evidence."""

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
    deliveries: list[Delivery]


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """An event that could not be metered, as it came. ``raw`` is text where it is UTF-8, else escaped."""

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


class PartitionAudit(msgspec.Struct, frozen=True, kw_only=True):
    """One Kafka partition's chain in the ledger, by the projection and by the raw rows."""

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
    """One partition of the worker."""

    partition: int
    mark: int
    rows_unwritten: int
    incident: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker does: ``written`` counts rows by kind/reason since its start."""

    version: str
    ready: bool
    not_ready_because: list[str]
    topic: str
    kafka_bootstrap: str
    units: list[UnitStatus]
    written: dict[str, int]
    uptime_s: int
    duplicate_filter_bytes: int
