"""One debit per run: a filter that never forgets, copies decided exactly, and the same rows however a stream is cut."""

import random
import tracemalloc
from collections.abc import Iterable
from itertools import islice, pairwise
from typing import Any, Final
from uuid import UUID, uuid1, uuid4

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from clickhouse_connect.driver.client import Client
from hypothesis import given, settings
from hypothesis import strategies as st
from uuid_utils.compat import uuid7

from creditstream.reference import ReferenceRater
from creditstream.simulate import events
from schemas.catalogue import EXAMPLE_CATALOGUES
from schemas.cell_run import from_milliseconds
from schemas.ledger import Identity, Kind, Reason
from sinks.accounts import find_runs
from sinks.filter_keys import key_of
from streams.rules.duplicates import RUN_SUBSTANCE, BloomFilter, Candidate, KeyFilter, Original, Verdict, decide
from streams.rules.records import id_keys, partition_of
from tests.ledger_rows import AUGUST_MS
from tests.records import STEADY, Record, Road, Row, event, in_words, write_rows

Keys = npt.NDArray[np.uint64]


def keys_of(numbers: Iterable[int]) -> Keys:
    return np.array(list(numbers), np.uint64)


def complete(bytes_max: int) -> KeyFilter:
    """An empty filter that has loaded everything."""
    run_filter = KeyFilter(bytes_max)
    run_filter.is_complete = True
    return run_filter


# The filter.

numbers = st.integers(0, 2**64 - 1) | st.integers(0, 40)
batches = st.lists(numbers, max_size=60).map(keys_of)
steps = st.lists(st.tuples(st.sampled_from(["add", "add", "add", "add_older"]), batches), max_size=25)


@settings(STEADY, max_examples=250)
@given(st.sampled_from([128, 256, 1024, 1 << 20]), steps)
def test_the_filter_never_forgets(bytes_max: int, found: list[tuple[str, Keys]]) -> None:
    """After any sequence of additions, merges and spills, every key is suspected; the memory stays bounded."""
    run_filter = complete(bytes_max)
    added = keys_of([])
    for step, keys in found:
        getattr(run_filter, step)(keys)
        added = np.concatenate([added, keys])

        assert run_filter.suspect(added).before.all()
        assert run_filter.nbytes <= bytes_max + keys.nbytes


def test_large_additions_never_forget() -> None:
    """A hundred thousand keys in batches of all sizes go through merges and spills, within the bound."""
    dice = np.random.default_rng(5)
    bytes_max = 200_000
    run_filter = complete(bytes_max)
    keys = dice.integers(0, 2**64 - 1, 100_000, np.uint64)
    cuts = np.sort(dice.integers(0, len(keys), 300))

    for start, end in pairwise([0, *cuts.tolist(), len(keys)]):
        run_filter.add(keys[start:end])
        assert run_filter.nbytes <= bytes_max

    assert run_filter.suspect(keys).before.all()


def test_the_exact_tier_suspects_nobody_else() -> None:
    """Keys that fit the bound are answered exactly."""
    run_filter = complete(1 << 22)
    run_filter.add(keys_of(range(0, 100_000, 2)))

    suspicion = run_filter.suspect(keys_of(range(100_000)))

    assert np.array_equal(suspicion.before, np.arange(100_000) % 2 == 0)


@pytest.mark.parametrize("made", ["random", "sequence", "high halves", "strides"])
@pytest.mark.parametrize(("bits_a_key", "rate_max"), [(24, 3e-4), (12, 1.5e-2), (6, 0.2)])
def test_the_older_tier_rarely_suspects_others(made: str, bits_a_key: int, rate_max: float) -> None:
    """False positives are about 1e-4 at 24 bits a key and grow gently, also for ids that somebody made up."""
    size = 50_000
    bytes_max = size * bits_a_key // 8
    step = {"sequence": 1, "high halves": 1 << 40, "strides": bytes_max // 64}.get(made)
    both = np.arange(2 * size, dtype=np.uint64) * np.uint64(step or 0)
    if made == "random":
        both = np.random.default_rng(3).integers(0, 2**64 - 1, 2 * size, np.uint64)
    bloom = BloomFilter(bytes_max)

    bloom.add(both[:size])

    assert bloom.contains(both[:size]).all()
    assert bloom.contains(both[size:]).mean() <= rate_max


def test_many_keys_at_once_need_no_memory_of_their_own() -> None:
    """A month's runs enter the older tier together, when a partition is assigned: what computes their places does not
    grow with them.
    """
    keys = np.random.default_rng(3).integers(0, 2**64 - 1, 1_000_000, np.uint64)
    bloom = BloomFilter(len(keys))
    tracemalloc.start()
    try:
        bloom.add(keys)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - bloom.nbytes < 2 * keys.nbytes
    assert bloom.contains(keys).all()


def test_repeats_within_a_batch_are_suspected() -> None:
    """A key that stands twice in one batch is suspected at both places, but nobody need look for it elsewhere."""
    run_filter = complete(1 << 16)
    run_filter.add(keys_of([7]))

    suspicion = run_filter.suspect(keys_of([5, 9, 7, 5, 8, 5]))

    assert suspicion.any.tolist() == [True, False, True, True, False, True]
    assert suspicion.before.tolist() == [False, False, True, False, False, False]


@settings(STEADY, max_examples=100)
@given(batches, batches)
def test_suspicion_by_the_obvious_count(before: Keys, batch: Keys) -> None:
    """Exactly the keys that were added before, and those that stand in the batch twice, are suspected."""
    run_filter = complete(1 << 20)
    run_filter.add(before)

    suspicion = run_filter.suspect(batch)

    listed = batch.tolist()
    assert suspicion.before.tolist() == [key in before.tolist() for key in listed]
    assert suspicion.any.tolist() == [key in before.tolist() or listed.count(key) > 1 for key in listed]


def test_an_incomplete_filter_suspects_everything() -> None:
    """While older keys still load, every run may have been seen."""
    suspicion = KeyFilter(1 << 16).suspect(keys_of([1, 2]))

    assert suspicion.before.all()
    assert suspicion.any.all()


def test_an_empty_batch_has_no_copies() -> None:
    """No keys, no suspicion, no memory."""
    run_filter = complete(1 << 16)
    run_filter.add(keys_of([]))
    run_filter.add_older(keys_of([]))

    assert len(run_filter.suspect(keys_of([])).any) == 0
    assert run_filter.nbytes == 0


# Settling.

DATA: Final = ("tbl", "col", "row", "enrich_person", "data", False, 5, "", "")


def candidate(row: int, facts: tuple[object, ...] = DATA, *, run: int = 1, is_debit: bool = True) -> Candidate:
    return Candidate(row, Identity("ws", UUID(int=run)), Original(f"t[0]@{row}", facts), is_debit)


def changed(**facts: object) -> tuple[object, ...]:
    return tuple(facts.get(name, value) for name, value in zip(RUN_SUBSTANCE, DATA, strict=True))


def duplicate(position: str) -> Verdict:
    return Verdict(Kind.DUPLICATE, Reason.DUPLICATE, f"a duplicate of the run at {position}")


def conflict(fields: str, position: str) -> Verdict:
    return Verdict(
        Kind.DEAD_LETTER,
        Reason.CONFLICTING_DUPLICATE,
        f"differs in {fields} from the run at {position}, which stands",
    )


def test_the_first_debit_stands() -> None:
    """Later events with the same facts are duplicates of the first, not of each other."""
    assert decide([candidate(4), candidate(6), candidate(9)], {}) == {6: duplicate("t[0]@4"), 9: duplicate("t[0]@4")}


def test_a_debit_from_before_stands() -> None:
    """What the ledger has is older than any candidate."""
    known = {Identity("ws", UUID(int=1)): Original("t[0]@2", DATA)}

    assert decide([candidate(4), candidate(5, changed(actor="eve"))], known) == {
        4: duplicate("t[0]@2"),
        5: conflict("actor", "t[0]@2"),
    }
    assert known == {Identity("ws", UUID(int=1)): Original("t[0]@2", DATA)}


@pytest.mark.parametrize(
    ("field", "value"), list(zip(RUN_SUBSTANCE, ["x", "x", "x", "x", "error", True, 6, "x", "x"], strict=True))
)
def test_a_conflict_names_its_field(field: str, value: object) -> None:
    """Each field that we know makes a conflict, and is named."""
    assert decide([candidate(1), candidate(2, changed(**{field: value}))], {}) == {2: conflict(field, "t[0]@1")}


def test_a_conflict_names_all_its_fields() -> None:
    """Several fields are named in the order of the event."""
    other = changed(ran_at=7, column_id="c", outcome="error")

    assert decide([candidate(1), candidate(2, other)], {}) == {2: conflict("column_id, outcome, ran_at", "t[0]@1")}


def test_a_conflict_changes_nothing() -> None:
    """After a conflict the first event still stands: a copy of it is a duplicate, a copy of the other conflicts."""
    other = changed(outcome="error")

    verdicts = decide([candidate(1), candidate(2, other), candidate(3), candidate(4, other)], {})

    assert verdicts == {2: conflict("outcome", "t[0]@1"), 3: duplicate("t[0]@1"), 4: conflict("outcome", "t[0]@1")}


def test_a_dead_letter_occupies_no_run_id() -> None:
    """An event with an unknown action leaves its id free; once a debit has it, such an event conflicts."""
    unknown = changed(action="find_yeti")

    verdicts = decide(
        [
            candidate(1, unknown, is_debit=False),
            candidate(2, unknown, is_debit=False),
            candidate(3),
            candidate(4, unknown, is_debit=False),
        ],
        {},
    )

    assert verdicts == {4: conflict("action", "t[0]@3")}


def test_identities_are_apart() -> None:
    """The same id in another workspace is another run, and so is another id."""
    elsewhere = Candidate(3, Identity("ws_2", UUID(int=1)), Original("t[0]@3", DATA), is_debit=True)

    assert decide([candidate(1), candidate(2, run=2), elsewhere], {}) == {}


@settings(STEADY, max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from("abc"), st.booleans()), max_size=12),
    st.dictionaries(st.integers(0, 2), st.sampled_from("abc")),
)
def test_deciding_by_the_obvious_book(found: list[tuple[int, str, bool]], before: dict[int, str]) -> None:
    """Whatever comes, the verdicts are those of one book that is asked event by event."""
    known = {
        Identity("ws", UUID(int=run)): Original("before", changed(row_id=row_id)) for run, row_id in before.items()
    }
    expected: dict[int, Kind] = {}
    book = dict(before)
    for row, (run, row_id, is_debit) in enumerate(found):
        if run in book:
            expected[row] = Kind.DUPLICATE if book[run] == row_id else Kind.DEAD_LETTER
        elif is_debit:
            book[run] = row_id

    verdicts = decide(
        [
            candidate(row, changed(row_id=row_id), run=run, is_debit=is_debit)
            for row, (run, row_id, is_debit) in enumerate(found)
        ],
        known,
    )

    assert {row: verdict.kind for row, verdict in verdicts.items()} == expected


# The key of a run.

EXTREME: Final = [
    UUID(int=0),
    UUID(int=2**128 - 1),
    UUID(int=1),
    UUID(int=2**127),
    UUID(int=2**64),
    UUID(int=2**64 - 1),
    UUID("00112233-4455-6677-8899-aabbccddeeff"),
]


def test_the_keys_are_those_of_the_ledger(engine: Client) -> None:
    """numpy and SQL compute the same key of every UUID: v1, v4, v7 and the extremes."""
    made = [make() for make in (uuid1, uuid4, uuid7) for _ in range(500)] + EXTREME

    found = engine.query(
        f"SELECT {key_of('run_id')} FROM (SELECT arrayJoin({{runs:Array(UUID)}}) AS run_id)",
        parameters={"runs": [str(run) for run in made]},
    )

    assert [key for (key,) in found.result_rows] == id_keys(b"".join(run.bytes for run in made)).tolist()


def test_the_keys_of_one_millisecond_are_apart() -> None:
    """UUIDv7s of one moment share their first half; their keys do not collide."""
    assert len(set(id_keys(b"".join(uuid7().bytes for _ in range(10_000))).tolist())) == 10_000


# The road.


def summary(rows: Iterable[Row]) -> list[tuple[str, str]]:
    return [(row.reason, row.detail) for row in rows]


COPY_OF_0: Final = ("duplicate", "a duplicate of the run at cell-runs[0]@0")


def test_copies_within_a_chunk() -> None:
    """Of equal events in one chunk the first is charged."""
    assert summary(Road().rows([Record(0, event()), Record(1, event())])) == [("charged", ""), COPY_OF_0]


def test_copies_across_the_chunks_of_a_take() -> None:
    """Of equal events in two chunks of one take the first is charged."""
    assert summary(Road().rows([Record(0, event())], [Record(1, event())])) == [("charged", ""), COPY_OF_0]


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("filter_bytes_max", [128, 1 << 16])
@pytest.mark.parametrize("is_complete", [False, True])
def test_copies_across_takes(is_written: bool, filter_bytes_max: int, is_complete: bool) -> None:
    """A copy is found while the run is on its way and when it is in the ledger, in any state of the filter."""
    road = Road(filter_bytes_max=filter_bytes_max, is_complete=is_complete)
    road.rows([Record(0, event()), *(Record(number, event(run=number)) for number in range(2, 40))])
    if is_written:
        road.write()

    rows = road.rows([Record(40, event(run=50)), Record(41, event())])

    assert summary(rows) == [("charged", ""), COPY_OF_0]


@pytest.mark.parametrize(
    "same",
    [
        event(run_id="0190F4A0-0000-7000-8000-000000000001"),
        event(run_id="0190f4a0000070008000000000000001"),
        event(ran_at="2026-08-20T14:00:00+02:00"),
        event(ran_at="2026-08-20T12:00:00.000999999Z"),
        event(triggered_by="", actor=""),
        event(own_api_key=False),
        event(unknown_field=1),
    ],
)
def test_a_copy_in_other_words_is_a_copy(same: bytes) -> None:
    """Spelling, offsets, what lies below a millisecond and fields that we do not know make no conflict."""
    assert summary(Road().rows([Record(0, event()), Record(1, same)])) == [("charged", ""), COPY_OF_0]


def test_a_conflict_on_the_road() -> None:
    """The second of two tries under one id is a dead letter that names what differs; the first stands."""
    first, second = event(outcome="error"), event(outcome="data", ran_ms=AUGUST_MS + 1)

    rows = Road().rows([Record(0, first), Record(1, second), Record(2, first)])

    assert summary(rows) == [
        ("error", ""),
        ("conflicting_duplicate", "differs in outcome, ran_at from the run at cell-runs[0]@0, which stands"),
        COPY_OF_0,
    ]


def test_a_parked_run_is_charged_when_it_comes_again() -> None:
    """Dead letters occupy no run id: whatever was wrong with an event, its good copy is charged."""
    road = Road()

    reasons = road.reasons(
        Record(0, event(action="find_yeti")),
        Record(1, event(), b"ws_2"),
        Record(2, event()[:-1]),
        Record(3, event(), timestamp=AUGUST_MS - 600_000),
        Record(4, event()),
        Record(5, event()),
    )

    assert reasons == ["unknown_action", "misrouted", "malformed", "future_run", "charged", "duplicate"]


def test_runs_whose_keys_collide_are_apart() -> None:
    """Two runs may share a filter key and even an id, over workspaces: only the same identity is a copy."""
    low, high = str(UUID(int=0)), str(UUID(int=2**128 - 1))
    road = Road()

    reasons = [
        *road.reasons(Record(0, event(run_id=low)), Record(1, event(run_id=high))),
        *road.reasons(Record(2, event(run_id=low, workspace_id="ws_2"), b"ws_2"), Record(3, event(run_id=high))),
    ]

    assert id_keys(UUID(low).bytes + UUID(high).bytes).tolist() == [0, 0]
    assert reasons == ["charged", "charged", "charged", "duplicate"]


# However a stream is cut.

RUNS: Final = [str(UUID(int=number)) for number in (0, 2**128 - 1, 2**64, 1, 0x0190F4A0_0000_7000_8000_000000000001)]
"""The first two share a filter key, and so do the next two."""

sent = st.builds(
    lambda run, workspace, changes, key: Record(
        0, event(run_id=run, workspace_id=workspace, **changes), key or workspace.encode()
    ),
    st.sampled_from(RUNS),
    st.sampled_from(["ws_1", "ws_2"]),
    st.sampled_from(
        [
            {},
            {},
            {},
            {"outcome": "error"},
            {"action": "find_yeti"},
            {"action": "clearbit_enrich_company"},
            {"own_api_key": True, "actor": "eve"},
            {"ran_at": "2026-08-20T14:00:00.000999999+02:00"},
            {"ran_ms": AUGUST_MS + 300_001},
            {"ran_ms": AUGUST_MS - 367 * 86_400_000},
            {"outcome": "fine"},
        ]
    ),
    st.sampled_from([None, None, None, None, b"ws_1", b"\xff"]),
) | st.sampled_from([Record(0, None), Record(0, b""), Record(0, b"{"), Record(0, b"x" * 65_537)])


@settings(STEADY, max_examples=300)
@given(st.lists(sent, min_size=1, max_size=14), st.data())
def test_a_cut_changes_nothing(stream: list[Record], data: st.DataObject) -> None:
    """However a stream is cut into chunks and takes, and whatever is written by then, its rows are the same.

    They are those of one big take, and say what the reference rater says one by one.
    """
    partitions = data.draw(st.sampled_from([1, 2]))
    partition = partition_of("ws_1", partitions)
    records = [Record(2 * at, record.value, record.key) for at, record in enumerate(stream)]
    reference = ReferenceRater(EXAMPLE_CATALOGUES, partition, partitions)
    cut = Road(
        partition=partition,
        partitions=partitions,
        filter_bytes_max=data.draw(st.sampled_from([128, 1 << 16])),
        is_complete=data.draw(st.booleans()),
    )

    whole = Road(partition=partition, partitions=partitions).table(records)
    tables = []
    for take in cut_up(records, data):
        tables.append(cut.table(*cut_up(take, data)))
        if data.draw(st.booleans()):
            cut.write()

    assert pa.concat_tables(tables).equals(whole)
    assert_as_referred(records, whole, reference)


def cut_up(records: list[Record], data: st.DataObject) -> list[list[Record]]:
    """The same records in pieces."""
    ends = data.draw(st.lists(st.integers(1, len(records)), max_size=4, unique=True).map(sorted))
    pieces = [records[start:end] for start, end in pairwise([0, *ends, len(records)])]
    return [piece for piece in pieces if piece]


def assert_as_referred(records: list[Record], table: pa.Table, reference: ReferenceRater) -> None:
    """Kind, reason, pool and credits of every row are the reference rater's."""
    rows = in_words(table)
    assert [row.offset for row in rows] == [record.offset for record in records]
    for record, row in zip(records, rows, strict=True):
        assert reference.expect(record.key, record.value, record.timestamp) == row[1:5]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_long_stream_in_random_pieces(seed: int) -> None:
    """5,000 simulated events, copies and broken ones among them, give the same rows in pieces and by the reference."""
    dice = random.Random(seed)
    ran_at = from_milliseconds(AUGUST_MS)
    stream = [found for found in islice(events(seed, ran_at=ran_at), 5000) if partition_of(found.key, 2) == 0]
    again = [dice.choice(stream) for _ in range(200)]
    records = [Record(at, found.value, found.key.encode()) for at, found in enumerate(stream + again)]
    cut = Road(partitions=2, filter_bytes_max=4096, is_complete=seed % 2 == 0)

    tables = []
    at = 0
    while at < len(records):
        chunks = []
        for _ in range(dice.randint(1, 3)):
            size = dice.choice([1, 2, 50, 400])
            chunks.append(records[at : at + size])
            at += size
        tables.append(cut.table(*filter(None, chunks)))
        if dice.random() < 0.5:
            cut.write()

    whole = Road(partitions=2).table(records)
    assert pa.concat_tables(tables).equals(whole)
    assert_as_referred(records, whole, ReferenceRater(EXAMPLE_CATALOGUES, 0, 2))


# What the ledger gives back.


def test_the_ledger_gives_back_what_a_copy_must_match(client: Client) -> None:
    """Debits that went through the ledger's table decide copies as those on their way do, whatever their names hold."""
    names = ["ws", "", "a'b", "back\\slash", "nul\0", "tab\t%(x)s", "語🧪", "{x:String}", "q" * 128]
    made: list[dict[str, Any]] = [
        {"run": run, "workspace_id": name or "w", "row_id": name or "r", "actor": name, "ran_ms": AUGUST_MS + run}
        for run, name in enumerate(names)
    ]
    made += [{"run_id": str(run)} for run in EXTREME]
    records = [
        Record(at, event(**fields), str(fields.get("workspace_id", "ws_1")).encode()) for at, fields in enumerate(made)
    ]
    road = Road()
    rows = road.table(records)
    write_rows(client, road.chain, rows)
    road.write()

    found = find_runs(client, list(road.ledger))

    assert {row.kind for row in Road().rows(records)} == {"run"}
    assert {identity: Original(position, substance) for identity, position, substance in found} == road.ledger
    assert find_runs(client, [Identity("ws_1", UUID(int=12345))]) == []


def test_dead_letters_keep_their_bytes_in_the_ledger(client: Client) -> None:
    """Raw values and keys come back from the ledger's table byte for byte."""
    wild = [bytes(range(256)), b"\xff\xfe", b"", b"\0", b"'\\"]
    road = Road()
    rows = road.table([Record(at, value, value, headers=[("h", value)]) for at, value in enumerate(wild)])

    write_rows(client, road.chain, rows)

    found = client.query(
        "SELECT raw, raw_key, toString(reason), raw_headers FROM ledger ORDER BY kafka_offset",
        column_formats={"raw": "bytes", "raw_key": "bytes"},
    ).result_rows
    assert [row[:3] for row in found] == [(value, value, "malformed") for value in wild]
    assert [row[3] for row in found] == rows.column("raw_headers").to_pylist()
