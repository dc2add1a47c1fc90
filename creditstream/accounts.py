"""Plans, balances and statements: what people ask of a workspace's account, each a function over the ledger.

The ledger gives facts and sums; what they mean is decided by the pure functions that the meter folds with
(`streams.rules`: `periods`, `limits`, `balances`), so an answer and an alert cannot differ. ``as_of`` asks for what the
ledger knew at an instant; without it, for what it knows now.
"""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime
from typing import Final, NamedTuple
from uuid import UUID

import msgspec
from clickhouse_connect.driver.client import Client

from creditstream.clock import now_ms
from schemas.account import is_in_range
from schemas.answers import (
    BalanceMove,
    By,
    Explanation,
    GrantRow,
    LimitsInForce,
    PeriodRow,
    PlanRow,
    PoolBalance,
    PublishedAlert,
    StatementLine,
    UsageRow,
)
from schemas.catalogue import Catalogue
from schemas.cell_run import EARLIEST_RAN_AT, from_milliseconds, to_milliseconds
from schemas.credits import Millicredits, format_credits
from schemas.ledger import Kind, Pool
from schemas.limits import DEFAULT_THRESHOLDS
from schemas.problem import Problem, UnknownId
from sinks import account_queries, queries
from sinks.account_queries import DaySum
from sinks.accounts import facts_of
from sinks.alerts import published_alerts
from streams.rules.balances import DAYS_KEPT, METERED, Account, Opening
from streams.rules.facts import openings
from streams.rules.limits import Facts
from streams.rules.messages import as_told, runs_out_on
from streams.rules.periods import (
    DAY_MS,
    Day,
    Period,
    PlanChange,
    allowance_of,
    day_of,
    history,
    in_effect,
    in_force,
    period_of,
    to_date,
    to_day,
)

_FIRST_DAY: Final = to_day(EARLIEST_RAN_AT.date())
_ASKED_AT_MOST: Final = 5
"""How often, for a statement that foots: inserts of a chain are at least a tenth of a second apart."""


class Moment(NamedTuple):
    """An instant that is asked for. ``known_ms``: rows recorded later do not count; None: all do."""

    ms: int
    known_ms: int | None

    @property
    def day(self) -> Day:
        """Its UTC day."""
        return day_of(self.ms)


def moment(as_of: datetime | None) -> Moment:
    """``as_of``, UTC where it names no offset; or now. Problem when it lies outside of what the ledger can date."""
    if as_of is None:
        return Moment(now_ms(), None)
    aware = as_of if as_of.tzinfo else as_of.replace(tzinfo=UTC)
    if not is_in_range(aware):
        raise Problem(f"nothing is known as of {as_of}", "it is before 2020 or after 2099", "Ask for another time.")
    return Moment(to_milliseconds(aware), to_milliseconds(aware))


def facts(client: Client, workspace_id: str, at: Moment) -> Facts:
    """What account events had said of a workspace by then."""
    rows = facts_of(client, [workspace_id])
    known = [row for row in rows if at.known_ms is None or row.recorded_ms <= at.known_ms]
    return openings([workspace_id], known, [])[workspace_id].facts


def account(client: Client, workspace_id: str, at: Moment) -> Account:
    """A workspace's account as the meter would hold it. UnknownId when the ledger holds nothing of it."""
    said = facts(client, workspace_id, at)
    days = at.day - DAYS_KEPT, at.day + 2
    sums = account_queries.day_sums(client, workspace_id, days, at.known_ms)
    if said == Facts() and not sums:
        _require_known(client, workspace_id)
    opening = Opening(said, _by_day(sums), sum(one.credits for one in sums if one.pool == Pool.PREMIUM))
    return Account(workspace_id, opening, at.ms)


def _require_known(client: Client, workspace_id: str) -> None:
    if not account_queries.knows(client, workspace_id):
        raise UnknownId(f"no workspace {workspace_id!r} in the ledger", "no run and no plan names it", "Check the id.")


def _by_day(sums: Iterable[DaySum]) -> dict[Day, Millicredits]:
    days: dict[Day, Millicredits] = {}
    for one in sums:
        if one.pool == Pool.ENRICHMENT:
            days[one.day] = days.get(one.day, 0) + one.credits
    return days


def balance(client: Client, workspace_id: str, as_of: datetime | None = None) -> list[PoolBalance]:
    """Where the enrichment and the premium pool stand. UnknownId for a workspace without any run or plan."""
    at = moment(as_of)
    held = account(client, workspace_id, at)
    return [_pool_balance(held, pool, at) for pool in METERED]


def _pool_balance(held: Account, pool: Pool, at: Moment) -> PoolBalance:
    standing = held.standing(pool)
    upcoming = standing.terms.next_allowance
    runs_out = runs_out_on(held, at.ms) if pool == Pool.ENRICHMENT else None
    told = as_told(held.name, standing, standing.passed)
    return PoolBalance(
        **told | {"thresholds": list(told["thresholds"])},
        next_allowance=None if upcoming is None else format_credits(upcoming),
        runs_out_on=None if runs_out is None else to_date(runs_out),
        as_of=from_milliseconds(at.ms),
    )


def periods(client: Client, workspace_id: str, as_of: datetime | None = None) -> list[PeriodRow]:
    """Every billing period from the workspace's first day on, the running one last. UnknownId as `balance`."""
    at = moment(as_of)
    plans = in_effect(facts(client, workspace_id, at).plans, at.ms)
    sums = account_queries.day_sums(client, workspace_id, account_queries.EVERY_DAY, at.known_ms)
    drawn = _by_day(sums)
    days = [*(one.day for one in sums), *(day_of(change.effective_ms) for change in plans)]
    if not days:
        _require_known(client, workspace_id)
    rows, day = [], min(days, default=at.day)
    while day <= at.day:
        period = period_of(day, plans, at.ms)
        allowance = allowance_of(period, plans, at.ms) or 0
        used = sum(drawn.get(one, 0) for one in range(*period))
        opening = in_force(plans, (period.start + 1) * DAY_MS - 1)
        rows.append(
            PeriodRow(
                workspace_id=workspace_id,
                period_start=to_date(period.start),
                period_end=to_date(period.end),
                plan=opening.plan if opening else "",
                allowance=format_credits(allowance),
                used=format_credits(used),
                remaining=format_credits(max(0, allowance - used)),
                overage=format_credits(max(0, used - allowance)),
                is_closed=period.end <= at.day,
            )
        )
        day = period.end
    return rows


def statement(
    client: Client, workspace_id: str, day: date | None = None, as_of: datetime | None = None
) -> list[StatementLine]:
    """Both pools over the billing period that holds ``day`` (UTC; None: today), from opening to closing.

    Its sums are questions of their own: what is inserted in between does not foot, and is asked for again. UnknownId as
    `balance`, and for a day that has not come, or before 2020.
    """
    at = moment(as_of)
    said = facts(client, workspace_id, at)
    period = period_of(_asked_day(day, at), said.plans, at.ms)
    for _ in range(_ASKED_AT_MOST):
        sums = account_queries.day_sums(client, workspace_id, period, at.known_ms)
        if said == Facts() and not sums:
            _require_known(client, workspace_id)
        lines = [
            _enrichment_line(client, workspace_id, said, period, sums, at),
            _premium_line(client, workspace_id, said, period, sums, at),
        ]
        if all(line.foots for line in lines):
            break
    return lines


def _enrichment_line(
    client: Client, workspace_id: str, said: Facts, period: Period, sums: list[DaySum], at: Moment
) -> StatementLine:
    allowance = allowance_of(period, said.plans, at.ms) or 0
    debited, given_back, runs = _movements(sums, Pool.ENRICHMENT, period)
    left = allowance - debited + given_back
    used = account_queries.drawn(client, workspace_id, Pool.ENRICHMENT, period, at.known_ms)
    is_closed = period.end <= at.day
    return _line(
        workspace_id, Pool.ENRICHMENT, said, period, at,
        moves=(0, allowance, debited, given_back, max(0, left) if is_closed else 0),
        closing=min(0, allowance - used) if is_closed else allowance - used,
        runs=runs,
    )  # fmt: skip


def _premium_line(
    client: Client, workspace_id: str, said: Facts, period: Period, sums: list[DaySum], at: Moment
) -> StatementLine:
    debited, given_back, runs = _movements(sums, Pool.PREMIUM, period)
    earlier = sum(one.credits for one in sums if one.pool == Pool.PREMIUM and one.day < period.start)
    grants = [(day_of(grant.effective_ms), grant.credits) for grant in said.grants if grant.effective_ms <= at.ms]
    used = account_queries.drawn(client, workspace_id, Pool.PREMIUM, (0, period.end), at.known_ms)
    return _line(
        workspace_id, Pool.PREMIUM, said, period, at,
        moves=(
            sum(credits for day, credits in grants if day < period.start) - earlier,
            sum(credits for day, credits in grants if day in period),
            debited, given_back, 0,
        ),
        closing=sum(credits for day, credits in grants if day < period.end) - used,
        runs=runs,
    )  # fmt: skip


def _movements(sums: list[DaySum], pool: Pool, period: Period) -> tuple[Millicredits, Millicredits, int]:
    """What a pool's runs drew in a period, what reversals gave back (both positive), and how many runs there were."""
    mine = [one for one in sums if one.pool == pool and one.day in period]
    runs = [one for one in mine if one.kind == Kind.RUN]
    given_back = -sum(one.credits for one in mine if one.kind == Kind.REVERSAL)
    return sum(one.credits for one in runs), given_back, sum(one.rows for one in runs)


def _line(
    workspace_id: str,
    pool: Pool,
    said: Facts,
    period: Period,
    at: Moment,
    *,
    moves: tuple[Millicredits, Millicredits, Millicredits, Millicredits, Millicredits],
    closing: Millicredits,
    runs: int,
) -> StatementLine:
    opening, granted, debited, given_back, expired = moves
    plan = in_force(said.plans, min(at.ms, period.end * DAY_MS - 1))
    return StatementLine(
        workspace_id=workspace_id,
        pool=pool,
        period_start=to_date(period.start),
        period_end=to_date(period.end),
        plan=plan.plan if plan else "",
        opening=format_credits(opening),
        granted=format_credits(granted),
        debited=format_credits(debited),
        reversed=format_credits(given_back),
        expired=format_credits(expired),
        closing=format_credits(closing),
        runs=runs,
        is_closed=period.end <= at.day,
        foots=opening + granted - debited + given_back - expired == closing,
        as_of=from_milliseconds(at.ms),
    )


def period_usage(
    client: Client, workspace_id: str, by: By, day: date, plans: Sequence[PlanChange] | None = None
) -> list[UsageRow]:
    """`sinks.queries.usage` over the billing period that holds a UTC day: the period first, then a range of days, which
    is half of what the view `usage_by_period` costs. Without ``plans``, the workspace's history, the ledger is asked.
    """
    at = moment(None)
    wanted = _asked_day(day, at)
    if plans is None:
        starts = account_queries.plan_starts(client, workspace_id)
        plans = history(PlanChange(effective, arrival, "", 0, restarts) for effective, arrival, restarts in starts)
    period = period_of(wanted, plans, at.ms)
    return queries.usage(client, workspace_id, by, to_date(period.start), to_date(period.end))


def _asked_day(day: date | None, at: Moment) -> Day:
    wanted = at.day if day is None else to_day(day)
    if not _FIRST_DAY <= wanted <= at.day:
        why = f"it is after {to_date(at.day)}" if wanted > at.day else "the ledger begins in 2020"
        raise UnknownId(f"no period holds {day}", why, "Ask for another day.")
    return wanted


def plans(client: Client, workspace_id: str, as_of: datetime | None = None) -> list[PlanRow]:
    """A workspace's plans in the order in which they take effect, also those to come. UnknownId as `balance`."""
    at = moment(as_of)
    said = facts(client, workspace_id, at)
    if not said.plans:
        _require_known(client, workspace_id)
    current = in_force(said.plans, at.ms)
    return [
        PlanRow(
            workspace_id=workspace_id,
            effective_at=from_milliseconds(change.effective_ms),
            plan=change.plan,
            allowance=format_credits(change.allowance),
            restart_period=change.restart_period,
            thresholds=list(change.thresholds),
            remaining_below=None if change.remaining_below is None else format_credits(change.remaining_below),
            recorded_at=from_milliseconds(change.arrival[0]),
            in_force=change is current,
        )
        for change in said.plans
    ]


def grants(client: Client, workspace_id: str, as_of: datetime | None = None) -> list[GrantRow]:
    """A workspace's premium grants in the order in which they take effect, also those to come. UnknownId as `balance`.

    The sum of those in force is what `balance` calls the premium allowance.
    """
    at = moment(as_of)
    said = facts(client, workspace_id, at)
    if not said.grants:
        _require_known(client, workspace_id)
    return [
        GrantRow(
            workspace_id=workspace_id,
            effective_at=from_milliseconds(grant.effective_ms),
            credits=format_credits(grant.credits),
            recorded_at=from_milliseconds(grant.arrival[0]),
            in_force=grant.effective_ms <= at.ms,
        )
        for grant in sorted(said.grants)
    ]


def limits(client: Client, workspace_id: str, as_of: datetime | None = None) -> LimitsInForce:
    """At what a workspace is told: its own thresholds, else its plan's, else the default. UnknownId as `balance`."""
    at = moment(as_of)
    said = facts(client, workspace_id, at)
    if said == Facts():
        _require_known(client, workspace_id)
    own, plan = said.thresholds, in_force(said.plans, at.ms)
    told = (
        ("workspace", own.percents if own else (), own.remaining_below if own else None),
        ("plan", plan.thresholds if plan else (), plan.remaining_below if plan else None),
        ("default", DEFAULT_THRESHOLDS, None),
    )
    by, percents = next((who, percents) for who, percents, _ in told if percents)
    below_by, below = next(((who, below) for who, _, below in told if below is not None), ("default", None))
    return LimitsInForce(
        workspace_id=workspace_id,
        thresholds=sorted({*percents, 100}),
        thresholds_by=by,
        remaining_below=None if below is None else format_credits(below),
        remaining_below_by=below_by,
    )


def alerts(
    client: Client, workspace_id: str = "", kind: str = "", limit: int = 100, as_of: datetime | None = None
) -> list[PublishedAlert]:
    """Limit alerts that left the meter, newest first; of one workspace and kind, or (empty) of all."""
    known_ms = moment(as_of).known_ms
    return published_alerts(client, workspace_id=workspace_id, kind=kind, limit=limit, as_of_ms=known_ms)


def explanation(client: Client, catalogue: Catalogue, run_id: UUID, workspace_id: str = "") -> Explanation:
    """`sinks.queries.explanation`, with what the run did to the balance, and the alert that it caused."""
    found = queries.explanation(client, run_id, catalogue, workspace_id)
    debit = account_queries.debit_of(client, found.workspace_id, run_id)
    if debit is None or debit.pool == Pool.NONE:
        return found
    alert = published_alerts(client, workspace_id=found.workspace_id, run_id=run_id, limit=1)
    move = _move(client, debit)
    if move.period_end and move.period_end <= found.recorded_at.date():
        told = f"{found.sentence} It arrived after its billing period had ended, and counts in that period."
        found = msgspec.structs.replace(found, sentence=told)
    return msgspec.structs.replace(found, balance=move, alert=alert[0] if alert else None)


def _move(client: Client, debit: account_queries.RunDebit) -> BalanceMove:
    """The balance before and after a debit, by what was known when it came, in the period that it ran in. An account
    event of the same millisecond came after it, as for `drawn_before`.
    """
    at = Moment(debit.recorded_ms, debit.recorded_ms - 1)
    said = facts(client, debit.workspace_id, at)
    plan_ms = at.ms
    if debit.pool == Pool.PREMIUM:
        period = None
        allowance = sum(grant.credits for grant in said.grants if grant.effective_ms <= at.ms)
    else:
        period = period_of(debit.day, said.plans, at.ms)
        allowance = allowance_of(period, said.plans, at.ms) or 0
        plan_ms = min(at.ms, period.end * DAY_MS - 1)
    plan = in_force(said.plans, plan_ms)
    before = allowance - account_queries.drawn_before(client, debit, period or account_queries.EVERY_DAY)
    return BalanceMove(
        pool=debit.pool,
        before=format_credits(before),
        after=format_credits(before - debit.credits),
        allowance=format_credits(allowance),
        plan=plan.plan if plan else "",
        period_start=to_date(period.start) if period else None,
        period_end=to_date(period.end) if period else None,
    )
