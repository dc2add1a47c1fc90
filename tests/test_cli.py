"""The command line, end to end: against a running worker, after it has ended, and when something is wrong."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest

from schemas.cell_run import Outcome
from schemas.codec import encode_run
from tests.worker_process import (
    ROOT,
    Event,
    Finished,
    WorkerProcess,
    cell_run,
    creditstream,
    event_of,
)

WORKSPACE: Final = "ws_0001"
EMAIL = cell_run(action="find_work_email", triggered_by="schedule", actor="ada")
RUNS: Final = [
    EMAIL,
    EMAIL,
    cell_run(action="format_date", column_id="col_2"),
    cell_run(outcome=Outcome.NO_DATA),
    cell_run(outcome=Outcome.NO_DATA, action="job_role_count"),
    cell_run(own_api_key=True),
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
        process.produce([*map(event_of, RUNS), Event(WORKSPACE.encode(), b"no JSON, and \xff no UTF-8")])
        process.start().wait_until_metered()
        yield process


def environment_of(worker: WorkerProcess) -> dict[str, str | int]:
    """The settings under which a command finds the worker's home."""
    return worker.settings | {"home": str(worker.home.path)}


@pytest.fixture
def settings(worker: WorkerProcess) -> dict[str, str | int]:
    """The settings of a command that asks the worker, which is started again when a test has ended it."""
    if not worker.is_alive:
        worker.start()
    worker.wait_until_ready()
    return environment_of(worker)


def read_json(done: Finished) -> Any:
    """The answer, when nothing went wrong: JSON on standard output and nothing else there."""
    assert done.code == 0, done
    return json.loads(done.out)


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
    assert creditstream("usage", "ws_none", settings=settings).out == "ws_none has no runs in these days.\n"
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


def test_dead_letters(settings: dict[str, str | int]) -> None:
    """The list names position and reason; the bytes are shown as they came."""
    letters = read_json(creditstream("dead-letters", "list", "--format", "json", settings=settings))
    text = creditstream("dead-letters", "list", "--reason", "malformed", settings=settings)
    (position,) = [letter["position"] for letter in letters if letter["reason"] == "malformed"]
    shown = creditstream("dead-letters", "show", position, settings=settings)
    record = read_json(creditstream("dead-letters", "show", position, "--format", "json", settings=settings))

    assert sorted(letter["reason"] for letter in letters) == ["malformed", "unknown_action"]
    assert position in text.out
    assert shown.out.endswith("no JSON, and \\xff no UTF-8\n")
    assert (record["raw_bytes"], record["raw_key"]) == (23, WORKSPACE)


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
    assert second.startswith(f"{run.run_id}  0 credits  duplicate  duplicate: a copy of the run at cli-cell-runs[")
    assert done.err.startswith("sent 2 cell runs to ")


def test_send_reports_bad_lines_and_sends_the_others(settings: dict[str, str | int]) -> None:
    """Each bad line with its number and field, the good ones sent, exit code 1."""
    good = cell_run()
    bad = encode_run(cell_run()).decode().replace('"data"', '"dat"')
    lines = f"{encode_run(good).decode()}\n\n{bad}\nno JSON\n"

    done = creditstream("send", "--wait", "-", settings=settings, stdin=lines)

    assert done.code == 1
    assert "Traceback" not in done.err
    assert "line 3: field `outcome`" in done.err
    assert "line 4: " in done.err
    assert "2 lines were not sent" in done.err
    assert done.out.startswith(f"{good.run_id}  1 credits  charged")


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


def test_a_wrong_setting_is_one_line() -> None:
    """It names the variable and its bound."""
    assert "CREDITSTREAM_EPOCH" in line_of(creditstream("config", settings={"epoch": -1}), 1)


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


def test_wrong_usage_is_exit_code_2() -> None:
    """An unknown option, an order of days that makes no sense, a position that is none."""
    for words in (
        ("usage", WORKSPACE, "--colour"),
        ("usage", WORKSPACE, "--from", "2026-02-01", "--to", "2026-01-01"),
        ("dead-letters", "show", "nowhere"),
        ("demo", "--for", "soon"),
    ):
        done = creditstream(*words)
        assert (done.code, done.out) == (2, ""), done
        assert "Traceback" not in done.err


def test_a_home_without_a_ledger_is_one_line(tmp_path: Path) -> None:
    """It says how to begin."""
    line = line_of(creditstream("usage", WORKSPACE, settings={"home": str(tmp_path)}), 1)

    assert "creditstream demo" in line


def test_help_loads_nothing_heavy() -> None:
    """A producer's machine has neither Faust nor ClickHouse, and nobody waits for help."""
    script = """
import sys
from creditstream.cli import cli
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


def test_the_demo_closes_its_books_and_its_next_step_works(tmp_path: Path) -> None:
    """Five seconds of everything for real: exit code 0, and the explain command that it prints explains."""
    home = tmp_path / "home"

    done = creditstream("demo", "--for", "5s", "--rate", "300", "--home", str(home), seconds=120)

    assert done.code == 0, done
    assert "The books close" in done.out
    assert "0 missing, 0 doubled" in done.out
    (next_step,) = re.findall(r"^  creditstream (explain .*)$", done.out, re.MULTILINE)
    explained = creditstream(*next_step.split())
    assert explained.code == 0, explained
    assert explained.out.startswith("Charged ")
