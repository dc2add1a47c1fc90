"""P1 against a real ledger, in process and over HTTP: every fault point, then the books must close.

A fault is injected where the worker meets it: a test drives the protocol's generator step by step and drops it where
the worker crashes, or the server closes, delays, refuses or dies while `Ledger.append` runs.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Final

import msgspec
import pytest
from clickhouse_connect.driver.client import Client

from schemas.catalogue import Catalogue
from schemas.cell_run import to_milliseconds
from schemas.ledger import Identity
from sinks.accounts import find_runs
from sinks.clickhouse import DatabaseError, connect
from sinks.filter_keys import recent_run_keys
from sinks.ledger import (
    ACKNOWLEDGED_MAX,
    SPENT_MAX,
    Chain,
    ForeignMark,
    Incident,
    Insert,
    Ledger,
    Mark,
    ReadMark,
    Steps,
    Stopped,
    append_steps,
)
from streams.batches import OpenBatch
from streams.rules.intake import read_chunk
from streams.rules.rating import RatingTable
from streams.rules.records import id_keys
from streams.rules.rows import rate_take
from tests.clickhouse_server import ClickHouseServer
from tests.ledger_rows import AUGUST_MS, assert_books_close, batch, content, content_of, run_id, wait_until_grown, write

CHAIN: Final = Chain("cell-runs", "topic-id-1", 3)
LAST: Final = 29
ANSWER_TIMEOUT_S: Final = 1
LATE_S: Final = 1.3

over_http = pytest.mark.parametrize("database_url", ["http"], indirect=True)


@pytest.fixture
def ledger(client: Client) -> Ledger:
    """The writing side, with ten rows written: the faults come in the middle of a chain."""
    ledger = Ledger(client)
    write(ledger, CHAIN, 9)
    return ledger


@pytest.fixture
def impatient(ledger_url: str) -> Iterator[Ledger]:
    """An owner that waits a second for an answer, with ten rows written."""
    with connect(ledger_url, answer_timeout_s=ANSWER_TIMEOUT_S) as client:
        ledger = Ledger(client)
        write(ledger, CHAIN, 9)
        yield ledger


def form(ledger: Ledger, chain: Chain, last: int, epoch: int = 0) -> tuple[Steps, Insert]:
    """One owner's batch from the mark to ``last``, about to be sent."""
    mark = ledger.mark(chain)
    steps = append_steps(batch(chain, mark.last, last), mark, epoch)
    insert = next(steps)
    assert isinstance(insert, Insert)
    return steps, insert


def take_over(client: Client, ledger: Ledger) -> None:
    """The next owner cuts the log elsewhere and writes the rest; then the ledger must be that of a clean run."""
    write(ledger, CHAIN, LAST, rows_max=7)
    assert_books_close(client, CHAIN, range(LAST + 1))
    assert content(client, CHAIN) == content_of(batch(CHAIN, -1, LAST).rows)


# F1 to F6: the owner crashes, and another one goes on.


def test_f1_crash_before_forming(client: Client, ledger: Ledger) -> None:
    """A mark that was read and not used leaves no trace."""
    ledger.mark(CHAIN)
    take_over(client, ledger)


def test_f2_crash_formed_not_sent(client: Client, ledger: Ledger) -> None:
    """A batch that was formed and not sent is cut anew."""
    form(ledger, CHAIN, 19)
    take_over(client, ledger)


def test_f3_crash_sent_not_executed(client: Client, ledger: Ledger) -> None:
    """A failed insert occupies no token: the next owner writes the place."""
    steps, _ = form(ledger, CHAIN, 19)
    assert isinstance(steps.send(False), ReadMark)
    take_over(client, ledger)


def test_f3_sent_not_executed_is_sent_again(client: Client, ledger: Ledger) -> None:
    """While the mark does not move, the same rows are sent under the same token on a newly read mark."""
    steps, first = form(ledger, CHAIN, 19)
    assert isinstance(steps.send(False), ReadMark)
    again = steps.send(ledger.mark(CHAIN))
    assert isinstance(again, Insert)
    assert (again.batch, again.token) == (first.batch, first.token)
    assert again.mark_read_at > first.mark_read_at
    ledger.insert(again)
    steps.send(True)
    assert finish(steps, ledger).last == 19
    take_over(client, ledger)


def test_f4_executed_not_acknowledged(client: Client, ledger: Ledger) -> None:
    """An insert whose answer is lost is found by the mark and not sent again."""
    steps, insert = form(ledger, CHAIN, 19)
    ledger.insert(insert)
    assert isinstance(steps.send(False), ReadMark)
    assert finish(steps, ledger).last == 19
    take_over(client, ledger)


def test_f4_crash_executed_not_acknowledged(client: Client, ledger: Ledger) -> None:
    """An insert that lands after its owner has gone is the next owner's starting point."""
    _, insert = form(ledger, CHAIN, 19)
    ledger.insert(insert)
    take_over(client, ledger)


def test_f4_lands_under_the_next_owner(client: Client, ledger: Ledger) -> None:
    """The dead owner's insert lands after the next one has read the mark: the second comer is dropped and learns it."""
    _, late = form(ledger, CHAIN, 14)
    steps, insert = form(ledger, CHAIN, 19)
    ledger.insert(late)
    ledger.insert(insert)
    steps.send(True)
    with pytest.raises(ForeignMark, match="the mark is at 14, expected 9 or our 19"):
        finish(steps, ledger)
    take_over(client, ledger)


def test_f5_crash_acknowledged_not_read_back(client: Client, ledger: Ledger) -> None:
    """An acknowledged insert that nobody read back is not written again."""
    steps, insert = form(ledger, CHAIN, 19)
    ledger.insert(insert)
    assert isinstance(steps.send(True), ReadMark)
    take_over(client, ledger)


def test_f6_crash_read_back_not_committed(client: Client, ledger: Ledger) -> None:
    """Kafka's committed offset stays behind, and the next owner does not ask for it: the mark decides."""
    assert write(ledger, CHAIN, 19).last == 19
    parts = level_0_parts(client)
    assert write(ledger, CHAIN, 19).next == 20
    assert level_0_parts(client) == parts
    take_over(client, ledger)


def test_f6_replay_from_a_committed_offset_is_dropped(client: Client, ledger: Ledger) -> None:
    """Even an owner that resumed below the mark adds nothing: its place in the chain is taken."""
    stale = ledger.mark(CHAIN)
    write(ledger, CHAIN, 19)
    with pytest.raises(ForeignMark):
        ledger.append(batch(CHAIN, 9, 14), stale, threading.Event())
    take_over(client, ledger)


def finish(steps: Steps, ledger: Ledger) -> Mark:
    """Answer one `ReadMark`, which must be the last step."""
    with pytest.raises(StopIteration) as done:
        steps.send(ledger.mark(CHAIN))
    mark = done.value.value
    assert isinstance(mark, Mark)
    return mark


# F8: one insert is one part.


def level_0_parts(client: Client) -> list[int]:
    """Rows of every part as it was inserted, whether it has been merged since or not."""
    found = client.query(
        "SELECT rows FROM system.parts WHERE database = currentDatabase() AND table = 'ledger' AND level = 0 "
        "ORDER BY partition, min_block_number"
    )
    return [rows for (rows,) in found.result_rows]


def recorded_at_months_end(offset: int) -> int:
    """Broker time under which offset 15 is the first record of September."""
    return to_milliseconds(datetime(2026, 9, 1, tzinfo=UTC)) + (offset - 15) * 10


def test_f8_one_part_per_insert(client: Client, ledger: Ledger) -> None:
    """An insert is one part, however many rows it has: all or nothing."""
    write(ledger, CHAIN, 30_009, rows_max=15_000)
    assert level_0_parts(client) == [10, 15_000, 15_000]
    assert_books_close(client, CHAIN, range(30_010))


def test_f8_a_batch_over_a_months_end_is_one_part(client: Client, ledger: Ledger) -> None:
    """The month is the first record's, so that no insert spans two ClickHouse partitions."""
    ledger.append(batch(CHAIN, 9, 19, recorded=recorded_at_months_end), ledger.mark(CHAIN), threading.Event())
    assert level_0_parts(client) == [10, 10]
    assert_books_close(client, CHAIN, range(20))


def test_f8_two_owners_at_one_position_over_a_months_end(client: Client, ledger: Ledger) -> None:
    """One's batch ends in August, the other's in September: their first record is the same, so they meet."""
    mark = ledger.mark(CHAIN)
    ledger.append(batch(CHAIN, 9, 12, recorded=recorded_at_months_end), mark, threading.Event())
    with pytest.raises(ForeignMark):
        ledger.append(batch(CHAIN, 9, 19, recorded=recorded_at_months_end), mark, threading.Event())
    assert_books_close(client, CHAIN, range(13))


def test_f8_the_last_records_month_would_let_both_in(ledger: Ledger) -> None:
    """Why it must be the first record's: one token lands once in each ClickHouse partition. The audit sees it."""
    mark = ledger.mark(CHAIN)
    for last, month in ((12, 202608), (19, 202609)):
        own = batch(CHAIN, 9, last, recorded=recorded_at_months_end, month=month)
        ledger.insert(Insert(own, "0/topic-id-1/3/10", mark.read_at))
    assert ledger.mark(CHAIN).rows == 23
    assert not ledger.mark(CHAIN).is_whole


class Record(msgspec.Struct):
    """A record as the transport delivers it."""

    offset: int
    timestamp: int
    key: bytes | None = None
    value: bytes | None = b"not a cell run"
    headers: Sequence[tuple[str, bytes]] = ()


async def test_f8_the_units_batch_takes_the_month_of_its_first_record() -> None:
    """The same rule in the unit, which forms the batches: whatever follows the first record, the month stays."""
    table = RatingTable(Catalogue([]))
    months = []
    for middle in (15, 17):
        open_batch = OpenBatch(13)
        for cut in (range(14, middle), range(middle, 20)):
            records = [Record(offset, recorded_at_months_end(offset)) for offset in cut]
            take = rate_take(CHAIN, cut[0] - 1, [records], [read_chunk(records, CHAIN.partition, 4)], table)
            open_batch.add(take, 1)
        months.append(set(open_batch.close(CHAIN).rows.column("batch_month").to_pylist()))
    assert months == [{202608}, {202608}]


# The answer is lost, late or an error: nobody knows, so the mark is read.


@over_http
@pytest.mark.parametrize(
    ("fault", "amount", "sent"),
    [
        pytest.param("close_before", 0, 2, id="f3_close_before"),
        pytest.param("status_503", 0, 2, id="f3_status_503"),
        pytest.param("exception", 252, 2, id="f3_exception"),
        pytest.param("late_before", LATE_S, 2, id="f3_late_before"),
        pytest.param("hold", 0, 2, id="f3_hold"),
        pytest.param("close_after", 0, 1, id="f4_close_after"),
        pytest.param("late_after", LATE_S, 1, id="f4_late_after"),
        pytest.param("exception_after", 252, 1, id="f4_exception_after"),
    ],
)
def test_an_insert_without_an_answer(
    client: Client, impatient: Ledger, http_server: ClickHouseServer, fault: str, amount: float, sent: int
) -> None:
    """Executed it is not sent again; otherwise it is, under the same token, and a late copy of it is dropped."""
    http_server.forget_log()
    http_server.fault(fault, amount)
    assert write(impatient, CHAIN, 19).last == 19
    if sent > 1:
        http_server.release()
        http_server.wait_for(fault=fault, state="executed" if fault in ("late_before", "hold") else "refused")
    assert [line["token"] for line in http_server.log("insert")] == ["0/topic-id-1/3/10"] * sent
    take_over(client, impatient)


@over_http
@pytest.mark.parametrize("fault", ["close_before", "exception", "late_after"])
def test_f5_a_mark_without_an_answer_is_read_again(
    client: Client, impatient: Ledger, http_server: ClickHouseServer, fault: str
) -> None:
    """However long the mark does not answer, the insert is not repeated meanwhile."""
    mark = impatient.mark(CHAIN)
    http_server.forget_log()
    http_server.fault(fault, 252 if fault == "exception" else LATE_S, on="select")
    http_server.fault(fault, 252 if fault == "exception" else LATE_S, on="select")
    assert impatient.append(batch(CHAIN, 9, 19), mark, threading.Event()).last == 19
    assert len(http_server.log("insert")) == 1
    take_over(client, impatient)


@over_http
def test_a_held_insert_is_dropped_after_the_chain_has_gone_on(
    client: Client, impatient: Ledger, http_server: ClickHouseServer
) -> None:
    """An insert that the server executes long after, when others have written its place and beyond, adds nothing."""
    http_server.fault("hold")
    take_over(client, impatient)
    http_server.release()
    http_server.wait_for(fault="hold", state="executed")
    take_over(client, impatient)


@over_http
def test_an_owner_that_closes_gives_its_batch_up(client: Client, ledger: Ledger, http_server: ClickHouseServer) -> None:
    """A unit that loses its partition does not wait for a database that is away."""
    closing = threading.Event()
    closing.set()
    http_server.fault("status_503")
    with pytest.raises(Stopped):
        ledger.append(batch(CHAIN, 9, 19), ledger.mark(CHAIN), closing)
    take_over(client, ledger)


# F9 and F10: the server is killed at each point and comes back, with its tokens or without.


@over_http
@pytest.mark.parametrize(
    ("fault", "statement"),
    [
        pytest.param("kill_before", "insert", id="f3_sent_not_executed"),
        pytest.param("kill_after", "insert", id="f4_executed_not_acknowledged"),
        pytest.param("kill_before", "select", id="f5_acknowledged_not_read_back"),
        pytest.param("kill_after", "select", id="f6_read_back_not_answered"),
    ],
)
def test_f9_server_killed(
    client: Client, ledger: Ledger, http_server: ClickHouseServer, fault: str, statement: str
) -> None:
    """The owner waits for the server, bears with its first seconds, and goes on where the ledger is."""
    mark = ledger.mark(CHAIN)
    http_server.fault(fault, on=statement)
    with ThreadPoolExecutor(1) as owner:
        written = owner.submit(ledger.append, batch(CHAIN, 9, 19), mark, threading.Event())
        http_server.wait_until_down()
        http_server.start()
        assert written.result(30).last == 19
    take_over(client, ledger)


@over_http
def test_f10_tokens_lost_in_a_restart(client: Client, ledger: Ledger, http_server: ClickHouseServer) -> None:
    """Nothing but the constraint stops an insert whose token was forgotten: its mark is older than the server."""
    _, late = form(ledger, CHAIN, 14)
    write(ledger, CHAIN, 19)
    http_server.stop()
    assert http_server.forget_tokens() >= 1
    http_server.start()
    wait_until_grown(client)
    with pytest.raises(DatabaseError, match="mark_is_fresh"):
        ledger.insert(late)
    take_over(client, ledger)
    ledger.insert(msgspec.structs.replace(late, mark_read_at=ledger.mark(CHAIN).read_at))
    assert not ledger.mark(CHAIN).is_whole, "without the constraint it would have landed"


@over_http
def test_f10_a_server_that_died_between_a_token_and_its_rows(
    client: Client, ledger: Ledger, http_server: ClickHouseServer
) -> None:
    """It drops every insert for that place, and acknowledges it: the place goes on under its next token, without an
    operator, and neither token lets anybody in once more.
    """
    client.command("SYSTEM STOP MERGES ledger")
    _, insert = form(ledger, CHAIN, 14)
    ledger.insert(insert)
    http_server.kill()
    http_server.lose_newest_part()
    http_server.start()
    wait_until_grown(client)
    assert ledger.mark(CHAIN).last == 9

    told: list[str] = []
    owner = Ledger(client, on_trouble=lambda _, what: told.append(what))
    assert owner.append(batch(CHAIN, 9, 16), ledger.mark(CHAIN), threading.Event()).last == 16
    assert told[0] == "cell-runs[3] after offset 9: the server died amid an insert, and its token is spent"
    assert told[-1] == ""
    for token in (insert.token, f"{insert.token}/1"):
        ledger.insert(msgspec.structs.replace(insert, token=token, mark_read_at=ledger.mark(CHAIN).read_at))
    take_over(client, ledger)


# F11: an owner that was away for longer than the tokens last.


def server_clock(client: Client) -> tuple[int, int]:
    """The server's clock in Unix milliseconds, and its age in seconds."""
    now_ms, uptime_s = client.query("SELECT toUnixTimestamp64Milli(now64(3)), uptime()").result_rows[0]
    return now_ms, uptime_s


@pytest.mark.parametrize("before_the_start", [False, True], ids=["older_than_120_s", "before_the_servers_start"])
def test_f11_a_stale_mark_is_refused_and_read_again(client: Client, ledger: Ledger, before_the_start: bool) -> None:
    """The table refuses the rows, the owner reads the mark again, and the rows are written on the new one."""
    now_ms, uptime_s = server_clock(client)
    age_s = uptime_s + 1 if before_the_start else 121
    stale = msgspec.structs.replace(ledger.mark(CHAIN), read_at=now_ms - age_s * 1000)
    with pytest.raises(DatabaseError, match="mark_is_fresh"):
        ledger.insert(Insert(batch(CHAIN, 9, 19), "0/topic-id-1/3/10", stale.read_at))
    assert ledger.mark(CHAIN).last == 9

    troubles: list[tuple[Chain, str]] = []
    mark = Ledger(client, on_trouble=lambda *told: troubles.append(told)).append(
        batch(CHAIN, 9, 19), stale, threading.Event()
    )

    assert mark.written_under > stale.read_at
    (_, trouble), (_, all_clear) = troubles
    assert "cell-runs[3] after offset 9" in trouble
    assert all_clear == ""
    take_over(client, ledger)


def test_f11_how_old_a_mark_may_be(client: Client) -> None:
    """120 seconds, and never older than the server: the table's own expression, evaluated at other ages of a server."""
    ((ddl,),) = client.query(
        "SELECT create_table_query FROM system.tables WHERE database = currentDatabase() AND name = 'ledger'"
    ).result_rows
    found = re.search(r"CONSTRAINT mark_is_fresh CHECK (.*?)(, PROJECTION|, CONSTRAINT|\) ENGINE)", ddl)
    assert found

    def accepts(uptime_s: int, age_s: float) -> bool:
        expression, age_ms = found[1].replace("uptime()", str(uptime_s)), int(age_s * 1000)
        row = f"(SELECT now64(3) - toIntervalMillisecond({age_ms}) AS mark_read_at)"
        return bool(client.query(f"SELECT {expression} FROM {row}").result_rows[0][0])

    assert [accepts(1000, 119), accepts(1000, 121)] == [True, False]
    assert [accepts(60, 58), accepts(60, 60)] == [True, False]
    assert not accepts(1, 0.1)


@pytest.mark.parametrize(("age_s", "first_step"), [(59.0, Insert), (61.0, ReadMark)])
def test_f11_an_old_mark_is_read_before_the_insert(age_s: float, first_step: type) -> None:
    """After a minute of silence on a partition the mark is too old to stand on."""
    mark = Mark(last=9, first=0, rows=10, gaps=10, written_under=1, read_at=2, age_from=100.0)
    assert isinstance(next(append_steps(batch(CHAIN, 9, 19), mark, 0, lambda: 100.0 + age_s)), first_step)


# F12: two owners who both believe that the partition is theirs.


def test_f12_two_live_owners(client: Client, ledger: Ledger) -> None:
    """The second one's insert is dropped, and it ends when it reads the mark."""
    first_steps, first = form(ledger, CHAIN, 15)
    second_steps, second = form(ledger, CHAIN, 19)
    for insert in (first, second, first):
        ledger.insert(insert)
    first_steps.send(True)
    assert finish(first_steps, ledger).last == 15
    second_steps.send(True)
    with pytest.raises(ForeignMark):
        second_steps.send(ledger.mark(CHAIN))
    take_over(client, ledger)


def test_f12_foreign_rows_that_end_where_ours_would(client: Client, ledger: Ledger) -> None:
    """Rows up to our last offset are not ours unless they stand on a mark that we read."""
    steps, insert = form(ledger, CHAIN, 19)
    write(ledger, CHAIN, 19)
    ledger.insert(insert)
    steps.send(True)
    with pytest.raises(ForeignMark):
        steps.send(ledger.mark(CHAIN))
    take_over(client, ledger)


def test_f12_three_live_owners_race(ledger_url: str, client: Client) -> None:
    """Three threads write one chain, each in cuts of its own: who loses a place starts again from the mark."""

    def own(rows_max: int) -> int:
        lost = 0
        with connect(ledger_url) as connection:
            while True:
                try:
                    write(Ledger(connection), CHAIN, 119, rows_max)
                    return lost
                except ForeignMark:
                    lost += 1

    with ThreadPoolExecutor(3) as owners:
        lost = sum(owners.map(own, (5, 7, 11)))

    assert lost > 0
    assert_books_close(client, CHAIN, range(120))
    assert content(client, CHAIN) == content_of(batch(CHAIN, -1, 119).rows)


def test_f12_owners_of_two_epochs_are_not_kept_apart(ledger: Ledger) -> None:
    """The limit of an epoch: raise it for a fleet that was stopped. Here the rows land twice, and the audit sees it."""
    _, old = form(ledger, CHAIN, 19, epoch=0)
    _, new = form(ledger, CHAIN, 19, epoch=1)
    ledger.insert(old)
    ledger.insert(new)
    assert ledger.mark(CHAIN).rows == 30
    assert not ledger.mark(CHAIN).is_whole


# Tokens that outlived their rows.


def test_five_acknowledged_inserts_with_the_mark_unmoved(client: Client, ledger: Ledger) -> None:
    """The tokens outlived the rows: an incident, not an endless loop; a raised epoch heals the chain."""
    write(ledger, CHAIN, 19)
    client.command("ALTER TABLE ledger DELETE WHERE kafka_offset > 9 SETTINGS mutations_sync = 2")

    with pytest.raises(Incident) as incident:
        write(ledger, CHAIN, 19)

    assert incident.value.why.startswith(f"{ACKNOWLEDGED_MAX} inserts after offset 9 were acknowledged")
    assert incident.value.fix == "Stop all workers. Raise CREDITSTREAM_EPOCH above 0, then start them."
    assert ledger.mark(CHAIN).last == 9
    take_over(client, Ledger(client, epoch=1))


def test_a_server_that_dies_again_and_again_is_an_incident(ledger: Ledger) -> None:
    """A place has some tokens; then an operator is asked."""
    _, insert = form(ledger, CHAIN, 19)
    mark = msgspec.structs.replace(ledger.mark(CHAIN), is_of_earlier_life=True)
    steps = append_steps(insert.batch, mark, 0)
    tokens = [insert.token, *(f"{insert.token}/{spent}" for spent in range(1, SPENT_MAX + 1))]

    sent = [next(steps)]
    for _ in range(ACKNOWLEDGED_MAX * len(tokens) - 1):
        assert isinstance(steps.send(True), ReadMark)
        sent.append(steps.send(mark))
    assert isinstance(steps.send(True), ReadMark)
    with pytest.raises(Incident):
        steps.send(mark)
    found = [step.token for step in sent if isinstance(step, Insert)]
    assert found == [token for token in tokens for _ in range(ACKNOWLEDGED_MAX)]


def test_failed_inserts_are_no_incident(ledger: Ledger) -> None:
    """A database that refuses for hours is waited for: only acknowledged inserts count."""
    steps, _ = form(ledger, CHAIN, 19)
    for _ in range(4 * ACKNOWLEDGED_MAX):
        assert isinstance(steps.send(False), ReadMark)
        assert isinstance(steps.send(ledger.mark(CHAIN)), Insert)


# F13: the topic was deleted and made again.


def test_f13_a_recreated_topic_starts_its_own_chain(client: Client, ledger: Ledger) -> None:
    """The same name, partition and offsets under a new topic id: nothing is taken for written."""
    new = Chain(CHAIN.topic, "topic-id-2", CHAIN.partition)
    assert ledger.mark(new).last == -1
    own = batch(new, -1, 9, runs_from=100, copies={0: 3, 7: 8})
    assert ledger.append(own, ledger.mark(new), threading.Event()).last == 9
    assert_books_close(client, new, range(10))
    assert content(client, new) == content_of(own.rows)
    take_over(client, ledger)


def test_f13_duplicates_are_found_across_topic_ids(client: Client, ledger: Ledger) -> None:
    """A run of the old topic is in the filter of the new one, and the look-up says where it lies."""
    new = Chain(CHAIN.topic, "topic-id-2", CHAIN.partition)
    old_run, unknown_run = run_id(CHAIN, 3), run_id(CHAIN, 1000)

    keys = recent_run_keys(client, new, since=AUGUST_MS / 1000)
    found = find_runs(
        client,
        [Identity("workspace-0", old_run), Identity("workspace-1", old_run), Identity("workspace-1", unknown_run)],
    )

    assert sorted(keys) == sorted(id_keys(b"".join(run_id(CHAIN, run).bytes for run in range(10))))
    assert [(identity, position) for identity, position, _ in found] == [(("workspace-0", old_run), "cell-runs[3]@3")]


# F15: Kafka itself has no record for some offsets.


FAR: Final = 2**33
"""A gap that is wider than 32 bits: retention may take any number of events."""


def test_f15_offset_gaps(client: Client, ledger: Ledger) -> None:
    """Compaction and transaction markers leave holes: the gaps add up to the range, within and between batches."""
    for last, offsets in ((19, [12, 13, 17, 19]), (29, [24, 29]), (FAR, [FAR])):
        mark = ledger.mark(CHAIN)
        ledger.append(batch(CHAIN, mark.last, last, offsets=offsets), mark, threading.Event())
    mark = ledger.mark(CHAIN)
    assert (mark.rows, mark.gaps, mark.is_whole) == (17, FAR + 1, True)
    assert_books_close(client, CHAIN, [*range(10), 12, 13, 17, 19, 24, 29, FAR])


def test_f15_a_chain_may_begin_late(client: Client) -> None:
    """Where retention took the beginning, the first row opens the chain without a gap."""
    ledger = Ledger(client)
    ledger.append(batch(CHAIN, -1, 109, offsets=range(100, 110)), ledger.mark(CHAIN), threading.Event())
    mark = write(ledger, CHAIN, 119)
    assert (mark.first, mark.gaps, mark.is_whole) == (100, 20, True)
    assert_books_close(client, CHAIN, range(100, 120))


def test_f15_a_hole_that_kafka_did_not_make_shows(ledger: Ledger) -> None:
    """Rows that are missing below the mark do not hide: their gaps are missing too."""
    ledger.insert(Insert(batch(CHAIN, 12, 19), "0/topic-id-1/3/13", ledger.mark(CHAIN).read_at))
    mark = ledger.mark(CHAIN)
    assert (mark.last, mark.rows, mark.gaps, mark.is_whole) == (19, 17, 17, False)
