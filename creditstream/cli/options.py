"""The options that commands share, and the one way in which a table leaves the program."""

import csv
import io
import os
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import msgspec
import orjson
import rich_click as click

from creditstream.cli.terminal import keep, printable, say, write
from creditstream.home import Home, settings_of
from schemas import account
from schemas.credits import group_credits, parse_credits
from schemas.problem import Unreachable
from streams.settings import Settings, variable

F = TypeVar("F", bound=Callable[..., Any])
DAY = click.DateTime(formats=["%Y-%m-%d"])


def home_option(command: F) -> F:
    """``--home``: which installation."""
    return click.option(
        "--home",
        type=click.Path(file_okay=False),
        metavar="DIR",
        envvar=variable("home"),
        callback=_keep_home,
        help=f"Directory of all embedded state [{variable('home')}].",
    )(command)


def _keep_home(_: click.Context, __: click.Parameter, home: str | None) -> str | None:
    keep("home", f"--home {shlex.quote(home)}" if home and Home.at(home) != Home.at(None) else "")
    return home


def source_options(command: F) -> F:
    """``--home`` and ``--url``: whom to ask."""
    url = click.option(
        "--url", type=Url(), default="", callback=_keep_url, help="A worker's read API, when it is not the home's."
    )
    return home_option(url(command))


def _keep_url(_: click.Context, __: click.Parameter, url: str) -> str:
    keep("url", f"--url {shlex.quote(url)}" if url else "")
    return url


def format_option(command: F) -> F:
    """``--format`` of a table: text for people, json and csv for programs."""
    return _format_of(("text", "json", "csv"))(command)


def record_format_option(command: F) -> F:
    """``--format`` of one object, which makes no table."""
    return _format_of(("text", "json"))(command)


def _format_of(forms: Sequence[str]) -> Callable[[F], F]:
    return click.option(
        "--format", "form", type=click.Choice(forms), default="text", show_default=True, help="How to print it."
    )


def kafka_settings_of(home: str | None = None) -> Settings:
    """`settings_of`, for a command that needs Kafka. Unreachable when that is the home's own, which does not run."""
    place = Home.at(home)
    if variable("kafka_bootstrap") not in os.environ and not place.worker() and place.kafka.exists():
        if pid := place.starting():
            why = f"process {pid} holds {place.path}: a worker that starts, or another command"
            raise Unreachable("Kafka does not run yet", why, "Try again in a few seconds.")
        fix = f"`creditstream worker --embedded` starts it again; for another one, set {variable('kafka_bootstrap')}."
        raise Unreachable("Kafka does not run", f"that in {place.path} ends with its worker", fix)
    return settings_of(home)


def show_rows(
    rows: Sequence[msgspec.Struct],
    form: str,
    columns: Sequence[str],
    nothing: str,
    *,
    read: Sequence[str] = (),
    limit: int | None = None,
) -> None:
    """Print a table: ``columns`` of each row, of which people ``read`` some, or (empty) all. ``nothing`` is what they
    read when there is no row; at the ``limit`` of a list they read that there may be more.
    """
    if form == "json":
        write(_json(rows))
    elif form == "csv":
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(columns)
        values = [msgspec.to_builtins(row) for row in rows]
        writer.writerows([[_plain(value.get(column, "")) for column in columns] for value in values])
        write(table.getvalue())
    elif not rows:
        say(nothing)
    else:
        shown = [name for name in read or columns if name not in RARE or any(getattr(row, name) for row in rows)]
        _print_table(rows, shown)
        if len(rows) == limit:
            say("", f"--limit {limit} is reached: there may be more.")


def show_record(record: msgspec.Struct) -> None:
    """Print one object as JSON."""
    write(_json(record))


def _json(value: Any) -> str:
    return orjson.dumps(msgspec.to_builtins(value), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


WIDTH_MAX = 100_000
"""Of a table, in characters: more than any has."""
AMOUNTS = frozenset({
    "credits", "credits_reference", "used", "allowance", "remaining", "overage",
    "opening", "granted", "debited", "reversed", "expired", "closing", "remaining_below",
})  # fmt: skip
"""Columns that hold credits, which people read in groups of three digits."""
RARE = frozenset({"remaining_below"})
"""Columns that people read only where they say something: few set an absolute line."""


def _print_table(rows: Sequence[msgspec.Struct], columns: Sequence[str]) -> None:
    """A line for each row; on a terminal that is too narrow for it, a line for each field that says something: what is
    folded can neither be read nor copied.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in AMOUNTS or all(_is_count(getattr(row, column)) for row in rows)
        table.add_column(column, justify="right" if right else "left")
    cells = [[printable(_read(column, getattr(row, column))) for column in columns] for row in rows]
    for row in cells:
        table.add_row(*map(Text, row))
    screen, text = Console(), io.StringIO()
    width = Console(file=text, width=WIDTH_MAX).measure(table).maximum
    if screen.is_terminal and width > screen.width:
        names = max(map(len, columns))
        fields = (
            [f"{name:<{names}}  {said}\n" for name, said in zip(columns, row, strict=True) if said] for row in cells
        )
        write("\n".join(map("".join, fields)))
        return
    Console(file=text, force_terminal=screen.is_terminal, width=width).print(table)
    write(text.getvalue())


def _read(column: str, value: Any) -> str:
    """A field as people read it."""
    if isinstance(value, datetime):
        return utc(value)
    if _is_count(value):
        return f"{value:,}"
    return grouped(value) if value and column in AMOUNTS else _plain(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def grouped(credits: str) -> str:
    """Credits as people read them: ``"19,998"``."""
    return group_credits(parse_credits(credits))


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
            return instant.astimezone(UTC) if instant.tzinfo else instant.replace(tzinfo=UTC)
        except (ValueError, OverflowError):  # an offset may lead out of the years that there are
            self.fail(f"{value!r} is no time; write 2026-01-15T14:00:00Z or 2026-01-15.", param, ctx)


class Url(click.ParamType):
    """Where a worker's read API is: ``http://127.0.0.1:8620``. Empty: not given."""

    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, where it is one."""
        from urllib.parse import urlsplit  # a tenth of the time that `--help` may take

        try:
            parts = urlsplit(value)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if value and not is_url:
            self.fail(f"{value!r} is no URL; write http://127.0.0.1:8620, say.", param, ctx)
        return str(value)


class Credits(click.ParamType):
    """Credits as people type them: ``500`` or ``0.5``; passed on as text, exact."""

    name = "CREDITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, where it is an amount that an event can carry."""
        try:
            return msgspec.convert(value, account.Credits)
        except msgspec.ValidationError:
            self.fail(f"{value!r} is no amount; write 500 or 0.5, at most 12 digits and 3 decimals.", param, ctx)


def as_of_option(command: F) -> F:
    """``--as-of``: what the ledger knew at an instant."""
    return _as_of("What the ledger knew then, instead of now.")(command)


def day_of_option(command: F) -> F:
    """``--as-of`` of what is asked of all workspaces at once: see `creditstream.spending.top`."""
    return _as_of("How it stood on that UTC day, by what the ledger knows now.")(command)


def _as_of(means: str) -> Callable[[F], F]:
    return click.option("--as-of", type=Instant(), help=means)


def utc(instant: datetime) -> str:
    """A time as people read it: ``2026-11-22 12:03:10 UTC``."""
    return f"{instant:%Y-%m-%d %H:%M:%S} UTC"
