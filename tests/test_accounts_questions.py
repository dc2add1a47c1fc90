"""What people ask of an account: balance, periods, statement, thresholds, and why a run moved it."""

from datetime import UTC, date, datetime, timedelta
from typing import Any, cast
from uuid import UUID

import pytest
from clickhouse_connect.driver.client import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creditstream import accounts
from schemas.answers import By, PoolBalance, StatementLine
from schemas.cell_run import to_milliseconds
from schemas.credits import parse_credits
from schemas.ledger import Pool
from schemas.problem import Problem, UnknownId
from sinks import account_queries
from streams.rules.balances import METERED
from tests.account_rows import SECOND, AccountRows, at
from tests.records import EXAMPLES, STEADY

pytestmark = pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
DAY = timedelta(days=1)


def enrichment(client: Client, as_of: datetime) -> PoolBalance:
    return accounts.balance(client, "ws_1", as_of)[0]


def premium(client: Client, as_of: datetime) -> PoolBalance:
    return accounts.balance(client, "ws_1", as_of)[1]


def told(balance: PoolBalance) -> tuple[str, str, str, list[int]]:
    return balance.used, balance.allowance, balance.state, balance.thresholds


def lines(client: Client, day: date | None, as_of: datetime) -> dict[str, StatementLine]:
    found = {line.pool: line for line in accounts.statement(client, "ws_1", day, as_of)}
    assert all(line.foots for line in found.values())
    return found


def moves(line: StatementLine) -> tuple[str, ...]:
    return line.opening, line.granted, line.debited, line.reversed, line.expired, line.closing


def test_history_of_a_plan_that_is_used_up_r06(client: Client) -> None:
    """As-of asks walk through a period: ok, warning, one credit left, exhausted with an overage of 1."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"))
    steps = [(9_999, "9999 ok"), (1, "10000 warning"), (5_999, "15999 warning"), (2, "16001 warning"),
             (3_998, "19999 warning"), (2, "20001 exhausted")]  # fmt: skip
    for day, (credits, _) in enumerate(steps):
        rows.run(at("2026-01-16") + day * DAY, credits)
    rows.write(client)

    for day, (_, expected) in enumerate(steps):
        found = enrichment(client, at("2026-01-16 12:00:00") + day * DAY)
        assert f"{found.used} {found.state}" == expected
    assert (found.remaining, found.overage, found.thresholds) == ("0", "1", [50, 80, 100])
    assert (found.period_start, found.period_end) == (date(2026, 1, 15), date(2026, 2, 15))
    assert (found.plan, found.next_allowance) == ("20k", "20000")


def test_history_of_an_upgrade_r06(client: Client) -> None:
    """The allowance of the running period becomes the new plan's at once; what was drawn stays drawn."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"))
    rows.run(at("2026-01-25"), 20_000)
    rows.plan(at("2026-01-26 10:00:00"), "50k", 50_000)
    rows.run(at("2026-01-27"), 5_000)
    rows.write(client)

    assert told(enrichment(client, at("2026-01-26"))) == ("20000", "20000", "exhausted", [50, 80, 100])
    assert told(enrichment(client, at("2026-01-26 10:00:01"))) == ("20000", "50000", "ok", [])
    assert told(enrichment(client, at("2026-01-28"))) == ("25000", "50000", "warning", [50])


def test_history_of_a_downgrade_r01(client: Client) -> None:
    """It takes effect with the next period, by time alone."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"), "50k", 50_000)
    rows.plan(at("2026-01-20 12:00:00"))
    rows.run(at("2026-01-25"), 30_000)
    rows.write(client)

    assert told(enrichment(client, at("2026-02-14 23:59:59"))) == ("30000", "50000", "warning", [50])
    assert told(enrichment(client, at("2026-02-15"))) == ("0", "20000", "ok", [])


def test_history_of_a_plan_that_comes_late(client: Client) -> None:
    """Before it all is `unknown_plan` in calendar months; after it the days before lie in a month cut at its day."""
    rows = AccountRows()
    rows.run(at("2026-01-05"), 3_000)
    rows.run(at("2026-01-15"), 12_000)
    rows.plan(at("2026-01-10 15:00:00"), recorded_at=at("2026-01-20"))
    rows.write(client)

    assert told(enrichment(client, at("2026-01-19"))) == ("15000", "0", "unknown_plan", [])
    assert told(enrichment(client, at("2026-01-20"))) == ("12000", "20000", "warning", [50])
    found = accounts.periods(client, "ws_1", at("2026-01-20"))
    assert [(row.period_start, row.period_end, row.used, row.allowance, row.plan, row.is_closed) for row in found] == [
        (date(2026, 1, 1), date(2026, 1, 10), "3000", "0", "", True),
        (date(2026, 1, 10), date(2026, 2, 10), "12000", "20000", "20k", False),
    ]


def test_periods_begin_with_the_first_run_whatever_it_drew(client: Client) -> None:
    """A premium or a free run is one, too: the same periods as in the view."""
    rows = AccountRows()
    for pool in (Pool.PREMIUM, Pool.NONE):
        rows.workspace_id = pool
        rows.run(at("2026-01-05"), int(pool == Pool.PREMIUM), pool=pool)
        rows.plan(at("2026-02-10"))
    rows.write(client)

    for name in (Pool.PREMIUM, Pool.NONE):
        view = client.query(
            "SELECT period_start, period_end, plan FROM billing_periods_as_of(as_of = {as_of:DateTime64(3, 'UTC')}) "
            "WHERE workspace_id = {name:String} ORDER BY period_start",
            parameters={"as_of": at("2026-02-20"), "name": str(name)},
        ).result_rows
        found = accounts.periods(client, name, at("2026-02-20"))
        assert [(row.period_start, row.period_end, row.plan) for row in found] == view
        assert [row.period_start for row in found] == [date(2026, 1, 1), date(2026, 2, 1), date(2026, 2, 10)]
        assert {row.used for row in found} == {"0"}


def test_history_of_reversals(client: Client) -> None:
    """A reversal of the running period gives back; one of a closed period changes that period only."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"))
    run = rows.run(at("2026-01-20"), 2)
    rows.run(at("2026-01-21"), 19_998)
    rows.reverse(run, at("2026-01-22"))
    closed = rows.run(at("2026-01-23"), 5)
    rows.reverse(closed, at("2026-02-20"))
    rows.write(client)

    assert told(enrichment(client, at("2026-01-21 12:00:00"))) == ("20000", "20000", "exhausted", [50, 80, 100])
    assert told(enrichment(client, at("2026-01-22"))) == ("19998", "20000", "warning", [50, 80])
    assert told(enrichment(client, at("2026-02-20"))) == ("0", "20000", "ok", [])
    assert [row.used for row in accounts.periods(client, "ws_1", at("2026-02-20"))] == ["19998", "0"]


def test_premium_credits_never_expire_r07_r10(client: Client) -> None:
    """Grants add up over periods; without one the pool is exhausted; percents are of the newest grant."""
    rows = AccountRows()
    rows.run(at("2026-01-10"), 1, pool=Pool.PREMIUM)
    rows.grant(at("2026-01-20"), 100)
    rows.grant(at("2026-03-20"), 10)
    rows.run(at("2026-04-01"), 100, pool=Pool.PREMIUM)
    rows.write(client)

    assert told(premium(client, at("2026-01-19"))) == ("1", "0", "exhausted", [])
    assert told(premium(client, at("2026-02-19"))) == ("1", "100", "ok", [])
    assert told(premium(client, at("2026-03-21"))) == ("1", "110", "ok", [])
    assert told(premium(client, at("2026-04-02"))) == ("101", "110", "ok", [])
    found = premium(client, at("2026-04-02"))
    assert (found.remaining, found.period_start, found.period_end, found.next_allowance) == ("9", None, None, None)


def test_grants_are_listed_those_to_come_too_r07(client: Client) -> None:
    """In the order in which they take effect; what is in force adds up to the allowance of the premium pool."""
    rows = AccountRows()
    rows.grant(at("2026-03-20"), 10, recorded_at=at("2026-01-10"))
    rows.grant(at("2026-01-20"), 100)
    rows.write(client)

    def granted(as_of: datetime) -> list[tuple[str, bool]]:
        return [(row.credits, row.in_force) for row in accounts.grants(client, "ws_1", as_of)]

    assert granted(at("2026-01-15")) == [("10", False)]
    assert granted(at("2026-02-01")) == [("100", True), ("10", False)]
    assert granted(at("2026-03-20")) == [("100", True), ("10", True)]
    assert premium(client, at("2026-03-20")).allowance == "110"
    assert accounts.grants(client, "ws_1")[0].recorded_at == at("2026-01-20") + timedelta(seconds=1)
    with pytest.raises(UnknownId):
        accounts.grants(client, "ws_none")


def test_a_statement_foots_and_says_so_r10(client: Client) -> None:
    """Enrichment opens with 0 and what is left expires; premium carries over; an open period expires nothing."""
    rows = AccountRows()
    rows.plan(at("2026-01-15 14:00:00"))
    rows.grant(at("2026-01-16"), 100)
    run = rows.run(at("2026-01-20"), 7)
    rows.run(at("2026-01-21"), 500)
    rows.run(at("2026-01-21"), 0, reason="error", outcome="error")
    rows.run(at("2026-01-22"), 30, pool=Pool.PREMIUM)
    rows.reverse(run, at("2026-02-20"))
    rows.grant(at("2026-02-15"), 5)
    rows.run(at("2026-02-17"), 20_001)
    rows.run(at("2026-02-15"), 80, pool=Pool.PREMIUM)
    rows.write(client)

    january = lines(client, date(2026, 2, 14), at("2026-03-20"))
    february = lines(client, date(2026, 2, 15), at("2026-03-20"))
    running = lines(client, None, at("2026-03-20"))
    early = lines(client, None, at("2026-01-20 12:00:00"))

    assert moves(january["enrichment"]) == ("0", "20000", "507", "7", "19500", "0")
    assert (january["enrichment"].runs, january["enrichment"].is_closed) == (3, True)
    assert moves(january["premium"]) == ("0", "100", "30", "0", "0", "70")
    assert moves(february["enrichment"]) == ("0", "20000", "20001", "0", "0", "-1")
    assert moves(february["premium"]) == ("70", "5", "80", "0", "0", "-5")
    assert moves(running["enrichment"]) == ("0", "20000", "0", "0", "0", "20000")
    assert moves(running["premium"]) == ("-5", "0", "0", "0", "0", "-5")
    assert moves(early["enrichment"]) == ("0", "20000", "7", "0", "0", "19993")


class Inserting:
    """A client beside which rows are inserted: some after each of its first sums."""

    def __init__(self, client: Client, inserts: list[AccountRows]) -> None:
        self._client, self._inserts = client, inserts

    def query(self, sql: str, **given: Any) -> Any:
        found = self._client.query(sql, **given)
        if "sum(credits)" in sql and self._inserts:
            self._inserts.pop().write(self._client)
        return found


@pytest.mark.parametrize("pool", METERED)
@pytest.mark.parametrize("inserts", [1, 2, 3])
def test_a_statement_foots_beside_inserts(client: Client, pool: Pool, inserts: int) -> None:
    """Whichever of its sums a run comes between, opening to closing are of one moment, and add up."""
    rows = AccountRows()
    rows.plan(at("2026-01-15"))
    rows.write(client)
    coming = []
    for number in range(inserts):
        rows = AccountRows()
        rows.run(at("2026-01-20"), 7, pool=pool, run_id=UUID(int=number), kafka_offset=number)
        coming.append(rows)

    found = accounts.statement(cast(Client, Inserting(client, coming)), "ws_1", None, at("2026-01-21"))
    assert not coming
    assert [line.foots for line in found] == [True, True]
    assert {line.pool: line.debited for line in found}[pool] == str(7 * inserts)


@settings(STEADY, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    drawn=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 400_000), st.booleans(), st.booleans()), max_size=30),
    asked=st.integers(0, 100),
)
def test_every_statement_foots(client: Client, drawn: list[tuple[int, int, bool, bool]], asked: int) -> None:
    """Whatever was drawn and reversed in whichever period, at whatever instant: both pools, of every period, foot, and
    a pool opens with what it closed with.
    """
    client.command("TRUNCATE TABLE ledger")
    rows = AccountRows()
    rows.plan(at("2026-01-31"))
    rows.grant(at("2026-02-02"), 300)
    for day, millicredits, is_premium, is_reversed in drawn:
        pool = Pool.PREMIUM if is_premium else Pool.ENRICHMENT
        run = rows.run(at("2026-01-20") + day * DAY, millicredits // 1000, pool=pool)
        if is_reversed:
            rows.reverse(run, at("2026-01-20") + (day + 20) * DAY)
    rows.write(client)
    as_of = at("2026-01-31") + asked * DAY

    carried = None
    for period in accounts.periods(client, "ws_1", as_of):
        found = lines(client, period.period_start, as_of)
        assert parse_credits(found["enrichment"].debited) >= parse_credits(found["enrichment"].reversed) >= 0
        assert carried in (None, found["premium"].opening)
        carried = found["premium"].closing


def test_usage_of_a_period_is_that_of_its_days(client: Client) -> None:
    """The period that holds a day, by the plans known now; it adds up to what the statement debits and gives back."""
    rows = AccountRows()
    rows.plan(at("2026-01-31"))
    rows.run(at("2026-02-27 23:59:59.999"), 1)
    run = rows.run(at("2026-02-28"), 2)
    rows.run(at("2026-03-30 23:59:59"), 4, column_id="col_2")
    rows.run(at("2026-03-31"), 8)
    rows.reverse(run, at("2026-04-10"))
    rows.write(client)

    found = accounts.period_usage(client, "ws_1", By.COLUMN, date(2026, 3, 1))
    assert [(row.column_id, row.credits, row.runs) for row in found] == [("col_2", "4", 1), ("col_1", "0", 1)]
    assert moves(lines(client, date(2026, 3, 1), at("2026-05-01"))["enrichment"])[2:4] == ("6", "2")
    assert accounts.period_usage(client, "ws_1", By.TABLE, date(2026, 2, 27))[0].credits == "1"


def test_a_period_to_come_has_no_statement(client: Client) -> None:
    """Nor has a workspace that nobody knows; both are unknown ids."""
    for question in (accounts.balance, accounts.periods, accounts.statement, accounts.plans, accounts.limits):
        with pytest.raises(UnknownId, match="no workspace 'ws_none'"):
            question(client, "ws_none")
    rows = AccountRows()
    rows.run(at("2026-01-10"))
    rows.write(client)
    wrong = (date(2026, 2, 1), "it is after 2026-01-31"), (date(1960, 1, 1), "the ledger begins in 2020")
    for day, why in wrong:  # the first one has come: no answer as of January may call it the future
        with pytest.raises(UnknownId, match=f"no period holds {day}: {why}"):
            accounts.statement(client, "ws_1", day, at("2026-01-31"))


def test_an_instant_without_an_offset_is_in_utc(client: Client) -> None:
    """And one that no row can have is refused."""
    rows = AccountRows()
    rows.run(at("2026-01-10"))
    rows.write(client)
    assert enrichment(client, datetime(2026, 1, 11)) == enrichment(client, at("2026-01-11"))  # noqa: DTZ001
    for instant in (at("2019-12-31"), at("2100-01-01"), datetime.max.replace(tzinfo=UTC)):
        with pytest.raises(Problem, match="nothing is known as of"):
            accounts.balance(client, "ws_1", instant)


def test_a_workspace_of_free_runs_has_a_balance(client: Client) -> None:
    """It is known, though it drew nothing from any pool."""
    rows = AccountRows()
    rows.run(at("2026-01-10"), 0, pool=Pool.NONE, reason="free_action")
    rows.write(client)
    assert told(enrichment(client, at("2026-01-11"))) == ("0", "0", "unknown_plan", [])


def test_thresholds_fall_back_from_workspace_to_plan_to_default(client: Client) -> None:
    """What a workspace leaves out is its plan's; what that leaves out is the default; 100 is always there."""
    rows = AccountRows()
    rows.plan(at("2026-01-01"), thresholds=[])
    rows.plan(at("2026-02-01"), "100k", 100_000, thresholds=[50, 95], remaining_below=1000)
    rows.limits(at("2026-03-01"), thresholds=[10])
    rows.limits(at("2026-04-01"), remaining_below=5)
    rows.write(client)

    found = [accounts.limits(client, "ws_1", at(f"2026-0{month}-02")) for month in (1, 2, 3, 4)]
    assert [(one.thresholds, one.thresholds_by, one.remaining_below, one.remaining_below_by) for one in found] == [
        ([50, 80, 100], "default", None, "default"),
        ([50, 95, 100], "plan", "1000", "plan"),
        ([10, 100], "workspace", "1000", "plan"),
        ([50, 95, 100], "plan", "5", "workspace"),
    ]
    plans = accounts.plans(client, "ws_1", at("2026-01-20"))
    assert [(row.plan, row.in_force) for row in plans] == [("20k", True)]
    plans = accounts.plans(client, "ws_1")
    assert [(row.plan, row.in_force) for row in plans] == [("20k", False), ("100k", True)]


def test_explain_shows_the_balance_in_kafkas_order(client: Client) -> None:
    """Before and after each of three runs of one millisecond, in the period in which it ran, as it was known then."""
    rows = AccountRows()
    rows.plan(at("2026-01-15"))
    came = at("2026-01-20 10:00:00")
    runs = [rows.run(came - n * SECOND, credits, recorded_at=came) for n, credits in enumerate([5, 7, 0])]
    rows.run(at("2026-01-14"), 100, recorded_at=came - DAY)
    rows.run(came, 1000, pool=Pool.PREMIUM, recorded_at=came - DAY)
    other = AccountRows("ws_2")
    other.run(came, 50, recorded_at=came - DAY)
    rows.reverse(runs[0], at("2026-01-21"))
    after = rows.run(at("2026-01-22"), 2)
    late = rows.run(at("2026-01-16"), 3, recorded_at=at("2026-03-01"))
    rows.plan(at("2026-01-15"), "50k", 50_000, recorded_at=at("2026-02-01"))
    rows.write(client)
    other.write(client)

    def balance(run: UUID) -> tuple[str, str, str]:
        move = accounts.explanation(client, EXAMPLES, run).balance
        assert move is not None
        assert (move.period_start, move.period_end) == (date(2026, 1, 15), date(2026, 2, 15))
        return move.before, move.after, move.plan

    assert [balance(run) for run in runs] == [
        ("20000", "19995", "20k"),
        ("19995", "19988", "20k"),
        ("19988", "19988", "20k"),
    ]
    assert balance(after) == ("19993", "19991", "20k")
    assert balance(late) == ("49991", "49988", "50k")
    ended = "It arrived after its billing period had ended, and counts in that period."
    assert [accounts.explanation(client, EXAMPLES, run).sentence.endswith(ended) for run in (after, late)] == [
        False, True
    ]  # fmt: skip


def test_explain_shows_the_plan_before_an_upgrade_of_the_same_millisecond_r06(client: Client) -> None:
    """On a tie the run was folded first, so neither a plan nor a grant of its own millisecond is in its balance."""
    rows = AccountRows()
    came = at("2026-01-20 10:00:00")
    rows.plan(at("2026-01-15"))
    rows.grant(at("2026-01-16"), 10)
    rows.plan(at("2026-01-20"), "50k", 50_000, recorded_at=came)
    rows.grant(at("2026-01-20"), 5, recorded_at=came)
    drawn = [rows.run(came, 4, recorded_at=came, pool=pool) for pool in METERED]
    rows.write(client)

    moves = [accounts.explanation(client, EXAMPLES, run).balance for run in drawn]
    assert [move and (move.before, move.allowance, move.plan) for move in moves] == [
        ("20000", "20000", "20k"),
        ("10", "10", "20k"),
    ]


def test_explain_names_the_plan_of_the_period_in_which_it_ran(client: Client) -> None:
    """Not that of today: before the first plan there was none."""
    rows = AccountRows()
    rows.plan(at("2026-01-15"), "20k", 20_000, recorded_at=at("2026-01-15"))
    rows.plan(at("2026-03-20"), "50k", 50_000, recorded_at=at("2026-03-20"))
    came = at("2026-04-01")
    planless, late = (rows.run(at(day), 4, recorded_at=came) for day in ("2026-01-02", "2026-02-20"))
    rows.write(client)

    moves = [accounts.explanation(client, EXAMPLES, run).balance for run in (planless, late)]
    assert [move and (move.plan, move.allowance) for move in moves] == [("", "0"), ("20k", "20000")]


def test_explain_shows_a_premium_balance_and_none_where_no_pool_is_drawn(client: Client) -> None:
    """Premium counts all grants and debits so far; an overage is negative; a formatter moves nothing."""
    rows = AccountRows()
    rows.grant(at("2026-01-10"), 10)
    rows.run(at("2026-01-11"), 9, pool=Pool.PREMIUM)
    over = rows.run(at("2026-03-11"), 2, pool=Pool.PREMIUM, action="clearbit_enrich_company")
    free = rows.run(at("2026-03-12"), 0, pool=Pool.NONE, reason="free_action", action="format_date")
    rows.write(client)

    move = accounts.explanation(client, EXAMPLES, over).balance
    assert move is not None
    assert (move.pool, move.before, move.after, move.allowance) == ("premium", "1", "-1", "10")
    assert move.period_start is None
    assert accounts.explanation(client, EXAMPLES, free).balance is None


def test_explain_shows_the_alert_that_the_run_caused(client: Client) -> None:
    """A run that crossed nothing has none, also where one in a topic since made again had its position."""
    rows = AccountRows()
    rows.plan(at("2026-01-15"), "tiny", 4)
    first, second = (rows.run(at("2026-01-20") + n * DAY, 2) for n in range(2))
    third = rows.run(at("2026-01-22"), 2, topic_id="topic-3", kafka_offset=1)
    rows.write(client)
    names = ["alert_id", "workspace_id", "pool", "kind", "state", "used", "allowance", "thresholds", "cause", "at",
             "position", "run_id"]  # fmt: skip
    alert = [UUID(int=5), "ws_1", "enrichment", "exhausted", "exhausted", 4, 4, [80, 100], "run", at("2026-01-21"),
             "cell-runs[0]@1", second]  # fmt: skip
    client.insert("published_alerts", [alert, alert], column_names=names)

    assert [accounts.explanation(client, EXAMPLES, run).alert for run in (first, third)] == [None, None]
    found = accounts.explanation(client, EXAMPLES, second).alert
    assert found is not None
    assert (found.alert_id, found.kind, found.used, found.thresholds) == (str(UUID(int=5)), "exhausted", "4", [80, 100])
    assert accounts.alerts(client, "ws_1") == accounts.alerts(client) == [found]
    assert accounts.alerts(client, kind="recovered") == accounts.alerts(client, as_of=at("2026-01-20")) == []


def test_alerts_of_one_instant_stand_in_the_order_of_their_records(client: Client) -> None:
    """The broker gives a producer's whole batch one time, so a bulk run crosses its lines at one instant: by offset."""
    names = ["alert_id", "workspace_id", "kind", "at", "position"]
    places = [(1, "crossed", 99), (2, "exhausted", 1000), (3, "crossed", 8)]
    told = [[UUID(int=n), "ws_1", kind, at("2026-01-21"), f"cell-runs[0]@{offset}"] for n, kind, offset in places]
    by_time = [UUID(int=0), "ws_1", "period_started", at("2026-01-21"), ""]
    client.insert("published_alerts", [*told, by_time], column_names=names)

    newest_first = ["cell-runs[0]@1000", "cell-runs[0]@99", "cell-runs[0]@8", ""]
    assert [alert.position for alert in accounts.alerts(client)] == newest_first
    assert [alert.kind for alert in accounts.alerts(client, limit=1)] == ["exhausted"]


def test_explain_tells_of_a_reversal(client: Client) -> None:
    """The sentence says when and how much was given back; copies of the reversal are no copies of the run."""
    rows = AccountRows()
    run = rows.run(at("2026-01-20"), 2, action="find_work_email", catalogue=2)
    rows.reverse(run, at("2026-02-03"))
    rows.reverse(run, at("2026-02-04"), kind="duplicate", reason="duplicate", credits=0, pool=Pool.NONE)
    rows.write(client)

    found = accounts.explanation(client, EXAMPLES, run)
    assert found.sentence == (
        'Charged 2 credits: "Find Work Email" returned data. It was reversed on 2026-02-03: 2 credits given back.'
    )
    assert [one.kind for one in found.deliveries] == ["run", "reversal", "duplicate"]


def test_an_account_event_is_followed_by_its_id(client: Client) -> None:
    """What became of it stands in its rows; none while it is not metered."""
    rows = AccountRows()
    rows.plan(at("2026-01-15"), event_id=UUID(int=77))
    rows.write(client)
    (row,) = account_queries.event_rows(client, "ws_1", UUID(int=77))
    assert (row.kind, row.reason, row.position) == ("plan", "plan_changed", "account-events[0]@0")
    assert (
        account_queries.event_rows(client, "ws_1", UUID(int=78))
        == account_queries.event_rows(client, "x", UUID(int=77))
        == []
    )


def test_the_forecast_needs_three_days_of_debits(client: Client) -> None:
    """Remaining over the mean of the last seven days, cut to days; none when it lasts to the period's end."""
    rows = AccountRows()
    rows.plan(at("2026-01-01"))
    for day in range(3):
        rows.run(at("2026-01-10") + day * DAY, 1_400)
    rows.write(client)
    ran_out = [enrichment(client, at(f"2026-01-{day}") + 12 * 3600 * SECOND).runs_out_on for day in (11, 12, 16, 20)]
    # 15,800 left at 4,200 in 7 days: 26.3 days, beyond January's end on the 12th.
    assert ran_out == [None, None, None, None]
    rows.run(at("2026-01-13"), 12_600)
    rows.write(client)
    # 3,200 left at 16,800 in 7 days, 2,400 a day: one day.
    assert enrichment(client, datetime(2026, 1, 13, 12, tzinfo=UTC)).runs_out_on == date(2026, 1, 14)
    assert to_milliseconds(enrichment(client, at("2026-01-13")).as_of) == to_milliseconds(at("2026-01-13"))
