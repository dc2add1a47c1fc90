"""Why a run cost what it cost, in a sentence for a customer and in evidence for support."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

import msgspec
import pytest
from clickhouse_connect.driver.client import Client

from creditstream.cli.runs import explained, folded
from schemas.answers import BalanceMove, EventRow, PublishedAlert
from schemas.catalogue import POOL_OF_CATEGORY, Action, Category
from schemas.cell_run import to_milliseconds
from schemas.credits import parse_credits
from schemas.ledger import DEAD_LETTER_REASONS, DEBIT_REASONS, REASONS, RULES, Kind, Pool, Reason
from schemas.problem import Problem, UnknownId
from sinks.explain import again, credits_text, explain, run_of, sentence
from sinks.queries import explanation, runs
from tests.ledger_rows import AUGUST_MS
from tests.records import EXAMPLES, Record, Road, event, run_id, write_rows

PRICED: Final = {Category.ENRICHMENT: "1", Category.PREMIUM: "1", Category.FORMATTER: "0", Category.DESTINATION: "0"}


def action_of(category: Category, price: str = "") -> Action:
    """An action of this category, priced as its kind is."""
    millicredits = parse_credits(price or PRICED[category])
    return Action(
        id="lookup",
        name="Look up",
        category=category,
        provider="test",
        price=millicredits,
        pool=POOL_OF_CATEGORY[category] if millicredits else Pool.NONE,
        charges_no_data=True,
    )


def told(reason: Reason, found: Action | None, credits: str = "0", detail: str = "") -> str:
    return sentence(reason, parse_credits(credits), found.pool if found else Pool.NONE, "lookup", found, detail)


SENTENCES: Final = {
    (Category.ENRICHMENT, Reason.OWN_API_KEY): 'Free: "Look up" ran with the workspace\'s own API key.',
    (Category.PREMIUM, Reason.OWN_API_KEY): 'Free: "Look up" ran with the workspace\'s own API key.',
    (Category.FORMATTER, Reason.OWN_API_KEY): 'Free: "Look up" ran with the workspace\'s own API key.',
    (Category.DESTINATION, Reason.OWN_API_KEY): 'Free: "Look up" ran with the workspace\'s own API key.',
    (Category.FORMATTER, Reason.FREE_ACTION): 'Free: "Look up" is a formatter, so every run of it is free.',
    (Category.DESTINATION, Reason.FREE_ACTION): 'Free: "Look up" is a destination, so every run of it is free.',
    (Category.ENRICHMENT, Reason.ERROR): 'Free: "Look up" ended in an error.',
    (Category.PREMIUM, Reason.ERROR): 'Free: "Look up" ended in an error.',
    (Category.ENRICHMENT, Reason.NO_DATA): 'Free: "Look up" found nothing.',
    (Category.PREMIUM, Reason.NO_DATA): 'Free: "Look up" found nothing.',
    (Category.ENRICHMENT, Reason.CHARGED_NO_DATA): (
        'Charged 1 credit: "Look up" found nothing, and for this action that is the answer.'
    ),
    (Category.PREMIUM, Reason.CHARGED_NO_DATA): (
        'Charged 1 premium credit: "Look up" found nothing, and for this action that is the answer.'
    ),
    (Category.ENRICHMENT, Reason.CHARGED): 'Charged 1 credit: "Look up" returned data.',
    (Category.PREMIUM, Reason.CHARGED): 'Charged 1 premium credit: "Look up" returned data.',
}
"""Every reason of a debit with every category that it can meet at its usual price."""


@pytest.mark.parametrize(
    ("case", "expected"), list(SENTENCES.items()), ids=lambda case: "" if isinstance(case, str) else "-".join(case)
)
def test_the_sentence_of_a_debit(case: tuple[Category, Reason], expected: str) -> None:
    """A customer reads what was charged, for which action, and why."""
    category, reason = case
    credits = "1" if reason in (Reason.CHARGED, Reason.CHARGED_NO_DATA) else "0"

    assert told(reason, action_of(category), credits) == expected


def test_every_debit_has_a_sentence() -> None:
    """The table of sentences leaves out no reason and no category."""
    assert {reason for _, reason in SENTENCES} == set(DEBIT_REASONS)
    assert {category for category, _ in SENTENCES} == set(Category)


@pytest.mark.parametrize("category", [Category.ENRICHMENT, Category.PREMIUM])
def test_an_action_without_a_price(category: Category) -> None:
    """An enrichment or premium action priced 0 is free for its price, not for its kind."""
    assert told(Reason.FREE_ACTION, action_of(category, "0")) == (
        'Free: "Look up" has no price, so every run of it is free.'
    )


@pytest.mark.parametrize(
    ("reason", "credits", "expected"),
    [
        (Reason.CHARGED, "2", 'Charged 2 credits: "lookup" returned data.'),
        (Reason.FREE_ACTION, "0", 'Free: "lookup" has no price, so every run of it is free.'),
        (Reason.ERROR, "0", 'Free: "lookup" ended in an error.'),
    ],
)
def test_an_action_that_the_catalogue_lost(reason: Reason, credits: str, expected: str) -> None:
    """Without its catalogue version a run is still explained, under the action's id."""
    assert told(reason, None, credits) == expected


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (Reason.TOO_LARGE, "Not charged: the run was set aside, because its event is too large (so)."),
        (Reason.MALFORMED, "Not charged: the run was set aside, because its event is not a valid cell run (so)."),
        (
            Reason.MISROUTED,
            "Not charged: the run was set aside, because its event had another Kafka key or partition than its "
            "workspace's (so).",
        ),
        (Reason.FUTURE_RUN, "Not charged: the run was set aside, because its time is in the future (so)."),
        (Reason.STALE_RUN, "Not charged: the run was set aside, because it arrived too late (so)."),
        (
            Reason.CONFLICTING_DUPLICATE,
            "Not charged: the run was set aside, because another event with the same run id had different facts (so).",
        ),
        (Reason.UNKNOWN_ACTION, "Not charged: the run was set aside, because no price is known for it (so)."),
        (
            Reason.UNKNOWN_RUN,
            "Not charged: the run has not arrived; only its reversal has, and waits for it (so).",
        ),
        (Reason.DUPLICATE, "Not charged again: this is so."),
    ],
)
def test_the_sentence_of_what_is_no_debit(reason: Reason, expected: str) -> None:
    """An event that was not debited says why, and carries its detail."""
    assert told(reason, None, detail="so") == expected


def test_every_reason_has_a_sentence_and_a_rule() -> None:
    """Whatever the ledger can say can be told to a customer."""
    for reason in REASONS:
        assert told(reason, action_of(Category.ENRICHMENT), "1", "detail").endswith(".")
        assert RULES[reason]


@pytest.mark.parametrize(
    ("credits", "pool", "expected"),
    [
        ("1", Pool.ENRICHMENT, "1 credit"),
        ("2", Pool.ENRICHMENT, "2 credits"),
        ("0.5", Pool.ENRICHMENT, "0.5 credits"),
        ("1.001", Pool.ENRICHMENT, "1.001 credits"),
        ("0", Pool.NONE, "0 credits"),
        ("1500", Pool.ENRICHMENT, "1,500 credits"),
        ("1", Pool.PREMIUM, "1 premium credit"),
        ("3", Pool.PREMIUM, "3 premium credits"),
        ("-1", Pool.ENRICHMENT, "-1 credit"),
    ],
)
def test_one_credit_is_singular(credits: str, pool: Pool, expected: str) -> None:
    """Exactly one credit is a credit; everything else is credits."""
    assert credits_text(parse_credits(credits), pool) == expected


def delivery(kind: Kind, reason: Reason) -> EventRow:
    return EventRow(
        position="t[0]@1",
        recorded_at=datetime(2026, 8, 20, tzinfo=UTC),
        kind=kind,
        reason=reason,
        credits="0",
        detail="",
    )


COPY: Final = delivery(Kind.DUPLICATE, Reason.DUPLICATE)
CONFLICT: Final = delivery(Kind.DEAD_LETTER, Reason.CONFLICTING_DUPLICATE)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([], ""),
        ([COPY], " It was delivered twice and counted once."),
        ([COPY] * 2, " It was delivered 3 times and counted once."),
        ([COPY] * 1000, " It was delivered 1,001 times and counted once."),
        ([CONFLICT], " 1 other event with the same run id had different facts and did not count."),
        ([CONFLICT] * 2, " 2 other events with the same run id had different facts and did not count."),
        (
            [COPY, CONFLICT],
            " It was delivered twice and counted once."
            " 1 other event with the same run id had different facts and did not count.",
        ),
        ([delivery(Kind.DEAD_LETTER, Reason.UNKNOWN_ACTION)], ""),
    ],
)
def test_copies_and_conflicts_are_told(others: list[EventRow], expected: str) -> None:
    """What came besides the debit is counted, in the singular and the plural."""
    assert again(others) == expected


# Rows of the ledger.


def row(offset: int = 7, **fields: Any) -> dict[str, Any]:
    """A ledger row of a charged run of `find_work_email`, as a query gives it."""
    instant = datetime(2026, 8, 20, 12, tzinfo=UTC)
    plain = {
        "topic": "cell-runs", "kafka_partition": 3, "kafka_offset": offset, "recorded_at": instant, "kind": "run",
        "run_id": run_id(1), "workspace_id": "ws_1", "table_id": "tbl_1", "column_id": "col_1", "row_id": "row_1",
        "action": "find_work_email", "outcome": "data", "own_api_key": False, "ran_at": instant, "triggered_by": "api",
        "actor": "eve", "pool": "enrichment", "credits": Decimal("2.000"), "reason": "charged", "catalogue": 2,
        "detail": "",
    }  # fmt: skip
    return plain | fields


def copy(offset: int, **fields: Any) -> dict[str, Any]:
    detail = "a duplicate of the run at cell-runs[3]@7"
    plain = {"kind": "duplicate", "reason": "duplicate", "credits": Decimal(0), "pool": "none", "catalogue": 0}
    return row(offset, **({"detail": detail} | plain | fields))


def letter(offset: int, reason: Reason, **fields: Any) -> dict[str, Any]:
    plain = {"kind": "dead_letter", "reason": reason, "credits": Decimal(0), "pool": "none", "catalogue": 0}
    return row(offset, **({"detail": "so"} | plain | fields))


def test_a_charged_run_with_its_evidence() -> None:
    """Price, catalogue version, rule and the reasons that would have made it free stand beside the sentence."""
    found = explain([row()], 4, EXAMPLES)

    assert found.sentence == 'Charged 2 credits: "Find Work Email" returned data.'
    assert (found.credits, found.price, found.catalogue, found.pool) == ("2", "2", 2, "enrichment")
    assert (found.action, found.action_name) == ("find_work_email", "Find Work Email")
    assert (found.rule, found.rule_text) == RULES[Reason.CHARGED]
    assert found.not_free_because == [
        "it did not run with the workspace's own API key",
        "the action has a price",
        "it did not end in an error",
        "it returned data",
    ]
    assert (found.position, found.runs_of_this_cell) == ("cell-runs[3]@7", 4)
    assert (found.run_id, found.triggered_by, found.actor) == (str(run_id(1)), "api", "eve")
    assert [(one.position, one.credits, one.kind) for one in found.deliveries] == [("cell-runs[3]@7", "2", "run")]


def test_an_answer_of_nothing_with_its_evidence() -> None:
    """Where nothing found was charged, the evidence says that it is the answer and not that data came."""
    charged = row(action="tech_stack", outcome="no_data", reason="charged_no_data", credits=Decimal("1.000"))

    found = explain([charged], 1, EXAMPLES)

    assert found.rule == "R09"
    assert found.not_free_because == [
        "it did not run with the workspace's own API key",
        "the action has a price",
        "it did not end in an error",
        "it found nothing, which for this action is the answer",
    ]


def test_a_premium_run_follows_r07() -> None:
    """A premium charge names its pool and its own rule."""
    charged = row(action="clearbit_enrich_company", pool="premium", credits=Decimal("1.000"))

    found = explain([charged], 1, EXAMPLES)

    assert found.sentence == 'Charged 1 premium credit: "Enrich Company with Clearbit" returned data.'
    assert (found.rule, found.pool) == ("R07", "premium")


def test_a_free_run_shows_what_it_would_have_cost() -> None:
    """The price stands beside a free run too; nothing needs to be said against its being free."""
    found = explain([row(reason="own_api_key", own_api_key=True, credits=Decimal(0))], 1, EXAMPLES)

    assert (found.credits, found.price, found.rule) == ("0", "2", "R05")
    assert found.not_free_because == []


@pytest.mark.parametrize(("catalogue", "price"), [(1, "4"), (2, "3")])
def test_the_price_is_that_of_the_version_that_priced_it(catalogue: int, price: str) -> None:
    """A run of June shows June's price, whatever is in force now."""
    charged = row(action="find_mobile_number", catalogue=catalogue, credits=Decimal(price))

    found = explain([charged], 1, EXAMPLES)

    assert (found.price, found.catalogue) == (price, catalogue)


def test_the_debit_is_explained_and_not_what_came_before() -> None:
    """A dead letter that came first does not hide the debit; all deliveries are listed in order."""
    rows = [letter(2, Reason.UNKNOWN_ACTION), row(), copy(9), letter(11, Reason.CONFLICTING_DUPLICATE), copy(12)]

    found = explain(rows, 1, EXAMPLES)

    assert run_of(rows) is rows[1]
    assert found.sentence == (
        'Charged 2 credits: "Find Work Email" returned data. It had been set aside as unknown_action, and was sent '
        "again. It was delivered 3 times and counted once. "
        "1 other event with the same run id had different facts and did not count."
    )
    assert [one.position for one in found.deliveries] == [f"cell-runs[3]@{offset}" for offset in (2, 7, 9, 11, 12)]
    assert [one.credits for one in found.deliveries] == ["0", "2", "0", "0", "0"]


def test_what_was_set_aside_after_its_debit_was_not_sent_again() -> None:
    """A copy that came under a wrong key, say: it changed nothing, and stands among the deliveries."""
    found = explain([row(), letter(9, Reason.MISROUTED)], 1, EXAMPLES)

    assert found.sentence == 'Charged 2 credits: "Find Work Email" returned data.'
    assert len(found.deliveries) == 2


def test_of_letters_the_newest_says_why_there_is_no_debit() -> None:
    """The first one is closed by the second, which is the one to look at."""
    found = explain([letter(2, Reason.MISROUTED), letter(9, Reason.UNKNOWN_ACTION)], 0, EXAMPLES)

    assert (found.reason, found.position) == ("unknown_action", "cell-runs[3]@9")
    assert found.sentence == told(Reason.UNKNOWN_ACTION, None, detail="so")


@pytest.mark.parametrize("reason", DEAD_LETTER_REASONS)
def test_a_lone_dead_letter(reason: Reason) -> None:
    """A run that was only set aside says so, draws nothing and counts nothing twice."""
    found = explain([letter(2, reason)], 0, EXAMPLES)

    assert found.sentence == told(reason, None, detail="so")
    assert (found.credits, found.price, found.action_name, found.rule) == ("0", "", "", "intake")


def test_when_a_dead_letter_ran_is_left_to_its_bytes() -> None:
    """The ledger dates a dead letter by its arrival, which is not when the run ran: of a stale one 366 days before."""
    lines = explained(explain([letter(2, Reason.STALE_RUN)], 0, EXAMPLES))

    assert "  when       received 2026-08-20 12:00:00 UTC" in lines
    assert lines[-1] == "More: `creditstream dead-letters show 'cell-runs[3]@2'`"
    assert "  when       ran 2026-08-20 12:00:00 UTC, received 2026-08-20 12:00:00 UTC" in explained(
        explain([row()], 1, EXAMPLES)
    )


def test_of_a_run_that_only_its_reversal_names_nothing_is_said_that_nobody_knows() -> None:
    """Neither a cell nor an outcome."""
    unknown = letter(2, Reason.UNKNOWN_RUN, table_id="", column_id="", row_id="", outcome="", action="")
    lines = explained(explain([unknown], 0, EXAMPLES))

    assert "  where      workspace ws_1" in lines
    assert not any(line.startswith("  outcome") for line in lines)


@pytest.mark.parametrize(
    ("move", "line"),
    [
        (("0", "-1", "0", "50k"), "0 -> 1 premium credits drawn"),
        (("3", "2", "4", "50k"), "3 -> 2 of 4 premium credits left"),
        (("0", "-1", "4", ""), "0 -> -1 of 4 premium credits left (1 over)"),
    ],
)
def test_a_plan_says_nothing_of_premium_credits(move: tuple[str, str, str, str], line: str) -> None:
    """What a premium run moved is measured by grants alone, whatever the workspace's plan is."""
    before, after, allowance, plan = move
    balance = BalanceMove(pool=Pool.PREMIUM, before=before, after=after, allowance=allowance, plan=plan)
    lines = explained(msgspec.structs.replace(explain([row()], 1, EXAMPLES), balance=balance))

    assert f"  balance    {line}" in lines


@pytest.mark.parametrize(
    ("thresholds", "below", "line"),
    [
        ([80], None, "crossed 80 %, sent 2026-08-20 12:00:01 UTC"),
        ([], "1500", "crossed 1,500 left, sent 2026-08-20 12:00:01 UTC"),
        ([50, 80], "0.5", "crossed 50 %, 80 %, 0.5 left, sent 2026-08-20 12:00:01 UTC"),
    ],
)
def test_an_alert_is_told_with_every_line_that_was_crossed(thresholds: list[int], below: str | None, line: str) -> None:
    """Percents, and the absolute line."""
    at = datetime(2026, 8, 20, 12, 0, 1, tzinfo=UTC)
    alert = PublishedAlert(
        alert_id="", workspace_id="ws_1", pool="enrichment", kind="crossed", state="warning", used="1", allowance="2",
        thresholds=thresholds, remaining_below=below, period_start=None, period_end=None, plan="", cause="run", at=at,
        position="", run_id="", seeded=False, published_at=at,
    )  # fmt: skip
    lines = explained(msgspec.structs.replace(explain([row()], 1, EXAMPLES), alert=alert))

    assert f"  alert      {line}" in lines


def test_the_evidence_of_a_premium_run_counts_premium_credits() -> None:
    """As its sentence does."""
    charged = row(action="clearbit_enrich_company", pool="premium", credits=Decimal("1.000"))
    lines = explained(explain([charged], 1, EXAMPLES))

    assert "    cell-runs[3]@7  run/charged  1 premium credit  2026-08-20 12:00:00 UTC" in lines


def test_on_a_terminal_what_belongs_to_a_field_stands_below_it() -> None:
    """No line is wider, and the command at the end stays whole; what fits is left as it is."""
    lines = explained(explain([row(), copy(9)], 1, EXAMPLES))
    shown = folded(lines, 80)
    start = next(number for number, line in enumerate(shown) if line.startswith("  not free"))

    assert shown[start : start + 2] == [
        "  not free   it did not run with the workspace's own API key; the action has a",
        "             price; it did not end in an error; it returned data",
    ]
    assert max(map(len, shown[:-1])) <= 80
    assert shown[-1] == lines[-1]
    assert folded(lines, 200) == lines
    assert folded(lines, 20)[-1] == lines[-1]


def test_another_workspace_is_not_told_of() -> None:
    """Two workspaces that use one run id have two runs; neither hears of the other's."""
    rows = [row(), copy(9, workspace_id="ws_2"), letter(10, Reason.CONFLICTING_DUPLICATE, workspace_id="ws_2")]

    found = explain(rows, 1, EXAMPLES)

    assert found.sentence == 'Charged 2 credits: "Find Work Email" returned data.'
    assert [one.position for one in found.deliveries] == ["cell-runs[3]@7"]


def test_an_explanation_from_the_ledger(client: Client) -> None:
    """From events to a sentence: a parked event, the run, a copy, a conflict, and another run of the same cell."""
    run = {"run": 1, "action": "find_work_email"}
    events = [
        event(run=1, action="find_yeti", row_id="elsewhere"),
        event(**run),
        event(**run),
        event(**run, actor="eve"),
        event(run=2, action="find_work_email", outcome="error"),
    ]
    road = Road()
    write_rows(client, road.chain, road.table([Record(at, value) for at, value in enumerate(events)]))

    found, other = (explanation(client, run_id(number), EXAMPLES) for number in (1, 2))

    assert found.sentence == (
        'Charged 2 credits: "Find Work Email" returned data. It had been set aside as unknown_action, and was sent '
        "again. It was delivered twice and counted once. "
        "1 other event with the same run id had different facts and did not count."
    )
    assert (found.credits, found.price, found.catalogue, found.runs_of_this_cell) == ("2", "2", 2, 2)
    assert [(one.position, one.reason) for one in found.deliveries] == [
        ("cell-runs[0]@0", "unknown_action"),
        ("cell-runs[0]@1", "charged"),
        ("cell-runs[0]@2", "duplicate"),
        ("cell-runs[0]@3", "conflicting_duplicate"),
    ]
    assert to_milliseconds(found.ran_at) == to_milliseconds(found.recorded_at) == AUGUST_MS
    assert other.sentence == 'Free: "Find Work Email" ended in an error.'
    with pytest.raises(UnknownId, match="no run"):
        explanation(client, UUID(int=5), EXAMPLES)
    with pytest.raises(UnknownId, match="no run"):
        explanation(client, UUID(int=0), EXAMPLES)  # the id of every row whose event could not be read


def test_a_run_id_of_two_workspaces_needs_the_workspace(client: Client) -> None:
    """Run ids are each workspace's own: none is chosen for the one who asks, and each is found under its workspace."""
    road = Road()
    records = [
        Record(0, event(run=1, action="find_work_email")),
        Record(1, event(run=1, workspace_id="ws_2"), key=b"ws_2"),
    ]
    write_rows(client, road.chain, road.table(records))

    with pytest.raises(Problem, match=r"names 2 runs: of ws_1, ws_2\."):
        explanation(client, run_id(1), EXAMPLES)
    found = {name: explanation(client, run_id(1), EXAMPLES, name) for name in ("ws_1", "ws_2")}
    assert {name: (one.workspace_id, one.credits) for name, one in found.items()} == {
        "ws_1": ("ws_1", "2"), "ws_2": ("ws_2", "1")
    }  # fmt: skip
    with pytest.raises(UnknownId, match="no event of ws_3 that could be read carries this id"):
        explanation(client, run_id(1), EXAMPLES, "ws_3")


def test_the_newest_runs_are_listed_with_their_ids(client: Client) -> None:
    """Free ones too, of a column or with a reason; neither copies nor other workspaces' runs."""
    road = Road()
    events = [
        event(run=1, action="find_work_email", ran_ms=AUGUST_MS - 3_000),
        event(run=2, column_id="col_2", ran_ms=AUGUST_MS - 1_000),
        event(run=3, outcome="error", ran_ms=AUGUST_MS - 2_000),
        event(run=2, column_id="col_2", ran_ms=AUGUST_MS - 1_000),
    ]
    records = [Record(offset, value) for offset, value in enumerate(events)]
    records.append(Record(4, event(run=4, workspace_id="ws_2"), key=b"ws_2"))
    write_rows(client, road.chain, road.table(records))

    def listed(**asked: Any) -> list[tuple[str, str, str]]:
        found = runs(client, "ws_1", **{"limit": 10} | asked)
        return [(row.run_id, row.credits, row.reason) for row in found]

    first, second, third = (str(run_id(number)) for number in (1, 2, 3))
    assert listed() == [(second, "1", "charged"), (third, "0", "error"), (first, "2", "charged")]
    assert listed(limit=1) == listed(column_id="col_2") == [(second, "1", "charged")]
    assert listed(reason="error") == [(third, "0", "error")]
    assert listed(table_id="tbl_none") == []
