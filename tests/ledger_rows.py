"""Ledger rows made cheaply: what a row holds follows from its chain and offset alone. And the books that must close."""

import hashlib
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import numpy as np
import pyarrow as pa
from clickhouse_connect.driver.client import Client

from schemas.cell_run import Outcome, from_milliseconds, to_milliseconds
from schemas.ledger import Kind, Pool, Reason, number_of
from sinks.columns import LEDGER_SCHEMA, constant, decimals, instants
from sinks.ledger import YOUNG_SERVER_S, Batch, Chain, Ledger, Mark

NO_COPIES: Final[Mapping[int, int]] = {}
AUGUST_MS: Final = to_milliseconds(datetime(2026, 8, 20, 12, tzinfo=UTC))


def recorded_ms(offset: int) -> int:
    """Broker time of an offset: one record a second, in one month."""
    return AUGUST_MS + offset * 1000


def run_id(chain: Chain, run: int) -> UUID:
    """The run with this number: the same in every incarnation of the topic."""
    return UUID(bytes=hashlib.md5(f"{chain}/{run}".encode()).digest())


def batch(
    chain: Chain,
    after: int,
    last: int,
    *,
    offsets: Sequence[int] | None = None,
    copies: Mapping[int, int] = NO_COPIES,
    runs_from: int = 0,
    recorded: Callable[[int], int] = recorded_ms,
    month: int | None = None,
) -> Batch:
    """Charged runs at ``offsets`` (all after ``after`` up to ``last``).

    Offset n holds run n + ``runs_from``, but ``copies`` (offset → run) hold that run again. ``month`` replaces that
    of the first record.
    """
    chosen = range(after + 1, last + 1) if offsets is None else offsets
    assert after < chosen[0]
    assert chosen[-1] == last
    first = from_milliseconds(recorded(chosen[0]))
    runs = [copies.get(offset, offset + runs_from) for offset in chosen]
    batch_month = month or first.year * 100 + first.month
    return Batch(chain, after, last, _rows(chain, after, chosen, runs, copies, recorded, batch_month))


def write(ledger: Ledger, chain: Chain, last: int, rows_max: int = 100) -> Mark:
    """One owner's life: from the mark to ``last``, in batches of ``rows_max`` rows."""
    mark = ledger.mark(chain)
    while mark.last < last:
        mark = ledger.append(batch(chain, mark.last, min(mark.last + rows_max, last)), mark, threading.Event())
    return mark


def _rows(
    chain: Chain,
    after: int,
    offsets: Sequence[int],
    runs: Sequence[int],
    copies: Collection[int],
    recorded: Callable[[int], int],
    batch_month: int,
) -> pa.Table:
    length = len(offsets)
    is_copy = np.array([offset in copies for offset in offsets])
    gaps = np.diff(np.array(offsets), prepend=after if after >= 0 else offsets[0] - 1)
    ran = instants([recorded_ms(run) for run in runs])
    arrays: dict[str, Any] = {
        "kafka_offset": pa.array(offsets, pa.uint64()),
        "offset_gap": pa.array(gaps.astype(np.uint64)),
        "recorded_at": instants([recorded(offset) for offset in offsets]),
        "kind": pa.array(np.where(is_copy, number_of(Kind.DUPLICATE), number_of(Kind.RUN)).astype(np.int8)),
        "run_id": pa.array([run_id(chain, run).bytes for run in runs], pa.binary(16)),
        "workspace_id": pa.array([f"workspace-{run % 3}" for run in runs]),
        "column_id": pa.array([f"column-{run % 4}" for run in runs]),
        "row_id": pa.array([f"row-{run}" for run in runs]),
        "ran_at": ran,
        "pool": pa.array(np.where(is_copy, number_of(Pool.NONE), number_of(Pool.ENRICHMENT)).astype(np.int8)),
        "credits": decimals(np.where(is_copy, 0, 250 * (1 + np.array(runs) % 5))),
        "reason": pa.array(np.where(is_copy, number_of(Reason.DUPLICATE), number_of(Reason.CHARGED)).astype(np.int8)),
        "detail": pa.array([f"a copy of run {run}" if copy else "" for run, copy in zip(runs, is_copy, strict=True)]),
    }
    constants: dict[str, str | bytes | int] = {
        "topic": chain.topic,
        "topic_id": chain.topic_id,
        "kafka_partition": chain.partition,
        "table_id": "table-1",
        "action": "find_email",
        "outcome": number_of(Outcome.DATA),
        "own_api_key": False,
        "catalogue": 1,
        "raw": b"",
        "raw_key": b"",
        "batch_month": batch_month,
    }
    for field in LEDGER_SCHEMA:
        if field.name not in arrays:
            arrays[field.name] = constant(constants.get(field.name, ""), length, field.type)
    return pa.table([arrays[field.name] for field in LEDGER_SCHEMA], schema=LEDGER_SCHEMA)


Content = list[tuple[int, int, int, UUID, str, datetime, Decimal, str]]
"""Offset, gap, kind, run id, workspace, recorded_at, credits, detail: whatever an owner decides about an offset."""


def content_of(table: pa.Table) -> Content:
    """What the ledger must hold of these rows, in order of their offsets."""
    names = ("kafka_offset", "offset_gap", "kind", "run_id", "workspace_id", "recorded_at", "credits", "detail")
    columns = [table.column(name).to_pylist() for name in names]
    columns[3] = [UUID(bytes=value) for value in columns[3]]
    return list(zip(*columns, strict=True))


def content(client: Client, chain: Chain) -> Content:
    """What the ledger holds of a chain, in order of its offsets."""
    found = client.query(
        "SELECT kafka_offset, offset_gap, toInt8(kind), run_id, workspace_id, recorded_at, credits, detail FROM ledger "
        f"WHERE {_CHAIN} ORDER BY kafka_offset",
        parameters=_of(chain),
    )
    return [tuple(row) for row in found.result_rows]


def assert_books_close(client: Client, chain: Chain, expected_offsets: Collection[int]) -> None:
    """One row for every offset of the chain, no hole, each insert in one part.

    And over the whole table: no run twice, and the sums through each projection are those of the rows.
    """
    expected = sorted(expected_offsets)
    assert [row[0] for row in content(client, chain)] == expected
    assert _ask(client, _GAPS, chain) == [(expected[-1] - expected[0] + 1,)]
    assert _ask(client, _RUNS_TWICE, chain) == []
    assert _ask(client, _INSERTS_SPLIT, chain) == []
    for projection, sums in (("marks", _MARKS), ("usage", _USAGE)):
        assert f"ReadFromMergeTree ({projection})" in explain(client, sums, chain)
        through, raw = (
            sorted(map(tuple, client.query(sums, parameters=_of(chain), settings=settings).result_rows))
            for settings in ({"optimize_use_projections": 1}, {"optimize_use_projections": 0})
        )
        assert through == raw


def explain(client: Client, sql: str, chain: Chain) -> str:
    """The plan of a question about a chain."""
    plan = client.query(f"EXPLAIN projections = 1 {sql}", parameters=_of(chain))
    return "\n".join(str(line) for (line,) in plan.result_rows)


def wait_until_grown(client: Client) -> None:
    """The ledger refuses inserts in the engine's first two seconds."""
    while client.query("SELECT uptime()").result_rows[0][0] < YOUNG_SERVER_S:
        time.sleep(0.1)


def _ask(client: Client, sql: str, chain: Chain) -> list[Any]:
    return list(client.query(sql, parameters=_of(chain)).result_rows)


def _of(chain: Chain) -> dict[str, Any]:
    return {"topic_id": chain.topic_id, "partition": chain.partition}


_CHAIN: Final = "topic_id = {topic_id:String} AND kafka_partition = {partition:UInt16}"
_GAPS: Final = f"SELECT sum(offset_gap) FROM ledger WHERE {_CHAIN}"
_RUNS_TWICE: Final = (
    "SELECT workspace_id, run_id, count() FROM ledger WHERE kind = 'run' "
    "GROUP BY workspace_id, run_id HAVING count() > 1"
)
_INSERTS_SPLIT: Final = (
    f"SELECT mark_read_at, uniqExact(_part) FROM ledger WHERE {_CHAIN} "
    "GROUP BY mark_read_at HAVING uniqExact(_part) > 1"
)
_MARKS: Final = (
    "SELECT topic_id, kafka_partition, max(kafka_offset), min(kafka_offset), count(), sum(offset_gap), "
    "argMax(mark_read_at, kafka_offset) FROM ledger GROUP BY topic_id, kafka_partition"
)
_USAGE: Final = (
    "SELECT workspace_id, day, table_id, column_id, action, pool, kind, reason, sum(credits), count() FROM ledger "
    "GROUP BY workspace_id, day, table_id, column_id, action, pool, kind, reason"
)


INVARIANTS: Final = (
    "SELECT topic_id, kafka_partition, kafka_offset FROM ledger "
    "GROUP BY topic_id, kafka_partition, kafka_offset HAVING count() > 1 LIMIT 5",
    "SELECT workspace_id, run_id FROM ledger WHERE kind = 'run' "
    "GROUP BY workspace_id, run_id HAVING count() > 1 LIMIT 5",
    "SELECT topic_id, kafka_partition FROM ledger GROUP BY topic_id, kafka_partition "
    "HAVING sum(offset_gap) != max(kafka_offset) - min(kafka_offset) + 1",
    "SELECT workspace_id, day FROM (SELECT workspace_id, day, sum(credits) AS credits, count() AS runs FROM ledger "
    "WHERE kind = 'run' GROUP BY workspace_id, day) AS projected FULL JOIN (SELECT workspace_id, day, sum(credits) "
    "AS credits, count() AS runs FROM ledger WHERE kind = 'run' AND row_id != '' GROUP BY workspace_id, day) AS raw "
    "USING (workspace_id, day) WHERE projected.credits != raw.credits OR projected.runs != raw.runs",
)
"""Each finds what must not be: an offset with two rows, a run with two debits, a hole, and a sum that the
projection has wrong (a question that reads ``row_id`` cannot use it).
"""
