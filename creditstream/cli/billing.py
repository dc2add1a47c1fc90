"""What billing says of a workspace: its plan, premium grants, reversals, thresholds. Each command sends one event."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import rich_click as click

from creditstream.asking import Answers, ask
from creditstream.billing import make_event, require_plan, send_event, wait_until_metered
from creditstream.cli.consequence import Metered, Pools, of_grant, of_limits, of_plan, of_reversal, told_limits
from creditstream.cli.options import (
    Credits,
    F,
    Instant,
    as_of_option,
    format_option,
    kafka_settings_of,
    record_format_option,
    source_options,
)
from creditstream.cli.tables import show_record, show_rows
from creditstream.cli.terminal import say
from creditstream.home import settings_of
from schemas.account import AccountEvent
from schemas.answers import GrantRow, PlanRow
from schemas.problem import Problem, UnknownId

PLAN_COLUMNS = ("effective_at", "plan", "allowance", "in_force", "restart_period", "recorded_at")
GRANT_COLUMNS = ("effective_at", "credits", "in_force", "recorded_at")


def _event_options(command: F) -> F:
    """The options of every event, and of whom to ask what became of it."""
    for option in (
        click.option("--wait", is_flag=True, help="Wait for the ledger row, and show the result."),
        click.option("--actor", metavar="NAME", help="Who makes the change."),
        click.option(
            "--event-id",
            type=click.UUID,
            metavar="UUID",
            help="Id of the event. Default: a new one.",
        ),
    ):
        command = option(command)
    return source_options(command)


@click.group()
def plan() -> None:
    """Plans: how many enrichment credits a workspace has each billing period."""


@plan.command("set")
@click.argument("workspace")
@click.argument("plan")
@click.option("--effective-at", type=Instant(), help="When it takes effect, past or future. Default: now.")
@click.option("--restart-period", is_flag=True, help="Start a new billing period on that UTC day.")
@_event_options
def set_plan(
    workspace: str, plan: str, effective_at: datetime | None, restart_period: bool, home: str, **sent: Any
) -> None:
    """Give a workspace a plan.

    A larger plan counts at once, a smaller one from the next period on. To cancel, set a plan with allowance 0.

    Example: `creditstream plan set ws_0001 50k --effective-at 2026-11-26T10:00:00Z --wait`
    """
    since = effective_at or datetime.now(UTC)
    chosen = require_plan(settings_of(home), plan, since)
    fields = {"plan": plan, "effective_at": since, "restart_period": restart_period or None}
    metered = _send("plan_changed", workspace, home, fields, **sent)
    say(*of_plan(workspace, chosen, since, restart_period, metered), err=True)


@plan.command("show")
@click.argument("workspace")
@as_of_option
@source_options
@format_option
def show_plan(workspace: str, as_of: datetime | None, home: str, url: str, form: str) -> None:
    """List the plans of a workspace in the order they take effect.

    Example: `creditstream plan show ws_0001`
    """
    with ask(settings_of(home), url) as answers:
        rows = answers.plans(workspace, as_of)
    nothing = f"{workspace} has no plan: its balance is unknown_plan."
    show_rows(rows, form, PlanRow.__struct_fields__, nothing, read=PLAN_COLUMNS)


@click.command()
@click.argument("workspace")
@click.argument("credits", type=Credits())
@click.option("--effective-at", type=Instant(), help="When it takes effect. Default: now.")
@_event_options
def grant(workspace: str, credits: str, effective_at: datetime | None, home: str, **sent: Any) -> None:
    """Add premium credits. They never expire.

    Example: `creditstream grant ws_0001 500 --actor ada`
    """
    since = effective_at or datetime.now(UTC)
    metered = _send("premium_granted", workspace, home, {"credits": credits, "effective_at": since}, **sent)
    say(*of_grant(workspace, credits, since, metered), err=True)


@click.command()
@click.argument("workspace")
@as_of_option
@source_options
@format_option
def grants(workspace: str, as_of: datetime | None, home: str, url: str, form: str) -> None:
    """List the premium grants of a workspace in the order they take effect.

    Example: `creditstream grants ws_0001`
    """
    with ask(settings_of(home), url) as answers:
        rows = answers.grants(workspace, as_of)
    nothing = f"{workspace} has no premium grants."
    show_rows(rows, form, GrantRow.__struct_fields__, nothing, read=GRANT_COLUMNS)


@click.command()
@click.argument("run_id", type=click.UUID)
@click.option("--workspace", required=True, metavar="ID", help="Workspace of the run.")
@_event_options
def reverse(run_id: UUID, workspace: str, home: str, **sent: Any) -> None:
    """Reverse a run: give back what it drew, once, on the day of the run.

    Example: `creditstream reverse 0199b2c4-7d1e-7a30-9f00-5c2f6e0a1b22 --workspace ws_0001`
    """
    metered = _send("run_reversed", workspace, home, {"run_id": run_id}, **sent)
    say(*of_reversal(workspace, run_id, metered), err=True)


@click.group()
def limits() -> None:
    """Thresholds: when a workspace is alerted that its credits run low."""


@limits.command("set")
@click.argument("workspace")
@click.option(
    "--threshold",
    "thresholds",
    type=click.IntRange(1, 100),
    multiple=True,
    help="Percent of the allowance; of premium, of the newest grant. Repeatable.",
)
@click.option("--remaining-below", type=Credits(), help="Also alert when no more than this remains.")
@click.option("--plan-default", is_flag=True, help="Return to the plan's thresholds.")
@_event_options
def set_limits(
    workspace: str, thresholds: tuple[int, ...], remaining_below: str | None, plan_default: bool, home: str, **sent: Any
) -> None:
    """Give a workspace its own thresholds. What you leave out comes from its plan; 100 is always included.

    Example: `creditstream limits set ws_0001 --threshold 50 --threshold 90 --remaining-below 1000`
    """
    own = bool(thresholds) or remaining_below is not None
    if own == plan_default:
        raise click.UsageError("Give --threshold or --remaining-below, or only --plan-default.")
    fields = {"thresholds": thresholds or None, "remaining_below": remaining_below}
    metered = _send("limits_changed", workspace, home, fields, **sent)
    say(*of_limits(workspace, metered), err=True)


@limits.command("show")
@click.argument("workspace")
@as_of_option
@source_options
@record_format_option
def show_limits(workspace: str, as_of: datetime | None, home: str, url: str, form: str) -> None:
    """Show a workspace's thresholds and their source: the workspace, its plan, or the default.

    Example: `creditstream limits show ws_0001`
    """
    with ask(settings_of(home), url) as answers:
        found = answers.limits(workspace, as_of)
    show_record(found, form, told_limits(found))


def _send(
    kind: str,
    workspace: str,
    home: str,
    fields: dict[str, Any],
    *,
    event_id: UUID | None,
    actor: str | None,
    wait: bool,
    url: str,
) -> Metered | None:
    """Send one event; its id and place go to standard output, for a program that may have to send it again. What
    became of it, when it is waited for.
    """
    try:
        event: AccountEvent = make_event(kind, workspace, event_id, actor=actor, **fields)
    except Problem as error:
        raise click.UsageError(str(error)) from error
    settings = kafka_settings_of(home)
    if not wait:
        _, place = send_event(settings, event)
        say(f"{event.event_id}  {place}")
        return None
    with ask(settings, url) as answers:
        before = _pools(answers, workspace)
        topic, place = send_event(settings, event)
        row = wait_until_metered(answers, topic, place)
        said = f"  {row.kind}/{row.reason}{f'  {row.detail}' if row.detail else ''}"
        say(f"{event.event_id}  {place}{said}")
        return Metered(row, before, _pools(answers, workspace), answers.limits(workspace, None))


def _pools(answers: Answers, workspace: str) -> Pools:
    """Where the pools stand; none while nothing is known of the workspace."""
    try:
        return {pool.pool: pool for pool in answers.balance(workspace, None)}
    except UnknownId:
        return {}
