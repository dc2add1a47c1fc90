"""Bytes from Kafka → columns of cell runs. Pure: no I/O, no clock.

A chunk of records is decoded at once, because Python's cost is per call: a lean twin of `CellRun` keeps ids and times
as text, and numpy and Arrow check and convert whole columns. With few records the calls on columns are what costs, so
these are converted one by one, and become columns with others, when rows are made of them. The lean way accepts only a
subset of what `CellRun` accepts, with the same values; every record it does not take is decoded by `decode_run`, whose
verdict stands.
A refused record keeps its row, blank, so that a chunk has exactly one row for every offset.
"""

import re
from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import Annotated, Final, Literal, NamedTuple
from uuid import UUID

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import Meta

from schemas.cell_run import (
    EARLIEST_RAN_AT,
    LATEST_RAN_AT,
    MAX_EVENT_BYTES,
    Identifier,
    Label,
    Outcome,
    to_milliseconds,
)
from schemas.codec import decode_run
from schemas.ledger import Reason, number_of
from streams.rules.periods import DAY_MS
from streams.rules.records import Record, Refusal, decoded, id_keys, partition_of

FUTURE_MS_MAX: Final = 5 * 60 * 1000
AGE_MS_MAX: Final = 366 * DAY_MS
FEW: Final = 64
"""Up to so many records cost less one by one than as columns."""
ROUTES_MAX: Final = 200_000
"""Workspace → partition answers that are remembered."""

Integers = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class LeanRun(msgspec.Struct, gc=False):
    """A cell run as it is decoded first: ids and times are text, checked later."""

    run_id: Annotated[str, Meta(min_length=36, max_length=36)]
    workspace_id: Identifier
    table_id: Identifier
    column_id: Identifier
    row_id: Identifier
    action: Identifier
    outcome: Literal["data", "no_data", "error"]
    ran_at: Annotated[str, Meta(min_length=20, max_length=35)]
    own_api_key: bool = False
    triggered_by: Label | None = None
    actor: Label | None = None


_OPTIONAL: Final = ("triggered_by", "actor")
TEXTS: Final = ("workspace_id", "table_id", "column_id", "row_id", "action", *_OPTIONAL)


class Runs(msgspec.Struct, frozen=True):
    """One chunk as columns, in Kafka's order: one row for every record, refused ones blank."""

    offsets: Integers
    recorded_ms: Integers
    ran_ms: Integers
    run_ids: bytes
    """16 bytes for each row."""
    keys: npt.NDArray[np.uint64]
    """The duplicate filter's key of each run id: both halves of the UUID, mixed (see `id_keys`)."""
    own_api_key: Mask
    outcome: npt.NDArray[np.int8]
    """0 blank, else the ledger's number of the outcome."""
    lean: list[LeanRun]
    """What the columns of text are made of; emptied then."""
    refusals: dict[int, Refusal]
    """Row → why it is a dead letter."""
    made: dict[str, pa.Array] = {}  # msgspec copies it
    """The columns of text, once they are made."""

    @property
    def columns(self) -> dict[str, pa.Array]:
        """run_id, workspace_id, table_id, column_id, row_id, action, triggered_by, actor."""
        if not self.made:
            self.make_columns()
        return self.made

    def make_columns(self) -> None:
        """Let go of the lean runs, for columns."""
        ids = pa.Array.from_buffers(pa.binary(16), len(self.lean), [None, pa.py_buffer(self.run_ids)])
        self.made["run_id"] = ids
        for name in TEXTS:
            column = pa.array(list(map(attrgetter(name), self.lean)), pa.string())
            self.made[name] = column.fill_null("") if name in _OPTIONAL else column
        self.lean.clear()

    def texts(self, name: str, rows: Sequence[int]) -> list[str]:
        """One field of some runs."""
        if self.lean:
            return [getattr(self.lean[row], name) or "" for row in rows]
        found: list[str] = self.columns[name].take(pa.array(rows, pa.int64())).to_pylist()
        return found

    def run_id(self, row: int) -> UUID:
        """The id of one run."""
        return UUID(bytes=self.run_ids[16 * row : 16 * row + 16])

    def coded(self, name: str) -> "Coded":
        """One column of text by its distinct values."""
        if self.lean:
            places: dict[str, int] = {}
            codes = [places.setdefault(getattr(run, name), len(places)) for run in self.lean]
            return Coded(list(places), np.array(codes, np.int64))
        encoded = self.columns[name].dictionary_encode()
        return Coded(encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64))


class Coded(NamedTuple):
    """A column of text: row → place among the distinct values."""

    names: list[str]
    codes: Integers


_NIL: Final = "00000000-0000-0000-0000-000000000000"
_NEVER: Final = "2020-01-01T00:00:00Z"
_BLANK: Final = LeanRun(_NIL, "", "", "", "", "", "data", _NEVER)
_OUTCOME_NUMBERS: Final = {str(outcome): number_of(outcome) for outcome in Outcome}
_RFC_3339: Final = r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-](0\d|1[0-4]):[0-5]\d)$"
_EARLIEST_MS: Final = to_milliseconds(EARLIEST_RAN_AT)
_LATEST_MS: Final = to_milliseconds(LATEST_RAN_AT)

_decode_lean: Final = msgspec.json.Decoder(LeanRun).decode


def read_chunk(records: Sequence[Record], partition: int, partitions: int) -> Runs:
    """Decode and check the records of one partition, in the order of the published checks up to ``stale_run``."""
    refusals: dict[int, Refusal] = {}
    lean = _decode(records, refusals)
    convert = _convert_few if len(lean) <= FEW else _convert
    converted = convert(lean)
    if converted is None or converted.odd.any():
        odd = np.ones(len(lean), np.bool_) if converted is None else converted.odd
        for row in map(int, np.flatnonzero(odd)):
            lean[row] = _decode_strictly(records[row].value, row, refusals)
        converted = convert(lean)
        assert converted is not None
    names = [run.workspace_id for run in lean]
    runs = _runs(records, lean, converted, refusals)
    _refuse_misrouted(records, names, refusals, partition, partitions)
    _refuse_untimely(runs)
    if len(lean) > FEW:
        runs.make_columns()
    return runs


def _decode(records: Sequence[Record], refusals: dict[int, Refusal]) -> list[LeanRun]:
    lean: list[LeanRun] = []
    for row, record in enumerate(records):
        value = record.value
        if value is not None and len(value) <= MAX_EVENT_BYTES:
            try:
                lean.append(_decode_lean(value))
                continue
            except (msgspec.MsgspecError, UnicodeError, RecursionError):
                pass
        lean.append(_decode_strictly(value, row, refusals))
    return lean


def _decode_strictly(value: bytes | None, row: int, refusals: dict[int, Refusal]) -> LeanRun:
    """The definition: what `decode_run` says of this record, as a lean run in canonical form."""
    run = decoded(value, decode_run)
    if isinstance(run, Refusal):
        refusals[row] = run
        return _BLANK
    text = {name: getattr(run, name) for name in LeanRun.__struct_fields__}
    milliseconds = to_milliseconds(run.ran_at)
    canonical = str(np.datetime_as_string(np.datetime64(milliseconds, "ms"))) + "Z"
    return LeanRun(**text | {"run_id": str(run.run_id), "outcome": str(run.outcome), "ran_at": canonical})


class _Converted(NamedTuple):
    """The two columns that are more than text, and the rows whose text is not in the plain shape."""

    run_ids: bytes
    ran_ms: Integers
    odd: Mask


def _convert_few(lean: list[LeanRun]) -> _Converted:
    """As `_convert`, one by one."""
    ids, times, odd = [], [], []
    for run in lean:
        milliseconds = _plain_milliseconds(run.ran_at)
        is_plain = milliseconds is not None and _PLAIN_ID(run.run_id) is not None
        ids.append(run.run_id.replace("-", "") if is_plain else _NIL.replace("-", ""))
        times.append(milliseconds or 0)
        odd.append(not is_plain)
    return _Converted(bytes.fromhex("".join(ids)), np.array(times, np.int64), np.array(odd, np.bool_))


def _plain_milliseconds(text: str) -> int | None:
    """Unix milliseconds, truncated, of a time in the plain shape; None for all others, and for nanoseconds of the last
    millisecond that there is: the definition rounds them.
    """
    if _PLAIN_TIME(text) is None:
        return None
    try:
        milliseconds = to_milliseconds(datetime.fromisoformat(text))
    except ValueError:
        return None
    last = _LATEST_MS if len(text) <= _MICROSECONDS else _LATEST_MS - 1
    return milliseconds if _EARLIEST_MS <= milliseconds <= last else None


_MICROSECONDS: Final = len("2026-08-20T12:00:00.123456Z")
_PLAIN_ID: Final = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE | re.ASCII).fullmatch
_PLAIN_TIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,9})?Z", re.ASCII).fullmatch


def _convert(lean: list[LeanRun]) -> _Converted | None:
    """Run ids as bytes and times as Unix milliseconds, truncated; None when some text is no id or no time."""
    texts = pa.array([run.ran_at for run in lean], pa.string())
    letters = "".join([run.run_id for run in lean]).encode()
    try:
        ran_ms = _milliseconds(texts)
        run_ids = bytes.fromhex(letters.replace(b"-", b"").decode())
    except ValueError:
        return None
    if len(run_ids) != 16 * len(lean) or len(letters) != 36 * len(lean):
        return None
    untimely = (ran_ms < _EARLIEST_MS) | (ran_ms > _LATEST_MS)
    return _Converted(run_ids, ran_ms, _odd_times(texts) | untimely | _odd_ids(letters))


def _milliseconds(texts: pa.Array) -> Integers:
    """Unix milliseconds, truncated; ValueError when a text is no time. Go and Java write nanoseconds: plain too."""
    try:
        microseconds: Integers = texts.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_numpy()
        return microseconds // 1000
    except pa.ArrowInvalid:
        nanoseconds: Integers = texts.cast(pa.timestamp("ns", "UTC")).cast(pa.int64()).to_numpy()
        return nanoseconds // 1_000_000


def _odd_ids(letters: bytes) -> Mask:
    """Rows whose id has its four dashes elsewhere, or more of them, or blanks: `bytes.fromhex` skips blanks."""
    grid = np.frombuffer(letters, np.uint8).reshape(-1, 36)
    odd: Mask = (grid[:, _DASHES] != ord("-")).any(axis=1) | ((grid <= ord("-")).sum(axis=1) != len(_DASHES))
    return odd


def _odd_times(texts: pa.Array) -> Mask:
    """Rows whose time Arrow has read, but which RFC 3339 may write otherwise, or not at all.

    Nearly every chunk has times of one length that end in Z: then four columns of letters tell, without a pattern.
    """
    letters = np.frombuffer(texts.buffers()[2], np.uint8)
    if len(letters) % len(texts) == 0 and (length := len(letters) // len(texts)) >= 20:
        grid = letters.reshape(-1, length)
        if (grid[:, _PLACES] == _LETTERS).all() and (grid[:, -1] == ord("Z")).all():
            odd: Mask = (grid[:, 19] != ord(".")) & (grid[:, 19] != ord("Z"))
            return odd
    plain: Mask = pc.match_substring_regex(texts, _RFC_3339).to_numpy(zero_copy_only=False)
    return ~plain


_DASHES: Final = [8, 13, 18, 23]
_PLACES: Final = [10, 13, 16]
_LETTERS: Final = np.frombuffer(b"T::", np.uint8)


def _runs(records: Sequence[Record], lean: list[LeanRun], converted: _Converted, refusals: dict[int, Refusal]) -> Runs:
    outcome = np.array([_OUTCOME_NUMBERS[run.outcome] for run in lean], np.int8)
    outcome[list(refusals)] = 0
    return Runs(
        offsets=np.array([record.offset for record in records], np.int64),
        recorded_ms=np.array([record.timestamp for record in records], np.int64),
        ran_ms=converted.ran_ms,
        run_ids=converted.run_ids,
        keys=id_keys(converted.run_ids),
        own_api_key=np.array([run.own_api_key for run in lean], np.bool_),
        outcome=outcome,
        lean=lean,
        refusals=refusals,
    )


_routes: Final[dict[tuple[bytes | None, str, int], int]] = {}


def _home(key: bytes | None, workspace_id: str, partitions: int) -> int:
    """The partition in which a record of this key and workspace belongs; `_NOWHERE`: the key is not the workspace."""
    place = key, workspace_id, partitions
    if (found := _routes.get(place)) is None:
        if len(_routes) >= ROUTES_MAX:
            _routes.clear()
        is_keyed = key == workspace_id.encode()
        found = _routes[place] = partition_of(workspace_id, partitions) if is_keyed else _NOWHERE
    return found


_NOWHERE: Final = -1


def _refuse_misrouted(
    records: Sequence[Record], names: list[str], refusals: dict[int, Refusal], partition: int, partitions: int
) -> None:
    keys = [record.key for record in records]
    strays = {
        (key, name): home
        for key, name in set(zip(keys, names, strict=True))
        if (home := _home(key, name, partitions)) != partition
    }
    if not strays:
        return
    for row, place in enumerate(zip(keys, names, strict=True)):
        if place not in strays or row in refusals:
            continue
        key, name = place
        detail = (
            f"the Kafka key is {_show(key)}, the workspace_id {name!r}"
            if strays[place] == _NOWHERE
            else f"partition {partition}, but the key's murmur2 hash gives {strays[place]}"
        )
        refusals[row] = Refusal(Reason.MISROUTED, detail)


def _show(key: bytes | None) -> str:
    return "missing" if key is None else repr(key[:64].decode(errors="backslashreplace"))


def _refuse_untimely(runs: Runs) -> None:
    ahead = runs.ran_ms - runs.recorded_ms
    for row in map(int, np.flatnonzero((ahead > FUTURE_MS_MAX) | (ahead < -AGE_MS_MAX))):
        if row in runs.refusals:
            continue
        milliseconds = int(ahead[row])
        runs.refusals[row] = (
            Refusal(Reason.FUTURE_RUN, f"`ran_at` is {milliseconds / 1000:,.3f} s ahead of the broker, at most 300 s")
            if milliseconds > 0
            else Refusal(Reason.STALE_RUN, f"`ran_at` is over {-milliseconds // DAY_MS} days old, at most 366")
        )
