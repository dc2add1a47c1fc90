"""Events that could not be metered: what there is, one with its bytes, and how it is sent again."""

import rich_click as click

from creditstream.asking import ask
from creditstream.cli.options import (
    format_option,
    kafka_settings_of,
    record_format_option,
    settings_of,
    show_record,
    show_rows,
    source_options,
    utc,
)
from creditstream.cli.terminal import say
from schemas.answers import DeadLetter
from schemas.ledger import DEAD_LETTER_REASONS, Position
from schemas.problem import Problem

LETTER_COLUMNS = ("position", "recorded_at", "reason", "detail", "workspace_id", "raw_bytes", "closed_by")


@click.group("dead-letters")
def dead_letters() -> None:
    """Events that could not be metered, with their bytes. Nothing is ever dropped."""


@dead_letters.command("list")
@click.option("--reason", type=click.Choice([str(reason) for reason in DEAD_LETTER_REASONS]), help="Only these.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=50, show_default=True, help="How many, newest first.")
@click.option("--open", "only_open", is_flag=True, help="Only those that were not sent again.")
@source_options
@format_option
def list_letters(reason: str | None, limit: int, only_open: bool, home: str, url: str, form: str) -> None:
    """The newest dead letters. `closed_by` says where one was sent again.

    Example: `creditstream dead-letters list --reason malformed`
    """
    with ask(settings_of(home), url) as answers:
        letters = answers.dead_letters(reason or "", limit, only_open)
    columns = LETTER_COLUMNS if form == "text" else DeadLetter.__struct_fields__
    show_rows(letters, form, columns, "No dead letters.")


@dead_letters.command("show")
@click.argument("position")
@source_options
@record_format_option
def show_letter(position: str, home: str, url: str, form: str) -> None:
    """One dead letter, with its bytes.

    Example: `creditstream dead-letters show 'cell-runs[3]@88123'`
    """
    with ask(settings_of(home), url) as answers:
        letter = answers.dead_letter(_place(position))
    if form == "json":
        show_record(letter)
        return
    say(
        f"{letter.position} was set aside as {letter.reason}: {letter.detail}",
        "",
        f"  received   {utc(letter.recorded_at)}",
        f"  key        {letter.raw_key}",
        f"  headers    {letter.raw_headers or '-'}",
        f"  sent again {letter.closed_by or '-'}",
        f"  value      {letter.raw_bytes:,} bytes",
        "",
        *letter.raw.split("\n"),
    )


@dead_letters.command("redrive")
@click.argument("positions", nargs=-1, metavar="[POSITION]...")
@click.option("--reason", type=click.Choice([str(reason) for reason in DEAD_LETTER_REASONS]), help="All of these.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=1000, show_default=True, help="How many of them.")
@source_options
def redrive_letters(positions: tuple[str, ...], reason: str | None, limit: int, home: str, url: str) -> None:
    """Send dead letters again, once what kept them from being metered is mended.

    Example: `creditstream dead-letters redrive --reason unknown_action`
    """
    if bool(positions) == bool(reason):
        raise click.UsageError("Give positions, or --reason.")
    from creditstream.redriving import redrive, why_not

    settings = kafka_settings_of(home)
    with ask(settings, url) as answers:
        letters = (
            answers.dead_letters(reason, limit, True)
            if reason
            else [answers.dead_letter(_place(position)) for position in positions]
        )
    for letter in letters:
        if why := why_not(letter):
            raise Problem(f"{letter.position} cannot be sent again", f"{letter.reason}: {why}", "Nothing was sent.")
    places = redrive(settings, letters)
    say(*(f"{letter.position} -> {place}" for letter, place in zip(letters, places, strict=True)))
    say(f"sent {len(places):,} again; `creditstream dead-letters list --open` shows what is left", err=True)


def _place(position: str) -> Position:
    try:
        return Position.parse(position)
    except ValueError as error:
        raise click.UsageError(f"{error}.") from error
