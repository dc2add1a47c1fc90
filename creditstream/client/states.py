"""What a gate holds of the topic ``limit-states``, small enough for a million workspaces. Pure: no I/O, no clock.

One workspace is one immutable row of bytes, both pools in it, and a change replaces the whole row. So a reader needs
no lock: it has the row before the change or the one after it, never a mixture.
"""

import struct
from datetime import date, datetime, timedelta
from functools import lru_cache
from typing import Final

import msgspec

from schemas.credits import PER_CREDIT, Millicredits, parse_credits
from schemas.ledger import Pool
from schemas.limits import AsOf, State

DAY_NS: Final = 24 * 60 * 60 * 1_000_000_000
NEVER_NS: Final = (1 << 63) - 1
"""The end of a period that does not end."""
ABSENT: Final = -2
"""``remaining`` of an enrichment pool of which no state came."""
PLANLESS: Final = -1
"""``remaining`` of a pool in state ``unknown_plan``, and a next allowance that is not known."""

BALANCE: Final = struct.Struct("<qqq")
"""The head of a half row, all that a check reads: remaining, allowance of the next period, end of the period (ns)."""
_AS_OF: Final = struct.Struct("<qqqI")
"""Its tail: last offsets of both topics, the meter's "now" (Unix µs), number of the log."""
HALF: Final = BALANCE.size + _AS_OF.size
OFFSET_OF_POOL: Final[dict[str, int]] = {Pool.ENRICHMENT: 0, Pool.PREMIUM: HALF}
"""Where a pool's half begins in a row; a row without a premium state has one half."""
_NO_HALF: Final = BALANCE.pack(ABSENT, PLANLESS, NEVER_NS) + _AS_OF.pack(-1, -1, 0, 0)

_UNKNOWN_PLAN: Final = str(State.UNKNOWN_PLAN)
_EPOCH: Final = datetime.fromisoformat("1970-01-01T00:00:00+00:00")
_MICROSECOND: Final = timedelta(microseconds=1)


_Seen = tuple[int, int, int, int]
"""`AsOf` in numbers: last offsets of both topics, "now" in Unix µs, number of the log."""


class _WireAsOf(msgspec.Struct, gc=False):
    log: str
    cell_runs: int
    account_events: int
    at: datetime


class _WireState(msgspec.Struct, gc=False):
    """A lean twin of `LimitState`: only what a check needs is decoded."""

    workspace_id: str
    pool: str
    state: str
    remaining: str
    as_of: _WireAsOf
    period_end: str | None = None
    next_allowance: str | None = None


_decode: Final = msgspec.json.Decoder(_WireState).decode
_NO_STATE: Final = (KeyError, ValueError, TypeError, OverflowError, RecursionError, struct.error)
"""What decoding raises, a time without an offset, numbers out of range; msgspec's errors are ValueErrors."""


class StateMirror:
    """The newest limit state of every workspace and pool. One thread writes; any number may read ``rows``."""

    def __init__(self) -> None:
        self.rows: Final[dict[str, bytes]] = {}
        """Workspace → its row."""
        self.unreadable = 0
        """Records that were no limit state; what was known before them stands."""
        self.overtaken = 0
        """States that were older than the one held, and so ignored."""
        self._logs: Final[dict[str, int]] = {}

    def apply(self, key: bytes | None, value: bytes | None) -> None:
        """Take one Kafka record of the topic; without a value it is a tombstone."""
        if value is None:
            self._drop(key)
            return
        try:
            wire = _decode(value)
            offset = OFFSET_OF_POOL[wire.pool]
            balance, seen = _balance(wire), self._seen(wire.as_of)
            half = balance + _AS_OF.pack(*seen)
        except _NO_STATE:
            self.unreadable += 1
            return
        self._replace(wire.workspace_id, offset, half, seen)

    def as_of(self, row: bytes, offset: int) -> AsOf | None:
        """Up to where the meter had folded when it wrote this half of a row."""
        if len(row) <= offset or BALANCE.unpack_from(row, offset)[0] == ABSENT:
            return None
        cell_runs, account_events, at_us, number = _AS_OF.unpack_from(row, offset + BALANCE.size)
        log = next(name for name, known in tuple(self._logs.items()) if known == number)
        at = _EPOCH + timedelta(microseconds=at_us)
        return AsOf(log=log, cell_runs=cell_runs, account_events=account_events, at=at)

    def _seen(self, as_of: _WireAsOf) -> _Seen:
        log = self._logs.setdefault(as_of.log, len(self._logs))
        return as_of.cell_runs, as_of.account_events, (as_of.at - _EPOCH) // _MICROSECOND, log

    def _replace(self, workspace_id: str, offset: int, half: bytes, seen: _Seen) -> None:
        row = self.rows.get(workspace_id, b"")
        is_held = len(row) > offset and BALANCE.unpack_from(row, offset)[0] != ABSENT
        if is_held and is_older(seen, _AS_OF.unpack_from(row, offset + BALANCE.size)):
            self.overtaken += 1
            return
        self.rows[workspace_id] = _with_half(row, offset, half)

    def _drop(self, key: bytes | None) -> None:
        pool, _, workspace_id = (key or b"").decode(errors="replace").partition("/")
        if pool not in OFFSET_OF_POOL:
            self.unreadable += 1
            return
        row = self.rows.get(workspace_id, b"")
        row = row[:HALF] if OFFSET_OF_POOL[pool] else _NO_HALF + row[HALF:]
        if row in (b"", _NO_HALF):
            self.rows.pop(workspace_id, None)
        else:
            self.rows[workspace_id] = row


def is_older(seen: _Seen, held: tuple[int, ...]) -> bool:
    """As `AsOf.is_older_than`; a test holds the two equal."""
    return seen[3] == held[3] and seen != held and seen[0] <= held[0] and seen[1] <= held[1] and seen[2] <= held[2]


def _with_half(row: bytes, offset: int, half: bytes) -> bytes:
    if offset:
        return (row[:HALF] or _NO_HALF) + half
    return half + row[HALF:]


def _balance(wire: _WireState) -> bytes:
    remaining = PLANLESS if wire.state == _UNKNOWN_PLAN else _millicredits(wire.remaining)
    following = PLANLESS if wire.next_allowance is None else _millicredits(wire.next_allowance)
    end_ns = NEVER_NS if wire.period_end is None else _start_ns(wire.period_end)
    return BALANCE.pack(remaining, following, end_ns)


def _millicredits(text: str) -> Millicredits:
    if text.isdecimal() and text.isascii() and len(text) <= 15:  # whole credits, the usual case, three times as fast
        return int(text) * PER_CREDIT
    if (parsed := parse_credits(text)) < 0:
        raise ValueError(f"{text!r} is negative")
    return parsed


@lru_cache(maxsize=4096)
def _start_ns(day: str) -> int:
    return (date.fromisoformat(day) - _EPOCH.date()).days * DAY_NS
