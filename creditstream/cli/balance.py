"""Questions about credits: what is left, where it went, may it run, what will it cost, who is close to a limit."""

from collections.abc import Sequence
from datetime import datetime

import rich_click as click

from creditstream.asking import ask
from creditstream.cli.options import (
    DAY,
    as_of_option,
    day_of_option,
    format_option,
    limit_option,
    record_format_option,
    source_options,
)
from creditstream.cli.tables import Bar, grouped, show_record, show_rows, utc
from creditstream.cli.terminal import argument, say
from creditstream.home import settings_of
from schemas.answers import CELLS_MAX, Estimate, PoolBalance, SpendCheck, StatementLine, TopBy, TopRow
from schemas.credits import parse_credits
from schemas.ledger import Pool
from schemas.problem import Difference
from sinks.explain import credits_text

BALANCE_COLUMNS = (
    "pool", "state", "used", "allowance", "remaining", "overage", "thresholds", "remaining_below", "plan",
    "period_start", "period_end", "runs_out_on",
)  # fmt: skip
STATEMENT_COLUMNS = ("pool", "opening", "granted", "debited", "reversed", "expired", "closing", "runs")
TOP_COLUMNS = (
    "workspace_id", "pool", "state", "used", "allowance", "remaining", "used_percent", "plan", "period_end",
    "runs_out_on",
)  # fmt: skip

_cells = click.option(
    "--cells", type=click.IntRange(1, CELLS_MAX), default=1, show_default=True, help="Number of cells to run."
)
_own_api_key = click.option("--own-api-key", is_flag=True, help="The run uses the workspace's own API key.")


@click.command()
@click.argument("workspace")
@as_of_option
@source_options
@format_option
def balance(workspace: str, as_of: datetime | None, home: str, url: str, form: str) -> None:
    """Show what a workspace has left in both pools.

    Example: `creditstream balance ws_0001 --as-of 2026-11-20`
    """
    with ask(settings_of(home), url) as answers:
        pools = answers.balance(workspace, as_of)
    show_rows(pools, form, PoolBalance.__struct_fields__, "", read=BALANCE_COLUMNS, bars=_used(pools))


def _used(pools: Sequence[PoolBalance | TopRow]) -> list[Bar]:
    return [(parse_credits(pool.used), parse_credits(pool.allowance)) for pool in pools]


@click.command()
@click.argument("workspace")
@click.option(
    "--period", type=DAY, metavar="YYYY-MM-DD", help="A UTC day in the billing period. Default: the running one."
)
@as_of_option
@source_options
@format_option
def statement(workspace: str, period: datetime | None, as_of: datetime | None, home: str, url: str, form: str) -> None:
    """Show one billing period from opening to closing balance. Exit 3 if it does not add up.

    Example: `creditstream statement ws_0001 --period 2026-11-01`
    """
    with ask(settings_of(home), url) as answers:
        lines = answers.statement(workspace, period.date() if period else None, as_of)
    if form == "text":
        say(_heading(lines[0]), "")
    show_rows(lines, form, StatementLine.__struct_fields__, "", read=STATEMENT_COLUMNS)
    wrong = [line.pool for line in lines if not line.foots]
    if wrong:
        what = f"the statement of {workspace} does not add up"
        raise Difference(what, f"pool {' and '.join(wrong)}", "Run `creditstream reconcile`.")
    if form == "text":
        days = f"--from {lines[0].period_start} --to {lines[0].period_end}"
        say("", "opening + granted - debited + reversed - expired = closing: it adds up.")
        if not as_of:  # usage goes by what the ledger knows now: other figures
            say(f"More: `creditstream usage {days} {argument(workspace)}`")


def _heading(line: StatementLine) -> str:
    state = "closed" if line.is_closed else f"running, as of {utc(line.as_of)}"
    plan = f"plan {line.plan}" if line.plan else "no plan"
    return f"{line.workspace_id}, {plan}, {line.period_start} to before {line.period_end} ({state})"


@click.command()
@click.argument("workspace")
@click.argument("action")
@_cells
@_own_api_key
@click.option(
    "--on-unknown", type=click.Choice(["allow", "deny"]), default="deny", show_default=True,
    help="Answer for a workspace without a plan.",
)  # fmt: skip
@as_of_option
@source_options
@record_format_option
@click.pass_context
def check(
    context: click.Context,
    workspace: str,
    action: str,
    cells: int,
    own_api_key: bool,
    on_unknown: str,
    as_of: datetime | None,
    home: str,
    url: str,
    form: str,
) -> None:
    """Ask whether a workspace may run an action, by the gate's rules. Exit 0: yes, 3: no.

    Example: `creditstream check ws_0001 find_work_email --cells 200`
    """
    asked = {"cells": cells, "own_api_key": own_api_key, "on_unknown": on_unknown, "as_of": as_of}
    with ask(settings_of(home), url) as answers:
        found = answers.check(workspace, action, **asked)
    show_record(found, form, told(found))
    if not found.allowed:
        context.exit(Difference.exit_code)


_BECAUSE = {
    "unknown_action": "no version of the catalogue lists {action}",
    "own_api_key": "with the workspace's own API key it costs nothing (R05)",
    "free_action": "{action} costs nothing (R04)",
    "unknown_workspace": "nothing is known of {workspace_id}",
    "unknown_plan": "{workspace_id} has no plan yet",
    "enough": "it would draw {credits} of the {remaining} {pool} credits left",
    "not_enough": "it would draw {credits}, but only {remaining} {pool} credits are left",
    "exhausted": "no {pool} credits are left",
}


def told(found: SpendCheck) -> str:
    """The answer in a line."""
    because = _BECAUSE[found.reason].format(
        action=found.action,
        workspace_id=found.workspace_id,
        credits=grouped(found.credits),
        remaining=grouped(found.remaining or "0"),
        pool=found.pool,
    )
    waits = found.period_end and not found.allowed and found.reason != "unknown_plan"
    until = f"; the next period starts on {found.period_end}" if waits else ""
    return f"{'yes' if found.allowed else 'no'}: {because}{until} ({found.reason})"


@click.command()
@click.argument("workspace")
@click.argument("action")
@_cells
@click.option("--table", "table_id", metavar="ID", default="", help="Table that holds the column.")
@click.option("--column", "column_id", metavar="ID", default="", help="Column whose history gives the expected cost.")
@_own_api_key
@as_of_option
@source_options
@record_format_option
def estimate(
    workspace: str,
    action: str,
    cells: int,
    table_id: str,
    column_id: str,
    own_api_key: bool,
    as_of: datetime | None,
    home: str,
    url: str,
    form: str,
) -> None:
    """Estimate a bulk run: worst case and expected cost, against what is left.

    Example: `creditstream estimate ws_0001 find_work_email --cells 5000 --table tbl_1 --column col_2`
    """
    if table_id and not column_id:
        raise click.UsageError("--table only narrows --column. Give --column too.")
    column = {"table_id": table_id, "column_id": column_id}
    with ask(settings_of(home), url) as answers:
        found = answers.estimate(workspace, action, cells=cells, own_api_key=own_api_key, as_of=as_of, **column)
    show_record(found, form, *_estimated(found))
    if found.warning:
        say(found.warning, err=True)


def _estimated(found: Estimate) -> list[str]:
    """The estimate as lines of text."""
    price, worst, expected = (
        credits_text(parse_credits(credits), found.pool) for credits in (found.price, found.worst_case, found.expected)
    )
    lines = [
        f"{found.action} in {found.cells:,} {'cell' if found.cells == 1 else 'cells'}, {price} each",
        "",
        f"  worst case  {worst}",
        f"  expected    {expected} ({_rests_on(found)})",
    ]
    if found.pool != Pool.NONE:  # what is free draws from none: nothing is unknown of it
        lines.append(f"  left        {'unknown' if found.remaining is None else grouped(found.remaining)}")
    return lines


def _rests_on(found: Estimate) -> str:
    if found.worst_case == "0":
        return "it is free"
    if not found.column_id:
        return "the worst case: give --table and --column to use the column's history"
    if not found.history:
        return f"the worst case: column {found.column_id} has no history of this action"
    runs = sum(share.runs for share in found.history)
    ended = ", ".join(f"{share.runs:,} {share.reason}" for share in found.history)
    return f"{runs:,} {'run' if runs == 1 else 'runs'}: {ended}"


@click.command()
@click.option(
    "--by", type=click.Choice([str(by) for by in TopBy]), default="used", show_default=True, help="Sort by this."
)
@limit_option(20, "At most this many.")
@day_of_option
@source_options
@format_option
def top(by: str, limit: int, as_of: datetime | None, home: str, url: str, form: str) -> None:
    """List the workspaces closest to a limit: most of the allowance used, or out of credits before the period ends.

    Pools without an allowance are not listed; `creditstream balance WORKSPACE` shows what they drew.

    Example: `creditstream top --by runs_out`
    """
    with ask(settings_of(home), url) as answers:
        rows = answers.top(TopBy(by), limit, as_of)
    nothing = (
        "No workspace will run out before its period ends." if by == TopBy.RUNS_OUT else "No pool has an allowance."
    )
    show_rows(rows, form, TopRow.__struct_fields__, nothing, read=TOP_COLUMNS, bars=_used(rows))
