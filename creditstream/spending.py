"""May it run, what will it cost, who comes close: questions about credits that are not drawn yet.

`check` is the gate itself (`creditstream.client.decision`), fed from the ledger instead of Kafka.
"""

from datetime import datetime
from typing import Final

import msgspec
from clickhouse_connect.driver.client import Client

from creditstream.accounts import Moment, account, moment
from creditstream.client.decision import Decision, GateRules, Policy
from creditstream.client.states import NEVER_NS
from schemas.answers import Estimate, ShareOfRuns, SpendCheck, TopBy, TopRow
from schemas.catalogue import Catalogue
from schemas.cell_run import from_milliseconds
from schemas.credits import Millicredits, format_credits, group_credits, parse_credits
from schemas.ledger import FREE_REASONS, Pool, Reason
from schemas.limits import AsOf, State, state_key
from schemas.prices import price_of
from schemas.problem import UnknownId
from sinks import account_queries
from sinks.explain import credits_text
from streams.rules.balances import METERED, Account
from streams.rules.messages import state_of
from streams.rules.periods import to_date

_NS_PER_MS: Final = 1_000_000
_TELLS_NOTHING: Final = (Reason.OWN_API_KEY, Reason.FREE_ACTION)
"""Runs that were free whatever they found: with the workspace's key, or before the action had a price."""


def check(
    client: Client,
    catalogue: Catalogue,
    workspace_id: str,
    action: str,
    *,
    cells: int = 1,
    own_api_key: bool = False,
    on_unknown: Policy = "deny",
    as_of: datetime | None = None,
) -> SpendCheck:
    """May this workspace run this action in so many cells? By the rules of the gate, from what the ledger knows.

    ``on_unknown`` decides for a workspace without a plan. Whatever is written later, also by this run, is not in it.
    """
    at = moment(as_of)
    held = _account_or_none(client, workspace_id, at)
    decision = _decide(held, workspace_id, action, catalogue, cells, own_api_key, on_unknown, at)
    found = catalogue.find(action, catalogue.era_at(at.ms))
    pool = found[1].pool if found else Pool.NONE
    standing = held.standing(pool) if held and pool != Pool.NONE else None
    period = standing.terms.period if standing else None
    return SpendCheck(
        workspace_id=workspace_id,
        action=action,
        cells=cells,
        own_api_key=own_api_key,
        allowed=decision.allowed,
        reason=decision.reason,
        credits=decision.price,
        pool=pool,
        remaining=decision.remaining,
        state=standing.state if standing else "",
        period_end=None if period is None else to_date(period.end),
        as_of=from_milliseconds(at.ms),
    )


def _account_or_none(client: Client, workspace_id: str, at: Moment) -> Account | None:
    try:
        return account(client, workspace_id, at)
    except UnknownId:
        return None


def _decide(
    held: Account | None,
    workspace_id: str,
    action: str,
    catalogue: Catalogue,
    cells: int,
    own_api_key: bool,
    on_unknown: Policy,
    at: Moment,
) -> Decision:
    now_ns = at.ms * _NS_PER_MS
    rules = GateRules(catalogue, on_unknown=on_unknown, on_stale="deny", clock=lambda: now_ns)
    rules.fresh_ns = NEVER_NS
    as_of = AsOf(log="", cell_runs=-1, account_events=-1, at=from_milliseconds(at.ms))
    if held:
        for pool in METERED:
            rules.states.apply(state_key(workspace_id, pool), msgspec.json.encode(state_of(held, pool, as_of, "")))
    return rules.check(workspace_id, action, own_api_key, cells)


def estimate(
    client: Client,
    catalogue: Catalogue,
    workspace_id: str,
    action: str,
    *,
    cells: int,
    table_id: str = "",
    column_id: str = "",
    own_api_key: bool = False,
    as_of: datetime | None = None,
) -> Estimate:
    """What a bulk run will cost, at worst and as the column's own history lets expect, against what is left (R14).

    UnknownId when no catalogue version lists the action. Without a column, or without runs of it with the product's
    key while the action had a price, the expected cost is the worst case.
    """
    at = moment(as_of)
    price = price_of(catalogue, action, at.ms, own_api_key)
    worst = parse_credits(price.credits) * cells
    history: list[ShareOfRuns] = []
    if worst and column_id:
        found = account_queries.shares(client, workspace_id, action, table_id, column_id, at.known_ms)
        history = [share for share in found if share.reason not in _TELLS_NOTHING]
    expected = expect(worst, history)
    held = _account_or_none(client, workspace_id, at) if price.pool != Pool.NONE else None
    standing = held.standing(Pool(price.pool)) if held else None
    remaining = None if not standing or standing.state == State.UNKNOWN_PLAN else standing.remaining
    return Estimate(
        workspace_id=workspace_id,
        action=action,
        cells=cells,
        own_api_key=own_api_key,
        table_id=table_id,
        column_id=column_id,
        pool=price.pool,
        price=price.credits,
        worst_case=format_credits(worst),
        expected=format_credits(expected),
        remaining=None if remaining is None else format_credits(remaining),
        fits=worst == 0 or (remaining is not None and worst <= remaining),
        warning=_warning(worst, expected, remaining),
        history=history,
        as_of=from_milliseconds(at.ms),
    )


def expect(worst: Millicredits, history: list[ShareOfRuns]) -> Millicredits:
    """The worst case times the share of runs that were charged, rounded up; the worst case without a history."""
    runs = sum(share.runs for share in history)
    charged = runs - sum(share.runs for share in history if share.reason in FREE_REASONS)
    return -(-worst * charged // runs) if runs else worst


def _warning(worst: Millicredits, expected: Millicredits, remaining: Millicredits | None) -> str:
    """What a person should know before the start; empty when even the worst case fits."""
    if not worst:
        return ""
    if remaining is None:
        return "The workspace has no plan yet, so what is left is unknown."
    if worst <= remaining:
        return ""
    left = f"{group_credits(remaining)} left"
    if expected > remaining:
        return f"It does not fit: about {credits_text(expected)} expected, {left}."
    return f"It may not fit: up to {credits_text(worst)}, {left}."


def top(client: Client, by: TopBy, limit: int, as_of: datetime | None = None) -> list[TopRow]:
    """Pools that are closest to their limit, or whose credits will be gone soonest, before their period ends.

    ``as_of`` goes by what the ledger knows now, with every debit of its UTC day.
    """
    return account_queries.top(client, by, moment(as_of).ms, limit)
