"""Ledger rows of accounts made by hand: what a worker writes of runs, plans, grants, reversals and limits."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from clickhouse_connect.driver.client import Client

from schemas.ledger import Kind, Pool, Reason

SECOND: Final = timedelta(seconds=1)
NOBODY: Final = UUID(int=0)
RUNS: Final = ("cell-runs", "topic-1")
EVENTS: Final = ("account-events", "topic-2")


def at(text: str) -> datetime:
    """``2026-01-15`` or ``2026-01-15 14:00:00`` in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


class AccountRows:
    """Rows in the order in which they are told, recorded one second after they ran or took effect unless said."""

    def __init__(self, workspace_id: str = "ws_1") -> None:
        self.workspace_id = workspace_id
        self._rows: list[dict[str, Any]] = []
        self._offsets = {RUNS: -1, EVENTS: -1}

    def run(self, ran_at: datetime, credits: int | Decimal = 1, **said: Any) -> UUID:
        """A charged run of `enrich_person`; ``said`` replaces any column."""
        run_id = said.pop("run_id", UUID(int=1_000_000 + len(self._rows)))
        plain = {
            "table_id": "tbl_1", "column_id": "col_1", "row_id": "row_1", "action": "enrich_person", "outcome": "data",
            "pool": Pool.ENRICHMENT, "reason": Reason.CHARGED, "catalogue": 1,
        }  # fmt: skip
        self._add(RUNS, Kind.RUN, ran_at, {"run_id": run_id, "credits": credits} | plain | said)
        return UUID(int=run_id.int)

    def plan(self, effective_at: datetime, plan: str = "20k", allowance: int | Decimal = 20_000, **said: Any) -> None:
        """A plan; ``restart_period``, ``thresholds``, ``remaining_below`` and any other column may be said."""
        self._account(Kind.PLAN, Reason.PLAN_CHANGED, effective_at, {"plan": plan, "allowance": allowance} | said)

    def grant(self, effective_at: datetime, credits: int | Decimal, **said: Any) -> None:
        """Premium credits."""
        self._account(Kind.GRANT, Reason.PREMIUM_GRANTED, effective_at, {"allowance": credits} | said)

    def limits(self, recorded_at: datetime, **said: Any) -> None:
        """The workspace's own thresholds."""
        self._account(Kind.LIMITS, Reason.LIMITS_CHANGED, recorded_at, {"recorded_at": recorded_at} | said)

    def reverse(self, run_id: UUID, recorded_at: datetime, **said: Any) -> None:
        """What a run drew, given back on its day. The rest of its columns are those of the run."""
        run = next(row for row in self._rows if row.get("run_id") == run_id and row["kind"] == Kind.RUN)
        same = ("workspace_id", "table_id", "column_id", "row_id", "action", "pool", "ran_at")
        self._account(
            Kind.REVERSAL,
            Reason.REVERSED,
            run["ran_at"],
            {name: run[name] for name in same}
            | {"run_id": run_id, "credits": -run["credits"], "recorded_at": recorded_at, "effective_at": NEVER}
            | said,
        )

    def write(self, client: Client) -> None:
        """Insert all, as the table's CHECK wants it: by a mark read just now."""
        ((now,),) = client.query("SELECT now64(3)").result_rows
        for row in self._rows:
            row["mark_read_at"] = now
        names = sorted({name for row in self._rows for name in row})
        rows = [[row.get(name, _PLAIN.get(name, "")) for name in names] for row in self._rows]
        client.insert("ledger", rows, column_names=names)
        self._rows = []

    def _account(self, kind: Kind, reason: Reason, effective_at: datetime, said: dict[str, Any]) -> None:
        event_id = UUID(int=9_000_000 + len(self._rows))
        plain = {"event_id": event_id, "effective_at": effective_at, "pool": Pool.NONE, "reason": reason}
        self._add(EVENTS, kind, effective_at, plain | said)

    def _add(self, topic: tuple[str, str], kind: Kind, ran_at: datetime, said: dict[str, Any]) -> None:
        self._offsets[topic] += 1
        name, topic_id = topic
        plain = {
            "topic": name, "topic_id": topic_id, "kafka_partition": 0, "kafka_offset": self._offsets[topic],
            "recorded_at": ran_at + SECOND, "kind": kind, "workspace_id": self.workspace_id, "ran_at": ran_at,
            "batch_month": 202601,
        }  # fmt: skip
        self._rows.append({**plain, **said})


NEVER: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NO_PERCENTS: Final[Sequence[int]] = ()
_PLAIN: Final[dict[str, Any]] = {
    "run_id": NOBODY, "event_id": NOBODY, "effective_at": NEVER, "credits": 0, "allowance": 0, "catalogue": 0,
    "restart_period": False, "own_api_key": False, "thresholds": _NO_PERCENTS, "remaining_below": -1,
}  # fmt: skip
