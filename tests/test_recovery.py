"""Where a unit begins, and what it does again: from the ledger's marks and Kafka's commits."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow as pa
import pytest
from clickhouse_connect.driver.client import Client

from schemas.cell_run import to_milliseconds
from schemas.ledger import Kind, Pool, number_of
from schemas.limits import AlertKind
from schemas.problem import Unreachable
from sinks import accounts
from sinks.accounts import AccountFact, Tail
from sinks.ledger import Chain, ForeignMark
from streams import assignment, recovery
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS
from streams.recovery import TAIL_ROWS_MAX, Start, first_ms, in_parts, instants_of, starting_point, told_at, without
from streams.rules.facts import openings
from streams.rules.limits import FOREVER_MS
from tests.account_records import Story, Topics, at
from tests.limit_voices import seen_of, told_of
from tests.unit_bench import CHAINS, SOON_S, Bench

ON_CHDB: Final = pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
NO_DEBITS: Final = pa.table({name: pa.array([], pa.int64()) for name in ("workspace_id", "pool", "credits", "day")})


@pytest.mark.parametrize(
    ("marks", "committed", "start"),
    [
        ((-1, -1), (None, None), Start(-1, -1, False)),
        ((-1, -1), (0, 0), Start(-1, -1, False)),
        ((0, 0), (0, 0), Start(-1, -1, False)),
        ((0, -1), (None, None), Start(0, -1, True)),
        ((9, 3), (10, 4), Start(9, 3, False)),
        ((9, 3), (5, 4), Start(4, 3, False)),
        ((9, 3), (None, 4), Start(9, 3, True)),
        ((9, -1), (10, None), Start(9, -1, False)),
        ((9, 3), (11, 4), Start(9, 3, True)),
        ((TAIL_ROWS_MAX, 3), (0, 4), Start(TAIL_ROWS_MAX, 3, True)),
    ],
)
def test_where_a_fold_begins(marks: tuple[int, int], committed: tuple[int | None, int | None], start: Start) -> None:
    """At the commit; without one, with one above the mark, or with too much behind it, at the mark, and seeded."""
    assert starting_point(marks, committed, (0, 0)) == start


def test_a_fold_begins_behind_what_kafka_has_dropped() -> None:
    """A group has committed where it began, and of that chain nothing is in the ledger: of the other one, which goes
    on, what was not told is told.
    """
    assert starting_point((9, -1), (5, 100), (0, 100)) == Start(4, -1, False)
    assert starting_point((9, -1), (5, 90), (0, 100)) == Start(4, -1, False)
    assert starting_point((9, -1), (5, 101), (0, 100)).is_seeded
    assert starting_point((9, 50), (5, 80), (0, 90)).is_seeded


def plan_row(recorded: str, effective: str, offset: int, allowance: int = 10_000, plan: str = "10") -> AccountFact:
    """A plan of ``ws_1`` as the ledger holds it."""
    return AccountFact(
        "ws_1", Kind.PLAN, to_milliseconds(at(recorded)), offset, to_milliseconds(at(effective)), plan, allowance,
        False, (), None, "enrichment", 0, 0,
    )  # fmt: skip


def test_f13_a_tail_takes_out_its_own_events_and_not_those_of_a_deleted_topic() -> None:
    """Offsets begin again in a topic that was recreated: an equal one is another event."""
    old, new = plan_row("Jan 1", "Jan 1", 0), plan_row("Feb 1", "Feb 1", 0)
    events, _ = without(Tail(NO_DEBITS, [(1, new)]), [old, new], [])
    assert events == [old]


def test_a_tail_takes_out_what_it_drew_and_gave_back() -> None:
    """Each with the other sign: debits of one pool and day together, premium ones of all time."""
    debits = pa.table({
        "workspace_id": ["ws_1", "ws_1", "ws_1", "ws_2"],
        "pool": [number_of(Pool.ENRICHMENT), number_of(Pool.ENRICHMENT), number_of(Pool.PREMIUM), 0],
        "credits": [1_000, 2_000, 500, 0],
        "day": [7, 7, 8, 9],
        "recorded_ms": [30, 40, 50, 60],
    })  # fmt: skip
    given_back = plan_row("Jan 2", "Jan 1", 0)._replace(kind=Kind.REVERSAL, credits=-3_000, day=9)
    premium = given_back._replace(recorded_ms=20, offset=1, pool="premium", credits=-250)
    tail = Tail(debits, [(1, premium), (2, given_back)])
    before = [("ws_1", "enrichment", 6, 10_000)]
    _, draws = without(tail, [], before)
    assert sorted(draw for draw in draws if draw[3]) == sorted([
        *before, ("ws_1", "enrichment", 7, -3_000), ("ws_1", "premium", 0, -500),
        ("ws_1", "enrichment", 9, 3_000), ("ws_1", "premium", 0, 250),
    ])  # fmt: skip
    assert (first_ms(tail), first_ms(Tail(debits, [])), first_ms(Tail(debits[:0], tail.events))) == (20, 30, 20)


def test_accounts_are_loaded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is left out, and none comes twice."""
    monkeypatch.setattr(recovery, "LOADED_AT_ONCE", 2)
    assert list(in_parts("abcde")) == ["ab", "cd", "e"]


def test_instants_come_in_their_order_with_what_is_learnt_between_them() -> None:
    """Two that were known long ago, one that was learnt between, and one that was learnt last."""
    known = [
        ("Jan 10", "Jan 20 12:00"), ("Jan 10", "Jan 20 14:00"), ("Jan 20 18:00", "Jan 21 06:00"),
        ("Jan 21 12:00", "Jan 21 18:00"), ("Jan 21 19:00", "Jan 23"),
    ]  # fmt: skip
    rows = [plan_row(recorded, effective, offset) for offset, (recorded, effective) in enumerate(known)]
    from_ms, to_ms = to_milliseconds(at("Jan 19")), to_milliseconds(at("Jan 22"))
    assert instants_of(rows, from_ms, to_ms) == tuple(to_milliseconds(at(effective)) for _, effective in known[:4])


def test_an_instant_tells_what_was_known_right_before_it() -> None:
    """What is recorded in the same millisecond comes behind it."""
    instant = to_milliseconds(at("Jan 20 12:00"))
    first = plan_row("Jan 10", "Jan 20 12:00", 0, 0, "cancelled")
    opening = openings(["ws_1"], [], [])["ws_1"]
    for recorded_ms, plan in ((instant - 1, "10"), (instant, "cancelled")):
        second = plan_row("Jan 11", "Jan 20 12:00", 1)._replace(recorded_ms=recorded_ms)
        told = told_at("ws_1", [first, second], instant, opening)
        assert [notice.standing.terms.plan for notice, _ in told] == ([] if plan == "10" else [plan])


def test_an_instant_tells_what_was_known_then() -> None:
    """An event that was replaced later still told; one that came later did not."""
    effective = "Jan 20 12:00"
    first = plan_row("Jan 10", effective, 0, 0, "cancelled")
    rows = [first, plan_row("Jan 21", effective, 1)]
    from_ms, to_ms = to_milliseconds(at("Jan 19")), to_milliseconds(at("Jan 22"))
    instant = to_milliseconds(at(effective))
    assert instants_of(rows, from_ms, to_ms) == (instant,)
    ((notice, source),) = told_at("ws_1", rows, instant, openings(["ws_1"], [], [])["ws_1"])
    assert (notice.kind, notice.standing.terms.plan, notice.at_ms, source) == ("exhausted", "cancelled", instant, None)
    assert instants_of(rows[1:], from_ms, to_ms) == ()


def test_a_grant_that_came_tells_of_what_the_pool_had_drawn() -> None:
    """Of all time: the premium pool has no period."""
    effective = "Jan 20 12:00"
    grant = plan_row("Jan 10", effective, 0)._replace(kind=Kind.GRANT, pool="premium", plan="")
    instant = to_milliseconds(at(effective))
    opening = openings(["ws_1"], [], [("ws_1", "premium", 0, 6_000)])["ws_1"]
    ((notice, _),) = told_at("ws_1", [grant], instant, opening)
    assert (notice.kind, notice.standing.used, [line.percent for line in notice.lines]) == ("recovered", 6_000, [50])


async def live(
    client: Client,
    committed: Sequence[int | None],
    *chunks: tuple[bool, list[Any]],
    chains: tuple[Chain, Chain] = CHAINS,
) -> Bench:
    """A unit that takes these chunks one after the other, and is killed."""
    bench = await Bench.open(client, committed=committed, chains=chains)
    task = bench.start()
    for of_account, records in chunks:
        done = bench.acknowledged + 1
        bench.deliver(records, of_account=of_account)
        bench.unit.drain()
        await bench.wait(task, lambda done=done: bench.acknowledged == done)  # type: ignore[misc]
    await bench.wait(task, lambda: not bench.unit.chores)
    await bench.kill(task)
    await bench.unit.voice.flush()
    return bench


@ON_CHDB
async def test_f6_what_the_commit_has_not_seen_is_told_again_with_the_same_ids(client: Client) -> None:
    """Rows are in the ledger, nobody heard: the next owner tells the same alerts, and no others."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(6, at("Jan 16"), at("Jan 17"))
    story.plan("20", at("Jan 18"))
    story.runs(4, at("Jan 19"), at("Jan 20"))
    told = (await live(client, (0, 0), *Topics().append(story.steps))).alerts
    assert [(str(alert.kind), alert.thresholds) for alert in told] == [
        ("crossed", (50,)), ("recovered", ()), ("crossed", (50,))
    ]  # fmt: skip

    heard_nothing = await live(client, (0, 0))
    heard_half = await live(client, (6, 1))
    heard_all = await live(client, (10, 2))

    plain = [(alert.alert_id, alert.position, alert.used, alert.run_id) for alert in told]
    assert [(a.alert_id, a.position, a.used, a.run_id) for a in heard_nothing.alerts] == plain
    assert [alert.alert_id for alert in heard_half.alerts] == [alert.alert_id for alert in told[1:]]
    assert heard_all.alerts == []
    for bench in (heard_nothing, heard_half, heard_all):
        seen = seen_of(bench.unit.balances["ws_1"].standing(Pool.ENRICHMENT))
        assert (seen.used, seen.allowance, seen.state) == (10, 20, "warning")


@ON_CHDB
async def test_who_is_let_go_during_the_look_back_is_told_nothing_twice(client: Client) -> None:
    """A grant was told when it came; an account that is loaded again as of before it would tell it by time, too."""
    before, granted, other = Story("ws_2"), Story(), Story("ws_3")
    before.plan("20", at("Jan 15"))
    granted.run(at("Jan 16"), "clearbit_enrich_company")
    await live(client, (0, 0), *Topics().append([*before.steps, *granted.steps]))
    granted.grant("10", at("Jan 17"), at("Jan 17"))
    other.runs(1, at("Jan 18"))
    granted.run(at("Jan 19"), "clearbit_enrich_company")
    never = asyncio.Event()
    bench = await Bench.open(client, committed=(1, 1), accounts_max=1, on_look_aside=never.wait)
    task = bench.start()
    grant, run, last = granted.steps[1], other.steps[0], granted.steps[2]
    chunks = Topics().append([before.steps[0], granted.steps[0], grant, run, last])
    for of_account, records in ((True, chunks[2][1]), (False, chunks[3][1][:1]), (False, chunks[3][1][1:])):
        done = bench.acknowledged + 1
        bench.deliver(records, of_account=of_account)
        await bench.wait(task, lambda done=done: bench.acknowledged == done)  # type: ignore[misc]
    await bench.kill(task)
    assert [(str(alert.kind), str(alert.cause)) for alert in bench.alerts] == [("recovered", "grant")]


@ON_CHDB
async def test_a_tail_of_months_is_told_again_as_it_was(client: Client) -> None:
    """A backlog that was drained at once: where its last days lie moves none of its first ones out of the account."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(4, at("Jan 16"))
    story.plan("20", at("Jan 18"), at("Jan 17"))
    story.runs(6, at("Jan 19"), at("Jan 20"))
    story.run(at("May 1"))
    told = (await live(client, (0, 0), *Topics().append(story.steps))).alerts
    assert [(str(alert.kind), alert.used) for alert in told] == [("crossed", "10"), ("period_started", "0")]
    again = (await live(client, (0, 0))).alerts
    assert {told_of(alert) for alert in again} == {told_of(alert) for alert in told}
    assert {alert.alert_id for alert in again} == {alert.alert_id for alert in told}


@ON_CHDB
async def test_what_was_committed_of_both_topics_is_of_one_moment(client: Client) -> None:
    """A chunk of runs with thresholds that changed amid it: its first part, folded again behind them, told a line that
    was passed long before.
    """
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(4, at("Jan 16"), at("Jan 17"))
    story.limits(at("Jan 18"), [30])
    story.run(at("Jan 19"))
    chunks = Topics().append(story.steps)
    runs = [record for of_account, records in chunks for record in records if not of_account]
    bench = await Bench.open(client, committed=(0, 0), linger_s=SOON_S)
    task = bench.start()
    for of_account, records in (chunks[0], chunks[2], (False, runs)):
        bench.deliver(records, of_account=of_account)
    await bench.wait(task, lambda: bench.committed[1] == 2)
    await bench.kill(task)
    assert (bench.acknowledged, bench.committed) == (2, [4, 2])
    again = await live(client, bench.committed)
    assert bench.alerts + again.alerts == []


@ON_CHDB
async def test_without_a_commit_standing_lines_are_told_as_seeded(client: Client) -> None:
    """There is no history to fold again: what stands is told, and notifies nobody."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(9, at("Jan 16"), at("Jan 17"))
    await live(client, (0, 0), *Topics().append(story.steps))

    bench = await live(client, (None, None))

    (alert,) = bench.alerts
    assert (alert.seeded, str(alert.kind), alert.thresholds, alert.used) == (True, "crossed", (50, 80), "9")
    assert {key: str(state.state) for key, state in bench.states.items()} == {
        b"enrichment/ws_1": "warning", b"premium/ws_1": "exhausted"
    }  # fmt: skip


@ON_CHDB
async def test_without_a_commit_everybody_is_told(client: Client) -> None:
    """Also who is `ok`: a gate that knows nobody would refuse them."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(1, at("Jan 18"), at("Jan 18"))
    await live(client, (0, 0), *Topics().append(story.steps))
    bench = await live(client, (None, None))
    assert str(bench.states[b"enrichment/ws_1"].state) == "ok"
    assert bench.alerts == []


@ON_CHDB
async def test_states_are_told_when_all_topics_were_made_again(client: Client) -> None:
    """The ledger alone is left: that of the compacted topic, too, is gone."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(10, at("Jan 16"), at("Jan 17"))
    await live(client, (0, 0), *Topics().append(story.steps))
    chains = Chain(CELL_RUNS, "topic-3", 0), Chain(ACCOUNT_EVENTS, "topic-4", 0)
    asked = asyncio.Event()
    killed = await Bench.open(client, chains=chains, on_look_aside=asked.wait)
    assert killed.unit.settling.is_seeding, "a commit would say that they were told, and after a crash nobody would be"
    bench = await live(client, (None, None), chains=chains)
    assert not bench.unit.settling.is_seeding
    assert str(bench.states[b"enrichment/ws_1"].state) == "exhausted"
    assert all(alert.seeded for alert in bench.alerts)


@ON_CHDB
async def test_what_is_folded_again_is_told_before_it_is_committed(client: Client) -> None:
    """A second crash, or a rebalance, right behind the assignment leaves no old ``used`` on the topic."""
    story = Story()
    story.plan("20", at("Jan 15"))
    story.runs(2, at("Jan 16"), at("Jan 17"))
    await live(client, (0, 0), *Topics().append(story.steps))
    bench = await Bench.open(client, committed=(0, 1))
    assert bench.states[b"enrichment/ws_1"].used == "2"
    assert not bench.unit.balances.moved


@ON_CHDB
async def test_what_is_folded_again_is_asked_for_in_parts(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many workspaces it is about: the ledger refuses a statement that names them all, at every start anew."""
    stories = Story(), Story("ws_2"), Story("ws_3")
    topics, chunks = Topics(), []
    for story in stories:
        story.plan("4", at("Jan 15"))
        story.runs(2, at("Jan 16"))
        chunks += topics.append(story.steps)
    before = await live(client, (0, 0), *chunks)
    asked: list[Sequence[str]] = []
    look_up = Bench.look_up

    async def watched(bench: Bench, question: Callable[..., Any], *args: Any) -> Any:
        if question in (accounts.facts_of, accounts.draws_of):
            asked.append(args[0])
        return await look_up(bench, question, *args)

    monkeypatch.setattr(Bench, "look_up", watched)
    monkeypatch.setattr(recovery, "LOADED_AT_ONCE", 2)
    bench = await Bench.open(client, committed=(0, 0))
    assert max(map(len, asked)) == 2
    assert {alert.alert_id for alert in bench.alerts} == {alert.alert_id for alert in before.alerts}
    for story in stories:
        assert seen_of(bench.unit.balances[story.workspace_id].standing(Pool.ENRICHMENT)).used == 2


@ON_CHDB
async def test_an_instant_that_comes_during_the_look_back_is_told(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for it is loaded later, and as of before it: nobody's upgrade is lost while a slow ledger is asked."""
    monkeypatch.setattr(recovery, "PRELOADED_MAX", 0)
    waiting, busy = Story(), Story("ws_2")
    waiting.plan("4", at("Jan 15"))
    waiting.runs(4, at("Jan 16"))
    waiting.plan("20", at("Jan 18"), at("Jan 16 12:00"))
    busy.runs(1, at("Jan 17"))
    topics = Topics()
    before = await live(client, (0, 0), *topics.append(waiting.steps), *topics.append(busy.steps))
    comes = asyncio.Event()
    bench = await Bench.open(client, committed=before.committed, on_look_aside=comes.wait)
    assert not list(bench.unit.balances)
    busy.runs(1, at("Jan 19"))
    ((_, records),) = topics.append(busy.steps[-1:])
    bench.deliver(records)
    now_ms = to_milliseconds(at("Jan 19"))
    bench.ends_ms = now_ms, now_ms
    task = bench.start()
    await bench.wait(task, lambda: bench.acknowledged == 1)
    assert bench.alerts == []
    comes.set()
    await bench.wait(task, lambda: bool(bench.alerts))
    await bench.kill(task)
    assert [(alert.workspace_id, alert.kind, alert.at) for alert in bench.alerts] == [
        ("ws_1", AlertKind.RECOVERED, at("Jan 18"))
    ]


@ON_CHDB
async def test_what_time_changed_right_before_a_crash_is_a_state_again(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit may pass an instant before the clock has told of it: gates must not refuse what was granted for good."""
    granted, busy = Story(), Story("ws_2")
    granted.plan("10", at("Jan 15"))
    granted.grant("5", at("Jan 18"), at("Jan 16"))
    busy.runs(1, at("Jan 19"))
    topics = Topics()
    monkeypatch.setattr("streams.unit.TICK_S", 60.0)
    killed = await Bench.open(client, committed=(0, 0))
    task = killed.start()
    killed.unit.drain()
    for told, (of_account, records) in enumerate([*topics.append(granted.steps), *topics.append(busy.steps)]):
        killed.deliver(records, of_account=of_account)
        await killed.wait(task, lambda told=told: killed.acknowledged == told + 1)  # type: ignore[misc]
    await killed.kill(task)
    assert str(killed.states[b"premium/ws_1"].state) == "exhausted"

    monkeypatch.undo()
    bench = await live(client, killed.committed)
    assert [(alert.kind, alert.at) for alert in bench.alerts] == [(AlertKind.RECOVERED, at("Jan 18"))]
    assert str(bench.states[b"premium/ws_1"].state) == "ok"


@ON_CHDB
async def test_a_long_tail_hides_no_instant_of_who_is_not_in_it(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in a backlog of a week: its last row is far behind an instant of a workspace that it is not about."""
    warned, busy = Story(), Story("ws_2")
    warned.plan("4", at("Jan 15"))
    warned.grant("5", at("Feb 16"), at("Jan 16"))
    warned.runs(4, at("Feb 14"))
    busy.runs(1, at("Feb 21"))
    monkeypatch.setattr("streams.unit.TICK_S", 60.0)
    await live(client, (0, 0), *Topics().append([*warned.steps, *busy.steps]))

    monkeypatch.undo()
    bench = await live(client, (4, 2))
    assert [(alert.workspace_id, alert.kind, alert.at) for alert in bench.alerts] == [
        ("ws_1", AlertKind.PERIOD_STARTED, at("Feb 15")), ("ws_1", AlertKind.RECOVERED, at("Feb 16"))
    ]  # fmt: skip
    assert {str(bench.states[key].state) for key in (b"enrichment/ws_1", b"premium/ws_1")} == {"ok"}


async def a_first_life(client: Client) -> tuple[Story, Topics]:
    """A plan of 10 credits and three of them drawn, all in the ledger; the story goes on in these topics."""
    story, topics = Story(), Topics()
    story.plan("10", at("Jan 15"))
    story.runs(3, at("Jan 16"))
    await live(client, (0, 0), *topics.append(story.steps))
    story.steps.clear()
    return story, topics


@ON_CHDB
@pytest.mark.parametrize("read", [accounts.tail_of, accounts.workspaces_of], ids=["before", "after"])
async def test_f12_an_insert_that_lands_while_balances_are_loaded_is_counted_once(
    client: Client, monkeypatch: pytest.MonkeyPatch, read: Callable[..., Any]
) -> None:
    """Of a dead worker: with its rows in the balances, and in Kafka, where they are read again, twice as much would be
    told to be used. The next process finds them below its mark.
    """
    story, topics = await a_first_life(client)
    story.runs(3, at("Jan 17"))
    late = topics.append(story.steps)

    async def land() -> None:
        monkeypatch.undo()
        await live(client, (3, 1), *late)

    def look_up(client: Client, *args: Any) -> Any:
        asyncio.run(land())
        return read(client, *args)

    monkeypatch.setattr(accounts, read.__name__, look_up)
    with pytest.raises(ForeignMark, match=r"cell-runs\[0\]: the mark is at 5, expected 2"):
        await Bench.open(client, committed=(3, 1))
    bench = await live(client, (3, 1))
    assert [(alert.kind, alert.used) for alert in bench.alerts] == [(AlertKind.CROSSED, "5")]


@ON_CHDB
@pytest.mark.parametrize("of_account", [False, True], ids=["runs", "grant"])
async def test_f12_an_insert_that_lands_before_an_account_is_asked_for_is_counted_once(
    client: Client, monkeypatch: pytest.MonkeyPatch, of_account: bool
) -> None:
    """Of a dead worker, when its successor is at work already and loads accounts as their records come: it ends before
    it tells anything by what is in the ledger and comes from Kafka, too.
    """
    story, topics = await a_first_life(client)
    if of_account:
        story.grant("5", at("Jan 17"), at("Jan 17"))
    else:
        story.runs(3, at("Jan 17"))
    ((_, late),) = topics.append(story.steps)
    monkeypatch.setattr(recovery, "PRELOADED_MAX", 0)
    stale = await Bench.open(client, committed=(3, 1))
    assert stale.unit.balances.missing(["ws_1"], FOREVER_MS)
    await live(client, (3, 1), (of_account, late))

    stale.deliver(late, of_account=of_account)
    with pytest.raises(ExceptionGroup) as ended:
        await stale.until(lambda: stale.acknowledged == 1)
    assert ended.group_contains(ForeignMark)
    assert (stale.alerts, stale.states) == ([], {})


@ON_CHDB
async def test_a_recovery_that_takes_too_long_ends_the_process(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker may be quicker: partitions do not wait for ever behind a ledger that hangs."""
    monkeypatch.setattr(assignment, "RECOVERY_S_MAX", 0.2)
    monkeypatch.setattr(Bench, "look_up", _hang)
    with pytest.raises(Unreachable, match=r"cell-runs\[0\] is not recovered: after 0.2 s"):
        await Bench.open(client)


async def _hang(bench: Bench, question: Callable[..., Any], *args: Any) -> Any:
    if question is accounts.last_recorded_ms:
        await asyncio.sleep(60)
    return await asyncio.to_thread(question, bench.client, *args)


@ON_CHDB
async def test_f13_balances_go_on_when_a_topic_was_made_again(client: Client) -> None:
    """Plans and debits of the old topic count; the new one's events at the same offsets are added."""
    story = Story()
    story.plan("10", at("Jan 15"))
    story.runs(3, at("Jan 16"), at("Jan 17"))
    await live(client, (0, 0), *Topics().append(story.steps))

    again = Story()
    again.plan("20", at("Jan 18"))
    again.runs(3, at("Jan 19"), at("Jan 20"))
    chains = Chain(CELL_RUNS, "topic-3", 0), Chain(ACCOUNT_EVENTS, "topic-4", 0)
    for chunks in (Topics().append(again.steps), []):
        bench = await live(client, (0, 0), *chunks, chains=chains)
        seen = seen_of(bench.unit.balances["ws_1"].standing(Pool.ENRICHMENT))
        assert (seen.used, seen.allowance, seen.state, seen.plan) == (6, 20, "ok", "20")
