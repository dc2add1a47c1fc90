"""What an account event means for its workspace, in sentences for whoever sent it. Pure."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from creditstream.cli.tables import grouped, utc
from creditstream.cli.terminal import argument, quoted
from schemas.answers import LedgerRow, LimitsInForce, PoolBalance
from schemas.credits import parse_credits
from schemas.ledger import Kind, Pool
from schemas.limits import State
from schemas.plan import Plan
from sinks.explain import credits_text

Pools = dict[str, PoolBalance]


class Metered(NamedTuple):
    """The event's ledger row, where the workspace's pools stood before it and after it, and its thresholds now."""

    row: LedgerRow
    before: Pools
    after: Pools
    limits: LimitsInForce


def of_plan(workspace: str, plan: Plan, since: datetime, restarts: bool, metered: Metered | None) -> list[str]:
    """A plan: what it gives, and from when on."""
    given = f"{credits_text(plan.allowance)} a billing period"
    told = [f"{workspace} has plan {plan.id}, {given}, from {utc(since)} on."]
    if restarts:
        told.append(f"A new billing period starts on {since:%Y-%m-%d}, with this allowance.")
    pool = metered.after.get(Pool.ENRICHMENT) if metered else None
    if pool and pool.period_end:
        told.append(f"The running period, to before {pool.period_end}: {_standing(pool)}.")
        told.append(f"The next one has {credits_text(parse_credits(pool.next_allowance or '0'))}.")
    elif not restarts:
        told.append(
            "A larger allowance counts from then on; a smaller one, too, on the first day of a billing period, "
            "and otherwise from the next period on."
        )
    return [*told, *_known(metered), _more(f"plan show {argument(workspace)}", metered)]


def of_grant(workspace: str, credits: str, since: datetime, metered: Metered | None) -> list[str]:
    """Premium credits."""
    granted = credits_text(parse_credits(credits), Pool.PREMIUM)
    told = f"{workspace} is granted {granted} from {utc(since)} on. Premium credits never expire."
    return [told, *_moved(metered), _more(f"grants {argument(workspace)}", metered)]


def of_reversal(workspace: str, run_id: UUID, metered: Metered | None) -> list[str]:
    """A reversed run."""
    told = f"Run {run_id} of {workspace} is reversed: what it drew is given back once, on the day of the run."
    if metered and metered.row.kind == Kind.REVERSAL:
        drawn = credits_text(-metered.row.credits, metered.row.pool)
        told = f"Run {run_id} of {workspace} is reversed: {drawn} given back, on the day of the run."
    return [told, *_moved(metered), _more(f"explain {run_id} --workspace {quoted(workspace)}", metered)]


def of_limits(workspace: str, metered: Metered | None) -> list[str]:
    """Thresholds."""
    told = told_limits(metered.limits) if metered else f"{workspace} gets these thresholds once the event is metered."
    return [told, *_known(metered), _more(f"limits show {argument(workspace)}", metered)]


def told_limits(found: LimitsInForce) -> str:
    """At what a workspace is alerted, and who said so."""
    percents = ", ".join(f"{percent} %" for percent in found.thresholds)
    left = "no absolute line"
    if found.remaining_below:
        left = f"{credits_text(parse_credits(found.remaining_below))} left if the allowance is larger"
    return (
        f"{found.workspace_id} is alerted at {percents} ({found.thresholds_by}), {left} ({found.remaining_below_by})."
    )


def _moved(metered: Metered | None) -> list[str]:
    """What is left in the pools that the event changed."""
    if not metered or _known(metered):
        return _known(metered)
    lines = []
    for name, pool in metered.after.items():
        before = _standing(metered.before[name]) if name in metered.before else "unknown"
        if before != (now := _standing(pool)):
            lines.append(f"The {name} pool before: {before}; now: {now}.")
    return lines or ["What is left is unchanged."]


def _standing(pool: PoolBalance) -> str:
    """``2,041 of 50,000 used, 47,959 left``."""
    if pool.state == State.UNKNOWN_PLAN:
        return f"{grouped(pool.used)} used, no plan"
    rest = f"{grouped(pool.remaining)} left" if pool.overage == "0" else f"{grouped(pool.overage)} over"
    return f"{grouped(pool.used)} of {grouped(pool.allowance)} used, {rest}"


def _known(metered: Metered | None) -> list[str]:
    if metered is None or metered.row.kind != Kind.DUPLICATE:
        return []
    return [f"Nothing has changed: {metered.row.detail}."]


def _more(words: str, metered: Metered | None) -> str:
    asked = f"`creditstream {words}`"
    return f"More: {asked}" if metered else f"It is on its way; {asked} shows the result."
