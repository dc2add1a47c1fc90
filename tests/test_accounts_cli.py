"""The commands of billing and of those who ask about credits, end to end: against a worker, and after it has ended."""

import csv
import io
import re
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import pytest

from schemas.answers import PeriodRow, PoolBalance
from tests.worker_process import (
    WAIT_S_MAX,
    WorkerProcess,
    cell_run,
    creditstream,
    environment_of,
    event_of,
    read_json,
)

WORKSPACE: Final = "ws_0001"
NOW: Final = datetime.now(UTC)
MAILS: Final = [cell_run(action="find_work_email", column_id="col_mail") for _ in range(3)]
RUNS: Final = [*MAILS, cell_run(), cell_run(action="clearbit_enrich_company"), cell_run(action="format_date")]


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, kafka: str) -> Iterator[WorkerProcess]:
    """A worker that has metered a handful of runs of a workspace, which billing then said things of."""
    with WorkerProcess(tmp_path_factory.mktemp("accounts"), kafka, "accounts-", instance="one") as process:
        assert creditstream("topics", settings=environment_of(process)).code == 0
        process.start()
        process.wait_until_ready()
        process.produce(map(event_of, RUNS))
        process.wait_until_metered()
        yield process


@pytest.fixture(scope="module")
def settings(worker: WorkerProcess) -> dict[str, str | int]:
    """Of a command, after billing has spoken: the commands that send are tried here, in order."""
    settings = environment_of(worker)
    yesterday = (NOW - timedelta(days=1)).strftime("%Y-%m-%d")
    for words, said in [
        (("plan", "set", WORKSPACE, "20k", "--effective-at", yesterday), "plan/plan_changed"),
        (("grant", WORKSPACE, "0.5", "--actor", "ada"), "grant/premium_granted"),
        (("limits", "set", WORKSPACE, "--threshold", "90", "--remaining-below", "12.5"), "limits/limits_changed"),
        (("reverse", str(MAILS[0].run_id), "--workspace", WORKSPACE), "reversal/reversed"),
    ]:
        done = creditstream(*words, "--wait", settings=settings)
        assert done.code == 0, done
        event_id, position, what = done.out.split("  ")[:3]
        assert UUID(event_id)
        assert position.startswith("accounts-account-events[")
        assert what.strip() == said
    return settings


QUESTIONS: Final = [
    ("balance", WORKSPACE),
    ("statement", WORKSPACE),
    ("usage", WORKSPACE, "--period", f"{NOW:%Y-%m-%d}"),
    ("check", WORKSPACE, "find_work_email", "--cells", "10"),
    ("top",),
    ("grants", WORKSPACE),
    ("explain", str(MAILS[0].run_id)),
]
AT: Final = ("--as-of", "2099-01-01")


def fixed(words: tuple[str, ...]) -> tuple[str, ...]:
    """The question at an instant, so that two answers can be equal."""
    return words if words[0] in ("explain", "usage") else (*words, *AT)


def test_billing_is_seen_in_every_answer(settings: dict[str, str | int]) -> None:
    """Plan, grant, thresholds and reversal: three mails less one reversed, and a plain run, against 20,000."""
    pools = {
        pool["pool"]: pool
        for pool in read_json(creditstream("balance", WORKSPACE, "--format", "json", settings=settings))
    }
    enrichment, premium = pools["enrichment"], pools["premium"]
    assert (enrichment["used"], enrichment["allowance"], enrichment["remaining"]) == ("5", "20000", "19995")
    assert (enrichment["plan"], enrichment["state"]) == ("20k", "ok")
    assert (premium["used"], premium["allowance"], premium["overage"], premium["state"]) == (
        "1",
        "0.5",
        "0.5",
        "exhausted",
    )
    text = creditstream("balance", WORKSPACE, settings=settings)
    assert "19,995" in text.out
    assert "None" not in text.out
    table = creditstream("balance", WORKSPACE, "--format", "csv", settings=settings)
    (row, _) = csv.DictReader(io.StringIO(table.out))
    assert tuple(row) == PoolBalance.__struct_fields__
    assert (row["remaining"], row["runs_out_on"]) == ("19995", "")


def test_it_is_said_what_an_event_means(settings: dict[str, str | int]) -> None:
    """Sentences on standard error: what was done, what is left before and now, and the command that shows more."""
    since = (NOW - timedelta(days=40)).strftime("%Y-%m-%d")

    def said(*words: str) -> list[str]:
        done = creditstream(*words, settings=settings)
        assert done.code == 0, done
        return done.err.splitlines()

    first = said("plan", "set", "ws_told", "50k", "--effective-at", since, "--wait")
    assert first[0] == f"ws_told has plan 50k, 50,000 credits a billing period, from {since} 00:00:00 UTC on."
    _, running, coming, more = said("plan", "set", "ws_told", "20k", "--wait")
    assert re.fullmatch(r"The running period, to before [0-9-]+: 0 of 50,000 used, 50,000 left\.", running)
    assert coming == "The next one has 20,000 credits."
    assert more.endswith("creditstream plan show ws_told`")
    assert said("grant", "ws_told", "1500", "--wait")[1] == (
        "The premium pool before: 0 of 0 used, 0 left; now: 0 of 1,500 used, 1,500 left."
    )
    one = said("grant", "ws_told", "1")
    assert one[0].startswith("ws_told is granted 1 premium credit from ")
    assert one[1].startswith("It is on its way; `")
    assert "a smaller one, too, on the first day" in said("plan", "set", "ws_later", "20k")[1]
    assert said("limits", "set", "ws_told", "--threshold", "70", "--wait")[0] == (
        "ws_told is alerted at 70 %, 100 % (workspace), no absolute line (default)."
    )
    again = said("reverse", str(MAILS[0].run_id), "--workspace", WORKSPACE, "--wait")
    assert again[1].startswith("Nothing has changed: the run was reversed at accounts-account-events[")
    (_, more) = said("reverse", str(MAILS[0].run_id), "--workspace", WORKSPACE)
    assert re.search(rf"explain {MAILS[0].run_id} --workspace {WORKSPACE}` shows the result", more)


def test_a_statement_is_printed_and_foots(settings: dict[str, str | int]) -> None:
    """A heading, a line for each pool, and that it adds up; of now also the command that says what drew."""
    done = creditstream("statement", WORKSPACE, settings=settings)
    assert done.code == 0
    assert done.out.startswith(f"{WORKSPACE}, plan 20k, ")
    assert "it adds up" in done.out
    assert re.search(f"creditstream usage --from .* {WORKSPACE}`$", done.out, re.MULTILINE)
    then = creditstream("statement", WORKSPACE, "--as-of", f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}", settings=settings)
    assert ("it adds up" in then.out, "creditstream usage" in then.out) == (True, False)
    lines = read_json(creditstream("statement", WORKSPACE, "--format", "json", settings=settings))
    assert [(line["debited"], line["reversed"], line["closing"], line["foots"]) for line in lines] == [
        ("7", "2", "19995", True),
        ("1", "0", "-0.5", True),
    ]


def test_a_check_answers_by_its_exit_code(settings: dict[str, str | int]) -> None:
    """0 for yes, 3 for no, and a line that says why."""
    yes = creditstream("check", WORKSPACE, "find_work_email", "--cells", "9997", settings=settings)
    assert (yes.code, yes.out) == (0, "yes: it would draw 19,994 of the 19,995 enrichment credits left (enough)\n")
    no = creditstream("check", WORKSPACE, "find_work_email", "--cells", "9998", settings=settings)
    assert no.code == 3
    assert no.out.startswith(
        "no: it would draw 19,996, but only 19,995 enrichment credits are left; the next period starts on "
    )
    own = creditstream("check", WORKSPACE, "clearbit_enrich_company", "--own-api-key", settings=settings)
    assert (own.code, own.out) == (0, "yes: with the workspace's own API key it costs nothing (R05) (own_api_key)\n")
    nobody = creditstream("check", "ws_none", "enrich_person", settings=settings)
    assert (nobody.code, nobody.out) == (3, "no: nothing is known of ws_none (unknown_workspace)\n")


def test_an_estimate_shows_worst_case_and_what_is_left_r14(settings: dict[str, str | int]) -> None:
    """A warning goes to standard error."""
    done = creditstream("estimate", WORKSPACE, "find_work_email", "--cells", "20000", settings=settings)
    assert done.code == 0
    assert "worst case  40,000 credits" in done.out
    assert "(the worst case: give --table and --column to use the column's history)" in done.out
    history = ("--table", MAILS[0].table_id, "--column", "col_mail")
    mails = creditstream("estimate", WORKSPACE, "find_work_email", "--cells", "5", *history, settings=settings)
    assert "expected    10 credits (3 runs: 3 charged)" in mails.out
    free = creditstream("estimate", WORKSPACE, "format_date", "--cells", "5", settings=settings)
    assert free.out.endswith("expected    0 credits (it is free)\n")  # what is left does not matter
    assert done.err == "It does not fit: about 40,000 credits expected, 19,995 left.\n"


def test_explain_shows_balance_and_reversal(settings: dict[str, str | int]) -> None:
    """What the run did to the balance stands among the evidence."""
    done = creditstream("explain", str(MAILS[0].run_id), settings=settings)
    assert "It was reversed on " in done.out.splitlines()[0]
    assert "  balance    0 -> 2 enrichment credits drawn, period " in done.out


def test_plans_are_listed(settings: dict[str, str | int]) -> None:
    """With the one in force, and what it gives."""
    (row,) = read_json(creditstream("plan", "show", WORKSPACE, "--format", "json", settings=settings))
    assert (row["plan"], row["allowance"], row["in_force"], row["restart_period"]) == ("20k", "20000", True, False)


def test_grants_are_listed(settings: dict[str, str | int]) -> None:
    """With those that count; of whom none were given any, a sentence says so."""
    (row,) = read_json(creditstream("grants", WORKSPACE, "--format", "json", settings=settings))
    assert (row["credits"], row["in_force"], row["workspace_id"]) == ("0.5", True, WORKSPACE)
    header, line = creditstream("grants", WORKSPACE, settings=settings).out.splitlines()
    assert header.split() == ["effective_at", "credits", "in_force", "recorded_at"]
    assert line.split()[3:5] == ["0.5", "yes"]
    assert creditstream("plan", "set", "ws_grantless", "20k", "--wait", settings=settings).code == 0
    assert creditstream("grants", "ws_grantless", settings=settings).out == ("ws_grantless has no premium grants.\n")


def test_one_credit_is_one_credit(settings: dict[str, str | int]) -> None:
    """And of a premium action a premium one, in every sentence that counts credits."""
    premium = creditstream("estimate", WORKSPACE, "clearbit_enrich_company", "--cells", "1", settings=settings)
    assert premium.out.splitlines()[0] == "clearbit_enrich_company in 1 cell, 1 premium credit each"
    assert "  worst case  1 premium credit\n" in premium.out
    assert "  expected    1 premium credit (" in premium.out
    assert premium.err == "It does not fit: about 1 credit expected, 0 left.\n"
    mail = creditstream("reverse", str(RUNS[4].run_id), "--workspace", WORKSPACE, "--wait", settings=settings)
    assert "is reversed: 1 premium credit given back, on the day of the run." in mail.err
    told = creditstream("limits", "set", "ws_one", "--remaining-below", "1", "--wait", settings=settings)
    assert ", 1 credit left if the allowance is larger (workspace)." in told.err


def test_limits_say_whose_they_are(settings: dict[str, str | int]) -> None:
    """Thresholds and the absolute line, each with its origin."""
    done = creditstream("limits", "show", WORKSPACE, settings=settings)
    line = "12.5 credits left if the allowance is larger (workspace)"
    assert done.out == f"{WORKSPACE} is alerted at 90 %, 100 % (workspace), {line}.\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("plan", "set", WORKSPACE, "gold"), 4, "no plan 'gold': the plan lists name cancelled, "),
        (("grant", WORKSPACE, "0"), 2, "the premium_granted event is wrong: `credits` must be more than 0"),
        (
            ("grant", WORKSPACE, "1.2345"),
            2,
            "'1.2345' is not an amount; write 500 or 0.5, at most 12 digits and 3 decimals.",
        ),
        (("grant", WORKSPACE, "1" * 13), 2, "is not an amount; write 500 or 0.5, at most 12 digits and 3 decimals."),
        (("grant", WORKSPACE, "0,5"), 2, "'0,5' is not an amount"),
        (("limits", "set", WORKSPACE, "--remaining-below", "1e3"), 2, "'1e3' is not an amount"),
        (("grant", "", "5"), 2, "the premium_granted event is wrong: field `workspace_id`"),
        (("limits", "set", WORKSPACE, "--threshold", "101"), 2, "101 is not in the range"),
        (("limits", "set", WORKSPACE), 2, "Give --threshold or --remaining-below, or only --plan-default."),
        (("plan", "set", WORKSPACE, "20k", "--effective-at", "soon"), 2, "'soon' is not a time"),
        (("plan", "set", WORKSPACE, "20k", "--effective-at", "2019-12-31"), 2, "'2019-12-31' is before 2020 or after"),
        (("plan", "set", "w" * 129, "20k"), 2, "the plan_changed event is wrong: field `workspace_id`"),
        (("balance", WORKSPACE, "--as-of", "2100-01-01"), 2, "'2100-01-01' is before 2020 or after 2099"),
        (("balance", "ws_none"), 4, "no workspace 'ws_none' in the ledger"),
        (("statement", WORKSPACE, "--period", "2098-01-01"), 4, "no period holds 2098-01-01"),
        (("estimate", WORKSPACE, "nobody_priced_this"), 4, "no action 'nobody_priced_this' in the catalogue"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_sent(
    settings: dict[str, str | int], words: tuple[str, ...], code: int, said: str
) -> None:
    """One line that names the field or the id, and its exit code."""
    done = creditstream(*words, settings=settings)
    assert (done.code, done.out) == (code, "")
    assert said in " ".join(done.err.replace("│", " ").split())


def test_an_event_that_is_sent_again_counts_once(settings: dict[str, str | int]) -> None:
    """Under its own id it is a duplicate; an event that billing cannot have meant is set aside, and said to be."""
    event_id = str(UUID(int=0x0190F4A0_0000_7000_8000_000000000001))
    words = ("grant", "ws_again", "5", "--effective-at", "2026-01-01", "--event-id", event_id, "--wait")
    first, again = (creditstream(*words, settings=settings) for _ in range(2))
    assert first.out.startswith(f"{event_id}  ")
    assert "grant/premium_granted" in first.out
    assert "duplicate/duplicate" in again.out
    (_, premium) = read_json(creditstream("balance", "ws_again", "--format", "json", settings=settings))
    assert premium["allowance"] == "5"
    lost = creditstream("reverse", event_id, "--workspace", "ws_again", "--wait", settings=settings)
    assert lost.code == 1
    assert lost.err.startswith("creditstream: the event was set aside as unknown_run: ")


def test_a_crossing_is_explained_by_the_run_that_caused_it(
    worker: WorkerProcess, settings: dict[str, str | int]
) -> None:
    """The alert that the worker published stands with its run, and in the list of alerts."""
    assert creditstream("grant", "ws_close", "4", "--wait", settings=settings).code == 0
    runs = [cell_run("ws_close", action="clearbit_enrich_company") for _ in range(3)]
    worker.produce(map(event_of, runs))
    deadline = time.monotonic() + WAIT_S_MAX
    while not (alerts := worker.answers.alerts("ws_close", "crossed", 10, None)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (alert,) = alerts
    assert (alert.used, alert.allowance, alert.thresholds, alert.run_id) == ("2", "4", [50], str(runs[1].run_id))
    worker.wait_until_metered()  # an alert leaves before its row is in the ledger
    done = creditstream("explain", str(runs[1].run_id), settings=settings)
    assert "  balance    3 -> 2 of 4 premium credits left\n" in done.out
    assert "  alert      crossed 50 %, sent " in done.out
    periods = worker.answers._get("/v1/periods", list[PeriodRow], workspace_id="ws_close")
    assert [row.period_end > NOW.date() for row in periods] == [True]


def test_every_question_has_the_same_answer_without_the_worker(
    worker: WorkerProcess, settings: dict[str, str | int]
) -> None:
    """A running worker answers over its API; when it has ended, the command opens the ledger itself."""
    asked = [creditstream(*fixed(words), "--format", "json", settings=settings) for words in QUESTIONS]
    worker.kill()
    alone = [creditstream(*fixed(words), "--format", "json", settings=settings) for words in QUESTIONS]
    assert [done.code for done in asked] == [0] * len(asked), asked
    assert [(done.code, done.out) for done in alone] == [(done.code, done.out) for done in asked]


def test_every_command_has_an_example(settings: dict[str, str | int]) -> None:
    """Its help shows one."""
    from creditstream.cli.commands import cli

    for name in ("plan", "grant", "reverse", "limits", "balance", "statement", "check", "estimate", "top"):
        command = cli.commands[name]
        for one in getattr(command, "commands", {name: command}).values():
            assert "Example: `creditstream " in (one.help or ""), name
