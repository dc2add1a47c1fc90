"""How answers leave the program: tables and records, as text for people, as JSON and CSV for programs."""

import csv
import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import msgspec
import orjson

from creditstream.cli.terminal import printable, say, write
from schemas.credits import Millicredits, group_credits, parse_credits
from schemas.limits import State

if TYPE_CHECKING:
    from rich.table import Table

Bar = tuple[Millicredits, Millicredits]
"""A part and its whole."""


def show_rows(
    rows: Sequence[msgspec.Struct],
    form: str,
    columns: Sequence[str],
    nothing: str,
    *,
    read: Sequence[str] = (),
    limit: int | None = None,
    bars: Sequence[Bar] = (),
) -> None:
    """Print a table: ``columns`` of each row, of which people ``read`` some, or (empty) all. ``nothing`` is what they
    read when there is no row; at the ``limit`` of a list they read that there may be more. On a terminal with room for
    it each row is followed by its bar.
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
        _print_table(rows, [name for name in read or columns if name not in RARE or _says(rows, name)], bars)
        if len(rows) == limit:
            say("", f"--limit {limit} is reached: there may be more.")


def show_record(record: msgspec.Struct, form: str, *lines: str) -> None:
    """Print one object: as JSON, or what people read of it."""
    if form == "json":
        write(_json(record))
    else:
        say(*lines)


def _json(value: Any) -> str:
    return orjson.dumps(msgspec.to_builtins(value), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


WIDTH_MAX = 100_000
"""Of a table, in characters: more than any has."""
AMOUNTS = frozenset({
    "credits", "credits_reference", "used", "allowance", "remaining", "overage",
    "opening", "granted", "debited", "reversed", "expired", "closing", "remaining_below",
})  # fmt: skip
"""Columns that hold credits, which people read in groups of three digits."""
RARE = frozenset({"remaining_below", "overage", "thresholds", "runs_out_on"})
"""Columns that people read only where they say something."""
STATE_COLOURS: Mapping[str, str] = {
    State.OK: "green", State.WARNING: "yellow", State.EXHAUSTED: "red", State.UNKNOWN_PLAN: "dim",
}  # fmt: skip
BAR_WIDTH = 20
BAR_COLOUR = "cyan"


def _says(rows: Sequence[msgspec.Struct], column: str) -> bool:
    return any(getattr(row, column) not in (None, "0", []) for row in rows)


def _print_table(rows: Sequence[msgspec.Struct], columns: Sequence[str], bars: Sequence[Bar]) -> None:
    """A line for each row; on a terminal that is too narrow for it, a line for each field that says something: what is
    folded can neither be read nor copied.
    """
    from rich.console import Console

    cells = [[printable(_read(column, getattr(row, column))) for column in columns] for row in rows]
    screen, text = Console(), io.StringIO()
    table = _table(rows, columns, cells)
    width = Console(file=text, width=WIDTH_MAX).measure(table).maximum
    if screen.is_terminal and width > screen.width:
        names = max(map(len, columns))
        fields = (
            [f"{name:<{names}}  {said}\n" for name, said in zip(columns, row, strict=True) if said] for row in cells
        )
        write("\n".join(map("".join, fields)))
        return
    if bars and screen.is_terminal and width + 2 + BAR_WIDTH <= screen.width:
        table, width = _table(rows, columns, cells, bars), width + 2 + BAR_WIDTH
    Console(file=text, force_terminal=screen.is_terminal, width=width).print(table)
    write(text.getvalue())


def _table(
    rows: Sequence[msgspec.Struct], columns: Sequence[str], cells: Sequence[Sequence[str]], bars: Sequence[Bar] = ()
) -> "Table":
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in AMOUNTS or all(_is_count(getattr(row, column)) for row in rows)
        table.add_column(column, justify="right" if right else "left")
    drawn = [
        [ProgressBar(max(1, whole), max(0, part), BAR_WIDTH, complete_style=BAR_COLOUR, finished_style=BAR_COLOUR)]
        for part, whole in bars
    ]
    for line, bar in zip(cells, drawn or [[]] * len(cells), strict=True):
        styles = [
            STATE_COLOURS.get(cell, "") if name == "state" else "" for name, cell in zip(columns, line, strict=True)
        ]
        table.add_row(*map(Text, line, styles), *bar)
    return table


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


def utc(instant: datetime) -> str:
    """A time as people read it: ``2026-11-22 12:03:10 UTC``."""
    return f"{instant:%Y-%m-%d %H:%M:%S} UTC"
