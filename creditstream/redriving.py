"""Dead letters sent again: once the catalogue knows the action, a plan list the plan, or the run's time has come.

A redrive is the letter's own bytes under the key of its workspace, with a header that names the letter; the ledger row
that it becomes closes it (docs/ledger.md).
"""

from collections.abc import Sequence
from typing import Final

from creditstream.asking import Answers
from creditstream.awaiting import await_rows
from creditstream.producing import Outgoing, deliver
from schemas.answers import LedgerRow, ParkedEvent
from schemas.codec import decode_account_event, decode_run
from schemas.ledger import REDRIVE_HEADER, Position, Reason
from schemas.problem import Problem
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS, Broker
from streams.settings import Settings

WHY_NOT: Final = {
    Reason.TOO_LARGE: "it is still too large",
    Reason.MALFORMED: "the same bytes would be refused again: send a corrected event",
    Reason.STALE_RUN: "it does not get younger",
    Reason.CONFLICTING_DUPLICATE: "the first event under its run id stands",
    Reason.UNKNOWN_RUN: "the worker sends it again by itself, once its run is there",
}
"""Why a letter of another reason is left alone."""


def redrive(settings: Settings, answers: Answers, letters: Sequence[ParkedEvent]) -> list[tuple[Position, LedgerRow]]:
    """Send letters again, in their order: where each lies now, and the ledger row that closes it.

    Problem when one of them cannot be sent again: then none was. Unreachable when Kafka does not take one, or no worker
    meters it; once they have their rows, nobody sends them twice.
    """
    ours = {settings.topic(CELL_RUNS), settings.topic(ACCOUNT_EVENTS)}
    for letter in letters:
        if why := _why_not(letter, ours):
            raise Problem(f"{letter.position} cannot be sent again", why, "Nothing was sent.")
    broker, named = Broker(settings), {letter.topic for letter in letters}
    topics = [broker.require(name) for name in (CELL_RUNS, ACCOUNT_EVENTS) if settings.topic(name) in named]
    fix = "Try again: delivered letters are closed, and a duplicate is never charged."
    places = deliver(settings, [_record(settings, letter) for letter in letters], "dead letters were", fix)
    rows: dict[Position, LedgerRow] = {}
    for topic in topics:
        rows |= await_rows(answers, topic, [place for place in places if place.topic == topic.name])
    return [(place, rows[place]) for place in places]


def _why_not(letter: ParkedEvent, ours: set[str]) -> str:
    if letter.topic not in ours:
        return f"it came from topic {letter.topic}, and this installation's are {' and '.join(sorted(ours))}"
    if letter.closed_by:
        return f"it was sent again as {letter.closed_by}"
    if why := WHY_NOT.get(Reason(letter.reason)):
        return f"{letter.reason}: {why}"
    return ""


def _record(settings: Settings, letter: ParkedEvent) -> Outgoing:
    """Keyed by what the event itself says: a misrouted one lies under another key."""
    decode = decode_account_event if letter.topic == settings.topic(ACCOUNT_EVENTS) else decode_run
    header = REDRIVE_HEADER, letter.letter.encode()
    return Outgoing(letter.topic, decode(letter.value).workspace_id, letter.value, [header])
