"""What alerts and states say of the pool that they are about, and of what caused them."""

from datetime import date

import pytest

from schemas.cell_run import from_milliseconds, to_milliseconds
from schemas.credits import parse_credits
from schemas.ledger import Kind, Pool
from schemas.limits import AlertKind, AsOf
from sinks.accounts import AccountFact
from streams.recovery import told_at
from streams.rules.balances import NOTHING, Account
from streams.rules.facts import openings
from streams.rules.limits import alert_id, alert_id_of_time
from streams.rules.messages import Source, alert_of, runs_out_on, seeded_alert, state_of
from streams.rules.periods import day_of, to_date
from tests.account_records import at
from tests.records import run_id
from tests.unit_bench import CHAINS

NOW_MS = to_milliseconds(at("Jan 28 12:00"))
AS_OF = AsOf(log="a+b", cell_runs=1, account_events=-1, at=from_milliseconds(NOW_MS))


def plan_row(allowance: str) -> AccountFact:
    """Of ``ws_1``, from 15 January on."""
    since_ms = to_milliseconds(at("Jan 15"))
    return AccountFact(
        "ws_1", Kind.PLAN, since_ms, 0, since_ms, "plan", parse_credits(allowance), False, (), None, "enrichment", 0, 0
    )  # fmt: skip


def account(allowance: str, drawn: dict[int, str]) -> Account:
    """On 28 January; ``drawn``: day of January → credits."""
    days = [("ws_1", "enrichment", day_of(NOW_MS) - 28 + day, parse_credits(text)) for day, text in drawn.items()]
    return Account("ws_1", openings(["ws_1"], [plan_row(allowance)], days)["ws_1"], NOW_MS)


@pytest.mark.parametrize(
    ("allowance", "drawn", "gone"),
    [
        ("24.999", dict.fromkeys(range(22, 29), "1"), date(2026, 2, 14)),
        ("25", dict.fromkeys(range(22, 29), "1"), None),
        ("100", {21: "50", 22: "36"} | dict.fromkeys(range(23, 29), "1"), date(2026, 1, 29)),
        ("100", {21: "50"} | dict.fromkeys(range(22, 29), "1"), None),
        ("12", {22: "1", 25: "1", 28: "1"}, None),
        ("4", {22: "1", 25: "1", 28: "1"}, date(2026, 1, 30)),
        ("4", {25: "1", 28: "2"}, None),
        ("3", {22: "1", 25: "1", 28: "1"}, None),
    ],
    ids=["last day", "its end", "seven days", "not eight", "late", "three days", "two days", "gone"],
)
def test_the_forecast_rests_on_the_last_seven_days(allowance: str, drawn: dict[int, str], gone: date | None) -> None:
    """At their mean, days without runs among them; none for the period's end, or when fewer than three tell."""
    day = runs_out_on(account(allowance, drawn), NOW_MS)
    assert (None if day is None else to_date(day)) == gone


def test_the_forecast_does_not_look_behind_its_period() -> None:
    """Four days of a new one are four days: 10 credits left at 2.5 a day."""
    now_ms = to_milliseconds(at("Jan 18 12:00"))
    days = {12: 1_000, 15: 2_000, 16: 2_000, 17: 2_000, 18: 4_000}
    draws = [("ws_1", "enrichment", day_of(now_ms) - 18 + day, credits) for day, credits in days.items()]
    young = Account("ws_1", openings(["ws_1"], [plan_row("20")], draws)["ws_1"], now_ms)
    assert runs_out_on(young, now_ms) == day_of(now_ms) + 4


def test_an_alert_names_what_caused_it() -> None:
    """The run, its cell and its action; nothing where time alone did."""
    since_ms = to_milliseconds(at("Jan 15"))
    ((notice, _),) = told_at("ws_1", [plan_row("0")._replace(recorded_ms=since_ms - 1)], since_ms, NOTHING)
    alert = alert_of(notice, Source(CHAINS[0], 7, run_id(1), "tbl_1", "col_1", "find_work_email"), None)
    assert (alert.position, alert.run_id, alert.table_id, alert.column_id, alert.action) == (
        f"{CHAINS[0]}@7", run_id(1), "tbl_1", "col_1", "find_work_email"
    )  # fmt: skip
    of_time = alert_of(notice, None, day_of(NOW_MS))
    assert (of_time.position, of_time.run_id, of_time.table_id, of_time.column_id, of_time.action) == (
        "", None, "", "", ""
    )  # fmt: skip
    assert (of_time.runs_out_on, alert.runs_out_on, of_time.at) == (date(2026, 1, 28), None, at("Jan 15"))
    assert alert.alert_id == alert_id("topic-1", 0, 7, Pool.ENRICHMENT, AlertKind.EXHAUSTED, notice.lines)
    assert of_time.alert_id == alert_id_of_time("ws_1", notice.standing, since_ms, AlertKind.EXHAUSTED)


def test_a_state_says_what_stands_crossed_and_what_comes() -> None:
    """Percents and the absolute line apart; a gate that passes the period's end goes on with the next allowance."""
    row = plan_row("10")._replace(thresholds=(50, 80, 100), remaining_below=3_000)
    draws = [("ws_1", "enrichment", day_of(NOW_MS), 8_500), ("ws_1", "premium", 0, 250)]
    warned = Account("ws_1", openings(["ws_1"], [row], draws)["ws_1"], NOW_MS)
    state = state_of(warned, Pool.ENRICHMENT, AS_OF, "me")
    assert (state.state, state.thresholds, state.remaining_below) == ("warning", (50, 80), "3")
    assert (state.used, state.allowance, state.remaining, state.overage) == ("8.5", "10", "1.5", "0")
    assert (state.next_allowance, state.period_start, state.period_end) == ("10", date(2026, 1, 15), date(2026, 2, 15))
    premium = state_of(warned, Pool.PREMIUM, AS_OF, "me")
    assert (premium.used, premium.overage, premium.plan) == ("0.25", "0.25", "plan")
    assert (premium.next_allowance, premium.period_start, premium.period_end) == (None, None, None)


def test_what_is_seeded_says_whether_anything_is_left() -> None:
    """By its kind, under an id of its own."""
    told = [seeded_alert(account(allowance, {20: "4"}), Pool.ENRICHMENT, NOW_MS) for allowance in ("5", "4")]
    assert [(alert.kind, alert.thresholds, alert.seeded) for alert in told] == [
        ("crossed", (50, 80), True), ("exhausted", (50, 80, 100), True)
    ]  # fmt: skip
    assert told[0].alert_id != told[1].alert_id


def test_a_state_without_a_plan_offers_nothing() -> None:
    """What was used stands, as overage."""
    unknown = Account("ws_1", openings(["ws_1"], [], [("ws_1", "enrichment", day_of(NOW_MS), 1_500)])["ws_1"], NOW_MS)
    state = state_of(unknown, Pool.ENRICHMENT, AS_OF, "me")
    assert (state.state, state.used, state.allowance, state.remaining, state.overage, state.next_allowance) == (
        "unknown_plan", "1.5", "0", "0", "1.5", None
    )  # fmt: skip
    assert (state.remaining_below, state.thresholds, state.plan, state.owner) == (None, (), "", "me")
