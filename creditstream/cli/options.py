"""The options that commands share, and the one way in which a table leaves the program."""

import csv
import os
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
import orjson
import rich_click as click

from schemas import account
from streams.settings import Settings, read_settings

F = TypeVar("F", bound=Callable[..., Any])

FORMATS = ("text", "json", "csv")


def home_option(command: F) -> F:
    """``--home``: which installation."""
    return click.option("--home", metavar="DIR", help="Directory of all embedded state [CREDITSTREAM_HOME].")(command)


def source_options(command: F) -> F:
    """``--home`` and ``--url``: whom to ask."""
    url = click.option("--url", metavar="URL", default="", help="A worker's read API, when it is not the home's.")
    return home_option(url(command))


def format_option(command: F) -> F:
    """``--format``: text for people, json and csv for programs."""
    return click.option("--format", "form", type=click.Choice(FORMATS), default="text", help="How to print it.")(
        command
    )


def settings_of(home: str | None = None, **flags: str | int | None) -> Settings:
    """The settings with these flags on top; a running worker's Kafka wins over the default."""
    from creditstream.home import Home

    settings = read_settings(os.environ, home=str(Home.at(home).path), **flags)
    worker = Home.at(settings.home).worker()
    if worker and "kafka_bootstrap" not in flags:
        settings = msgspec.structs.replace(settings, kafka_bootstrap=worker.kafka_bootstrap)
    return settings


def show_rows(rows: Sequence[msgspec.Struct], form: str, columns: Sequence[str], nothing: str) -> None:
    """Print a table: ``columns`` of each row. ``nothing`` is what people read when there is no row."""
    values = [msgspec.to_builtins(row) for row in rows]
    if form == "json":
        sys.stdout.buffer.write(orjson.dumps(values, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
        return
    if form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows([[_plain(value.get(column, "")) for column in columns] for value in values])
        return
    if not rows:
        click.echo(nothing)
        return
    _print_table(values, columns)


def show_record(record: msgspec.Struct) -> None:
    """Print one object as JSON."""
    value = msgspec.to_builtins(record)
    sys.stdout.buffer.write(orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))


def _print_table(values: list[dict[str, Any]], columns: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = all(_is_number(value.get(column, "")) for value in values)
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for value in values:
        table.add_row(*(Text(_plain(value.get(column, ""))) for column in columns))
    console = Console()
    console = console if console.is_terminal else Console(width=200)
    console.print(table)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and value.replace(".", "").lstrip("-").isdigit())


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else f"{value}"


class Instant(click.ParamType):
    """A time as people type it: ``2026-01-15T14:00:00Z``, or a UTC day, or without an offset: UTC."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Aware, in UTC."""
        if isinstance(value, datetime):
            return value
        try:
            instant = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time; write 2026-01-15T14:00:00Z or 2026-01-15.", param, ctx)
        return instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)


class Credits(click.ParamType):
    """Credits as people type them: ``500`` or ``0.5``; passed on as text, exact."""

    name = "CREDITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, where it is an amount that an event can carry."""
        try:
            return msgspec.convert(value, account.Credits)
        except msgspec.ValidationError:
            self.fail(f"{value!r} is no amount; write 500 or 0.5, with at most 3 decimals.", param, ctx)


def as_of_option(command: F) -> F:
    """``--as-of``: what the ledger knew at an instant."""
    return click.option("--as-of", type=Instant(), help="What the ledger knew then, instead of now.")(command)


def utc(instant: datetime) -> str:
    """A time as people read it: ``2026-11-22 12:03:10 UTC``."""
    return f"{instant:%Y-%m-%d %H:%M:%S} UTC"
