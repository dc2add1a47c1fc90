"""Dead letters sent again: once the catalogue knows the action, a plan list the plan, or the run's time has come.

A redrive is the letter's own bytes under the key of its workspace, with a header that names the letter's position; the
ledger row that it becomes closes the letter (charge rules: "When is a dead letter closed?").
"""

from collections.abc import Sequence
from typing import Final

from creditstream.producing import Outgoing, deliver
from schemas.answers import DeadLetter
from schemas.codec import decode_account_event, decode_run
from schemas.ledger import Position, Reason
from streams.intake import REDRIVE_HEADER
from streams.settings import Settings
from streams.topics import account_events_topic

REDRIVABLE: Final = (Reason.MISROUTED, Reason.FUTURE_RUN, Reason.UNKNOWN_ACTION, Reason.UNKNOWN_PLAN)
WHY_NOT: Final = {
    Reason.TOO_LARGE: "it is still too large",
    Reason.MALFORMED: "the same bytes would be refused again: send a corrected event",
    Reason.STALE_RUN: "it does not get younger",
    Reason.CONFLICTING_DUPLICATE: "the first event under its run id stands",
    Reason.UNKNOWN_RUN: "the worker sends it again by itself, once its run is there",
}
"""Why a letter of another reason is left alone."""


def why_not(letter: DeadLetter) -> str:
    """Why a letter cannot be sent again; empty when it can."""
    if letter.closed_by:
        return f"it was sent again as {letter.closed_by}"
    return WHY_NOT.get(Reason(letter.reason), "")


def redrive(settings: Settings, letters: Sequence[DeadLetter]) -> list[Position]:
    """Send letters again, all of which can be: where each lies now. Unreachable when Kafka does not take one.

    One that was sent again twice is metered once: its run id, or event id, is known by then.
    """
    records = [_record(settings, letter) for letter in letters]
    fix = "Try again: those that were delivered are closed, and a copy is never charged twice."
    return deliver(settings, records, "dead letters were", fix)


def _record(settings: Settings, letter: DeadLetter) -> Outgoing:
    """Keyed by what the event itself says: a misrouted one lies under another key."""
    topic, value = Position.parse(letter.position).topic, letter.raw.encode()
    decode = decode_account_event if topic == account_events_topic(settings) else decode_run
    return Outgoing(topic, decode(value).workspace_id, value, [(REDRIVE_HEADER, letter.position.encode())])
