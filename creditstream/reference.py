"""The reference rater: a second, slow, obvious implementation of the charge rules, for `creditstream reconcile`.

It shares the event's schema with the meter and nothing else: one event at a time, dictionaries, Decimal, TOML read
afresh. When it disagrees with the ledger, one of the two is wrong.
"""

import tomllib
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from aiokafka.partitioner import murmur2

from schemas.cell_run import CellRun
from schemas.codec import decode_run


class Expected(NamedTuple):
    """What the ledger must say of one offset."""

    kind: str
    reason: str
    pool: str
    credits: Decimal


class ReferenceRater:
    """Feed it one partition's records in Kafka's order; it remembers every run of the partition."""

    def __init__(self, catalogue_dir: Path, partition: int, partitions: int) -> None:
        self._partition, self._partitions = partition, partitions
        self._runs: dict[tuple[str, str], CellRun] = {}
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
        owner = run.workspace_id.encode()
        if key != owner or (murmur2(owner) & 0x7FFFFFFF) % self._partitions != self._partition:
            return _dead("misrouted")
        ran_at = _milliseconds(run.ran_at)
        recorded_at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=recorded_ms)
        if ran_at > recorded_at + timedelta(minutes=5):
            return _dead("future_run")
        if ran_at < recorded_at - timedelta(days=366):
            return _dead("stale_run")
        return self._settle(run, ran_at)

    def forget(self, workspace_id: str, run_id: str) -> None:
        """The run just rated is a copy of one that Kafka no longer has: that one stands, not this."""
        self._runs.pop((workspace_id, run_id), None)

    def _settle(self, run: CellRun, ran_at: datetime) -> Expected:
        identity = run.workspace_id, str(run.run_id)
        plain = msgspec.structs.replace(run, ran_at=ran_at, triggered_by=run.triggered_by or "", actor=run.actor or "")
        if first := self._runs.get(identity):
            return (
                Expected("duplicate", "duplicate", "none", Decimal(0))
                if first == plain
                else _dead("conflicting_duplicate")
            )
        action = self._action(run.action, ran_at)
        if action is None:
            return _dead("unknown_action")
        self._runs[identity] = plain
        reason, credits = _charge(run, action)
        return Expected("run", reason, _pool(action), credits)

    def _action(self, name: str, ran_at: datetime) -> dict[str, Any] | None:
        before = [version for version in self._versions if version["effective_from"] <= ran_at]
        after = [version for version in self._versions if version["effective_from"] > ran_at]
        for version in [*reversed(before), *after]:
            for action in version["actions"]:
                if action["id"] == name:
                    found: dict[str, Any] = action
                    return found
        return None


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


def _dead(reason: str) -> Expected:
    return Expected("dead_letter", reason, "none", Decimal(0))


def _milliseconds(instant: datetime) -> datetime:
    utc = instant.astimezone(UTC)
    return utc.replace(microsecond=utc.microsecond // 1000 * 1000)
