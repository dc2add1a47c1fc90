"""The reference raters: a second, slow, obvious implementation of the charge rules, for `creditstream reconcile`.

They share the events' schemas with the meter and nothing else: one event at a time, dictionaries, Decimal, TOML read
afresh. When one disagrees with the ledger, one of the two is wrong.
"""

import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from aiokafka.partitioner import murmur2

from schemas.account import AccountEvent, LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.cell_run import CellRun
from schemas.codec import decode_account_event, decode_run


class Expected(NamedTuple):
    """What the ledger must say of one offset."""

    kind: str
    reason: str
    pool: str
    credits: Decimal

    def __str__(self) -> str:
        return f"{self.kind}/{self.reason} {self.credits:f} {self.pool}"


class ReferenceRater:
    """Feed it one partition's records in Kafka's order; it remembers every run of the partition by a digest."""

    def __init__(self, catalogue_dir: Path, partition: int, partitions: int) -> None:
        self._partition, self._partitions = partition, partitions
        self._runs: dict[tuple[str, str], bytes] = {}
        self.debits: dict[tuple[str, str], Expected] = {}
        """(workspace, run id) → what the run was debited."""
        files = [tomllib.loads(file.read_text()) for file in sorted(catalogue_dir.glob("*.toml"))]
        self._versions = sorted(files, key=lambda version: version["effective_from"])

    def expect(self, key: bytes | None, value: bytes | None, recorded_ms: int) -> Expected:
        """The verdict on the next record."""
        if value is not None and len(value) > 64 * 1024:
            return _dead("too_large")
        try:
            run = decode_run(value or b"")
        except msgspec.DecodeError:
            return _dead("malformed")
        if not _lies_right(key, run.workspace_id, self._partition, self._partitions):
            return _dead("misrouted")
        ran_at = _milliseconds(run.ran_at)
        recorded_at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=recorded_ms)
        if ran_at > recorded_at + timedelta(minutes=5):
            return _dead("future_run")
        if ran_at < recorded_at - timedelta(days=366):
            return _dead("stale_run")
        return self._charge_once(run, ran_at)

    def forget(self, workspace_id: str, run_id: str) -> None:
        """The run just rated is a copy of one that Kafka no longer has: that one stands, not this."""
        self._runs.pop((workspace_id, run_id), None)
        self.debits.pop((workspace_id, run_id), None)

    def _charge_once(self, run: CellRun, ran_at: datetime) -> Expected:
        identity = intern(run.workspace_id), str(run.run_id)
        plain = msgspec.structs.replace(run, ran_at=ran_at, triggered_by=run.triggered_by or "", actor=run.actor or "")
        said = blake2b(msgspec.json.encode(plain), digest_size=16).digest()
        if first := self._runs.get(identity):
            return _DUPLICATE if first == said else _dead(_CONFLICT)
        action = self._action(run.action, ran_at)
        if action is None:
            return _dead("unknown_action")
        self._runs[identity] = said
        self.debits[identity] = _debit(_pool(action), *_charge(run, action))
        return self.debits[identity]

    def _action(self, name: str, ran_at: datetime) -> dict[str, Any] | None:
        before = [version for version in self._versions if version["effective_from"] <= ran_at]
        after = [version for version in self._versions if version["effective_from"] > ran_at]
        for version in [*reversed(before), *after]:
            for action in version["actions"]:
                if action["id"] == name:
                    found: dict[str, Any] = action
                    return found
        return None


class ReferenceBilling:
    """Feed it one partition's account events in Kafka's order. ``debits``: those of the same partition's cell runs."""

    def __init__(
        self, plans_dir: Path, partition: int, partitions: int, debits: Mapping[tuple[str, str], Expected]
    ) -> None:
        self._partition, self._partitions, self._debits = partition, partitions, debits
        self._events: dict[tuple[str, UUID], tuple[object, ...]] = {}
        self._reversed: set[tuple[str, str]] = set()
        self._rated: tuple[tuple[str, UUID], tuple[object, ...], tuple[str, str] | None] | None = None
        """The event just rated: its identity, what it says, and the run that it reverses."""
        files = [tomllib.loads(file.read_text()) for file in plans_dir.glob("*.toml")]
        self.plans: set[str] = {plan["id"] for version in files for plan in version["plans"]}

    def expect(self, key: bytes | None, value: bytes | None) -> Expected:
        """The verdict on the next record."""
        self._rated = None
        if value is not None and len(value) > 64 * 1024:
            return _dead("too_large")
        try:
            event = decode_account_event(value or b"")
        except msgspec.DecodeError:
            return _dead("malformed")
        if not _lies_right(key, event.workspace_id, self._partition, self._partitions):
            return _dead("misrouted")
        identity, said = (event.workspace_id, event.event_id), _said(event)
        if first := self._events.get(identity):
            return _DUPLICATE if first == said else _dead(_CONFLICT)
        expected = self._rate(event)
        run = (event.workspace_id, str(event.run_id)) if isinstance(event, RunReversed) else None
        self._rated = identity, said, run
        if expected.kind not in ("dead_letter", "duplicate"):
            self.remember()
        return expected

    def remember(self) -> None:
        """The event just rated stands: the run that it reverses was in the ledger, and Kafka no longer has it."""
        if self._rated:
            identity, said, run = self._rated
            self._events[identity] = said
            self._reversed |= {run} if run else set()

    def forget(self) -> None:
        """The event just rated does not stand: when the meter came to it, its run had not arrived."""
        if self._rated:
            identity, _, run = self._rated
            self._events.pop(identity)
            self._reversed -= {run} if run else set()

    def _rate(self, event: AccountEvent) -> Expected:
        match event:
            case PlanChanged():
                known = event.plan in self.plans
                return Expected("plan", "plan_changed", "enrichment", Decimal(0)) if known else _dead("unknown_plan")
            case PremiumGranted():
                return Expected("grant", "premium_granted", "premium", Decimal(0))
            case LimitsChanged():
                return Expected("limits", "limits_changed", "none", Decimal(0))
            case RunReversed():
                run = event.workspace_id, str(event.run_id)
                if run in self._reversed:
                    return _DUPLICATE
                debit = self._debits.get(run)
                return Expected("reversal", "reversed", debit.pool, -debit.credits) if debit else _dead(UNKNOWN_RUN)


UNKNOWN_RUN = "unknown_run"
_CONFLICT = "conflicting_duplicate"
_DUPLICATE = Expected("duplicate", "duplicate", "none", Decimal(0))


def _said(event: AccountEvent) -> tuple[object, ...]:
    """What a copy must say as well."""
    who = type(event).__name__, event.actor or ""
    match event:
        case PlanChanged():
            return (*who, event.plan, _milliseconds(event.effective_at), event.restart_period)
        case PremiumGranted():
            return (*who, Decimal(event.credits), _milliseconds(event.effective_at))
        case RunReversed():
            return (*who, event.run_id)
        case LimitsChanged():
            percents = None if event.thresholds is None else {100, *event.thresholds}
            below = None if event.remaining_below is None else Decimal(event.remaining_below)
            return (*who, percents, below)


def _lies_right(key: bytes | None, workspace_id: str, partition: int, partitions: int) -> bool:
    return key == workspace_id.encode() and _home(workspace_id, partitions) == partition


@lru_cache(100_000)
def _home(workspace_id: str, partitions: int) -> int:
    return int(murmur2(workspace_id.encode()) & 0x7FFFFFFF) % partitions


def _charge(run: CellRun, action: dict[str, Any]) -> tuple[str, Decimal]:
    price = Decimal(str(action["price"]))
    if run.own_api_key:
        return "own_api_key", Decimal(0)
    if price == 0:
        return "free_action", Decimal(0)
    if run.outcome == "error":
        return "error", Decimal(0)
    if run.outcome == "no_data":
        return ("charged_no_data", price) if action.get("charges_no_data") else ("no_data", Decimal(0))
    return "charged", price


def _pool(action: dict[str, Any]) -> str:
    if Decimal(str(action["price"])) == 0:
        return "none"
    return "premium" if action["category"] == "premium" else "enrichment"


@lru_cache
def _debit(pool: str, reason: str, credits: Decimal) -> Expected:
    """One object for all runs that end alike."""
    return Expected("run", reason, pool, credits)


def _dead(reason: str) -> Expected:
    return Expected("dead_letter", reason, "none", Decimal(0))


def _milliseconds(instant: datetime) -> datetime:
    utc = instant.astimezone(UTC)
    return utc.replace(microsecond=utc.microsecond // 1000 * 1000)
