"""The metered event: what is a cell run and what is malformed, and how its time is read."""

import json
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta, timezone
from datetime import time as dt_time
from typing import Any, Final
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.cell_run import EARLIEST_RAN_AT, CellRun, Outcome, from_milliseconds, to_milliseconds
from schemas.codec import decode_run, encode_run

EVENT: Final[Mapping[str, Any]] = {
    "run_id": "01938d0e-7c00-7000-8000-000000000001",
    "workspace_id": "ws_acme",
    "table_id": "tbl_leads",
    "column_id": "col_email",
    "row_id": "row_17",
    "action": "find_work_email",
    "outcome": "data",
    "ran_at": "2026-11-22T11:59:58.123456+02:00",
}
REQUIRED: Final = tuple(EVENT)
IDENTIFIERS: Final = ("workspace_id", "table_id", "column_id", "row_id", "action")
OFFSETS: Final = st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
INSTANTS: Final = st.datetimes(datetime(2020, 1, 2), datetime(9999, 12, 30), timezones=OFFSETS)  # noqa: DTZ001
RUNS: Final = st.builds(
    CellRun,
    run_id=st.uuids(),
    **dict.fromkeys(IDENTIFIERS, st.text(st.characters(codec="utf-8"), min_size=1, max_size=128)),
    outcome=st.sampled_from(Outcome),
    ran_at=INSTANTS,
    own_api_key=st.booleans(),
    triggered_by=st.none() | st.text(st.characters(codec="utf-8"), max_size=128),
    actor=st.none() | st.text(st.characters(codec="utf-8"), max_size=128),
)


def decoded(**changed: Any) -> CellRun:
    return decode_run(json.dumps({**EVENT, **changed}).encode())


def ran_at(text: str) -> str:
    return decoded(ran_at=text).ran_at.astimezone(UTC).isoformat()


@given(RUNS)
def test_encode_then_decode_gives_the_same_run(run: CellRun) -> None:
    assert decode_run(encode_run(run)) == run


def test_absent_fields_have_the_documented_defaults() -> None:
    run = decoded()
    assert run.run_id == UUID(EVENT["run_id"])
    assert (run.own_api_key, run.triggered_by, run.actor) == (False, None, None)


def test_unknown_fields_are_ignored() -> None:
    """A producer may be newer than the meter."""
    assert decoded(model="large", nested={"deep": [1, {}]}) == decoded()


@pytest.mark.parametrize("first", ['"error"', '"found"', "7", "null"])
def test_of_a_field_that_stands_there_twice_the_last_one_counts(first: str) -> None:
    """Whatever the first one holds: two decoders must not disagree on what is malformed."""
    assert decode_run(b'{"outcome": ' + first.encode() + b", " + json.dumps(EVENT).encode()[1:]) == decoded()


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_malformed_and_named(field: str) -> None:
    event = {name: value for name, value in EVENT.items() if name != field}
    with pytest.raises(msgspec.ValidationError, match=f"missing required field `{field}`"):
        decode_run(json.dumps(event).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, "") for field in IDENTIFIERS),
        *((field, "x" * 129) for field in (*IDENTIFIERS, "triggered_by", "actor")),
        *((field, None) for field in (*REQUIRED, "own_api_key")),
        ("workspace_id", 7),
        ("run_id", "no-uuid"),
        ("outcome", "found"),
        ("outcome", "DATA"),
        ("own_api_key", 1),
        ("own_api_key", "false"),
        ("ran_at", 1_795_348_798),
        ("ran_at", "2026-11-22"),
        ("ran_at", "2026-11-22T11:59:58"),
        ("ran_at", "2026-02-29T11:59:58Z"),
        ("ran_at", "2026-11-22T24:00:00Z"),
    ],
)
def test_a_wrong_field_is_malformed_and_named(field: str, value: Any) -> None:
    with pytest.raises(msgspec.ValidationError, match=rf"`\$\.{field}`"):
        decoded(**{field: value})


@pytest.mark.parametrize("field", IDENTIFIERS)
def test_128_characters_fit_whatever_their_bytes(field: str) -> None:
    assert getattr(decoded(**{field: "😀" * 128}), field) == "😀" * 128


@pytest.mark.parametrize(
    "value",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"workspace_id": "\xff"}', b'{"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}"],
    ids=["empty", "cut", "array", "null", "binary", "not_utf8", "nested"],
)
def test_whatever_is_no_cell_run_is_one_kind_of_error(value: bytes) -> None:
    """A caller catches `msgspec.DecodeError` and nothing else; no bytes can raise past it."""
    with pytest.raises(msgspec.DecodeError):
        decode_run(value)


@given(st.binary())
def test_random_bytes_are_refused_by_that_error(value: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode_run(value)


def test_a_run_without_an_offset_is_refused_where_it_is_made() -> None:
    """A worker's own mistake, in a sentence, before anything compares it."""
    known = decoded(ran_at="2026-11-22T11:59:58Z")
    with pytest.raises(ValueError, match="`ran_at` has no offset from UTC"):
        msgspec.structs.replace(known, ran_at=known.ran_at.replace(tzinfo=None))


@pytest.mark.parametrize(
    "wrong", [5, None, "2026-11-22T11:59:58Z", date(2026, 11, 22), dt_time(11, tzinfo=UTC)], ids=repr
)
def test_a_run_whose_time_is_none_is_refused_where_it_is_made(wrong: object) -> None:
    """In a sentence that names the field, what it got and what to write."""
    with pytest.raises(TypeError, match=r"`ran_at` is not a datetime but .*: write datetime\.now\(UTC\), for example"):
        msgspec.structs.replace(decoded(), ran_at=wrong)


@pytest.mark.parametrize("text", ["2019-12-31T23:59:59.999Z", "2020-01-01T00:59:59+01:00", "0001-01-01T00:00:00+14:00"])
def test_before_2020_is_malformed_in_utc(text: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="`ran_at` is before 2020"):
        decoded(ran_at=text)


@pytest.mark.parametrize("text", ["2020-01-01T00:00:00Z", "2019-12-31T23:00:00-01:00"])
def test_the_first_instant_of_2020_is_accepted(text: str) -> None:
    assert decoded(ran_at=text).ran_at == EARLIEST_RAN_AT


def test_an_instant_beyond_year_9999_in_utc_is_malformed() -> None:
    """It has no UTC form, so every later conversion would fail on it."""
    assert ran_at("9999-12-31T23:59:59.999Z")
    with pytest.raises(msgspec.ValidationError, match="`ran_at` is after the year 9999"):
        decoded(ran_at="9999-12-31T23:59:59-00:01")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025-12-31T23:59:59.9999999Z", "2025-12-31T23:59:59.999999+00:00"),
        ("2026-01-31T23:59:59.999999999+00:00", "2026-01-31T23:59:59.999999+00:00"),
        ("2026-01-31T23:59:59.1234564Z", "2026-01-31T23:59:59.123456+00:00"),
    ],
)
def test_nanoseconds_are_cut_and_never_rounded_into_the_next_period(text: str, expected: str) -> None:
    assert ran_at(text) == expected


def test_nanoseconds_do_not_lift_a_run_into_2020() -> None:
    with pytest.raises(msgspec.DecodeError, match="`ran_at` is before 2020"):
        decoded(ran_at="2019-12-31T23:59:59.999999999Z")


@given(INSTANTS)
def test_milliseconds_are_truncated_and_never_rounded(instant: datetime) -> None:
    """The millisecond of an instant is the one that it lies in."""
    start = from_milliseconds(to_milliseconds(instant))
    assert start <= instant < start + timedelta(milliseconds=1)


@given(st.datetimes(datetime(1900, 1, 1), datetime(1970, 1, 1), timezones=OFFSETS))  # noqa: DTZ001
def test_truncation_goes_to_the_past_before_1970_too(instant: datetime) -> None:
    start = from_milliseconds(to_milliseconds(instant))
    assert start <= instant < start + timedelta(milliseconds=1)


@given(st.integers(0, to_milliseconds(datetime.max.replace(tzinfo=UTC))))
def test_milliseconds_survive_the_way_there_and_back(milliseconds: int) -> None:
    assert to_milliseconds(from_milliseconds(milliseconds)) == milliseconds
