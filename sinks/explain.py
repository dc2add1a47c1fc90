"""One sentence that explains any charge. Pure: ledger rows and the catalogue in, text out."""

from typing import Any, Final

from schemas.answers import Delivery, Explanation
from schemas.catalogue import Action, Catalogue, Category
from schemas.credits import Millicredits, format_credits, group_credits
from schemas.ledger import RULES, Kind, Reason

_FREE: Final = {
    Reason.OWN_API_KEY: "{name} ran with the workspace's own API key",
    Reason.ERROR: "{name} ended in an error",
    Reason.NO_DATA: "{name} found nothing",
}
_CONDITIONS: Final = (
    (Reason.OWN_API_KEY, "it did not run with the workspace's own API key"),
    (Reason.FREE_ACTION, "the action has a price"),
    (Reason.ERROR, "it did not end in an error"),
    (Reason.NO_DATA, "it returned data"),
)


def credits_text(millicredits: Millicredits) -> str:
    """``1 credit``, ``2 credits``, ``0.5 credits``."""
    return f"{group_credits(millicredits)} credit{'' if millicredits == 1000 else 's'}"


def sentence(
    kind: Kind, reason: Reason, millicredits: Millicredits, action: str, found: Action | None, detail: str
) -> str:
    """What a customer can read, without its deliveries."""
    name = f'"{found.name}"' if found else f'"{action}"'
    if kind == Kind.DEAD_LETTER:
        return f"Not charged: the event was set aside as {reason} ({detail})."
    if reason == Reason.FREE_ACTION:
        always_free = found and found.category in (Category.FORMATTER, Category.DESTINATION)
        what = f"is a {found.category}" if found and always_free else "has no price"
        return f"Free: {name} {what}, so every run of it is free."
    if reason in _FREE:
        return f"Free: {_FREE[reason].format(name=name)}."
    if reason == Reason.CHARGED_NO_DATA:
        return f"Charged {credits_text(millicredits)}: {name} found nothing, and for this action that is the answer."
    pool = " of the premium pool" if found and found.pool == "premium" else ""
    return f"Charged {credits_text(millicredits)}{pool}: {name} returned data."


def again(deliveries: list[Delivery]) -> str:
    """What the sentence adds for a run that came more than once."""
    copies = [delivery for delivery in deliveries if delivery.kind == Kind.DUPLICATE]
    conflicts = [delivery for delivery in deliveries if delivery.reason == Reason.CONFLICTING_DUPLICATE]
    told = ""
    if copies:
        told += f" It was delivered {len(copies) + 1} times and debited once."
    if conflicts:
        events = f"{len(conflicts)} event{'s' * (len(conflicts) > 1)}"
        told += f" {events} under the same id said something else and did not count."
    return told


def explain(rows: list[dict[str, Any]], runs_of_this_cell: int, catalogue: Catalogue) -> Explanation:
    """Explain the run that these ledger rows (every delivery of one run id, in the order of arrival) are about."""
    chosen = next((row for row in rows if row["kind"] == Kind.RUN), rows[0])
    kind, reason = Kind(chosen["kind"]), Reason(chosen["reason"])
    millicredits = int(chosen["credits"].scaleb(3))
    action = _action(chosen, catalogue)
    deliveries = [_delivery(row) for row in rows]
    rule, rule_text = RULES[reason]
    return Explanation(
        sentence=sentence(kind, reason, millicredits, chosen["action"], action, chosen["detail"]) + again(deliveries),
        **{name: chosen[name] for name in _COPIED},
        run_id=str(chosen["run_id"]),
        action_name=action.name if action else "",
        credits=format_credits(millicredits),
        rule="R07" if rule == "R02" and chosen["pool"] == "premium" else rule,
        rule_text=rule_text,
        price=format_credits(action.price) if action else "",
        not_free_because=_not_free_because(reason),
        runs_of_this_cell=runs_of_this_cell,
        position=_position(chosen),
        deliveries=deliveries,
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
    return f"{row['topic']}[{row['kafka_partition']}]@{row['kafka_offset']}"


def _delivery(row: dict[str, Any]) -> Delivery:
    return Delivery(
        position=_position(row),
        recorded_at=row["recorded_at"],
        kind=row["kind"],
        reason=row["reason"],
        credits=format_credits(int(row["credits"].scaleb(3))),
        detail=row["detail"],
    )
