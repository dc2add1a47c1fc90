"""Rows as Arrow columns: the types in which the ledger's table takes them.

Arrow is the cheapest road into chDB (0.5 µs a row to encode). Two traps are dealt with here: a 16-byte binary becomes
a UUID in RFC byte order, and an Enum8 takes an int8 by its stored number (`schemas.ledger.number_of`).
"""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

LEDGER_SCHEMA: Final = pa.schema(
    [
        ("topic", pa.string()),
        ("topic_id", pa.string()),
        ("kafka_partition", pa.uint16()),
        ("kafka_offset", pa.uint64()),
        ("offset_gap", pa.uint64()),
        ("recorded_at", pa.timestamp("ms", "UTC")),
        ("kind", pa.int8()),
        ("run_id", pa.binary(16)),
        ("workspace_id", pa.string()),
        ("table_id", pa.string()),
        ("column_id", pa.string()),
        ("row_id", pa.string()),
        ("action", pa.string()),
        ("outcome", pa.int8()),
        ("own_api_key", pa.bool_()),
        ("ran_at", pa.timestamp("ms", "UTC")),
        ("triggered_by", pa.string()),
        ("actor", pa.string()),
        ("pool", pa.int8()),
        ("credits", pa.decimal128(18, 3)),
        ("reason", pa.int8()),
        ("catalogue", pa.uint16()),
        ("detail", pa.string()),
        ("raw", pa.binary()),
        ("raw_key", pa.binary()),
        ("raw_headers", pa.string()),
        ("redrive_of", pa.string()),
        ("batch_month", pa.uint32()),
    ]
)
"""What a batch of cell runs carries; ``mark_read_at`` is added by each attempt to insert it."""

ACCOUNT_SCHEMA: Final = pa.schema(
    [
        *LEDGER_SCHEMA,
        ("event_id", pa.binary(16)),
        ("effective_at", pa.timestamp("ms", "UTC")),
        ("plan", pa.string()),
        ("allowance", pa.decimal128(18, 3)),
        ("restart_period", pa.bool_()),
        ("thresholds", pa.list_(pa.uint8())),
        ("remaining_below", pa.decimal128(18, 3)),
    ]
)
"""What a batch of account events carries: the same, and what only they say."""


def instants(milliseconds: Sequence[int] | npt.NDArray[np.int64]) -> pa.Array:
    """Unix milliseconds → DateTime64(3, 'UTC')."""
    values = np.ascontiguousarray(milliseconds, np.int64)
    return pa.Array.from_buffers(pa.timestamp("ms", "UTC"), len(values), [None, pa.py_buffer(values)])


def decimals(millicredits: npt.NDArray[np.int64]) -> pa.Array:
    """Millicredits → Decimal(18, 3), exactly: the unscaled integer is the millicredits."""
    words = np.empty((len(millicredits), 2), np.int64)
    words[:, 0] = millicredits
    words[:, 1] = millicredits >> 63
    return pa.Array.from_buffers(pa.decimal128(18, 3), len(millicredits), [None, pa.py_buffer(words)])


def constant(value: str | bytes | int, length: int, kind: pa.DataType) -> pa.Array:
    """One value, ``length`` times."""
    return pa.repeat(pa.scalar(value, kind), length)


def sparse(blank: str | bytes, found: Mapping[int, str | bytes], length: int, kind: pa.DataType) -> pa.Array:
    """A column that is blank but for a few rows: row → value."""
    if not found:
        return constant(blank, length, kind)
    places = np.zeros(length, np.int64)
    places[list(found)] = np.arange(1, len(found) + 1)
    return pa.array([blank, *found.values()], kind).take(pa.array(places))
