"""The charge rules, one by one, and the conformance table, told by three voices that must agree.

The voices: `rate` for one run, the column road that the worker drives, and the reference rater of `reconcile`.
"""

from collections.abc import Callable
from datetime import datetime
from decimal import Decimal
from itertools import product
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from creditstream.reference import ReferenceRater
from schemas.catalogue import EXAMPLE_CATALOGUES, Action, Catalogue, Category
from schemas.cell_run import Outcome, to_milliseconds
from schemas.credits import parse_credits
from schemas.ledger import DEBIT_REASONS, POOLS, Pool, Reason
from schemas.prices import price_of, prices
from schemas.problem import UnknownId
from streams.rules.rating import Debit, rate
from tests.ledger_rows import AUGUST_MS
from tests.records import EXAMPLES, Record, Road, Row, enrichment, event, write_catalogue

CONFORMANCE: Final = """
| enrich_person | data | no | 1 | enrichment | charged |
| enrich_person | no_data | no | 0 | enrichment | no_data |
| enrich_person | error | no | 0 | enrichment | error |
| enrich_person | data | yes | 0 | enrichment | own_api_key |
| enrich_person | error | yes | 0 | enrichment | own_api_key |
| find_work_email | data | no | 2 | enrichment | charged |
| find_work_email | no_data | no | 0 | enrichment | no_data |
| google_keyword_search | no_data | no | 1 | enrichment | charged_no_data |
| google_keyword_search | error | no | 0 | enrichment | error |
| google_keyword_search | no_data | yes | 0 | enrichment | own_api_key |
| job_role_count | no_data | no | 1 | enrichment | charged_no_data |
| tech_stack | no_data | no | 1 | enrichment | charged_no_data |
| clearbit_enrich_company | data | no | 1 | premium | charged |
| clearbit_enrich_company | data | yes | 0 | premium | own_api_key |
| clearbit_enrich_company | no_data | no | 0 | premium | no_data |
| clearbit_enrich_company | error | no | 0 | premium | error |
| find_work_email | error | no | 0 | enrichment | error |
| find_and_enrich_person_google | no_data | no | 0 | enrichment | no_data |
| find_and_enrich_person_google | data | no | 2 | enrichment | charged |
| format_date | data | no | 0 | none | free_action |
| hubspot_send | data | no | 0 | none | free_action |
| hubspot_send | error | no | 0 | none | free_action |
| hubspot_send | data | yes | 0 | none | own_api_key |
"""
"""Action, outcome, own key; credits, pool, reason: the published table, as it stands there."""


class Case(NamedTuple):
    """One line of the conformance table."""

    action: str
    outcome: str
    own_api_key: bool
    expected: tuple[str, str, Decimal]
    """Reason, pool, credits."""


def cases() -> list[Case]:
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in CONFORMANCE.strip().splitlines()]
    return [
        Case(action, outcome, own_key == "yes", (reason, pool, Decimal(credits)))
        for action, outcome, own_key, credits, pool, reason in cells
    ]


# The three voices: each says (reason, pool, credits) of one run.


def by_rate(catalogue: Catalogue, action: str, outcome: str, own_api_key: bool, ran_ms: int) -> tuple[Any, ...]:
    found = catalogue.find(action, catalogue.era_at(ran_ms))
    assert found
    debit = rate(found[1], Outcome(outcome), own_api_key)
    return str(debit.reason), str(debit.pool), Decimal(debit.credits) / 1000


def by_columns(catalogue: Catalogue, action: str, outcome: str, own_api_key: bool, ran_ms: int) -> tuple[Any, ...]:
    (row,) = charge(catalogue, [{"action": action, "outcome": outcome, "own_api_key": own_api_key, "ran_ms": ran_ms}])
    assert row.kind == "run"
    return row.reason, row.pool, row.credits


def by_reference(directory: Path, action: str, outcome: str, own_api_key: bool, ran_ms: int) -> tuple[Any, ...]:
    value = event(action=action, outcome=outcome, own_api_key=own_api_key, ran_ms=ran_ms)
    expected = ReferenceRater(directory, 0, 1).expect(b"ws_1", value, ran_ms)
    assert expected.kind == "run"
    return expected.reason, expected.pool, expected.credits


def charge(catalogue: Catalogue, runs: list[dict[str, Any]]) -> list[Row]:
    """The ledger's rows of these runs, each under an id of its own, recorded when it ran."""
    records = [
        Record(number, event(run=number, **run), timestamp=run.get("ran_ms", AUGUST_MS))
        for number, run in enumerate(runs)
    ]
    return Road(catalogue).rows(records)


def charged(*runs: dict[str, Any]) -> list[tuple[str, str, Decimal]]:
    """Reason, pool and credits of these runs by the example catalogue."""
    return [(row.reason, row.pool, row.credits) for row in charge(EXAMPLES, list(runs))]


@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.action}-{case.outcome}-{case.own_api_key}")
def test_the_conformance_table(case: Case) -> None:
    """Each line of the published table holds by the definition, by the worker's road and by the reference rater."""
    run = case.action, case.outcome, case.own_api_key, AUGUST_MS

    assert case.expected == by_rate(EXAMPLES, *run)
    assert case.expected == by_columns(EXAMPLES, *run)
    assert case.expected == by_reference(EXAMPLE_CATALOGUES, *run)


def test_the_conformance_table_in_one_take() -> None:
    """The whole table in one chunk gives each line what it gives alone."""
    runs = [{"action": case.action, "outcome": case.outcome, "own_api_key": case.own_api_key} for case in cases()]

    assert [case.expected for case in cases()] == charged(*runs)


def test_every_action_of_the_example_catalogue_by_all_voices() -> None:
    """Whatever the action, outcome, key and version in force, the three voices say the same."""
    first, *later = EXAMPLES.starts_ms
    moments = [first, *(starts + step for starts in later for step in (-1, 0))]
    actions = sorted({action for version in EXAMPLES.versions for action in version.actions})
    runs = list(product(actions, ("data", "no_data", "error"), (False, True), moments))
    road, reference = Road(), ReferenceRater(EXAMPLE_CATALOGUES, 0, 1)

    values = [
        event(run=number, action=action, outcome=outcome, own_api_key=own_api_key, ran_ms=ran_ms)
        for number, (action, outcome, own_api_key, ran_ms) in enumerate(runs)
    ]
    rows = road.rows([Record(at, value, timestamp=runs[at][3]) for at, value in enumerate(values)])

    assert len(runs) > 900
    assert [by_rate(EXAMPLES, *run) for run in runs] == [(row.reason, row.pool, row.credits) for row in rows]
    for row, value, run in zip(rows, values, runs, strict=True):
        assert reference.expect(b"ws_1", value, run[3]) == (row.kind, row.reason, row.pool, row.credits)


# Rule by rule.


def test_r02_a_priced_action_draws_its_price() -> None:
    """Most enrichments cost 1 credit; the two searches for a person cost 2."""
    assert charged(
        {"action": "enrich_person"}, {"action": "find_work_email"}, {"action": "find_and_enrich_person_google"}
    ) == [
        ("charged", "enrichment", Decimal(1)),
        ("charged", "enrichment", Decimal(2)),
        ("charged", "enrichment", Decimal(2)),
    ]


def test_r03_charges_add_up_over_columns() -> None:
    """Three charged 1-credit columns on one row of a table are 3 credits."""
    rows = charged(*({"column_id": column, "row_id": "row_7"} for column in ("col_1", "col_2", "col_3")))

    assert sum(credits for *_, credits in rows) == 3


@pytest.mark.parametrize("outcome", list(Outcome))
def test_r04_formatters_and_destinations_are_free(outcome: Outcome) -> None:
    """Every formatter and destination is free, however it ended and as often as it runs."""
    free = {
        action.id
        for version in EXAMPLES.versions
        for action in version.actions.values()
        if action.category in (Category.FORMATTER, Category.DESTINATION)
    }
    runs = [{"action": action, "outcome": outcome} for action in sorted(free) for _ in range(3)]

    assert {"format_date", "hubspot_send", "salesforce_send", "outreach_send"} <= free
    assert set(charged(*runs)) == {("free_action", "none", Decimal(0))}


def test_r04_an_enrichment_priced_0_is_free() -> None:
    """An action whose price is 0 is a free action of pool `none`, whatever its category."""
    free_premium = Action(
        id="a", name="A", category=Category.PREMIUM, provider="p", price=0, pool=Pool.NONE, charges_no_data=False
    )

    assert charged({"action": "lookup_row"}) == [("free_action", "none", Decimal(0))]
    assert rate(free_premium, Outcome.DATA, own_api_key=False) == Debit(Reason.FREE_ACTION, Pool.NONE, 0)


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("action", ["enrich_person", "google_keyword_search", "clearbit_enrich_company"])
def test_r05_an_own_key_is_free(action: str, outcome: Outcome) -> None:
    """A run with the workspace's own API key is free, premium and R09's exceptions included."""
    ((reason, _, credits),) = charged({"action": action, "outcome": outcome, "own_api_key": True})

    assert (reason, credits) == ("own_api_key", Decimal(0))


def test_r05_no_own_key_unless_said() -> None:
    """An event that does not mention the key ran with ours."""
    (left_out, said) = charged({"own_api_key": None}, {"own_api_key": False})

    assert left_out == said == ("charged", "enrichment", Decimal(1))


@pytest.mark.parametrize("action", ["pdl_enrich_person", "clearbit_enrich_company", "owler_enrich_company"])
def test_r07_premium_actions_draw_the_premium_pool(action: str) -> None:
    """People Data Labs, Clearbit and Owler draw premium credits, and never enrichment credits."""
    ((reason, pool, credits),) = charged({"action": action})

    assert (reason, pool) == ("charged", "premium")
    assert credits > 0


def test_r08_errors_are_free() -> None:
    """A run that ended in an error is free, also where nothing found would cost."""
    rows = charged(
        {"action": "find_work_email", "outcome": "error"},
        {"action": "google_keyword_search", "outcome": "error"},
        {"action": "clearbit_enrich_company", "outcome": "error"},
    )

    assert [(reason, credits) for reason, _, credits in rows] == [("error", Decimal(0))] * 3


def test_r09_nothing_found_is_free() -> None:
    """A run that found nothing is free; "Find & Enrich Person from Google Search" is no exception."""
    rows = charged(
        {"action": "enrich_person", "outcome": "no_data"},
        {"action": "find_and_enrich_person_google", "outcome": "no_data"},
    )

    assert rows == [("no_data", "enrichment", Decimal(0))] * 2


@pytest.mark.parametrize("action", ["google_keyword_search", "website_keyword_search", "job_role_count", "tech_stack"])
def test_r09_nothing_found_is_the_answer(action: str) -> None:
    """Where nothing found is itself the answer it costs what data costs, and the debit says so."""
    nothing, data = charged({"action": action, "outcome": "no_data"}, {"action": action, "outcome": "data"})

    assert nothing == ("charged_no_data", "enrichment", Decimal(1))
    assert data == ("charged", "enrichment", Decimal(1))


def test_r11_running_a_cell_again_is_a_new_run() -> None:
    """The same cell under a new run id is rated by itself; the same run id is a copy."""
    road = Road()

    rows = road.rows([Record(0, event(run=1)), Record(1, event(run=2)), Record(2, event(run=1))])

    assert [(row.kind, row.credits) for row in rows] == [
        ("run", Decimal(1)),
        ("run", Decimal(1)),
        ("duplicate", Decimal(0)),
    ]


@pytest.mark.parametrize("chunk_rows", [1000, 333, 7])
def test_r12_no_bulk_discount(chunk_rows: int) -> None:
    """1,000 charged runs of a 1-credit action are 1,000 credits, in whatever portions they come."""
    road = Road()
    records = [Record(run, event(run=run)) for run in range(1000)]

    rows = [row for at in range(0, 1000, chunk_rows) for row in road.rows(records[at : at + chunk_rows])]

    assert sum(row.credits for row in rows) == 1000


def test_r12_no_rounding() -> None:
    """1,000 runs at a tenth of a credit are exactly 100 credits, and an eighth of a credit stays 0.125."""
    tenths = charged(*[{"action": "geocode_address"}] * 1000)

    assert sum(credits for *_, credits in tenths) == Decimal("100.000")
    assert charged({"action": "translate_text"}) == [("charged", "enrichment", Decimal("0.125"))]


def test_r13_a_price_is_what_the_run_will_cost() -> None:
    """The price shown beside every action is what a run that returns data is charged, with and without an own key."""
    for action, own_api_key in product(prices(EXAMPLES, AUGUST_MS), (False, True)):
        shown = price_of(EXAMPLES, action.action, AUGUST_MS, own_api_key)
        reason, pool, credits = by_columns(EXAMPLES, action.action, "data", own_api_key, AUGUST_MS)

        assert parse_credits(shown.credits) == credits * 1000
        assert shown.pool == pool
        assert (shown.credits == "0") == (reason != "charged")


def test_r13_an_unknown_action_has_no_price() -> None:
    """A price of an unknown action is an error, also with an own key, and never 0."""
    for own_api_key in (False, True):
        with pytest.raises(UnknownId, match="no action 'find_yeti'"):
            price_of(EXAMPLES, "find_yeti", AUGUST_MS, own_api_key)


# The order of reasons.

ORDER: Final[dict[Reason, Callable[[Action, Outcome, bool], bool]]] = {
    Reason.OWN_API_KEY: lambda action, outcome, own_key: own_key,
    Reason.FREE_ACTION: lambda action, outcome, own_key: action.price == 0,
    Reason.ERROR: lambda action, outcome, own_key: outcome == Outcome.ERROR,
    Reason.NO_DATA: lambda action, outcome, own_key: outcome == Outcome.NO_DATA and not action.charges_no_data,
    Reason.CHARGED_NO_DATA: lambda action, outcome, own_key: outcome == Outcome.NO_DATA,
    Reason.CHARGED: lambda action, outcome, own_key: True,
}
"""Reason → does it apply? In the published order."""


@pytest.mark.parametrize("outcome", list(Outcome))
@pytest.mark.parametrize("own_api_key", [False, True])
@pytest.mark.parametrize("charges_no_data", [False, True])
@pytest.mark.parametrize("price", [0, 1000])
@pytest.mark.parametrize("pool", [Pool.ENRICHMENT, Pool.PREMIUM])
def test_the_first_reason_that_applies_wins(
    outcome: Outcome, own_api_key: bool, charges_no_data: bool, price: int, pool: Pool
) -> None:
    """Of several reasons the earliest in the published order is recorded, and only the last two cost anything."""
    action = Action(
        id="a", name="A", category=Category.ENRICHMENT, provider="p", price=price,
        pool=pool if price else Pool.NONE, charges_no_data=charges_no_data,
    )  # fmt: skip

    debit = rate(action, outcome, own_api_key)

    assert debit.reason == next(reason for reason, applies in ORDER.items() if applies(action, outcome, own_api_key))
    assert debit.pool == action.pool
    assert debit.credits == (price if debit.reason in (Reason.CHARGED_NO_DATA, Reason.CHARGED) else 0)


def test_the_order_is_the_ledgers() -> None:
    """The order in which reasons are tried is the order of the ledger's words."""
    assert tuple(ORDER) == DEBIT_REASONS
    assert POOLS == ("none", "enrichment", "premium")


@pytest.mark.parametrize("own_api_key", [False, True])
@pytest.mark.parametrize("outcome", list(Outcome))
def test_an_unknown_action_is_parked(own_api_key: bool, outcome: Outcome) -> None:
    """An action that no version lists is a dead letter: never free by accident, not even with an own key."""
    (row,) = charge(EXAMPLES, [{"action": "find_yeti", "outcome": outcome, "own_api_key": own_api_key}])

    assert row[1:6] == ("dead_letter", "unknown_action", "none", Decimal(0), 0)
    assert row.detail == "action 'find_yeti' is in no version of the catalogue"


# Which version of the catalogue prices a run.

JULY_MS: Final = to_milliseconds(datetime.fromisoformat("2026-07-01T00:00:00Z"))
OCTOBER_MS: Final = to_milliseconds(datetime.fromisoformat("2026-10-01T00:00:00Z"))
JANUARY_MS: Final = to_milliseconds(datetime.fromisoformat("2026-01-01T00:00:00Z"))


@pytest.fixture
def changing(tmp_path: Path) -> Path:
    """Three versions: a price that rises, an action that goes, one that comes and goes, one that comes last."""
    return write_catalogue(
        tmp_path,
        (7, "2026-10-01T00:00:00Z", {"rising": enrichment("3"), "coming": enrichment("0.7")}),
        (2, "2026-01-01T00:00:00Z", {"rising": enrichment("1"), "going": enrichment("5")}),
        (
            9,
            "2026-07-01T02:00:00+02:00",
            {"rising": enrichment("2"), "passing": enrichment("4"), "coming": enrichment("0.6")},
        ),
    )


@pytest.mark.parametrize(
    ("action", "ran_ms", "price", "version"),
    [
        ("rising", JANUARY_MS - 1, "1", 2),
        ("rising", JANUARY_MS, "1", 2),
        ("rising", JULY_MS - 1, "1", 2),
        ("rising", JULY_MS, "2", 9),
        ("rising", OCTOBER_MS - 1, "2", 9),
        ("rising", OCTOBER_MS, "3", 7),
        ("rising", OCTOBER_MS + 1, "3", 7),
        ("going", JULY_MS - 1, "5", 2),
        ("going", JULY_MS, "5", 2),
        ("going", OCTOBER_MS, "5", 2),
        ("passing", JANUARY_MS, "4", 9),
        ("passing", OCTOBER_MS, "4", 9),
        ("coming", JANUARY_MS - 1, "0.6", 9),
        ("coming", JULY_MS - 1, "0.6", 9),
        ("coming", OCTOBER_MS, "0.7", 7),
    ],
)
def test_the_version_in_force_at_ran_at_prices_the_run(
    changing: Path, action: str, ran_ms: int, price: str, version: int
) -> None:
    """A price changes at its millisecond; without an entry the newest earlier version, else the first later one."""
    catalogue = Catalogue.load(changing)
    expected = "charged", "enrichment", Decimal(price)

    (row,) = charge(catalogue, [{"action": action, "ran_ms": ran_ms}])

    assert (row.reason, row.pool, row.credits, row.catalogue) == (*expected, version)
    assert expected == by_rate(catalogue, action, "data", False, ran_ms)
    assert expected == by_reference(changing, action, "data", False, ran_ms)


def test_ran_at_and_not_its_arrival_picks_the_price(changing: Path) -> None:
    """A run of the last millisecond of June that arrives in August is priced as of June."""
    late = Record(0, event(action="rising", ran_ms=JULY_MS - 1), timestamp=AUGUST_MS)

    assert Road(Catalogue.load(changing)).rows([late])[0].credits == 1


def test_a_price_change_is_never_rounded_into(changing: Path) -> None:
    """The last nanosecond before a price change has the old price: times are truncated."""
    last = Record(0, event(action="rising", ran_at="2026-06-30T23:59:59.999999999Z"))
    reference = ReferenceRater(changing, 0, 1)

    assert Road(Catalogue.load(changing)).rows([last])[0].credits == 1
    assert reference.expect(last.key, last.value, last.timestamp).credits == 1


def test_many_versions_in_one_take(changing: Path) -> None:
    """Rows of one chunk that fall under different versions are priced apart."""
    catalogue = Catalogue.load(changing)
    moments = [OCTOBER_MS, JANUARY_MS, JULY_MS, JULY_MS - 1, OCTOBER_MS - 1]

    rows = charge(catalogue, [{"action": "rising", "ran_ms": ran_ms} for ran_ms in moments])

    assert [row.credits for row in rows] == [3, 1, 2, 1, 2]
    assert [row.catalogue for row in rows] == [7, 2, 9, 2, 9]
