"""Account events: checked in the published order, each taken once, a run reversed once, nothing dropped."""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from typing import Any, Final

import pytest
from clickhouse_connect.driver.client import Client
from hypothesis import given, settings
from hypothesis import strategies as st

from creditstream.reference import Expected, ReferenceBilling
from schemas.account import LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.cell_run import MAX_EVENT_BYTES, to_milliseconds
from schemas.codec import encode_account_event
from schemas.ledger import Identity, Kind, Pool, Reason
from sinks.accounts import RunToReverse, draws_of, facts_of
from streams.kafka.topics import ACCOUNT_EVENTS
from streams.redriving import redrive
from streams.rules.account_events import (
    NOTHING_KNOWN,
    Known,
    RatedEvent,
    fact_of,
    rate_events,
    receive,
    substance,
    with_rows,
)
from streams.rules.balances import NOTHING, Balances
from streams.rules.duplicates import Original
from streams.rules.facts import fold_event, openings
from streams.rules.limits import Thresholds
from streams.rules.records import partition_of
from tests.account_records import PLANS, PLANS_DIR, Story, Topics, account_record, at, event_id
from tests.dead_letter_examples import RECORDED_AT, DeadLetterExample, dead_letter_examples
from tests.ledger_rows import assert_books_close
from tests.records import STEADY, Record, event, run_id
from tests.unit_bench import CHAINS, Bench

NOW: Final = at("Jan 20 12:00")
ON_CHDB: Final = pytest.mark.parametrize("database_url", ["chdb"], indirect=True)


def plan(number: int = 1, **said: Any) -> PlanChanged:
    """Plan ``10`` of ``ws_1`` from now on."""
    plain = {"event_id": event_id(number), "workspace_id": "ws_1", "effective_at": NOW, "plan": "10"}
    return PlanChanged(**plain | said)


def reversal(number: int, run: int = 1, **said: Any) -> RunReversed:
    """Run ``run`` of ``ws_1`` is taken back."""
    return RunReversed(event_id=event_id(number), workspace_id="ws_1", run_id=run_id(run), **said)


def a_run(run: int = 1, **said: Any) -> RunToReverse:
    """The debit of 2 credits of run ``run`` as the ledger knows it."""
    plain = {
        "workspace_id": "ws_1", "run_id": run_id(run), "table_id": "tbl_1", "column_id": "col_1", "row_id": "row_1",
        "action": "find_work_email", "pool": "enrichment", "credits": 2000, "ran_ms": to_milliseconds(at("Jan 2")),
        "catalogue": 1, "reversed_at": "",
    }  # fmt: skip
    return RunToReverse(**plain | said)


def rows_of(
    *records: Record, known: Known = NOTHING_KNOWN, partition: int = 0, partitions: int = 1
) -> list[RatedEvent]:
    """The rows of one chunk."""
    chunk = receive(records, partition, partitions)
    return rate_events(chunk, CHAINS[1], known, PLANS)


def said(rows: Sequence[RatedEvent]) -> list[str]:
    """Kind and reason of each."""
    return [f"{row.kind}/{row.reason}" for row in rows]


# Intake.


def test_the_checks_come_in_the_published_order() -> None:
    """What is too large is never decoded; what is malformed is not asked where it lies; then the plan is looked up."""
    far = plan(plan="no such plan", workspace_id="ws_2")
    records = [
        Record(0, b"{" * (MAX_EVENT_BYTES + 1), b"elsewhere"),
        Record(1, b"no JSON", b"elsewhere"),
        Record(2, None),
        account_record(3, far, NOW, key=b"elsewhere"),
        account_record(4, far, NOW),
    ]
    home = partition_of("ws_2", 8)
    rows = rows_of(*records, partition=home, partitions=8)
    assert [row.reason for row in rows] == [
        Reason.TOO_LARGE, Reason.MALFORMED, Reason.MALFORMED, Reason.MISROUTED, Reason.UNKNOWN_PLAN
    ]  # fmt: skip
    (elsewhere,) = rows_of(account_record(0, far, NOW), partition=(home + 1) % 8, partitions=8)
    assert elsewhere.reason == Reason.MISROUTED
    assert f"gives {home}" in elsewhere.detail


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (b'{"type": "plan_changed"}', "event_id"),
        (b'{"type": "plan_cancelled"}', "plan_cancelled"),
        (encode_account_event(plan()).replace(b"2026", b"2019"), "before 2020"),
        (encode_account_event(plan()).replace(b"2026", b"2100"), "after 2099"),
        (encode_account_event(plan()).replace(b'"10"', b"10"), "`plan`"),
        (b'{"type":"premium_granted","event_id":"%s","workspace_id":"ws_1","effective_at":"2026-01-01T00:00:00Z",'
         b'"credits":"0"}' % str(event_id(1)).encode(), "more than 0"),
        (b'{"type":"premium_granted","event_id":"%s","workspace_id":"ws_1","effective_at":"2019-12-31T23:59:59Z",'
         b'"credits":"1"}' % str(event_id(1)).encode(), "before 2020"),
        (b'{"type":"limits_changed","event_id":"%s","workspace_id":"ws_1","thresholds":[101]}'
         % str(event_id(1)).encode(), "thresholds"),
        (b'{"type":"limits_changed","event_id":"%s","workspace_id":"ws_1","remaining_below":"5\\n"}'
         % str(event_id(1)).encode(), "remaining_below"),
        (b'{"type":"premium_granted","event_id":"%s","workspace_id":"ws_1","effective_at":"2026-01-01T00:00:00Z",'
         b'"credits":"5\\n"}' % str(event_id(1)).encode(), "credits"),
        (b"[" * 2000, ""),
    ],
)  # fmt: skip
def test_a_malformed_event_names_its_field(value: bytes, detail: str) -> None:
    """A dead letter with its bytes, whatever came."""
    (row,) = rows_of(Record(0, value))
    assert (row.kind, row.reason) == (Kind.DEAD_LETTER, Reason.MALFORMED)
    assert detail in row.detail


@pytest.mark.parametrize("last", [b"9", b"\\u0039"])
def test_a_plan_of_the_last_nanoseconds_of_a_day_takes_effect_on_that_day(last: bytes) -> None:
    """Truncated, never rounded, however its digits are written."""
    change = plan(effective_at=at("Jan 31 23:59:59"))
    value = encode_account_event(change).replace(b"23:59:59Z", b"23:59:59.999999" + last + b"Z")
    (row,) = rows_of(Record(0, value))
    assert row.effective_ms == to_milliseconds(at("Jan 31 23:59:59.999"))


@pytest.mark.parametrize(
    "example",
    [example for example in dead_letter_examples() if example.topic == ACCOUNT_EVENTS],
    ids=lambda example: str(example.reason),
)
def test_the_checked_in_dead_letters(example: DeadLetterExample) -> None:
    """Each example is refused for its reason."""
    records = [
        Record(offset, value, key, to_milliseconds(RECORDED_AT)) for offset, (key, value) in enumerate(example.events)
    ]
    *_, letter = rows_of(*records)
    assert (letter.kind, letter.reason) == (Kind.DEAD_LETTER, example.reason)
    assert example.detail in letter.detail
    assert letter.workspace_id == "ws_acme"


# Once.


def test_f16_a_copy_is_a_duplicate_in_one_chunk_and_over_chunks() -> None:
    """An event id is taken once; a copy names the event that stands."""
    first, copy = account_record(0, plan(), NOW), account_record(1, plan(), NOW + timedelta(days=40))
    assert said(rows_of(first, copy)) == ["plan/plan_changed", "duplicate/duplicate"]
    known = Known({Identity("ws_1", event_id(1)): Original("account-events[0]@0", substance(plan()))}, {})
    (row,) = rows_of(copy, known=known)
    assert (row.kind, row.detail) == (Kind.DUPLICATE, "a duplicate of the event at account-events[0]@0")


@pytest.mark.parametrize(
    "other",
    [
        plan(plan="20"), plan(restart_period=True), plan(actor="ada"), plan(effective_at=NOW + timedelta(seconds=1)),
        PremiumGranted(event_id=event_id(1), workspace_id="ws_1", effective_at=NOW, credits="10"), reversal(1),
        LimitsChanged(event_id=event_id(1), workspace_id="ws_1"),
    ],
    ids=["plan", "restart", "actor", "time", "grant", "reversal", "limits"],
)  # fmt: skip
def test_an_event_that_says_something_else_under_a_known_id(other: Any) -> None:
    """The first stands; the second is a dead letter."""
    known = Known({}, {Identity("ws_1", run_id(1)): a_run()})
    rows = rows_of(account_record(0, plan(), NOW), account_record(1, other, NOW), known=known)
    assert said(rows) == ["plan/plan_changed", "dead_letter/conflicting_duplicate"]
    assert rows[1].detail == "differs from the event at account-events[0]@0, which stands"


def test_times_are_compared_in_milliseconds() -> None:
    """What a copy says beyond them is not looked at; nor how a number is written."""
    finer = plan(effective_at=NOW + timedelta(microseconds=999))
    grants = [
        PremiumGranted(event_id=event_id(2), workspace_id="ws_1", effective_at=NOW, credits=text)
        for text in ("5", "5.000")
    ]
    records = [account_record(n, each, NOW) for n, each in enumerate([plan(), finer, *grants])]
    assert said(rows_of(*records)) == [
        "plan/plan_changed", "duplicate/duplicate", "grant/premium_granted", "duplicate/duplicate"
    ]  # fmt: skip


def test_event_ids_are_each_workspaces_own() -> None:
    """Two workspaces may use one."""
    records = [account_record(n, plan(workspace_id=name), NOW) for n, name in enumerate(["ws_1", "ws_2"])]
    assert said(rows_of(*records)) == ["plan/plan_changed"] * 2


def test_a_dead_letter_occupies_no_event_id() -> None:
    """Once the plan list knows the plan, the same event is taken."""
    rows = rows_of(account_record(0, plan(plan="later"), NOW), account_record(1, plan(), NOW))
    assert said(rows) == ["dead_letter/unknown_plan", "plan/plan_changed"]
    on_its_way = with_rows(NOTHING_KNOWN, rows[:1], CHAINS[1])
    assert said(rows_of(account_record(1, plan(), NOW), known=on_its_way)) == ["plan/plan_changed"]


def test_the_newest_limits_stand_in_whatever_order_the_ledger_gives_them() -> None:
    """Its answer has none. A line at 0 is a line, as that of somebody who wants no other."""
    story = Story()
    story.limits(at("Jan 1"), thresholds=[90])
    story.limits(at("Jan 2"), below="0")
    records = [account_record(n, step.event, step.recorded) for n, step in enumerate(story.steps)]
    rows = [fact_of(row) for row in rows_of(*records)]
    for given_by_ledger in (rows, rows[::-1]):
        found = openings(["ws_1"], given_by_ledger, [])["ws_1"].facts.thresholds
        assert found == Thresholds((to_milliseconds(at("Jan 2")), 1), (), 0)


# Reversals.


def test_a_run_is_reversed_once_under_any_event_ids() -> None:
    """A negative debit dated by the original's day, with its pool and cell; a second one is a duplicate."""
    known = Known({}, {Identity("ws_1", run_id(1)): a_run()})
    first, second, copy = rows_of(
        *(account_record(offset, reversal(number), NOW) for offset, number in enumerate([1, 2, 1])), known=known
    )
    assert said([first, second, copy]) == ["reversal/reversed", "duplicate/duplicate", "duplicate/duplicate"]
    assert (first.credits, first.pool, first.ran_ms) == (-2000, Pool.ENRICHMENT, to_milliseconds(at("Jan 2")))
    assert (second.credits, second.detail) == (0, "the run was reversed at account-events[0]@0")


def test_a_run_that_was_reversed_long_ago() -> None:
    """The ledger says where."""
    known = Known({}, {Identity("ws_1", run_id(1)): a_run(reversed_at="account-events[3]@7")})
    (row,) = rows_of(account_record(9, reversal(1), NOW), known=known)
    assert (row.kind, row.detail) == (Kind.DUPLICATE, "the run was reversed at account-events[3]@7")


def test_a_run_of_another_workspace_is_unknown() -> None:
    """Nobody gives back what another one paid; and it is not said that the ledger lacks a run which it has."""
    known = Known({}, {Identity("ws_2", run_id(1)): a_run(workspace_id="ws_2")})
    (row,) = rows_of(account_record(0, reversal(1), NOW), known=known)
    assert (row.reason, row.run_id) == (Reason.UNKNOWN_RUN, run_id(1))
    assert row.detail == f"no run {run_id(1)} of ws_1 in the ledger"


# Against the reference.


events = st.one_of(
    st.builds(plan, st.integers(1, 3), plan=st.sampled_from(["10", "20", "none"]), restart_period=st.booleans()),
    st.builds(reversal, st.integers(1, 3), st.integers(1, 3), actor=st.sampled_from([None, "", "ada"])),
    st.builds(
        lambda number, text: PremiumGranted(
            event_id=event_id(number), workspace_id="ws_1", effective_at=NOW, credits=text
        ),
        st.integers(1, 3),
        st.sampled_from(["5", "5.0", "6"]),
    ),
    st.builds(
        lambda number, percents, below: LimitsChanged(
            event_id=event_id(number), workspace_id="ws_1", thresholds=percents, remaining_below=below
        ),
        st.integers(1, 3),
        st.sampled_from([None, (), (100,), (50,)]),
        st.sampled_from([None, "0", "0.0"]),
    ),
)


@settings(STEADY, max_examples=300)
@given(st.lists(st.tuples(events, st.sampled_from([b"ws_1", b"ws_2"]) | st.just(b"ws_1")), max_size=12))
def test_rows_are_the_references(sent: list[tuple[Any, bytes]]) -> None:
    """Kind, reason, pool and credits of any chunk, by the other implementation."""
    runs = {Identity("ws_1", run_id(n)): a_run(n, credits=n * 1000) for n in (1, 2)}
    debits = {
        (name, str(run)): Expected("run", "charged", found.pool, _credits(found.credits))
        for (name, run), found in runs.items()
    }
    billing = ReferenceBilling(PLANS_DIR, 0, 1, debits)
    records = [account_record(n, each, NOW, key=key) for n, (each, key) in enumerate(sent)]
    rows = rows_of(*records, known=Known({}, runs))
    expected = [billing.expect(record.key, record.value) for record in records]
    assert [(row.kind, row.reason, row.pool, _credits(row.credits)) for row in rows] == expected


def _credits(millicredits: int) -> Decimal:
    return Decimal(millicredits).scaleb(-3)


# Into the ledger and back.


async def take(bench: Bench, *chunks: tuple[bool, Sequence[Record]]) -> None:
    """Deliver chunks of both topics, one after the other, until all are acknowledged."""
    task = bench.start()
    for of_account, records in chunks:
        bench.deliver(records, of_account=of_account)
        done = bench.acknowledged + 1
        bench.unit.drain()
        await bench.wait(task, lambda done=done: bench.acknowledged == done)  # type: ignore[misc]
    await bench.kill(task)


def test_gaps_count_what_kafka_has_not(client: Client) -> None:
    """Compaction and transaction markers leave holes: each row says how many offsets it stands for."""
    records = [account_record(offset, plan(offset), NOW) for offset in (2, 3, 7)]

    async def life() -> None:
        await take(await Bench.open(client), (True, records[:2]))
        await take(await Bench.open(client, committed=(0, 4)), (True, records[1:]))

    asyncio.run(life())
    rows = client.query("SELECT kafka_offset, offset_gap, toString(kind) FROM ledger ORDER BY kafka_offset").result_rows
    assert rows == [(2, 1, "plan"), (3, 1, "plan"), (7, 4, "plan")]
    assert_books_close(client, CHAINS[1], [2, 3, 7])


@ON_CHDB
async def test_an_event_is_taken_once_over_restarts(client: Client) -> None:
    """The ledger remembers event ids; a reversal sent after 40 days under another one changes nothing."""
    run = Record(0, event(run=1, ran_ms=to_milliseconds(NOW)), timestamp=to_milliseconds(NOW))
    grant = PremiumGranted(event_id=event_id(5), workspace_id="ws_1", effective_at=NOW, credits="5")
    limits = LimitsChanged(event_id=event_id(6), workspace_id="ws_1", thresholds=(40,), remaining_below="1")
    sent = [plan(), grant, limits, reversal(7)]
    await take(
        await Bench.open(client),
        (False, [run]),
        (True, [account_record(offset, each, NOW) for offset, each in enumerate(sent)]),
    )
    later = NOW + timedelta(days=40)
    again = [*sent, reversal(8), plan(plan="20")]
    bench = await Bench.open(client, committed=(1, 4))
    await take(bench, (True, [account_record(4 + offset, each, later) for offset, each in enumerate(again)]))
    kinds = client.query("SELECT toString(kind), toString(reason), count() FROM ledger GROUP BY 1, 2 ORDER BY 1, 2")
    assert kinds.result_rows == [
        ("dead_letter", "conflicting_duplicate", 1), ("duplicate", "duplicate", 5), ("grant", "premium_granted", 1),
        ("limits", "limits_changed", 1), ("plan", "plan_changed", 1), ("reversal", "reversed", 1),
        ("run", "charged", 1),
    ]  # fmt: skip
    assert_books_close(client, CHAINS[1], range(10))


@ON_CHDB
async def test_the_ledger_is_asked_for_known_events_only(client: Client) -> None:
    """An upgrade does not wait for a question whose answer the filter knows: nobody has seen it before."""
    bench = await Bench.open(client)
    await take(bench, (True, [account_record(0, plan(1), NOW), account_record(1, plan(2), NOW)]))
    assert bench.events_looked_up == []

    bench = await Bench.open(client, committed=(0, 2))
    await take(bench, (True, [account_record(2, plan(2), NOW), account_record(3, plan(3), NOW)]))
    assert bench.events_looked_up == [{event_id(2)}]
    assert bench.kinds() == {"plan": 3, "duplicate": 1}


async def test_runs_are_reversed_by_the_thousand(client: Client) -> None:
    """As after an outage of a vendor: one chunk, each run once, whatever else it says; what is unknown is set aside."""
    when, many = to_milliseconds(NOW), 3_000
    runs = [Record(n, event(run=n, ran_ms=when), timestamp=when) for n in range(many)]
    twice = [account_record(n, reversal(n, run=n % many), NOW) for n in range(2 * many)]
    unknown = [account_record(2 * many + n, reversal(2 * many + n, run=many + n), NOW) for n in range(2)]
    bench = await Bench.open(client, batch_rows=10_000)
    await take(bench, (False, runs), (True, twice + unknown))
    assert bench.kinds() == {"run": many, "reversal": many, "duplicate": many, "dead_letter": 2}
    assert bench.unit.balances["ws_1"].enrichment.used == 0
    assert client.query("SELECT sum(credits), uniqExact(run_id) FROM ledger WHERE kind = 'reversal'").result_rows == [
        (-many, many)
    ]


@ON_CHDB
async def test_a_reversal_that_waited_for_its_run_is_redriven_and_closed(client: Client) -> None:
    """Nothing is sent while the run is not there; then once, with the letter's name; then the letter is closed, and no
    longer kept in mind.
    """
    when = to_milliseconds(NOW)
    letter = account_record(0, reversal(1), NOW)
    bench = await Bench.open(client)
    await take(bench, (True, [letter]))
    assert await redrive(bench.unit.event_chain, set(), bench.look_aside, bench.send) == set()
    assert bench.sent == []

    bench = await Bench.open(client, committed=(0, 1))
    await take(bench, (False, [Record(0, event(run=1, ran_ms=when), timestamp=when)]))
    on_its_way = await redrive(bench.unit.event_chain, set(), bench.look_aside, bench.send)
    assert await redrive(bench.unit.event_chain, on_its_way, bench.look_aside, bench.send) == on_its_way
    (sent,) = bench.sent
    assert (sent.topic, sent.key, sent.value) == (ACCOUNT_EVENTS, b"ws_1", letter.value)

    bench = await Bench.open(client, committed=(1, 1))
    await take(bench, (True, [Record(1, sent.value, sent.key, when, sent.headers)]))
    assert await redrive(bench.unit.event_chain, on_its_way, bench.look_aside, bench.send) == set()
    assert bench.sent == []
    rows = client.query(
        "SELECT kafka_offset, toString(kind), toString(reason), redrive_of, credits FROM ledger "
        "WHERE topic = 'account-events' ORDER BY kafka_offset"
    ).result_rows
    assert [row[:4] for row in rows] == [
        (0, "dead_letter", "unknown_run", ""), (1, "reversal", "reversed", "topic-2/account-events[0]@0")
    ]  # fmt: skip
    assert rows[1][4] == -1


@ON_CHDB
async def test_openings_from_the_ledger_are_what_was_folded(client: Client) -> None:
    """An account that is loaded stands where the one stands that was folded event by event."""
    story = Story()
    story.plan("own_lines", at("Jan 10"))
    story.plan("20", at("Jan 25 12:00"), at("Jan 11"), restart=True)
    story.plan("10", at("Jan 10"), at("Jan 12"))
    story.grant("5", at("Jan 11"))
    story.grant("2.5", at("Jan 30"), at("Jan 12 01:00"))
    story.limits(at("Jan 13"), thresholds=[20, 70])
    story.limits(at("Jan 14"), below="3")
    run = story.run(at("Jan 15"), "find_work_email")
    story.run(at("Jan 16"), "clearbit_enrich_company")
    story.run(at("Jan 9"), recorded=at("Jan 17"))
    story.reverse(run, at("Jan 18"))
    story.steps.sort(key=lambda step: step.recorded)
    bench = await Bench.open(client)
    await take(bench, *Topics().append(story.steps))
    folded = bench.unit.balances["ws_1"]

    opening = openings(["ws_1"], facts_of(client, ["ws_1"]), draws_of(client, ["ws_1"], at("Jan 1").date()))["ws_1"]
    loaded = Balances(1, bench.unit.balances.now_ms)
    loaded.load({"ws_1": opening})

    assert opening.facts == folded.facts
    assert loaded["ws_1"].outline() == folded.outline()
    assert [loaded["ws_1"].standing(pool).used for pool in (Pool.ENRICHMENT, Pool.PREMIUM)] == [0, 1000]
    assert folded.standing(Pool.PREMIUM) == loaded["ws_1"].standing(Pool.PREMIUM)


def test_a_row_comes_back_as_it_was_rated() -> None:
    """What the fold is given of a row is what the ledger would give back."""
    rows = rows_of(account_record(3, plan(plan="own_lines", restart_period=True), NOW))
    row = fact_of(rows[0])
    assert (row.plan, row.allowance, row.thresholds, row.remaining_below) == ("own_lines", 10_000, (30, 60), 2000)
    balances = Balances(1, row.recorded_ms)
    balances.load({"ws_1": NOTHING})
    fold_event(balances, row)
    assert balances["ws_1"].facts.plans[0].restart_period
