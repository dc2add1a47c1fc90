"""Bytes from Kafka → columns: the lean road reads what `decode_run` reads, and nothing that comes can stop it."""

import json
import random
from itertools import pairwise
from typing import Any, Final
from uuid import UUID

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from aiokafka.partitioner import DefaultPartitioner
from clickhouse_connect.driver.client import Client
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.cell_run import MAX_EVENT_BYTES, CellRun, Outcome, to_milliseconds
from schemas.codec import decode_run, name_field
from schemas.ledger import DEAD_LETTER_REASONS, KINDS, REASONS, Reason
from streams.kafka.topics import CELL_RUNS
from streams.rules import intake, rating
from streams.rules.balances import Balances, Opening
from streams.rules.intake import (
    AGE_MS_MAX,
    FEW,
    FUTURE_MS_MAX,
    Runs,
    read_chunk,
)
from streams.rules.limits import Facts, Grant
from streams.rules.periods import DAY_MS, PlanChange
from streams.rules.records import Refusal, headers_text, partition_of
from streams.rules.rows import Take, counts, drawn, join_takes, ledger_rows, source_of
from tests.dead_letter_examples import RECORDED_AT, DeadLetterExample, dead_letter_examples
from tests.ledger_rows import AUGUST_MS
from tests.records import STEADY, Record, Road, event, fields_of, in_words, run_id, timestamp_text

OUTCOMES: Final = tuple(Outcome)
MADE_TEXTS: Final = ("workspace_id", "table_id", "column_id", "row_id", "action", "triggered_by", "actor")


# Events that are valid or nearly so.

letters = st.sampled_from(["a", "Z", "0", "é", "语", "🧪", "\0", '"', "\\", "/", "\n", "\x7f", " ", "\ufeff"])
texts = st.builds(
    lambda letter, length: letter * length, letters, st.sampled_from([0, 1, 2, 36, 127, 128, 129])
) | st.text(max_size=6)


@st.composite
def times(draw: st.DrawFn) -> str:
    """RFC 3339 in legal and nearly legal forms."""
    year = draw(st.sampled_from(["2026", "2020", "2019", "9999", "0001", "0000", "1970", "12026"]))
    date = f"{year}-{draw(st.integers(0, 13)):02}-{draw(st.sampled_from([0, 1, 28, 29, 30, 31, 32])):02}"
    if draw(st.booleans()):
        date = draw(st.sampled_from(["2026-08-20", "2020-01-01", "2019-12-31", "9999-12-31", "2024-02-29"]))
    clock = draw(st.sampled_from(["12:00:00", "00:00:00", "23:59:59", "23:59:60", "24:00:00", "12:60:00", "1:00:00"]))
    digits = draw(st.text("0123456789", max_size=10) | st.sampled_from(["9" * n for n in range(1, 10)]))
    dot = "." if digits else draw(st.sampled_from(["", "", "", "."]))
    separator = draw(st.sampled_from("TTTTTt _"))
    return f"{date}{separator}{clock}{dot}{digits}{draw(zones)}"


zones = st.sampled_from(["Z"] * 8 + ["z", "", "+00:00", "-00:00", "+0200", "+02", "+2:00", " Z", "Z\n", "+02:00 "]) | (
    st.builds("{}{:02}:{:02}".format, st.sampled_from("+-"), st.integers(0, 25), st.sampled_from([0, 30, 59, 60]))
)
NEIGHBOURS: Final = (
    ("a" * 36, "aaaaaaaa-aaaa-aaaa-aaaa--a-a-a-aaaaa"),
    ("a" * 35 + "-", "aaaaaaaa-aaaa-aaaa-aaaa- a\ta\naaaaaaa"),
)
"""Pairs of ids that are none, and that together have as many hexadecimal digits as two UUIDs."""
uuids = st.uuids().flatmap(
    lambda uuid: st.sampled_from(
        [
            str(uuid),
            str(uuid).upper(),
            uuid.hex,
            uuid.hex.upper(),
            f"{{{uuid}}}",
            uuid.urn,
            f" {uuid}"[:36],
            f"{uuid}"[:35],
            f"{uuid}0",
            f"{uuid}"[:35] + "g",
            f"{uuid}"[:35] + "é",
            f"{uuid}"[:34] + "é",
            f"{uuid}"[:35] + "\0",
            str(uuid).replace("-", "_"),
            f"{uuid.hex[:7]}-{uuid.hex[7:13]}-{uuid.hex[13:17]}-{uuid.hex[17:21]}-{uuid.hex[21:]}",
            uuid.hex + "----",
            "-" * 36,
            *NEIGHBOURS[0],
            *NEIGHBOURS[1],
        ]
    )
)
strangers = st.sampled_from([None, True, 0, -1, 1.5, 10**30, [], ["data"], {}, {"a": None}, "", "true", "data "])
ODD: Final[dict[str, st.SearchStrategy[Any]]] = {
    **dict.fromkeys(MADE_TEXTS, texts),
    "run_id": uuids,
    "ran_at": times(),
    "outcome": st.sampled_from(["data", "no_data", "error", "DATA", "", "no data"]),
    "own_api_key": st.booleans(),
    "unknown_field": st.recursive(strangers, lambda inner: st.lists(inner) | st.dictionaries(texts, inner)),
}
odd_fields = st.sampled_from(sorted(ODD)).flatmap(lambda name: st.tuples(st.just(name), ODD[name] | strangers))


@st.composite
def values(draw: st.DrawFn) -> bytes:
    """A valid event with a few changes: odd and wrong values, missing, new and repeated fields, odd JSON."""
    pairs = list(fields_of(run=draw(st.integers(0, 50))).items())
    for _ in range(draw(st.integers(0, 3))):
        name, value = draw(odd_fields)
        match draw(st.sampled_from(["replace", "replace", "replace", "before", "after", "drop"])):
            case "replace":
                pairs = [*((key, old) for key, old in pairs if key != name), (name, value)]
            case "before":
                pairs.insert(0, (name, value))
            case "after":
                pairs.append((name, value))
            case "drop":
                pairs = [(key, old) for key, old in pairs if key != name]
    if draw(st.booleans()):
        pairs = draw(st.permutations(pairs))
    colon, comma = draw(st.sampled_from([(":", ","), (": ", ", "), ("\n:\t", " ,\r\n")]))
    ascii_only = draw(st.booleans())
    text = comma.join(
        f"{_spelled(draw, key)}{colon}{json.dumps(value, ensure_ascii=ascii_only)}" for key, value in pairs
    )
    value = f"{{{text}}}".encode()
    return draw(st.sampled_from([value] * 12 + [value[:-1], value + b" \n", value + b"x", b"\xef\xbb\xbf" + value]))


def _spelled(draw: st.DrawFn, key: str) -> str:
    """A key as JSON, now and then with an escape."""
    if draw(st.integers(0, 15)):
        return json.dumps(key)
    return f'"\\u{ord(key[0]):04x}{key[1:]}"'


def read(*found: bytes | None) -> Runs:
    """One chunk whose records are routed and timed as their runs want it: only decoding can refuse them."""
    return read_chunk([fitting(at, value) for at, value in enumerate(found)], 0, 1)


def fitting(offset: int, value: bytes | None) -> Record:
    """A record whose key and append time fit its value, where that is a run."""
    try:
        run = decode_run(value or b"")
    except msgspec.DecodeError:
        return Record(offset, value)
    return Record(offset, value, run.workspace_id.encode(), to_milliseconds(run.ran_at))


def row_of(runs: Runs, row: int) -> tuple[Any, ...]:
    """What the columns hold of one run."""
    texts = {name: column[row].as_py() for name, column in runs.columns.items()}
    return (
        UUID(bytes=texts["run_id"]),
        *(texts[name] for name in MADE_TEXTS),
        OUTCOMES[runs.outcome[row] - 1],
        bool(runs.own_api_key[row]),
        int(runs.ran_ms[row]),
    )


def defined(run: CellRun) -> tuple[Any, ...]:
    """The same, by the definition."""
    return (
        run.run_id,
        *(getattr(run, name) or "" for name in MADE_TEXTS),
        run.outcome,
        run.own_api_key,
        to_milliseconds(run.ran_at),
    )


def assert_as_defined(found: list[bytes]) -> None:
    """Verdict and values of every record are those of `decode_run`, among few records and among many."""
    many = found * (FEW // len(found) + 1)
    for values in (found, many):
        runs = read(*values)
        for row, value in enumerate(found):
            try:
                expected = defined(decode_run(value))
            except msgspec.DecodeError as error:
                refusal = Refusal(Reason.MALFORMED, name_field(str(error)))
                assert (refusal, 0) == (runs.refusals.get(row), runs.outcome[row])
            else:
                assert row not in runs.refusals
                assert row_of(runs, row) == expected


# The lean road and the strict road.


@settings(STEADY, max_examples=250)
@given(st.lists(values(), min_size=1, max_size=4))
@example([b'{"ran_at":"some twenty letters.",' + event()[1:]])
@example([b'{"run_id":"thirty-six letters that are no UUID!",' + event()[1:]])
@example([event(run_id=text) for text in NEIGHBOURS[0]])
@example([event(run_id=text) for text in NEIGHBOURS[1]])
@example([event(ran_at="9999-12-31T23:59:59-14:00")])
@example([event(ran_at="9999-12-31T23:59:59-23:59")])
@example([event(ran_at="9999-12-31T23:59:59.999999Z")])
@example([event(ran_at="9999-12-31T23:59:59Z"), event(ran_at="2026-08-31T23:59:59.123456789Z")])
@example([event(ran_at="1600-01-01T00:00:00Z"), event(ran_at="2026-08-31T23:59:59.123456789Z")])
@example([event(ran_at="2300-01-01T00:00:00.123456789Z"), event(ran_at="1677-01-01T00:00:00.123456789Z")])
@example([event(ran_at="1677-09-21T00:12:44.123456789+14:00"), event(ran_at="2262-04-11T23:47:16.123456789-14:00")])
@example([event(ran_at="2019-12-31T23:59:59.9999999Z")])
@example([event(ran_at="2019-12-31T23:59:59.999999999Z")])
@example([event(ran_at="2026-08-31T23:59:59.999999999Z")])
@example([event(ran_at="2026-08-31T23:59:59.9999999999Z")])
@example([event(ran_at="2026-08-20T12:00:00.Z")])
@example([event(ran_at="2026-08-20T12:00:00+02")])
@example([event(ran_at="2026-08-20T12:00:00+0200")])
@example([event(ran_at="2026-08-20T12:00+02:00")])
@example([event(ran_at="2026-08-20T12:00:00+02"), event(ran_at="2026-08-20T12:00:00.123456789Z")])
def test_the_lean_road_reads_what_the_definition_reads(found: list[bytes]) -> None:
    """Odd and broken events, in any company and alone, have the verdict and the values of `decode_run`.

    Alone and beside a plain one too, because company that no column conversion takes sends all down the strict road.
    """
    assert_as_defined(found)
    for value in found:
        assert_as_defined([value, event()])
        assert_as_defined([value])


@settings(STEADY, max_examples=400)
@given(times())
def test_every_form_of_time(text: str) -> None:
    """Whatever a time looks like, both roads accept the same ones and read the same millisecond."""
    found = [event(ran_at=text), event(ran_at="2026-08-20T12:00:00.123456789Z")]

    assert_as_defined(found[:1])
    assert_as_defined(found)


@settings(STEADY, max_examples=150)
@given(uuids, uuids)
def test_every_form_of_run_id(one: str, other: str) -> None:
    """Whatever a run id looks like, both roads accept the same ones and read the same 16 bytes."""
    found = [event(run_id=one), event(run_id=other)]

    assert_as_defined(found[:1])
    assert_as_defined(found)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2026-08-20T12:00:00Z", "2026-08-20T12:00:00.000Z"),
        ("2026-08-20t12:00:00z", "2026-08-20T12:00:00.000Z"),
        ("2026-08-20 12:00:00Z", "2026-08-20T12:00:00.000Z"),
        ("2026-08-20T12:00:00.1Z", "2026-08-20T12:00:00.100Z"),
        ("2026-08-20T12:00:00.1239Z", "2026-08-20T12:00:00.123Z"),
        ("2026-08-20T12:00:00.123999Z", "2026-08-20T12:00:00.123Z"),
        ("2026-08-20T12:00:00.123999999Z", "2026-08-20T12:00:00.123Z"),
        ("2026-08-31T23:59:59.9999999Z", "2026-08-31T23:59:59.999Z"),
        ("2026-08-20T12:00:00-00:00", "2026-08-20T12:00:00.000Z"),
        ("2026-08-20T00:30:00+14:00", "2026-08-19T10:30:00.000Z"),
        ("2026-08-20T00:30:00+23:59", "2026-08-19T00:31:00.000Z"),
        ("2026-08-20T23:30:00-01:30", "2026-08-21T01:00:00.000Z"),
        ("2020-01-01T00:00:00Z", "2020-01-01T00:00:00.000Z"),
        ("2019-12-31T23:00:00-01:00", "2020-01-01T00:00:00.000Z"),
    ],
)
def test_times_are_truncated_to_milliseconds(text: str, same: str) -> None:
    """Legal forms of a time, and the millisecond that each falls into: cut, never rounded."""
    runs = read(event(ran_at=text))

    assert not runs.refusals
    assert timestamp_text(int(runs.ran_ms[0])) == same


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"run_id": None}, "Object missing required field `run_id`"),
        ({"run_id": "7"}, "field `run_id`: Invalid UUID"),
        ({"run_id": 7}, "field `run_id`: Expected `uuid`, got `int`"),
        ({"workspace_id": ""}, "field `workspace_id`: Expected `str` of length >= 1"),
        ({"row_id": "r" * 129}, "field `row_id`: Expected `str` of length <= 128"),
        ({"actor": "a" * 129}, "field `actor`: Expected `str` of length <= 128"),
        ({"outcome": "fine"}, "field `outcome`: Invalid enum value 'fine'; it takes data, no_data, error"),
        ({"own_api_key": "no"}, "field `own_api_key`: Expected `bool`, got `str`"),
        ({"ran_at": "2026-08-20T12:00:00"}, "field `ran_at`: Expected `datetime` with a timezone component"),
        ({"ran_at": "yesterday"}, "field `ran_at`: Invalid RFC3339 encoded datetime"),
        ({"ran_at": "2019-12-31T23:59:59.999Z"}, "`ran_at` is before 2020"),
        ({"ran_at": "2019-12-31T23:59:59.9999999Z"}, "`ran_at` is before 2020"),
        ({"ran_at": "9999-12-31T23:59:59-01:00"}, "`ran_at` is after the year 9999 in UTC"),
    ],
)
def test_a_malformed_event_names_its_field(fields: dict[str, Any], detail: str) -> None:
    """The dead letter of a malformed event says which field is wrong, and how."""
    assert read(event(**fields)).refusals == {0: (Reason.MALFORMED, detail)}


def test_optional_fields_may_be_left_out_or_null() -> None:
    """Nobody need say who started a run; nothing said, null and the empty text are the same row."""
    runs = read(
        event(),
        b'{"triggered_by":null,"actor":null,' + event()[1:],
        event(triggered_by="", actor=""),
        event(actor="a" * 128),
    )

    assert not runs.refusals
    assert runs.columns["actor"].to_pylist() == ["", "", "", "a" * 128]
    assert runs.columns["triggered_by"].to_pylist() == [""] * 4


def test_a_newer_producer_is_understood() -> None:
    """Unknown fields are ignored."""
    assert not read(event(waterfall_step=3, provider={"name": "x", "tries": [1, 2]})).refusals


def test_lengths_count_characters() -> None:
    """128 characters are 128 characters, whatever their bytes."""
    names = ["a" * 128, "é" * 128, "🧪" * 128, "\0" * 128]
    runs = read(*(event(workspace_id=name) for name in names))

    assert not runs.refusals
    assert runs.columns["workspace_id"].to_pylist() == names


# Whatever bytes come.

wild = st.binary(max_size=60) | st.sampled_from([None, b"", b"{}", b"null", b"[]", b'"', b"\xff" * 9, b"[" * 5000])
headers = st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=8)), max_size=3)


@st.composite
def anything(draw: st.DrawFn) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes]]]:
    """Key, value and headers of a record that may be anything at all."""
    value = draw(wild | values() | values().flatmap(lambda whole: st.just(whole[: len(whole) // 2])))
    return draw(wild | st.just(b"ws_1")), value, draw(headers)


@settings(STEADY, max_examples=120)
@given(st.lists(st.lists(anything() | st.none(), min_size=1, max_size=5), min_size=1, max_size=3))
def test_no_bytes_stop_the_road(chunks: list[list[tuple[Any, ...] | None]]) -> None:
    """Each record gives one row, in order: a debit, or a dead letter with its bytes. Valid neighbours do not notice."""
    records: list[list[Record]] = []
    offset = 0
    for chunk in chunks:
        records.append([])
        for wild_one in chunk:
            key, value, sent = wild_one or (b"ws_1", event(run=1000 + offset), [])
            records[-1].append(Record(offset, value, key, AUGUST_MS, sent))
            offset += 1
    untouched = [wild_one is None for chunk in chunks for wild_one in chunk]

    table = Road().table(*records)

    flat = [record for chunk in records for record in chunk]
    assert table.column("kafka_offset").to_pylist() == list(range(offset))
    for record, row, valid in zip(flat, table.to_pylist(), untouched, strict=True):
        kind = KINDS[row["kind"] - 1]
        assert not valid or kind == "run"
        if kind == "dead_letter":
            assert row["raw"] == (record.value or b"")
            assert row["raw_key"] == (record.key or b"")
            assert row["raw_headers"] == headers_text(record.headers)
            assert REASONS[row["reason"] - 1] in DEAD_LETTER_REASONS
            assert row["detail"]
            assert row["credits"] == 0
            assert to_milliseconds(row["ran_at"]) == record.timestamp
        else:
            assert (row["raw"], row["raw_key"], row["raw_headers"]) == (b"", b"", "")
            assert record.key == row["workspace_id"].encode()


def test_huge_and_missing_values() -> None:
    """Tombstones, empty values, 64 KiB and one byte more, in one chunk with a valid event."""
    at_most = event(run=2) + b" " * (MAX_EVENT_BYTES - len(event(run=2)))
    too_much, enormous = at_most + b" ", b"x" * 1_000_000
    odd = event(run_id=run_id(6).hex).ljust(MAX_EVENT_BYTES)
    found = [None, b"", at_most, too_much, event(run=5), enormous, odd, odd + b" "]
    records = [Record(at, value) for at, value in enumerate(found)]

    table = Road().table(records)

    assert [row.reason for row in in_words(table)] == [
        "malformed", "malformed", "charged", "too_large", "charged", "too_large", "charged", "too_large",
    ]  # fmt: skip
    assert table.column("raw").to_pylist() == [b"", b"", b"", too_much, b"", enormous, b"", odd + b" "]
    assert [row.detail for row in in_words(table)][:4] == [
        "the record has no value", "Input data was truncated", "", "65,537 bytes, at most 65,536",
    ]  # fmt: skip


def test_a_value_that_is_nested_too_deeply_is_malformed() -> None:
    """64 KiB of brackets end neither the decoder nor its neighbours."""
    deep = event()[:-1] + b',"x":' + b"[" * 30_000 + b"]" * 30_000 + b"}"

    assert Road().reasons(Record(0, event(run=1)), Record(1, deep), Record(2, event(run=2))) == [
        "charged", "malformed", "charged",
    ]  # fmt: skip


@settings(STEADY, max_examples=100)
@given(headers)
def test_headers_are_kept_as_json(sent: list[tuple[str, bytes]]) -> None:
    """A dead letter's headers are JSON pairs in order; bytes that are no text are escaped."""
    text = headers_text(sent)

    assert (json.loads(text) if text else []) == [
        [name, value.decode(errors="backslashreplace")] for name, value in sent
    ]


# The order of the checks.

LARGE: Final = b"x" * (MAX_EVENT_BYTES + 1)


@pytest.mark.parametrize(
    ("reason", "record"),
    [
        ("too_large", Record(0, LARGE)),
        ("too_large", Record(0, event().ljust(MAX_EVENT_BYTES + 1), b"ws_2")),
        ("malformed", Record(0, b"{", b"ws_2")),
        ("malformed", Record(0, event(ran_at="2019-12-31T23:59:59Z"), b"ws_2")),
        ("malformed", Record(0, event(ran_at="2019-12-31T23:59:59Z"))),
        ("misrouted", Record(0, event(ran_ms=AUGUST_MS + FUTURE_MS_MAX + 1), b"ws_2")),
        ("misrouted", Record(0, event(ran_ms=AUGUST_MS - AGE_MS_MAX - 1), b"ws_2")),
        ("misrouted", Record(0, event(action="find_yeti"), None)),
        ("future_run", Record(0, event(action="find_yeti", ran_ms=AUGUST_MS + FUTURE_MS_MAX + 1))),
        ("stale_run", Record(0, event(action="find_yeti", ran_ms=AUGUST_MS - AGE_MS_MAX - 1))),
    ],
)
def test_the_first_check_that_fails_gives_the_reason(reason: str, record: Record) -> None:
    """Of two things that are wrong with an event, the one that is checked earlier is the reason."""
    assert Road().reasons(record) == [reason]


@pytest.mark.parametrize(
    ("reason", "copy"),
    [
        ("too_large", Record(1, event().ljust(MAX_EVENT_BYTES + 1))),
        ("malformed", Record(1, event()[:-1])),
        ("misrouted", Record(1, event(), b"ws_2")),
        ("future_run", Record(1, event(), timestamp=AUGUST_MS - FUTURE_MS_MAX - 1)),
        ("future_run", Record(1, event(row_id="other"), timestamp=AUGUST_MS - FUTURE_MS_MAX - 1)),
        ("stale_run", Record(1, event(), timestamp=AUGUST_MS + AGE_MS_MAX + 1)),
        ("stale_run", Record(1, event(row_id="other"), timestamp=AUGUST_MS + AGE_MS_MAX + 1)),
        ("duplicate", Record(1, event(), timestamp=AUGUST_MS + AGE_MS_MAX)),
        ("conflicting_duplicate", Record(1, event(row_id="other"))),
        ("conflicting_duplicate", Record(1, event(action="find_yeti"))),
    ],
)
def test_a_copy_is_looked_for_after_the_event_itself_is_checked(reason: str, copy: Record) -> None:
    """What is wrong with a copy by itself comes first, then whether it conflicts, then its unknown action."""
    assert Road().reasons(Record(0, event()), copy) == ["charged", reason]


@pytest.mark.parametrize(
    ("ran_ms", "recorded_ms", "reason"),
    [
        (AUGUST_MS + 300_000, AUGUST_MS, "charged"),
        (AUGUST_MS + 300_001, AUGUST_MS, "future_run"),
        (AUGUST_MS - 366 * DAY_MS, AUGUST_MS, "charged"),
        (AUGUST_MS - 366 * DAY_MS - 1, AUGUST_MS, "stale_run"),
    ],
)
def test_the_edges_of_time(ran_ms: int, recorded_ms: int, reason: str) -> None:
    """5 minutes ahead and 366 days back are allowed to the millisecond."""
    assert Road().reasons(Record(0, event(ran_ms=ran_ms), timestamp=recorded_ms)) == [reason]


def test_the_earliest_time() -> None:
    """2020 begins at its first millisecond, whatever the clock of the broker says."""
    first = 1_577_836_800_000
    records = [
        Record(0, event(run=0, ran_ms=first), timestamp=first),
        Record(1, event(run=1, ran_ms=first - 1), timestamp=first),
    ]

    assert Road().reasons(*records) == ["charged", "malformed"]


def test_the_details_of_time_and_place() -> None:
    """A dead letter says how far its run is off, and where its key leads."""
    road = Road(partition=1, partitions=4)
    assert partition_of("ws_1", 4) != 1
    (other,) = {partition_of("ws_1", 4)}
    records = [
        Record(0, event()),
        Record(1, event(), b"ws_\xff2"),
        Record(2, event(), None),
    ]

    details = [row.detail for row in road.rows(records)]

    assert details == [
        f"partition 1, but the key's murmur2 hash gives {other}",
        "the Kafka key is 'ws_\\\\xff2', the workspace_id 'ws_1'",
        "the Kafka key is missing, the workspace_id 'ws_1'",
    ]
    early, late = (
        Road().rows([Record(0, event(ran_ms=ran_ms))])[0].detail
        for ran_ms in (AUGUST_MS + 300_001, AUGUST_MS - 366 * DAY_MS - 1)
    )
    assert early == "`ran_at` is 300.001 s ahead of the broker, at most 300 s"
    assert late == "`ran_at` is over 366 days old, at most 366"


@pytest.mark.parametrize(
    "example",
    [example for example in dead_letter_examples() if example.topic == CELL_RUNS],
    ids=lambda example: str(example.reason),
)
def test_the_checked_in_dead_letters(example: DeadLetterExample) -> None:
    """Each example of a dead letter is refused for its reason, with its bytes, after its forerunners were debited."""
    partitions = 4
    partition = partition_of(example.events[0][0].decode(), partitions)
    now_ms = to_milliseconds(RECORDED_AT)
    records = [Record(at, value, key, now_ms) for at, (key, value) in enumerate(example.events)]

    table = Road(partition=partition, partitions=partitions).table(records)

    *before, letter = in_words(table)
    assert {row.kind for row in before} <= {"run"}
    assert (letter.kind, letter.reason) == ("dead_letter", example.reason)
    assert example.detail in letter.detail
    assert table.column("raw")[-1].as_py() == example.events[-1][1]
    assert table.column("raw_key")[-1].as_py() == example.events[-1][0]


def test_every_dead_letter_reason_has_an_example() -> None:
    """The examples cover the closed list of reasons."""
    assert {example.reason for example in dead_letter_examples()} == set(DEAD_LETTER_REASONS)


# Where a workspace lies.


@pytest.mark.parametrize(
    ("key", "murmur2"),
    [
        ("21", -973932308),
        ("foobar", -790332482),
        ("a-little-bit-long-string", -985981536),
        ("a-little-bit-longer-string", -1486304829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        ("abc", 479470107),
    ],
)
def test_murmur2_is_kafkas(key: str, murmur2: int) -> None:
    """The hash is that of Kafka's own test cases (UtilsTest.java), its sign bit cleared."""
    assert partition_of(key, 2**31) == murmur2 & 0x7FFFFFFF


def test_a_workspace_lies_where_kafkas_clients_put_it(engine: Client) -> None:
    """For many names, aiokafka's partitioner and ClickHouse's kafkaMurmurHash choose the same partition as we do."""
    dice = random.Random(7)
    alphabet = "abcXYZ019_-éß语🧪\0\\'\" "
    names = ["".join(dice.choices(alphabet, k=dice.randint(1, 128))) for _ in range(3000)]
    names += [f"ws_{number:04d}" for number in range(1000)]
    partitions = [1, 2, 3, 12, 64, 2**31]
    aiokafka = DefaultPartitioner()

    hashes = engine.query_arrow(
        "SELECT bitAnd(kafkaMurmurHash(unhex(arrayJoin({names:Array(String)}))), 0x7fffffff) AS hash",
        parameters={"names": [name.encode().hex() for name in names]},
    )

    ours = np.array([[partition_of(name, count) for count in partitions] for name in names])
    assert np.array_equal(ours, hashes.column("hash").to_numpy().astype(np.int64)[:, None] % np.array(partitions))
    for name, row in zip(names, ours[:, :5].tolist(), strict=True):
        assert [aiokafka(name.encode(), list(range(count)), list(range(count))) for count in partitions[:5]] == row


@settings(STEADY, max_examples=100)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=20), st.integers(1, 5), st.data())
def test_only_records_of_this_partition_pass(names: list[str], partitions: int, data: st.DataObject) -> None:
    """A record is debited exactly on the partition of its key's hash."""
    partition = data.draw(st.integers(0, partitions - 1))
    records = [Record(at, event(run=at, workspace_id=name), name.encode()) for at, name in enumerate(names)]

    reasons = Road(partition=partition, partitions=partitions).reasons(*records)

    assert reasons == ["charged" if partition_of(name, partitions) == partition else "misrouted" for name in names]


def test_offsets_may_have_gaps() -> None:
    """A row says how far the record before it lies; the first of a chain stands for itself."""
    road = Road()
    first = road.table([Record(5, event(run=1)), Record(9, event(run=2))], [Record(10, event(run=3))])
    second = road.table([Record(20 + 2**32, event(run=4))])

    assert first.column("offset_gap").to_pylist() == [1, 4, 1]
    assert second.column("offset_gap").to_pylist() == [10 + 2**32]
    from_the_first = Road()
    assert from_the_first.table([Record(0, event(run=1))]).column("offset_gap").to_pylist() == [1]
    assert from_the_first.table([Record(4, event(run=2))]).column("offset_gap").to_pylist() == [4]
    assert first.column("run_id").to_pylist() == [run_id(number).bytes for number in (1, 2, 3)]


def test_rows_are_counted_by_kind_and_reason() -> None:
    """For the metrics and the live view."""
    runs = [event(run=1), event(run=2, outcome="no_data"), event(run=1), event(run=3, action="find_yeti"), b"{"]
    take = Road().take([Record(offset, value) for offset, value in enumerate([*runs, event(run=4)])])
    assert counts(take) == {
        "run/charged": 2, "run/no_data": 1, "duplicate/duplicate": 1, "dead_letter/unknown_action": 1,
        "dead_letter/malformed": 1,
    }  # fmt: skip


def test_what_is_remembered_of_names_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actions and workspaces are anybody's to invent; what was forgotten is found out again."""
    monkeypatch.setattr(rating, "COMBINATIONS_MAX", 3)
    monkeypatch.setattr(intake, "ROUTES_MAX", 3)
    monkeypatch.setattr(intake, "_routes", routes := {})
    road, chunk = Road(), []
    for number in range(8):
        name = f"ws_{number % 4}"
        action = "find_work_email" if number % 4 == 0 else f"find_yeti_{number % 4}"
        chunk.append(Record(number, event(run=number, action=action, workspace_id=name), name.encode()))
        kinds = [row.kind for row in road.rows(chunk[-1:])]
        assert kinds == ["run" if number % 4 == 0 else "dead_letter"]
        assert len(routes) <= 3
        assert len(road._table._answers) <= 3


# However records are cut into takes.


def _mixed(dice: random.Random) -> list[Record]:
    """Six hundred records of a month: five workspaces, all kinds of runs, copies and dead letters."""
    copies = dice.choice([0, 0.1])
    records: list[Record] = []
    for offset in range(600):
        name = f"ws_{dice.randrange(5)}"
        at_ms = AUGUST_MS + offset * DAY_MS // 24
        value = event(
            run=dice.randrange(offset + 1) if dice.random() < copies else offset,
            workspace_id=name,
            action=dice.choice(["enrich_person", "clearbit_enrich_person", "no such action"]),
            outcome=dice.choice(list(Outcome)),
            own_api_key=dice.random() < 0.2,
            ran_ms=at_ms - dice.randrange(3) * DAY_MS,
        )
        records.append(Record(offset, b"{" if dice.random() < 0.05 else value, name.encode(), at_ms))
    return records


@settings(STEADY, max_examples=30)
@given(st.integers(0, 1 << 32))
def test_takes_of_any_length_give_the_same_rows_and_balances(seed: int) -> None:
    """Few records are treated one by one, many as columns: rows, balances and alerts do not show it."""
    dice = random.Random(seed)
    records = _mixed(dice)
    cuts = sorted({0, len(records), *(dice.randrange(len(records)) for _ in range(dice.randrange(12)))})
    whole, cut = Road(), Road()

    at_once = whole.take(records)
    apart = [cut.take(records[start:end]) for start, end in pairwise(cuts)]

    assert _told(apart) == _told([at_once])
    assert ledger_rows(join_takes(apart)).equals(ledger_rows(at_once))
    assert pa.concat_tables([ledger_rows(take) for take in apart]).equals(ledger_rows(at_once))


def _told(takes: list[Take]) -> tuple[list[Any], list[Any]]:
    plan = PlanChange(AUGUST_MS - DAY_MS, (0, 0), "small", 20_000)
    grant = Grant(AUGUST_MS - DAY_MS, (0, 1), 30_000)
    balances = Balances(100, AUGUST_MS)
    balances.load({f"ws_{number}": Opening(Facts((plan,), (grant,)), {}, 0) for number in range(5)})
    notices = [
        (notice.workspace_id, notice.at_ms, notice._replace(row=0), notice.row >= 0 and source_of(take, notice.row))
        for take in takes
        for notice in balances.fold(drawn(take))
    ]
    return sorted(notices, key=lambda told: told[:2]), [
        (account.name, account.outline(), account.enrichment, account.premium) for account in balances
    ]
