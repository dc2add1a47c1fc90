"""From the fold to what leaves the meter: limit alerts and limit states. Pure: no I/O, no clock."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple
from uuid import UUID

from schemas.cell_run import from_milliseconds
from schemas.credits import format_credits
from schemas.ledger import Pool
from schemas.limits import FORECAST_DAYS, FORECAST_DAYS_MIN, AlertKind, AsOf, Cause, LimitAlert, LimitState
from sinks.ledger import Chain
from streams.rules.balances import Account, Notice
from streams.rules.limits import REMAINING_BELOW, Line, Standing, alert_id, alert_id_of_time
from streams.rules.periods import Day, day_of, to_date


class Source(NamedTuple):
    """The record that caused an alert; the ids are those of a run."""

    chain: Chain
    offset: int
    run_id: UUID | None = None
    table_id: str = ""
    column_id: str = ""
    action: str = ""


def alert_of(notice: Notice, source: Source | None, runs_out: Day | None) -> LimitAlert:
    """The message of one notice. ``source`` None: time alone caused it."""
    standing = notice.standing
    if source:
        chain = source.chain
        place = chain.topic_id, chain.partition, source.offset
        name = alert_id(*place, standing.terms.pool, notice.kind, notice.lines)
    else:
        name = alert_id_of_time(notice.workspace_id, standing, notice.at_ms, notice.kind)
    return LimitAlert(
        alert_id=name,
        kind=notice.kind,
        at=from_milliseconds(notice.at_ms),
        cause=notice.cause,
        position=chain.position(source.offset) if source else "",
        run_id=source.run_id if source else None,
        table_id=source.table_id if source else "",
        column_id=source.column_id if source else "",
        action=source.action if source else "",
        runs_out_on=None if runs_out is None else to_date(runs_out),
        **as_told(notice.workspace_id, standing, notice.lines),
    )


def seeded_alert(account: Account, pool: Pool, at_ms: int) -> LimitAlert:
    """What stands in a pool that is not ``ok``, told by a worker that starts without a history."""
    standing = account.standing(pool)
    kind = AlertKind.EXHAUSTED if not standing.remaining else AlertKind.CROSSED
    return LimitAlert(
        alert_id=alert_id_of_time(f"seeded/{account.name}", standing, at_ms, kind),
        kind=kind,
        at=from_milliseconds(at_ms),
        cause=Cause.TIME,
        seeded=True,
        **as_told(account.name, standing, standing.passed),
    )


def state_of(account: Account, pool: Pool, as_of: AsOf, owner: str) -> LimitState:
    """The state of one pool as its unit has it now."""
    standing = account.standing(pool)
    upcoming = standing.terms.next_allowance
    return LimitState(
        next_allowance=None if upcoming is None else format_credits(upcoming),
        as_of=as_of,
        owner=owner,
        **as_told(account.name, standing, standing.passed),
    )


def as_told(workspace_id: str, standing: Standing, lines: Sequence[Line]) -> dict[str, Any]:
    """What an alert, a state and a balance that is asked for say alike."""
    terms = standing.terms
    below = [terms.allowance - line.used_at for line in lines if line.percent == REMAINING_BELOW and terms.allowance]
    return {
        "workspace_id": workspace_id,
        "pool": terms.pool,
        "state": standing.state,
        "used": format_credits(standing.used),
        "allowance": format_credits(terms.allowance or 0),
        "remaining": format_credits(standing.remaining),
        "overage": format_credits(standing.overage),
        "thresholds": tuple(sorted(line.percent for line in lines if line.percent != REMAINING_BELOW)),
        "remaining_below": format_credits(below[0]) if below else None,
        "period_start": to_date(terms.period.start) if terms.period else None,
        "period_end": to_date(terms.period.end) if terms.period else None,
        "plan": terms.plan,
    }


def runs_out_on(account: Account, now_ms: int) -> Day | None:
    """The day on which the period's enrichment credits will be gone, at the mean of the last days, up to seven; None
    when that is not before the period's end, or when too few days tell.
    """
    period, remaining = account.period, account.enrichment.remaining
    if not remaining:
        return None
    today = day_of(now_ms)
    days = [account.used_on(day) for day in range(max(period.start, today - FORECAST_DAYS + 1), today + 1)]
    drawn = sum(days)
    if sum(day > 0 for day in days) < FORECAST_DAYS_MIN:
        return None
    last = today + int(Fraction(remaining * len(days), drawn))
    return last if last < period.end else None
