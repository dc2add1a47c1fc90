"""Account events as billing sends them: made, checked, delivered, and waited for.

Only billing may write the topic; on a shared broker that is an ACL. An event is idempotent by its id: sent again after
a failure under the same id, it counts once.
"""

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import msgspec

from creditstream.asking import Answers
from creditstream.awaiting import await_rows
from schemas.account import AccountEvent
from schemas.answers import LedgerRow
from schemas.cell_run import to_milliseconds
from schemas.ledger import Kind, Position
from schemas.plan import Plan, PlanLists
from schemas.problem import Problem, UnknownId
from streams.settings import Settings

if TYPE_CHECKING:
    from streams.kafka.topics import Topic


def make_event(kind: str, workspace_id: str, event_id: UUID | None, **fields: Any) -> AccountEvent:
    """The event of this kind (``plan_changed``, ``premium_granted``, ``run_reversed``, ``limits_changed``).

    A field of None is left out; with an ``event_id`` of None it gets a new one. Problem naming the field that is wrong.
    """
    from schemas.codec import decode_account_event, name_field

    plain = {"type": kind, "event_id": event_id or uuid4(), "workspace_id": workspace_id} | fields
    given = {name: value for name, value in plain.items() if value is not None}
    try:
        return decode_account_event(msgspec.json.encode(given))
    except msgspec.DecodeError as error:
        raise Problem(f"the {kind} event is wrong", name_field(str(error)), "Nothing was sent.") from error


def require_plan(settings: Settings, plan: str, effective_at: datetime) -> Plan:
    """The plan that the lists name so at that time. UnknownId, naming those that there are."""
    lists = PlanLists.load(Path(settings.plans_dir))
    found = lists.find(plan, to_milliseconds(effective_at))
    if not found:
        names = ", ".join(known.id for known in lists.newest())
        raise UnknownId(
            f"no plan {plan!r}", f"the plan lists name {names}", "Choose one of these, or add the plan to a list."
        )
    return found


def send_event(settings: Settings, event: AccountEvent) -> tuple["Topic", Position]:
    """Deliver one event; where it lies in Kafka. Unreachable when it was not delivered."""
    from creditstream.producing import Outgoing, deliver
    from schemas.codec import encode_account_event
    from streams.kafka.topics import ACCOUNT_EVENTS, Broker

    topic = Broker(settings).require(ACCOUNT_EVENTS)
    record = Outgoing(topic.name, event.workspace_id, encode_account_event(event))
    fix = f"Send it again with --event-id {event.event_id}; it counts only once."
    (place,) = deliver(settings, [record], "account events were", fix)
    return topic, place


def wait_until_metered(answers: Answers, topic: "Topic", place: Position) -> LedgerRow:
    """The event's ledger row. Problem when it was set aside, Unreachable when it is not there in time."""
    row = await_rows(answers, topic, [place])[place]
    if row.kind == Kind.DEAD_LETTER:
        fix = f"See `creditstream dead-letters show '{place}'`."
        raise Problem(f"the event was set aside as {row.reason}", row.detail, fix)
    return row
