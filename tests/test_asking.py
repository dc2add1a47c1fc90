"""Who answers a question: both ways are one, which no type checker sees."""

import os
import re
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from threading import Timer

import pytest
from click.testing import CliRunner

from creditstream.asking import PRICED, QUESTIONS, WorkerAnswers, ask
from creditstream.cli.commands import cli
from creditstream.home import HOLD_WAIT_S, Endpoints, Home
from schemas.problem import Problem, Unreachable
from streams.settings import Settings


def test_what_a_worker_is_asked_the_ledger_is_asked_too() -> None:
    """But for how the worker itself is."""
    asked = {name for name in vars(WorkerAnswers) if not name.startswith("_")}
    assert asked - {"status"} == QUESTIONS.keys()


@pytest.mark.parametrize("question", QUESTIONS)
def test_both_ways_take_the_same_and_give_the_same(question: str) -> None:
    """A question's arguments have the same names in the same order, and its answers the same type."""
    over_http = signature(getattr(WorkerAnswers, question))
    of_ledger = signature(getattr(import_module(QUESTIONS[question]), question))
    needed = ["client", "catalogue"] if question in PRICED else ["client"]
    named = [name for name, one in over_http.parameters.items() if one.kind != Parameter.VAR_KEYWORD]
    assert list(of_ledger.parameters)[: len(needed) + len(named) - 1] == [*needed, *named[1:]]
    assert of_ledger.return_annotation == over_http.return_annotation


def test_a_directory_without_a_ledger_is_not_called_empty(tmp_path: Path) -> None:
    """Anything else may lie in it: a mistyped home."""
    (tmp_path / "letter").touch()
    with pytest.raises(Problem, match=f"no ledger yet: {tmp_path} holds none") as refused:
        ask(Settings(home=str(tmp_path))).__enter__()
    assert "--url" in refused.value.fix, "an enrichment worker's install has no worker to start"


def test_a_worker_that_starts_meanwhile_is_asked(tmp_path: Path) -> None:
    """A command that waits for the home until its holder answers is not told to end it."""
    home = Home.at(tmp_path)
    home.ledger.mkdir()
    endpoints = Endpoints("127.0.0.1:1", "http://127.0.0.1:1", os.getpid())
    with home.hold():
        started = Timer(HOLD_WAIT_S / 3, home.publish, [endpoints])
        started.start()
        with ask(Settings(home=str(tmp_path))) as answers:
            assert isinstance(answers, WorkerAnswers)
        started.join()


def test_a_server_that_does_not_answer_is_said_in_the_transports_own_words(tmp_path: Path) -> None:
    """Without what each library on the way has wrapped around them."""
    nobody = Settings(home=str(tmp_path), ledger_url="http://127.0.0.1:1")
    line = r"^ClickHouse at 127\.0\.0\.1:1 does not answer: \[Errno \d+\] Connection refused\. Start it or set"
    with pytest.raises(Unreachable) as refused, ask(nobody):
        pass
    assert re.match(line, str(refused.value))


def test_letters_are_sent_again_through_a_worker_that_is_named(tmp_path: Path) -> None:
    """As runs and account events are sent: a dead letter is repaired where no worker runs, too."""
    words = ["dead-letters", "redrive", "cell-runs[0]@0", "--home", str(tmp_path), "--url", "http://127.0.0.1:1"]
    failed = CliRunner().invoke(cli, words).exception
    assert isinstance(failed, Unreachable)
    assert "the worker at http://127.0.0.1:1 does not answer" in str(failed)
