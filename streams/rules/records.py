"""What one Kafka record is to both topics: its shape, where it belongs, its id as a key, what its headers say. Pure."""

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from aiokafka.partitioner import murmur2

from schemas.account import LATEST_EFFECTIVE_AT
from schemas.cell_run import MAX_EVENT_BYTES, to_milliseconds
from schemas.codec import name_field
from schemas.ledger import REDRIVE_HEADER, Reason

T = TypeVar("T")

UpTo = tuple[int, int]
"""Up to where something has come in a unit: the last offset of each of its chains, cell runs first."""


class Record(Protocol):
    """What the transport delivers of one Kafka record; ``timestamp`` is the broker's append time, Unix ms."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]


_LATEST_MS: Final = to_milliseconds(LATEST_EFFECTIVE_AT)


def is_datable(timestamp: int) -> bool:
    """Whether a Kafka timestamp can be the time at which a record was recorded. The broker's always can."""
    return 0 <= timestamp < _LATEST_MS


def recorded_ms_of(timestamp: int) -> int:
    """When a record counts as recorded, Unix ms. The producer's own time, in a topic that had its setting changed, may
    be anything: what cannot be is 1970, so that no clock begins by it and its run is a dead letter (``future_run``).
    """
    return timestamp if is_datable(timestamp) else 0


class Refusal(NamedTuple):
    """Why one record is a dead letter: ``detail`` names the field or the fact."""

    reason: Reason
    detail: str


def decoded(value: bytes | None, decode: Callable[[bytes], T]) -> T | Refusal:
    """What a record's value says, or why it says nothing, in the published order: ``too_large``, ``malformed``."""
    if value is None:
        return Refusal(Reason.MALFORMED, "the record has no value")
    if len(value) > MAX_EVENT_BYTES:
        return Refusal(Reason.TOO_LARGE, f"{len(value):,} bytes, at most {MAX_EVENT_BYTES:,}")
    try:
        return decode(value)
    except msgspec.DecodeError as error:
        return Refusal(Reason.MALFORMED, name_field(str(error)))


def bytes_of(records: Sequence[Record]) -> int:
    """What Kafka holds of their keys, values and headers, bytes."""
    plain = sum([len(record.value or b"") + len(record.key or b"") for record in records])
    return plain + sum([len(name) + len(value or b"") for record in records for name, value in record.headers or ()])


def partition_of(workspace_id: str, partitions: int) -> int:
    """Where Kafka's default partitioner puts a workspace (murmur2 of the key, sign bit cleared)."""
    return int(murmur2(workspace_id.encode()) & 0x7FFF_FFFF) % partitions


def id_keys(ids: bytes) -> npt.NDArray[np.uint64]:
    """A filter's keys of joined 16-byte ids: the XOR of both halves, as `sinks.filter_keys.key_of` says it in SQL.

    Both halves, because a UUIDv7 begins with the time: its first half alone has 12 random bits.
    """
    halves = np.frombuffer(ids, ">u8").reshape(-1, 2)
    keys: npt.NDArray[np.uint64] = (halves[:, 0] ^ halves[:, 1]).astype(np.uint64)
    return keys


def redrive_of(headers: Sequence[tuple[str, bytes]]) -> str:
    """The dead letter that this record is the redrive of, as `ParkedEvent.letter`; empty for all others."""
    return next(
        ((value or b"").decode(errors="replace")[:200] for name, value in headers if name == REDRIVE_HEADER), ""
    )


def headers_text(headers: Sequence[tuple[str, bytes]]) -> str:
    """Kafka headers as JSON, values as text with escapes, for a dead letter's ``raw_headers``."""
    if not headers:
        return ""
    pairs: list[Any] = [[name, (value or b"").decode(errors="backslashreplace")] for name, value in headers]
    return msgspec.json.encode(pairs).decode()
