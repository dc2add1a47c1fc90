"""The command line, end to end: against a running worker, after it has ended, and when something is wrong."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Thread
from typing import Any, Final
from uuid import uuid4

import msgspec
import psutil
import pytest

from creditstream.api import listen
from creditstream.cli import commands, main, terminal
from creditstream.cli.balance import BALANCE_COLUMNS, told
from creditstream.cli.tables import BAR_WIDTH, show_rows
from creditstream.home import Home
from creditstream.webhooks.endpoints import Address, Endpoint
from creditstream.webhooks.resending import send_test
from creditstream.webhooks.signing import new_secret, parse_secret
from schemas.answers import PoolBalance, SpendCheck, UsageRow
from schemas.cell_run import Outcome
from schemas.codec import encode_run
from schemas.problem import Problem
from tests.clickhouse_server import ClickHouseServer
from tests.worker_process import (
    ROOT,
    WAIT_S_MAX,
    Event,
    Finished,
    WorkerProcess,
    cell_run,
    creditstream,
    environment,
    environment_of,
    event_of,
    read_json,
)

WORKSPACE: Final = "ws_0001"
EMAIL = cell_run(action="find_work_email", triggered_by="schedule", actor="ada")
EARLIER = cell_run(own_api_key=True, ran_at=datetime.now(UTC) - timedelta(days=2))
RUNS: Final = [
    EMAIL,
    EMAIL,
    cell_run(action="format_date", column_id="col_2", row_id="row_2"),
    cell_run(outcome=Outcome.NO_DATA),
    cell_run(outcome=Outcome.NO_DATA, action="job_role_count"),
    EARLIER,
    cell_run(action="clearbit_enrich_company"),
    cell_run(action="nobody_priced_this"),
]
CREDITS: Final = re.compile(r"\d+(\.\d{1,3})?")


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, kafka: str) -> Iterator[WorkerProcess]:
    """A worker on chDB with a handful of events of known fate, running until a test ends it."""
    with WorkerProcess(tmp_path_factory.mktemp("cli"), kafka, "cli-", instance="one") as process:
        created = creditstream("topics", settings=environment_of(process))
        assert (created.code, created.err) == (0, "")
        assert created.out.startswith("cli-cell-runs: created, 4 partitions, id ")
        process.produce(
            [*map(event_of, RUNS), Event(WORKSPACE.encode(), b"no JSON,\n\x1b]0;owned\x07 and \xff no UTF-8")]
        )
        process.start().wait_until_metered()
        yield process


@pytest.fixture
def settings(worker: WorkerProcess) -> dict[str, str | int]:
    """The settings of a command that asks the worker, which is started again when a test has ended it."""
    if not worker.is_alive:
        worker.start()
    worker.wait_until_ready()
    return environment_of(worker)


def line_of(done: Finished, code: int) -> str:
    """The one line by which a command fails."""
    assert done.code == code, done
    assert done.out == ""
    (line,) = done.err.splitlines()
    assert line.startswith("creditstream: ")
    return line


def questions(position: str) -> list[tuple[str, ...]]:
    """Every command that asks the ledger, for programs."""
    return [
        ("usage", WORKSPACE, "--by", "day", "--from", "2026-01-01", "--format", "json"),
        ("explain", str(EMAIL.run_id), "--format", "json"),
        ("runs", WORKSPACE, "--row", "row_1", "--reason", "charged", "--from", "2026-01-01", "--format", "json"),
        ("dead-letters", "show", position),
        ("reconcile", "--format", "json"),
    ]


def test_a_question_has_the_same_answer_with_and_without_the_worker(
    worker: WorkerProcess, settings: dict[str, str | int]
) -> None:
    """A running worker answers over its API; when it has ended, the command opens the ledger itself."""
    (letter, *_) = worker.answers.dead_letters("malformed", 1)
    asked = [creditstream(*words, settings=settings) for words in questions(letter.position)]
    worker.kill()

    alone = [creditstream(*words, settings=settings) for words in questions(letter.position)]

    assert [done.code for done in asked] == [0] * len(asked), asked
    assert [(done.code, done.out) for done in alone] == [(done.code, done.out) for done in asked]


def test_usage(settings: dict[str, str | int]) -> None:
    """Credits of a workspace, as text for people, as strings in JSON and CSV for programs."""
    text = creditstream("usage", WORKSPACE, "--by", "action", settings=settings)
    rows = read_json(creditstream("usage", WORKSPACE, "--by", "action", "--format", "json", settings=settings))
    table = creditstream("usage", WORKSPACE, "--by", "action", "--format", "csv", settings=settings)

    credits = {row["action"]: row["credits"] for row in rows}
    assert all(isinstance(value, str) and CREDITS.fullmatch(value) for value in credits.values())
    assert credits["find_work_email"] == "2"
    assert credits["format_date"] == "0"
    assert [row | {"free_runs": 2, "runs": 2} for row in rows if row["action"] == "enrich_person"] == [
        {"action": "enrich_person", "pool": "enrichment", "credits": "0", "runs": 2, "free_runs": 2}
    ]
    assert {row["action"]: row["credits"] for row in csv.DictReader(io.StringIO(table.out))} == credits
    assert all(action in text.out for action in credits)


def test_usage_of_nobody(settings: dict[str, str | int]) -> None:
    """A workspace without runs is an answer, not an error."""
    assert creditstream("usage", "ws_none", settings=settings).out == "ws_none has no runs.\n"
    dated = creditstream("usage", "ws_none", "--from", "2026-01-01", settings=settings)
    assert dated.out == "ws_none has no runs in these days.\n"
    assert read_json(creditstream("usage", "ws_none", "--format", "json", settings=settings)) == []


def test_explain(settings: dict[str, str | int]) -> None:
    """One sentence for a customer, then the evidence; the same as a record for programs."""
    text = creditstream("explain", str(EMAIL.run_id), settings=settings)
    record = read_json(creditstream("explain", str(EMAIL.run_id), "--format", "json", settings=settings))

    assert text.code == 0
    assert text.out.startswith(record["sentence"])
    assert "triggered by schedule, by ada" in text.out
    assert (record["credits"], record["reason"], record["rule"]) == ("2", "charged", "R02")
    assert [delivery["kind"] for delivery in record["deliveries"]] == ["run", "duplicate"]


def test_runs(settings: dict[str, str | int]) -> None:
    """The newest runs of a workspace, with the ids that `explain` takes; of one cell, of some days, or for one
    reason.
    """
    day = EARLIER.ran_at.date()
    text = creditstream("runs", WORKSPACE, settings=settings)
    charged = read_json(creditstream("runs", WORKSPACE, "--reason", "charged", "--format", "json", settings=settings))
    (date,) = read_json(creditstream("runs", WORKSPACE, "--column", "col_2", "--format", "json", settings=settings))

    assert str(EMAIL.run_id) in text.out
    assert (str(EMAIL.run_id), "2") in {(row["run_id"], row["credits"]) for row in charged}
    assert {row["reason"] for row in charged} == {"charged"}
    assert (date["action"], date["reason"]) == ("format_date", "free_action")
    days = ("--from", str(day), "--to", str(day + timedelta(days=1)))
    for wanted, run in (
        (("--row", "row_2"), RUNS[2]),
        (days, EARLIER),
        (("--to", str(day + timedelta(days=1))), EARLIER),
    ):
        (found,) = read_json(creditstream("runs", WORKSPACE, *wanted, "--format", "json", settings=settings))
        assert found["run_id"] == str(run.run_id), wanted
    later = read_json(creditstream("runs", WORKSPACE, "--from", days[-1], "--format", "json", settings=settings))
    assert {row["run_id"] for row in later} == {str(run.run_id) for run in RUNS[:-1]} - {str(EARLIER.run_id)}
    assert creditstream("runs", WORKSPACE, "--row", "x", settings=settings).out == f"{WORKSPACE} has no such runs.\n"
    assert creditstream("runs", "ws_none", settings=settings).out == "ws_none has no runs.\n"
    assert "there may be more" not in text.out
    assert (
        "\n\n--limit 1 is reached: there may be more."
        in creditstream("runs", WORKSPACE, "--limit", "1", settings=settings).out
    )


def test_dead_letters(settings: dict[str, str | int]) -> None:
    """The list names position and reason; the bytes are shown as they came."""
    letters = read_json(creditstream("dead-letters", "list", "--format", "json", settings=settings))
    text = creditstream("dead-letters", "list", "--reason", "malformed", settings=settings)
    (position,) = [letter["position"] for letter in letters if letter["reason"] == "malformed"]
    shown = creditstream("dead-letters", "show", position, settings=settings)
    record = read_json(creditstream("dead-letters", "show", position, "--format", "json", settings=settings))

    assert sorted(letter["reason"] for letter in letters) == ["malformed", "unknown_action"]
    assert position in text.out
    assert shown.out.endswith("no JSON,\n\\x1b]0;owned\\x07 and \\xff no UTF-8\n")
    assert (record["raw_bytes"], record["raw_key"]) == (34, WORKSPACE)
    assert "\x1b]0;owned\x07" in record["raw"]


def test_what_events_name_cannot_command_a_terminal(worker: WorkerProcess, settings: dict[str, str | int]) -> None:
    """Control characters of an id are escaped in tables and sentences; JSON and CSV have them as they came."""
    evil = "col\x1b[2J\n1"
    run = cell_run("ws_evil", column_id=evil)
    worker.produce([event_of(run)])
    worker.wait_until_metered()

    table = creditstream("usage", "ws_evil", settings=settings)
    told = creditstream("explain", str(run.run_id), settings=settings)
    (row,) = read_json(creditstream("usage", "ws_evil", "--format", "json", settings=settings))
    listed = creditstream("usage", "ws_evil", "--format", "csv", settings=settings)

    for text in (table.out, told.out):
        assert "col\\x1b[2J\\n1" in text
        assert "\x1b" not in text
    assert row["column_id"] == evil
    assert next(csv.DictReader(io.StringIO(listed.out)))["column_id"] == evil


def test_reconcile(settings: dict[str, str | int]) -> None:
    """The books close: as a sentence, and as a record whose progress lines stay off standard output."""
    text = creditstream("reconcile", settings=settings)
    books = read_json(creditstream("reconcile", "--format", "json", settings=settings))

    assert text.code == 0
    assert "0 missing, 0 doubled" in text.out
    assert books["closes"] is True
    assert (books["missing"], books["doubled"], books["different"], books["behind"]) == (0, 0, 0, 0)
    assert books["credits"] == books["credits_reference"]


def test_reconcile_finds_a_lost_row(worker: WorkerProcess, settings: dict[str, str | int], tmp_path: Path) -> None:
    """Exit code 3, the offset, and one line that says so, in every format."""
    worker.kill()
    home = tmp_path / "home"
    shutil.copytree(worker.home.ledger, home / "ledger", symlinks=True)
    tamper(home, f"DELETE WHERE run_id = '{EMAIL.run_id}' AND kind = 'run'")

    for form in ("text", "json"):
        done = creditstream("reconcile", "--format", form, settings=settings | {"home": str(home)})

        assert done.code == 3
        assert "no ledger row, expected run/charged" in done.err
        assert "Traceback" not in done.err
    assert json.loads(done.out)["missing"] == 1


def test_a_dead_letter_is_sent_again(worker: WorkerProcess, settings: dict[str, str | int]) -> None:
    """What can be is, once, and is closed by that; what would be refused again is left alone, in a sentence."""
    (old,) = worker.answers.dead_letters("unknown_action", 10, True)
    (broken,) = worker.answers.dead_letters("malformed", 10, True)

    sent = creditstream("dead-letters", "redrive", old.position, old.position, settings=settings)
    listed = read_json(creditstream("dead-letters", "list", "--open", "--format", "json", settings=settings))
    refused = creditstream("dead-letters", "redrive", broken.position, settings=settings)

    before, _, after = sent.out.strip().partition(" -> ")
    place, told = after.split(maxsplit=1)
    assert (sent.code, before) == (1, old.position)
    assert told.startswith("dead_letter, unknown_action  ")  # nobody has priced it meanwhile
    assert sent.err.splitlines()[-1].startswith("creditstream: dead letters were set aside again: 1 of 1, see above. ")
    assert {letter["position"] for letter in listed} == {place, broken.position}
    assert "the same bytes would be refused again" in line_of(refused, 1)


def tamper(home: Path, change: str) -> None:
    """What nobody may do to the ledger."""
    script = (
        "import sys\nfrom sinks.clickhouse import connect\n"
        "with connect(sys.argv[1]) as client: client.command(sys.argv[2], settings={'mutations_sync': 1})"
    )
    command = [sys.executable, "-c", script, f"chdb://{home / 'ledger'}", f"ALTER TABLE ledger {change}"]
    subprocess.run(command, cwd=ROOT, check=True)


def test_send_waits_for_the_debits(settings: dict[str, str | int]) -> None:
    """Each run's debit is printed; a copy says that it is one."""
    run = cell_run(action="find_work_email")
    lines = "".join(f"{encode_run(each).decode()}\n" for each in (run, run))

    done = creditstream("send", "--wait", "-", settings=settings, stdin=lines)

    assert done.code == 0, done
    first, second = done.out.splitlines()
    assert first.startswith(f"{run.run_id}  2 credits  charged  Charged 2 credits")
    assert second.startswith(
        f"{run.run_id}  0 credits  duplicate  Not charged again: this is a duplicate of the run at cli-"
    )
    assert done.err.startswith("sent 2 cell runs to ")


def test_send_waits_for_the_run_of_its_own_workspace(settings: dict[str, str | int]) -> None:
    """A run id that another workspace has used, too, is another run."""
    mine = cell_run("ws_mine", action="find_work_email")
    theirs = msgspec.structs.replace(mine, workspace_id="ws_theirs", outcome=Outcome.NO_DATA)
    lines = "".join(f"{encode_run(each).decode()}\n" for each in (mine, theirs))

    done = creditstream("send", "--wait", "-", settings=settings, stdin=lines)

    assert done.code == 0, done
    assert [line.split("  ")[1:3] for line in done.out.splitlines()] == [
        ["2 credits", "charged"], ["0 credits", "no_data"]
    ]  # fmt: skip
    explain = ("explain", str(mine.run_id))
    assert "of ws_mine, ws_theirs. Name the workspace" in line_of(creditstream(*explain, settings=settings), 1)
    told = creditstream(*explain, "--workspace", "ws_theirs", settings=settings)
    assert told.out.startswith('Free: "Find Work Email" found nothing.')


def test_send_says_what_was_set_aside(settings: dict[str, str | int]) -> None:
    """With exit code 1, as of an account event that is waited for; what is not waited for is not known."""
    runs = [cell_run("ws_aside"), cell_run("ws_aside", action="nobody_priced_this")]
    lines = "".join(f"{encode_run(each).decode()}\n" for each in runs)

    done = creditstream("send", "--wait", "-", settings=settings, stdin=lines)

    assert done.code == 1
    assert [line.split("  ")[2] for line in done.out.splitlines()] == ["charged", "unknown_action"]
    assert done.err.splitlines()[-1].startswith("creditstream: runs were set aside: 1 of 2, see above. ")
    assert creditstream("send", "-", settings=settings, stdin=lines).code == 0


def test_send_waits_for_many_at_once(settings: dict[str, str | int]) -> None:
    """A thousand debits are printed in the order of the file, in the time of one wait."""
    runs = [cell_run(f"ws_{number % 7}") for number in range(1000)]
    lines = "".join(f"{encode_run(run).decode()}\n" for run in runs)

    done = creditstream("send", "--wait", "-", settings=settings, stdin=lines)

    assert [line.split("  ")[0] for line in done.out.splitlines()] == [str(run.run_id) for run in runs]


def test_send_reports_bad_lines_and_sends_the_others(settings: dict[str, str | int]) -> None:
    """Each bad line with its number and field, the good ones sent, exit code 1. A byte order mark is no part of any."""
    good = cell_run()
    bad = encode_run(cell_run()).decode().replace('"data"', '"dat"')
    lines = f"\ufeff{encode_run(good).decode()}\n\n{bad}\nno JSON\n"

    done = creditstream("send", "--wait", "-", settings=settings, stdin=lines)

    assert done.code == 1
    assert "Traceback" not in done.err
    assert "line 3: field `outcome`" in done.err
    assert "line 4: " in done.err
    assert "2 lines were not sent: see above. Correct them and send them again." in done.err
    one = creditstream("send", "-", settings=settings, stdin="no JSON\n")
    assert "1 line was not sent: see above. Correct it and send it again." in one.err
    assert done.out.startswith(f"{good.run_id}  1 credit  charged")


def test_send_without_input(settings: dict[str, str | int]) -> None:
    """Nothing to send is a mistake, and said in one line."""
    assert "nothing was sent" in line_of(creditstream("send", "-", settings=settings), 1)


def test_rules() -> None:
    """Prices before a run: a list, one action, and the own key."""
    listed = read_json(creditstream("rules", "list", "--format", "json"))
    table = list(csv.DictReader(io.StringIO(creditstream("rules", "list", "--format", "csv").out)))
    shown = creditstream("rules", "show", "find_work_email")
    own_key = read_json(
        creditstream("rules", "show", "find_work_email", "--own-api-key", "--format", "json"),
    )

    assert len(listed) >= 50
    assert [row["action"] for row in table] == [price["action"] for price in listed]
    assert all(isinstance(price["credits"], str) for price in listed)
    assert shown.out.startswith("Find Work Email: 2 credits of the enrichment pool")
    assert (own_key["price"], own_key["credits"]) == ("2", "0")


def test_a_table_is_never_folded() -> None:
    """What is too wide for a terminal is a line for each field, and can be copied; a pipe has no width."""
    words = [sys.executable, "-m", "creditstream", "rules", "list"]

    def shown(**screen: str) -> list[str]:
        there = environment() | screen
        done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=there)
        assert done.returncode == 0, done
        return done.stdout.splitlines()

    (piped,) = [line for line in shown(COLUMNS="40") if "find_and_enrich_person_google" in line]
    assert "Find & Enrich Person from Google Search" in piped
    narrow = shown(COLUMNS="80", FORCE_COLOR="1")
    start = narrow.index("action           find_and_enrich_person_google")
    assert narrow[start : start + 3] == [
        "action           find_and_enrich_person_google",
        "name             Find & Enrich Person from Google Search",
        "category         enrichment",
    ]
    assert len(shown(COLUMNS="200", FORCE_COLOR="1")) == len(shown())


@pytest.mark.parametrize("below", [None, "1500"])
def test_an_absolute_line_is_shown_where_it_was_crossed(capsys: pytest.CaptureFixture[str], below: str | None) -> None:
    """A warning without a percent would be a riddle; where nobody has such a line there is no column for it."""
    pool = PoolBalance(
        workspace_id="ws_1", pool="enrichment", state="warning", used="1", allowance="2000", remaining="1999",
        overage="0", thresholds=[], remaining_below=below, period_start=None, period_end=None, next_allowance=None,
        plan="", runs_out_on=None, as_of=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    show_rows([pool], "text", (), "", read=BALANCE_COLUMNS)
    header, line = capsys.readouterr().out.splitlines()
    assert ("remaining_below" in header, "1,500" in line) == (bool(below), bool(below))


@pytest.mark.parametrize(
    ("terminal", "columns", "has_bar"), [("1", "200", True), ("1", "40", False), ("", "200", False)]
)
def test_a_terminal_with_room_gets_bars(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: str, columns: str, has_bar: bool
) -> None:
    """Half of the allowance is half of a bar; who reads through a pipe, or on a narrow terminal, gets the figures."""
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("FORCE_COLOR" if terminal else "IGNORED", "1")
    row = UsageRow(table_id="tbl_1", column_id="col_1", pool="enrichment", credits="5", runs=5, free_runs=0)
    show_rows([row, row], "text", ("table_id", "pool", "credits"), "", bars=[(5_000, 10_000), (20_000, 10_000)])
    told = capsys.readouterr().out
    assert [len(filled) for filled in re.findall("\x1b\\[36m(━+)", told)] == (
        [BAR_WIDTH // 2, BAR_WIDTH] if has_bar else []
    )
    assert told.count("tbl_1     enrichment        5") == 2


def test_rules_check(tmp_path: Path) -> None:
    """A good file is counted; in a bad one file, action and field are named, in one line."""
    example = ROOT / "schemas" / "catalogues" / "2026-07.toml"
    wrong = tmp_path / "wrong.toml"
    wrong.write_text(example.read_text().replace('price = "2"', 'price = "-2"', 1))

    assert creditstream("rules", "check", str(example)).out.startswith("2026-07.toml: version 2, ")
    line = line_of(creditstream("rules", "check", str(wrong)), 1)
    assert "wrong.toml: action `find_work_email`, field `price`" in line


def test_topics(settings: dict[str, str | int]) -> None:
    """What exists and fits is said so; what is missing or does not fit is refused in one line."""
    missing = settings | {"topic_prefix": "cli-none-"}

    assert creditstream("topics", "--check", settings=settings).out.startswith("cli-cell-runs: fits, 4 partitions")
    assert "does not exist" in line_of(creditstream("topics", "--check", settings=missing), 1)
    assert "does not fit" in line_of(creditstream("topics", settings=settings | {"partitions": 5}), 1)


def test_migrate(tmp_path: Path) -> None:
    """A new home's ledger is made; the second time there is nothing to do."""
    home = {"home": str(tmp_path)}

    first, second = (creditstream("migrate", settings=home) for _ in range(2))

    assert first.out.startswith("applied 0001 ")
    assert (second.code, second.out) == (0, "nothing to do\n")


def test_a_server_that_refuses_a_migration_is_one_line(http_server: ClickHouseServer, tmp_path: Path) -> None:
    """As one that fails a question: what the server says, and no defect of ours."""
    refused: dict[str, str | int] = {"ledger_url": f"{http_server.url}/no%60name", "home": str(tmp_path)}
    line = line_of(creditstream("migrate", settings=refused), 5)
    assert line.startswith("creditstream: the ledger failed: ")


def test_config() -> None:
    """Every setting with value and origin; secrets are hidden, typing errors shown."""
    rows = read_json(
        creditstream("config", "--format", "json", settings={"ledger_password": "hunter2", "epoch": 7, "epohc": 8})
    )
    found = {row["setting"]: row for row in rows}

    assert (found["CREDITSTREAM_EPOCH"]["value"], found["CREDITSTREAM_EPOCH"]["origin"]) == (
        "7",
        "CREDITSTREAM_EPOCH",
    )
    assert found["CREDITSTREAM_PARTITIONS"]["origin"] == "default"
    assert found["CREDITSTREAM_EPOHC"]["meaning"] == "unknown: ignored"
    assert "hunter2" not in str(rows)


def test_config_shows_the_kafka_that_is_in_force(worker: WorkerProcess, settings: dict[str, str | int]) -> None:
    """That of the worker that runs in the home, whatever the default says."""
    home = {"home": settings["home"]}
    rows = {row["setting"]: row for row in read_json(creditstream("config", "--format", "json", settings=home))}

    found = rows["CREDITSTREAM_KAFKA_BOOTSTRAP"]
    assert (found["value"], found["origin"]) == (settings["kafka_bootstrap"], f"the worker, process {worker.pid}")


def test_a_wrong_setting_is_one_line() -> None:
    """It names the variable and its bound, and `config` does not send whoever asks it to itself."""
    line = line_of(creditstream("config", settings={"epoch": -1}), 1)
    assert "CREDITSTREAM_EPOCH: Expected `int` >= 0; it takes 0 or more. Correct or unset it" in line


def test_an_unknown_id_is_exit_code_4(settings: dict[str, str | int]) -> None:
    """For runs and for dead letters, in one line."""
    assert "no run" in line_of(creditstream("explain", str(uuid4()), settings=settings), 4)
    nowhere = "cell-runs[3]@999999"
    assert nowhere in line_of(creditstream("dead-letters", "show", nowhere, settings=settings), 4)
    assert "nobody_priced_this" in line_of(creditstream("rules", "show", "nobody_priced_this"), 4)


def test_what_does_not_answer_is_exit_code_5(tmp_path: Path) -> None:
    """A worker and a ClickHouse that are not there, in one line each."""
    nobody = "http://127.0.0.1:1"

    assert "does not answer" in line_of(creditstream("explain", str(uuid4()), "--url", nobody), 5)
    elsewhere: dict[str, str | int] = {"ledger_url": f"{nobody}/creditstream", "home": str(tmp_path)}
    assert "does not answer" in line_of(creditstream("usage", WORKSPACE, settings=elsewhere), 5)


def refused_with(answer: bytes) -> Finished:
    """A question to somebody who answers so."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse() -> None:
            asked, _ = server.accept()
            with asked:
                asked.recv(65_536)
                asked.sendall(answer)

        refusing = Thread(target=refuse)
        refusing.start()
        done = creditstream("balance", WORKSPACE, "--url", f"http://127.0.0.1:{server.getsockname()[1]}")
        refusing.join()
    return done


def test_a_refusal_that_breaks_off_is_exit_code_5() -> None:
    """A worker that ends in the middle of its answer does not answer, also where that would have been a no."""
    done = refused_with(b"HTTP/1.1 404 Not Found\r\nContent-Length: 100\r\n\r\n{")
    assert "does not answer" in line_of(done, 5)


@pytest.mark.parametrize("page", [b"<!DOCTYPE HTML>\n<html>\n", b'{"detail":"no such path"}'])
def test_a_server_that_is_no_worker_is_told_from_one(page: bytes) -> None:
    """In one line, whatever page it answers with, and with what to look at."""
    line = line_of(refused_with(b"HTTP/1.1 404 Not Found\r\nContent-Length: %d\r\n\r\n%s" % (len(page), page)), 1)
    assert line.endswith(
        "the worker refused the question: 404 Not Found. Check that this is the read API of a worker of this version."
    )


def test_wrong_usage_is_exit_code_2() -> None:
    """An unknown option, an order of days that makes no sense, a position that is none."""
    for words in (
        ("usage", WORKSPACE, "--colour"),
        ("usage", WORKSPACE, "--from", "2026-02-01", "--to", "2026-01-01"),
        ("dead-letters", "show", "nowhere"),
        ("explain", "nothing"),
        ("demo", "--for", "soon"),
        ("demo", "--for", "²"),
        ("usage", WORKSPACE, "--url", "notaurl"),
        ("usage", WORKSPACE, "--url", "http://[::1"),
        ("usage", WORKSPACE, "--url", "http://ada:secret@127.0.0.1:8620"),
        ("balance", WORKSPACE, "--as-of", "0001-01-01T00:00+23:59"),
        ("balance", WORKSPACE, "--home", __file__),
        ("estimate", WORKSPACE, "find_work_email", "--table", "tbl_1"),
        ("alerts", "resend", str(uuid4())),
    ):
        done = creditstream(*words)
        assert (done.code, done.out) == (2, ""), done
        assert "Traceback" not in done.err
        assert "unexpected" not in done.err
    assert "CREDITSTREAM_WEBHOOK_ENDPOINTS" in done.err


def test_a_home_that_is_a_file_is_no_riddle() -> None:
    """Also where it comes from the environment; what needs no home does not care."""
    home = {"home": __file__}
    assert creditstream("balance", WORKSPACE, settings=home).code == 2
    assert creditstream("rules", "show", "find_work_email", settings=home).code == 0


def test_a_home_of_nobody_is_one_line() -> None:
    """Of a user who does not exist."""
    assert "~nobody-here/x is not a directory" in line_of(creditstream("top", "--home", "~nobody-here/x"), 1)


def test_help_begins_with_where_to_start() -> None:
    """Commands stand in groups, however the program is called."""
    program = Path(sys.executable).with_name("creditstream")
    for called in ([program], [sys.executable, "-m", "creditstream"]):
        help_text = subprocess.run([*called, "--help"], capture_output=True, text=True, cwd=ROOT).stdout
        groups = re.findall("^╭─ ([A-Z][a-z ]+?) ─", help_text, re.MULTILINE)
        assert groups == [
            "Options",
            "Start here",
            "Ask",
            "Check before running",
            "Get alerts",
            "Plans and credits",
            "Send",
            "Operate",
        ]


def test_help_that_nobody_reads_ends_quietly() -> None:
    """As any other output."""
    script = f"{sys.executable} -m creditstream --help | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "words", [("rules", "list"), ("rules", "list", "--format", "json"), ("rules", "check"), ("usage", "--help")]
)
def test_a_reader_that_has_gone_ends_it_quietly(words: tuple[str, ...]) -> None:
    """A closed pipe, or a standard output that was closed from the start, is no failure; a full disk is one line."""
    catalogue = str(ROOT / "schemas" / "catalogues" / "2026-07.toml")
    command = shlex.join([sys.executable, "-m", "creditstream", *words, *[catalogue] * (words[-1] == "check")])

    def shell(redirected: str) -> Finished:
        script = f"{command} {redirected}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment())
        return Finished(done.returncode, done.stdout, done.stderr)

    assert shell("| true") == (0, "", "")
    assert shell(">&-") == (0, "", "")
    assert "the output cannot be written: No space left on device" in line_of(shell("> /dev/full"), 1)


def test_an_answer_that_nobody_reads_keeps_its_exit_code(settings: dict[str, str | int]) -> None:
    """A no that a script does not read is still a no, and a failure is one where nobody hears of it."""

    def code(words: str, redirected: str) -> int:
        script = f"{sys.executable} -m creditstream {words} {redirected}; exit ${{PIPESTATUS[0]}}"
        return subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment(**settings)).returncode

    for redirected in ("| true", "2>&1 | true", "2> /dev/full > /dev/null"):
        assert code(f"check {WORKSPACE} nobody_priced_this", redirected) == 3
        assert code("balance ws_nobody", redirected) == 4


def test_what_is_said_beside_an_answer_decides_nothing(settings: dict[str, str | int], tmp_path: Path) -> None:
    """With a log on a full disk a command does all that it does, and ends as it does: a grant that was sent and ended
    with an error would be granted twice.
    """
    run = cell_run(workspace_id="ws_full")
    (tmp_path / "runs").write_bytes(encode_run(run))
    words = shlex.join([sys.executable, "-m", "creditstream", "send", str(tmp_path / "runs"), "--wait"])
    done = subprocess.run(
        ["bash", "-c", f"{words} 2> /dev/full"],
        capture_output=True, text=True, cwd=ROOT, env=environment(**settings),
    )  # fmt: skip
    assert (done.returncode, str(run.run_id) in done.stdout) == (0, True)


@pytest.mark.parametrize("redirected", ["2>&-", "2> /dev/full"])
@pytest.mark.parametrize(
    ("words", "code"), [("rules show nobody", 4), ("no-such-command", 2), ("notifier --endpoints nowhere", 1)]
)
def test_without_a_standard_error_it_says_nothing_elsewhere(words: str, code: int, redirected: str) -> None:
    """As a daemon may be started: standard output is for answers, which a program reads, and a log is not needed."""
    script = f"{sys.executable} -m creditstream {words} {redirected}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert (done.returncode, done.stdout) == (code, "")


def test_a_standard_input_that_was_closed_is_empty() -> None:
    """And is said to be."""
    script = f"{sys.executable} -m creditstream send - <&-"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert "nothing was sent: the input is empty" in line_of(Finished(done.returncode, done.stdout, done.stderr), 1)


def test_a_listener_that_nobody_reads_receives_nothing() -> None:
    """Its sender hears no yes, and so tries again."""
    command = [sys.executable, "-m", "creditstream", "listen", "--port", "0", "--secret-env", "HOOK_SECRET"]
    hooks = {**environment(), "HOOK_SECRET": new_secret()}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=hooks
    ) as listener:
        assert listener.stdout
        assert listener.stderr
        found = re.search(r"http://\S+", listener.stderr.readline())
        listener.stdout.close()
        assert found
        key = parse_secret(hooks["HOOK_SECRET"])
        answer = send_test(Endpoint("one", Address.parse(found[0], True), (key,), allow_private=True))

        assert (answer.status, listener.wait(WAIT_S_MAX)) == (0, 0)


def test_words_that_are_not_utf8_are_wrong_usage(tmp_path: Path) -> None:
    """A name that no event can carry is told as it was typed, whatever would have choked on it; a file may have it."""
    odd = os.fsdecode(b"ws_\xff")
    for words in (
        ("balance", odd, "--url", "http://127.0.0.1:1"),
        ("balance", odd, "--home", str(tmp_path)),
        ("plan", "set", odd, "20k"),
    ):
        done = creditstream(*words, settings={"home": str(tmp_path)})
        assert (done.code, done.out) == (2, ""), done
        assert done.err.endswith("Error: 'ws_\\udcff' is not UTF-8.\n"), done
    (tmp_path / odd).write_bytes(b"")
    assert "is not UTF-8" not in creditstream("send", str(tmp_path / odd), settings={"home": str(tmp_path)}).err


def test_a_home_whose_kafka_has_ended_names_the_command_that_starts_it(tmp_path: Path) -> None:
    """At once, and as it is called here: after the demo nobody has a Kafka of his own."""
    (tmp_path / "kafka").mkdir()

    for words in (("send", "-"), ("grant", WORKSPACE, "5"), ("reconcile",), ("alerts", "deliveries"), ("worker",)):
        done = creditstream(*words, "--home", str(tmp_path), stdin=encode_run(EMAIL).decode())

        called = f"`{shlex.quote(sys.executable)} -m creditstream worker --home {tmp_path} --embedded`"
        assert (
            f"Kafka is not running: the one in {tmp_path} ends with its worker. {called} starts it again; for"
            in line_of(done, 5)
        )


def test_an_event_that_is_wrong_is_refused_before_kafka_is_looked_for(tmp_path: Path) -> None:
    """Nobody starts a Kafka to be told what was typed wrongly."""
    (tmp_path / "kafka").mkdir()

    done = creditstream("grant", WORKSPACE, "0", "--home", str(tmp_path))

    assert (done.code, "`credits` must be more than 0" in done.err) == (2, True), done


def test_a_home_whose_kafka_starts_is_told_of_as_such(tmp_path: Path) -> None:
    """Whoever was told to start it would find the home in use."""
    (tmp_path / "kafka").mkdir()

    with Home.at(tmp_path).hold():
        line = line_of(creditstream("grant", WORKSPACE, "5", "--home", str(tmp_path)), 5)

    assert f"Kafka is not running yet: process {os.getpid()} holds {tmp_path}: a worker that is starting, or" in line
    assert line.endswith("Try again in a few seconds.")


def test_commands_are_named_as_the_program_was_called(tmp_path: Path) -> None:
    """By its path where it is not on the PATH, by its name where it is."""
    program = Path(sys.executable).with_name("creditstream")
    inherited = environment(home=str(tmp_path))

    def said(command: Path | str, path: str) -> str:
        done = subprocess.run([command, "top"], capture_output=True, text=True, env=inherited | {"PATH": path})
        return done.stderr

    assert f"`{program} demo`" in said(program, "/usr/bin:/bin")
    assert "`creditstream demo`" in said(program, f"{program.parent}:/usr/bin:/bin")


def test_a_command_that_is_suggested_asks_the_same_home(settings: dict[str, str | int]) -> None:
    """It is typed as it was printed, in a shell that knows of no home; a command without the option is left alone."""
    home = str(settings["home"])
    elsewhere = {name: value for name, value in settings.items() if name != "home"}

    text = creditstream("usage", WORKSPACE, "--home", home, settings=elsewhere)
    (next_step,) = re.findall("^More: `(.*)`$", text.out, re.MULTILINE)
    more = subprocess.run(shlex.split(next_step), capture_output=True, text=True, cwd=ROOT, env=environment())

    assert str(EMAIL.run_id) in more.stdout, more
    refused = creditstream("estimate", WORKSPACE, "nobody_priced_this", "--home", home, settings=elsewhere)
    assert line_of(refused, 4).endswith("-m creditstream rules list`.")


def test_a_command_that_is_suggested_asks_the_same_worker(
    worker: WorkerProcess, settings: dict[str, str | int]
) -> None:
    """Whoever names a worker by its address goes on to ask that one."""
    text = creditstream("usage", WORKSPACE, "--url", worker.home.worker().api_url)  # type: ignore[union-attr]
    (next_step,) = re.findall("^More: `(.*)`$", text.out, re.MULTILINE)
    more = subprocess.run(shlex.split(next_step), capture_output=True, text=True, cwd=ROOT, env=environment())

    assert str(EMAIL.run_id) in more.stdout, more


def test_a_command_that_is_suggested_takes_a_workspace_for_no_option(
    worker: WorkerProcess, settings: dict[str, str | int]
) -> None:
    """A workspace may have any name."""
    run = cell_run("-w")
    worker.produce([event_of(run)])
    worker.wait_until_metered()
    home = ("--home", str(settings["home"]))
    elsewhere = {name: value for name, value in settings.items() if name != "home"}
    for words in (("usage", *home, "--", "-w"), ("explain", str(run.run_id), *home), ("statement", *home, "--", "-w")):
        text = creditstream(*words, settings=elsewhere)
        (next_step,) = re.findall("`(.*)`$", text.out, re.MULTILINE)
        more = subprocess.run(shlex.split(next_step), capture_output=True, text=True, cwd=ROOT, env=environment())
        assert more.returncode == 0, (next_step, more)


@pytest.mark.parametrize("name", ["ws 1", "a\nb", "\x1b[31m it's \\", "\x85\u200b\U000e0001 é", "-\t"])
def test_a_name_is_suggested_as_a_shell_reads_it(name: str) -> None:
    """What cannot be seen in it, too: as an escape that bash and zsh undo, since a line for people has nothing else."""
    shown = terminal.printable(terminal.argument(name))
    script = f"printf '%s\\0' {shown}"
    read = subprocess.run(["bash", "-c", script], capture_output=True, env={"LC_ALL": "C.UTF-8"}, check=True).stdout
    assert read.decode().split("\0")[-2] == name


def test_a_command_that_has_an_argument_of_that_name_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`alerts test` takes the URL of a receiver, and no worker's."""
    monkeypatch.setitem(terminal._kept, "url", "--url http://worker.example")
    assert terminal.suggested("alerts test URL").endswith("creditstream alerts test URL")


def test_the_default_home_is_not_repeated(tmp_path: Path) -> None:
    """However it is spelled, nor that of the environment, which the next command has, too; another one is."""

    def said(home: Path | str, **known: str) -> str:
        words = [sys.executable, "-m", "creditstream", "top", "--home", home]
        inherited = environment() | {"PYTHONPATH": str(ROOT)} | known
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=inherited).stderr

    for home in (".creditstream", tmp_path / ".creditstream"):
        assert "creditstream demo` or" in said(home)
    assert "creditstream demo` or" in said("my home", CREDITSTREAM_HOME="my home")
    assert "creditstream demo --home 'my home'` or" in said("my home")
    assert "creditstream worker --home 'my home' --embedded`" in said("my home")


def test_a_home_without_a_ledger_is_one_line(tmp_path: Path) -> None:
    """It says how to begin."""
    line = line_of(creditstream("usage", WORKSPACE, settings={"home": str(tmp_path)}), 1)

    assert "creditstream demo" in line


def test_nobody_is_told_to_end_a_worker_that_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It holds its home for seconds before it answers."""
    monkeypatch.setattr("creditstream.home.COMMAND_WAIT_S", 0.1)
    monkeypatch.setattr(terminal, "_kept", {})
    monkeypatch.setattr("sys.argv", ["creditstream", "balance", WORKSPACE, "--home", str(tmp_path)])
    home = Home.at(tmp_path)
    home.ledger.mkdir()
    with home.hold(), pytest.raises(SystemExit) as end:
        main()

    assert end.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"process {os.getpid()} holds it: a worker that is starting, or another command. Try again" in line


def test_a_worker_that_cannot_start_shows_its_trace_when_asked(tmp_path: Path) -> None:
    """As every other command."""
    done = creditstream("worker", settings={"home": str(tmp_path), "catalogue_dir": "/nowhere", "debug": 1})

    assert done.code == 1
    assert "Traceback" in done.err


def test_a_wrong_host_is_not_blamed_on_the_port() -> None:
    """Whoever sets an address that is none, or an IPv6 one, reads which setting it is."""
    for host in ("::1", "192.0.2.1"):
        with pytest.raises(Problem, match="CREDITSTREAM_API_HOST"):
            listen(host, 0)


def test_who_has_no_plan_is_promised_nothing() -> None:
    """Its next period has no credits either."""
    asked: dict[str, Any] = {"workspace_id": "ws_1", "action": "enrich_person", "cells": 1, "own_api_key": False}
    at = datetime(2026, 1, 1, tzinfo=UTC)
    found = SpendCheck(
        **asked, allowed=False, reason="unknown_plan", credits="1", pool="enrichment", remaining=None,
        state="unknown_plan", period_end=at.date(), as_of=at,
    )  # fmt: skip
    assert told(found) == "no: ws_1 has no plan yet (unknown_plan)"


def test_help_loads_nothing_heavy() -> None:
    """A producer's machine has neither Faust nor ClickHouse, and nobody waits for help."""
    script = """
import sys
from creditstream.cli.commands import cli
def show(command, *words):
    cli.main([*words, "--help"], standalone_mode=False)
    for name, below in getattr(command, "commands", {}).items():
        show(below, *words, name)
show(cli)
heavy = {"faust", "mode", "chdb", "clickhouse_connect", "pyarrow", "numpy", "litestar", "confluent_kafka"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)

    assert done.stderr == "[]\n"
    assert done.stdout.count("Usage") > 12


def test_the_demo_closes_its_books_and_its_next_step_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds of everything for real: exit code 0, and the explain command that it prints explains. It touches no
    ledger, catalogue or plans but its own, whatever the environment names, and asks nobody's proxy.
    """
    home = tmp_path / "home"
    production: dict[str, str | int] = {
        "ledger_url": "http://127.0.0.1:1/production", "catalogue_dir": "/nowhere", "plans_dir": "/nowhere"
    }  # fmt: skip
    with monkeypatch.context() as proxied:
        proxied.setenv("http_proxy", "http://127.0.0.1:1")
        proxied.delenv("no_proxy", raising=False)
        proxied.delenv("NO_PROXY", raising=False)
        done = creditstream(
            "demo", "--for", "5s", "--rate", "300", "--home", str(home), settings=production, seconds=120
        )

    assert done.code == 0, done
    assert "The books close" in done.out
    assert "0 missing, 0 doubled" in done.out
    (next_step,) = re.findall(r"^  (.* -m creditstream explain .*)$", done.out, re.MULTILINE)
    there = environment(**production)
    explained = subprocess.run(shlex.split(next_step), capture_output=True, text=True, cwd=ROOT, env=there)
    assert explained.returncode == 0, explained
    assert explained.stdout.startswith("Charged ")


def test_ctrl_c_while_a_class_is_made_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As while the modules of the command line load: Python 3.11 makes a RuntimeError of it there."""

    def run() -> int:
        raise RuntimeError("Error calling __set_name__") from KeyboardInterrupt()

    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(SystemExit) as end:
        main()
    assert (end.value.code, capsys.readouterr().err) == (130, "creditstream: interrupted\n")


@pytest.mark.parametrize("ready", [False, True], ids=["while it starts", "while it runs"])
def test_ctrl_c_ends_the_demo_in_one_line(tmp_path: Path, ready: bool) -> None:
    """Within seconds, with exit code 130, without a line of Kafka's client, and no process is left."""
    command = [sys.executable, "-m", "creditstream", "demo", "--home", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    ) as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if line.startswith("ready: " if ready else "Apache Kafka"):
                break
        time.sleep(1)
        demo.send_signal(signal.SIGINT)
        _, err = demo.communicate(timeout=WAIT_S_MAX)

    assert (demo.returncode, err.strip()) == (130, "creditstream: interrupted")
    left = [process.info["cmdline"] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in left if str(tmp_path) in " ".join(words or ())]
