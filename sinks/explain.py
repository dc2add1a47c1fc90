"""One sentence that explains any charge. Pure: ledger rows and the catalogue in, text out."""

from typing import Any, Final

from schemas.answers import EventRow, Explanation
from schemas.catalogue import Action, Catalogue, Category
from schemas.credits import PER_CREDIT, Millicredits, format_credits, group_credits, millicredits_of
from schemas.ledger import RULES, Kind, Pool, Position, Reason

_FREE: Final = {
    Reason.OWN_API_KEY: "ran with the workspace's own API key",
    Reason.ERROR: "ended in an error",
    Reason.NO_DATA: "found nothing",
}
_CONDITIONS: Final = (
    (Reason.OWN_API_KEY, "it did not run with the workspace's own API key"),
    (Reason.FREE_ACTION, "the action has a price"),
    (Reason.ERROR, "it did not end in an error"),
    (Reason.NO_DATA, "it returned data"),
)


_SET_ASIDE: Final = {
    Reason.TOO_LARGE: "its event is too large",
    Reason.MALFORMED: "its event is not a valid cell run",
    Reason.MISROUTED: "its event had another Kafka key or partition than its workspace's",
    Reason.FUTURE_RUN: "its time is in the future",
    Reason.STALE_RUN: "it arrived too late",
    Reason.CONFLICTING_DUPLICATE: "another event with the same run id had different facts",
    Reason.UNKNOWN_ACTION: "no price is known for it",
    Reason.UNKNOWN_PLAN: "no plan list names the plan",
}
_NO_RUN: Final = {
    Reason.REVERSED: "a reversal",
    Reason.PLAN_CHANGED: "a plan",
    Reason.PREMIUM_GRANTED: "a grant",
    Reason.LIMITS_CHANGED: "a workspace's thresholds",
}
"""What account events are; none of them is ever explained as a run."""


def credits_text(millicredits: Millicredits, pool: str = Pool.ENRICHMENT) -> str:
    """``1 credit``, ``-2 credits``, ``0.5 premium credits``."""
    premium = "premium " if pool == Pool.PREMIUM else ""
    return f"{group_credits(millicredits)} {premium}credit{'' if abs(millicredits) == PER_CREDIT else 's'}"


def sentence(reason: Reason, credits: Millicredits, pool: str, action: str, found: Action | None, detail: str) -> str:
    """What a customer can read, without its deliveries. ``found`` is the action in the version that priced it."""
    name = f'"{found.name}"' if found else f'"{action}"'
    match reason:
        case Reason.CHARGED:
            return f"Charged {credits_text(credits, pool)}: {name} returned data."
        case Reason.CHARGED_NO_DATA:
            charge = credits_text(credits, pool)
            return f"Charged {charge}: {name} found nothing, and for this action that is the answer."
        case Reason.FREE_ACTION:
            always_free = found and found.category in (Category.FORMATTER, Category.DESTINATION)
            what = f"is a {found.category}" if found and always_free else "has no price"
            return f"Free: {name} {what}, so every run of it is free."
        case Reason.OWN_API_KEY | Reason.ERROR | Reason.NO_DATA:
            return f"Free: {name} {_FREE[reason]}."
        case Reason.DUPLICATE:
            return f"Not charged again: this is {detail}."
        case Reason.REVERSED | Reason.PLAN_CHANGED | Reason.PREMIUM_GRANTED | Reason.LIMITS_CHANGED:
            return f"Not a run: this is {_NO_RUN[reason]}."
        case Reason.UNKNOWN_RUN:
            return f"Not charged: the run has not arrived; only its reversal has, and waits for it ({detail})."
    return f"Not charged: the run was set aside, because {_SET_ASIDE[reason]} ({detail})."


def again(deliveries: list[EventRow]) -> str:
    """What the sentence adds for a run that came more than once."""
    copies = sum(delivery.kind == Kind.DUPLICATE for delivery in deliveries)
    conflicts = sum(delivery.reason == Reason.CONFLICTING_DUPLICATE for delivery in deliveries)
    told = ""
    if copies:
        told += f" It was delivered {'twice' if copies == 1 else f'{copies + 1:,} times'} and counted once."
    if conflicts:
        events = "1 other event" if conflicts == 1 else f"{conflicts:,} other events"
        told += f" {events} with the same run id had different facts and did not count."
    return told


def _set_aside_before(rows: list[dict[str, Any]], debit: dict[str, Any]) -> str:
    """What the sentence adds for a run that came as a dead letter first: ``rows`` are its workspace's, as they came."""
    earlier = [row for row in rows[: rows.index(debit)] if not _is_account_event(row)]
    reasons = dict.fromkeys(str(row["reason"]) for row in earlier if row["kind"] == Kind.DEAD_LETTER)
    if debit["kind"] != Kind.RUN or not reasons:
        return ""
    return f" It had been set aside as {' and '.join(reasons)}, and was sent again."


def _taken_back(rows: list[dict[str, Any]]) -> str:
    """What the sentence adds for a run that was reversed. ``rows``: those of its workspace."""
    for row in rows:
        if row["kind"] == Kind.REVERSAL:
            given = credits_text(-millicredits_of(row["credits"]), row["pool"])
            return f" It was reversed on {row['recorded_at']:%Y-%m-%d}: {given} given back."
    return ""


def run_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rows under one run id, the one to explain: the debit, or else the last event of a run, or any."""
    of_runs = [row for row in rows if not _is_account_event(row)]
    return next((row for row in of_runs if row["kind"] == Kind.RUN), (of_runs or rows)[-1])


def _is_account_event(row: dict[str, Any]) -> bool:
    """A reversal, or a copy of one: it carries the run's id and an event's own."""
    event_id = row.get("event_id")
    return bool(event_id and event_id.int)


def explain(rows: list[dict[str, Any]], runs_of_this_cell: int, catalogue: Catalogue) -> Explanation:
    """Explain the run that these ledger rows (every delivery of one run id, in the order of arrival) are about.

    Rows of another workspace are another run, which nobody else is told of.
    """
    chosen = run_of(rows)
    reason = Reason(chosen["reason"])
    millicredits = millicredits_of(chosen["credits"])
    action = _action(chosen, catalogue)
    mine = [row for row in rows if row["workspace_id"] == chosen["workspace_id"]]
    others = [_event_row(row) for row in mine if row is not chosen and not _is_account_event(row)]
    told = sentence(reason, millicredits, chosen["pool"], chosen["action"], action, chosen["detail"])
    rule, rule_text = RULES[reason]
    return Explanation(
        sentence=told + _set_aside_before(mine, chosen) + again(others) + _taken_back(mine),
        **{name: chosen[name] for name in _COPIED},
        run_id=str(chosen["run_id"]),
        action_name=action.name if action else "",
        credits=format_credits(millicredits),
        rule="R07" if rule == "R02" and chosen["pool"] == Pool.PREMIUM else rule,
        rule_text=rule_text,
        price=format_credits(action.price) if action else "",
        not_free_because=_not_free_because(reason),
        runs_of_this_cell=runs_of_this_cell,
        position=_position(chosen),
        deliveries=[_event_row(row) for row in mine],
    )


_COPIED: Final = (
    "workspace_id", "table_id", "column_id", "row_id", "action", "outcome", "own_api_key", "ran_at", "recorded_at",
    "triggered_by", "actor", "kind", "pool", "reason", "catalogue",
)  # fmt: skip


def _action(row: dict[str, Any], catalogue: Catalogue) -> Action | None:
    for version in catalogue.versions:
        if version.number == row["catalogue"]:
            return version.actions.get(row["action"])
    return None


def _not_free_because(reason: Reason) -> list[str]:
    if reason == Reason.CHARGED:
        return [text for _, text in _CONDITIONS]
    if reason == Reason.CHARGED_NO_DATA:
        return [text for condition, text in _CONDITIONS if condition != Reason.NO_DATA] + [
            "it found nothing, which for this action is the answer"
        ]
    return []


def _position(row: dict[str, Any]) -> str:
    """Where a row of the ledger lay in Kafka."""
    return str(Position(row["topic"], row["kafka_partition"], row["kafka_offset"]))


def _event_row(row: dict[str, Any]) -> EventRow:
    return EventRow(
        position=_position(row),
        recorded_at=row["recorded_at"],
        kind=row["kind"],
        reason=row["reason"],
        credits=format_credits(millicredits_of(row["credits"])),
        detail=row["detail"],
    )
