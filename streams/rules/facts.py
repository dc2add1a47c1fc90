"""From account events in the ledger to what is known of a workspace, and into its balance. Pure: no I/O, no clock."""

from collections.abc import Iterable
from typing import Final

from schemas.ledger import Kind, Pool
from schemas.limits import Cause
from sinks.accounts import AccountFact
from streams.rules.balances import Account, Balances, Notice, Opening
from streams.rules.limits import Facts, Grant, Thresholds
from streams.rules.periods import PlanChange, history

_CAUSES: Final = {Kind.PLAN: Cause.PLAN, Kind.GRANT: Cause.GRANT, Kind.REVERSAL: Cause.REVERSAL}


def fold_event(balances: Balances, row: AccountFact) -> list[Notice]:
    """Fold one event. Its account is loaded. A closed period's reversal moves nothing."""

    def change(account: Account) -> None:
        if row.kind == Kind.REVERSAL:
            account.draw(Pool(row.pool), row.day, row.credits)
        else:
            account.facts = with_event(account.facts, row)

    return balances.apply(row.workspace_id, _CAUSES.get(row.kind), change, row.recorded_ms, row.offset)


def with_event(facts: Facts, row: AccountFact) -> Facts:
    """The facts with one plan, grant or change of thresholds more."""
    arrival = row.recorded_ms, row.offset
    match row.kind:
        case Kind.PLAN:
            change = PlanChange(
                row.effective_ms, arrival, row.plan, row.allowance, row.restart_period, row.thresholds,
                row.remaining_below,
            )  # fmt: skip
            return facts._replace(plans=history((*facts.plans, change)))
        case Kind.GRANT:
            return facts._replace(grants=(*facts.grants, Grant(row.effective_ms, arrival, row.allowance)))
        case Kind.LIMITS:
            newest = facts.thresholds
            if newest and newest.arrival > arrival:
                return facts
            return facts._replace(thresholds=Thresholds(arrival, row.thresholds, row.remaining_below))
    return facts


def openings(
    names: Iterable[str], events: Iterable[AccountFact], draws: Iterable[tuple[str, str, int, int]]
) -> dict[str, Opening]:
    """What the ledger holds of these workspaces, from its rows (`sinks.accounts.facts_of`, `draws_of`)."""
    facts = dict.fromkeys(names, Facts())
    for row in events:
        facts[row.workspace_id] = with_event(facts[row.workspace_id], row)
    days: dict[str, dict[int, int]] = {name: {} for name in facts}
    premium = dict.fromkeys(facts, 0)
    for name, pool, day, credits in draws:
        if pool == Pool.PREMIUM:
            premium[name] += credits
        else:
            days[name][day] = days[name].get(day, 0) + credits
    return {name: Opening(facts[name], days[name], premium[name]) for name in facts}
