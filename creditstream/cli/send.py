"""Send cell runs by hand: for trying things, for tests of a producer, for repairs."""

import codecs
from pathlib import Path
from typing import IO

import msgspec
import rich_click as click

from creditstream.asking import ask
from creditstream.cli.options import kafka_settings_of, source_options
from creditstream.cli.terminal import say
from schemas.answers import LedgerRow
from schemas.catalogue import Catalogue
from schemas.cell_run import CellRun, to_milliseconds
from schemas.ledger import Kind, Reason
from schemas.problem import Problem
from sinks.explain import credits_text, sentence
from streams.settings import Settings


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--wait", is_flag=True, help="Wait for each debit, and print it.")
@source_options
def send(file: IO[bytes], wait: bool, home: str, url: str) -> None:
    """Send cell runs from a file of JSON lines (`-`: standard input).

    Each bad line is reported by number and field; the good ones are sent. Exit 1 if a line was bad or, with --wait, if
    a run was set aside as a dead letter.

    Example: `creditstream send --wait runs.ndjson`
    """
    runs, bad = _read(file)
    aside = _send(runs, kafka_settings_of(home), url, wait) if runs else 0
    if bad:
        them = "them" if bad > 1 else "it"
        raise Problem(
            f"{bad:,} line{'s were' if bad > 1 else ' was'} not sent",
            "see above",
            f"Correct {them} and send {them} again.",
        )
    if aside:
        why = f"{aside:,} of {len(runs):,}, see above"
        raise Problem("runs were set aside", why, "`creditstream dead-letters list --open` shows them.")
    if not runs:
        raise Problem("nothing was sent", "the input is empty", "Give one JSON object per line.")


def _read(file: IO[bytes]) -> tuple[list[CellRun], int]:
    from schemas.codec import decode_run, name_field

    runs, bad = [], 0
    for number, read in enumerate(file, 1):
        line = read if number > 1 else read.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            runs.append(decode_run(line))
        except (msgspec.MsgspecError, UnicodeError) as error:
            bad += 1
            say(f"line {number}: {name_field(str(error))}", err=True)
    return runs, bad


def _send(runs: list[CellRun], settings: Settings, url: str, wait: bool) -> int:
    """How many of them were set aside, as far as they are waited for."""
    from creditstream.awaiting import await_rows
    from creditstream.producing import Outgoing, deliver
    from schemas.codec import encode_run
    from streams.kafka.topics import CELL_RUNS, Broker

    topic = Broker(settings).require(CELL_RUNS)
    records = [Outgoing(topic.name, run.workspace_id, encode_run(run)) for run in runs]
    places = deliver(settings, records, "runs were", "Send the file again; a duplicate is never charged.")
    next_step = "" if wait else f"; `creditstream explain {runs[-1].run_id}` shows what the last one cost"
    say(f"sent {len(runs):,} cell run{'s' * (len(runs) != 1)} to {settings.kafka_bootstrap}{next_step}", err=True)
    if not wait:
        return 0
    catalogue = Catalogue.load(Path(settings.catalogue_dir))
    with ask(settings, url) as answers:
        rows = await_rows(answers, topic, places)
    say(*(_line(run, rows[place], catalogue) for run, place in zip(runs, places, strict=True)))
    return sum(rows[place].kind == Kind.DEAD_LETTER for place in places)


def _line(run: CellRun, row: LedgerRow, catalogue: Catalogue) -> str:
    found = catalogue.find(run.action, catalogue.era_at(to_milliseconds(run.ran_at)))
    action = found[1] if found else None
    told = sentence(Reason(row.reason), row.credits, row.pool, run.action, action, row.detail)
    return f"{run.run_id}  {credits_text(row.credits, row.pool)}  {row.reason}  {told}"
