"""Events that could not be metered: what there is, one with its bytes, and how it is sent again."""

import rich_click as click

from creditstream.asking import ask
from creditstream.cli.options import (
    format_option,
    kafka_settings_of,
    limit_option,
    record_format_option,
    source_options,
)
from creditstream.cli.tables import show_record, show_rows, utc
from creditstream.cli.terminal import say
from creditstream.home import settings_of
from schemas.answers import DeadLetter
from schemas.ledger import DEAD_LETTER_REASONS, REDRIVABLE_REASONS, Kind, Position, Reason
from schemas.problem import Problem

LETTER_COLUMNS = ("position", "recorded_at", "reason", "detail", "workspace_id", "raw_bytes", "closed_by")


@click.group("dead-letters")
def dead_letters() -> None:
    """Dead letters: events that could not be metered, kept byte for byte."""


@dead_letters.command("list")
@click.option(
    "--reason",
    type=click.Choice([str(reason) for reason in DEAD_LETTER_REASONS]),
    help="Only letters with this reason.",
)
@limit_option(50)
@click.option("--open", "only_open", is_flag=True, help="Only letters not yet sent again.")
@source_options
@format_option
def list_letters(reason: str | None, limit: int, only_open: bool, home: str, url: str, form: str) -> None:
    """List the newest dead letters. `closed_by` is where one was sent again.

    Example: `creditstream dead-letters list --reason malformed`
    """
    with ask(settings_of(home), url) as answers:
        letters = answers.dead_letters(reason or "", limit, only_open)
    show_rows(letters, form, DeadLetter.__struct_fields__, "No dead letters.", read=LETTER_COLUMNS, limit=limit)


@dead_letters.command("show")
@click.argument("position")
@source_options
@record_format_option
def show_letter(position: str, home: str, url: str, form: str) -> None:
    """Show one dead letter with its bytes.

    Example: `creditstream dead-letters show 'cell-runs[3]@88123'`
    """
    place = _place(position)
    with ask(settings_of(home), url) as answers:
        letter = answers.dead_letter(place)
    show_record(
        letter,
        form,
        f"{letter.position} was set aside as {letter.reason}: {letter.detail}",
        "",
        f"  received   {utc(letter.recorded_at)}",
        f"  key        {letter.raw_key or '-'}",
        f"  headers    {letter.raw_headers or '-'}",
        f"  sent again {letter.closed_by or '-'}",
        f"  value      {letter.raw_bytes:,} bytes",
        "",
        *letter.raw.split("\n"),
    )


@dead_letters.command("redrive")
@click.argument("positions", nargs=-1, metavar="[POSITION]...")
@click.option(
    "--reason",
    type=click.Choice([str(reason) for reason in REDRIVABLE_REASONS]),
    help="All open letters with this reason, oldest first.",
)
@limit_option(1000, "With --reason: at most this many letters.")
@source_options
def redrive_letters(positions: tuple[str, ...], reason: str | None, limit: int, home: str, url: str) -> None:
    """Send dead letters again once you have fixed their cause, and wait for the result.

    Exit 1 if one is set aside again: it is then a new letter, and the old one is closed.

    Example: `creditstream dead-letters redrive --reason unknown_action`
    """
    if bool(positions) == bool(reason):
        raise click.UsageError("Give either positions or --reason.")
    from creditstream.redriving import redrive

    places = dict.fromkeys(_place(position) for position in positions)  # each once, however often it is named
    settings = kafka_settings_of(home)
    with ask(settings, url) as answers:
        letters = (
            answers.parked_events([Reason(reason)], limit)
            if reason
            else [answers.parked_event(place) for place in places]
        )
        if not letters:
            say(f"No open dead letters: {reason}.")
            return
        sent = redrive(settings, answers, letters)
    for letter, (place, row) in zip(letters, sent, strict=True):
        say(f"{letter.position} -> {place}  {row.kind}, {row.reason}  {row.detail}".rstrip())
    say(f"sent {len(letters):,} again; `creditstream dead-letters list --open` shows what is left", err=True)
    if aside := sum(row.kind == Kind.DEAD_LETTER for _, row in sent):
        why = f"{aside:,} of {len(sent):,}, see above"
        raise Problem("dead letters were set aside again", why, "Fix the cause first.")


def _place(position: str) -> Position:
    try:
        return Position.parse(position)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
