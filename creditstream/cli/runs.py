"""Questions to the ledger: what was used, why a run cost what it cost."""

from collections.abc import Sequence
from datetime import date, datetime
from textwrap import wrap
from typing import Any, Final
from uuid import UUID

import rich_click as click

from creditstream.asking import ask
from creditstream.cli.options import DAY, format_option, limit_option, record_format_option, source_options
from creditstream.cli.tables import Bar, grouped, show_record, show_rows, utc
from creditstream.cli.terminal import argument, say
from creditstream.home import settings_of
from schemas.answers import By, EventRow, Explanation, RunRow, UsageRow
from schemas.credits import parse_credits
from schemas.ledger import DEBIT_REASONS, Kind
from sinks.explain import credits_text

FIELD_INDENT: Final = 13
"""Columns before what a field of an explanation says."""

_from_option: Final = click.option("--from", "start", type=DAY, metavar="YYYY-MM-DD", help="First UTC day.")
_to_option: Final = click.option("--to", "end", type=DAY, metavar="YYYY-MM-DD", help="Day after the last one.")


@click.command()
@click.argument("workspace")
@click.option(
    "--by", type=click.Choice([str(by) for by in By]), default="column", show_default=True, help="Group by this."
)
@_from_option
@_to_option
@click.option("--period", type=DAY, metavar="YYYY-MM-DD", help="Instead: the billing period with this UTC day.")
@source_options
@format_option
def usage(
    workspace: str,
    by: str,
    start: datetime | None,
    end: datetime | None,
    period: datetime | None,
    home: str,
    url: str,
    form: str,
) -> None:
    """Sum a workspace's credits and runs by column, table, action, day or reason.

    Example: `creditstream usage ws_0001 --by day --from 2026-11-01 --to 2026-12-01`
    """
    days = _days(start, end)
    if period and (start or end):
        raise click.UsageError("Give either --period, or --from and --to.")
    with ask(settings_of(home), url) as answers:
        if period:
            rows = answers.period_usage(workspace, By(by), period.date())
        else:
            rows = answers.usage(workspace, By(by), *days)
    columns = (*By(by).keys, "pool", "credits", "runs", "free_runs")
    nothing = f"{workspace} has no runs{' in these days' if start or end or period else ''}."
    show_rows(rows, form, columns, nothing, bars=_shares(rows))
    if rows and form == "text":
        say("", f"More: `creditstream runs {argument(workspace)}`")


def _shares(rows: Sequence[UsageRow]) -> list[Bar]:
    """What each row drew, beside the largest."""
    drawn = [parse_credits(row.credits) for row in rows]
    largest = max(drawn, default=0)
    return [(part, largest) for part in drawn]


def _days(start: datetime | None, end: datetime | None) -> tuple[date | None, date | None]:
    first, last = (day.date() if day else None for day in (start, end))
    if first and last and last <= first:
        raise click.UsageError(f"--to {last} is not after --from {first}; --to is the day after the last one.")
    return first, last


@click.command()
@click.argument("workspace")
@click.option("--table", "table_id", metavar="ID", default="", help="Only runs of this table.")
@click.option("--column", "column_id", metavar="ID", default="", help="Only runs of this column.")
@click.option("--row", "row_id", metavar="ID", default="", help="Only runs of this row.")
@click.option(
    "--reason", type=click.Choice([str(reason) for reason in DEBIT_REASONS]), help="Only runs with this reason."
)
@_from_option
@_to_option
@limit_option(20)
@source_options
@format_option
def runs(
    workspace: str,
    table_id: str,
    column_id: str,
    row_id: str,
    reason: str | None,
    start: datetime | None,
    end: datetime | None,
    limit: int,
    home: str,
    url: str,
    form: str,
) -> None:
    """List a workspace's newest runs, free ones too, with the ids that `explain` takes.

    Example: `creditstream runs ws_0001 --table tbl_1 --row row_17 --from 2026-11-03 --to 2026-11-04`
    """
    first, last = _days(start, end)
    asked = {"table_id": table_id, "column_id": column_id, "row_id": row_id, "reason": reason, "start": first,
             "end": last}  # fmt: skip
    wanted: dict[str, Any] = {name: value for name, value in asked.items() if value}
    with ask(settings_of(home), url) as answers:
        rows = answers.runs(workspace, **wanted, limit=limit)
    nothing = f"{workspace} has no such runs." if wanted else f"{workspace} has no runs."
    show_rows(rows, form, RunRow.__struct_fields__, nothing, limit=limit)


@click.command()
@click.argument("run_id", type=click.UUID)
@click.option("--workspace", metavar="ID", default="", help="Workspace of the run, if several have used its id.")
@source_options
@record_format_option
def explain(run_id: UUID, workspace: str, home: str, url: str, form: str) -> None:
    """Explain in one sentence why a run cost what it cost, with evidence.

    Example: `creditstream explain 0199b2c4-7d1e-7a30-9f00-5c2f6e0a1b22`
    """
    with ask(settings_of(home), url) as answers:
        explanation = answers.explanation(run_id, workspace)
    lines = explained(explanation)
    if form == "text":
        from rich.console import Console  # a tenth of the time that `--help` may take

        screen = Console()
        lines = folded(lines, screen.width) if screen.is_terminal else lines
    show_record(explanation, form, *lines)


def folded(lines: list[str], width: int) -> list[str]:
    """Lines of an explanation for a terminal: what is too long goes on below its field. The command at the end stays
    whole, so that it can be copied.
    """
    told = []
    for line in lines[:-1]:
        below = " " * FIELD_INDENT if line.startswith("  ") else ""
        told += wrap(line, width, subsequent_indent=below, break_long_words=False, break_on_hyphens=False) or [""]
    return [*told, lines[-1]]


def explained(run: Explanation) -> list[str]:
    """The explanation as lines of text."""
    version = f"catalogue version {run.catalogue}, price {run.price}" if run.catalogue else "no catalogue version"
    who = ", ".join(
        filter(None, [run.triggered_by and f"triggered by {run.triggered_by}", run.actor and f"by {run.actor}"])
    )
    is_parked = run.kind == Kind.DEAD_LETTER
    cell = f", table {run.table_id}, column {run.column_id}, row {run.row_id}" if run.table_id else ""
    lines = [
        run.sentence,
        "",
        f"  rule       {run.rule}: {run.rule_text}",
        f"  priced by  {version}",
        f"  when       {'' if is_parked else f'ran {utc(run.ran_at)}, '}received {utc(run.recorded_at)}",
        f"  where      workspace {run.workspace_id}{cell}",
        *([f"  who        {who}"] if who else []),
        *([f"  outcome    {run.outcome}, own API key: {'yes' if run.own_api_key else 'no'}"] if run.outcome else []),
    ]
    if run.not_free_because:
        lines.append(f"  not free   {'; '.join(run.not_free_because)}")
    if run.runs_of_this_cell > 1:
        lines.append(f"  re-runs    this cell has {run.runs_of_this_cell} runs; each is rated by itself")
    lines += _moved(run)
    lines.append("  evidence")
    lines += [f"    {_evidence(delivery, run.pool)}" for delivery in run.deliveries]
    more = (
        f"dead-letters show {argument(run.position)}"
        if is_parked
        else f"usage --by column {argument(run.workspace_id)}"
    )
    return [*lines, "", f"More: `creditstream {more}`"]


def _evidence(delivery: EventRow, pool: str) -> str:
    credits = credits_text(parse_credits(delivery.credits), pool)
    said = f"{delivery.position}  {delivery.kind}/{delivery.reason}  {credits}  {utc(delivery.recorded_at)}"
    return f"{said}  ({delivery.detail})" if delivery.detail else said


def _moved(run: Explanation) -> list[str]:
    """What the run did to the balance, and whom it alarmed."""
    lines = []
    if move := run.balance:
        terms = ""
        if move.period_start:  # neither period nor plan say anything of the premium pool
            plan = f"plan {move.plan}" if move.plan else "no plan"
            terms = f", period {move.period_start} to before {move.period_end}, {plan}"
        if move.allowance != "0" or (move.plan and terms):
            moved = f"{grouped(move.before)} -> {grouped(move.after)}"
            over = f" ({grouped(move.after[1:])} over)" if move.after.startswith("-") else ""
            balance = f"{moved} of {grouped(move.allowance)} {move.pool} credits left{over}"
        else:
            drawn = (grouped(text).removeprefix("-") for text in (move.before, move.after))
            balance = f"{' -> '.join(drawn)} {move.pool} credits drawn"
        lines.append(f"  balance    {balance}{terms}")
    if alert := run.alert:
        crossed = [f"{percent} %" for percent in alert.thresholds]
        crossed += [f"{grouped(alert.remaining_below)} left"] if alert.remaining_below else []
        lines.append(
            f"  alert      {' '.join(filter(None, [alert.kind, ', '.join(crossed)]))}, sent {utc(alert.published_at)}"
        )
    return lines
