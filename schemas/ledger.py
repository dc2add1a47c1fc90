"""The closed, ordered words of the ledger. Their numbers are stored: append, never reorder or reuse.

Every consumed Kafka offset becomes one ledger row, and ``Kind`` says which; ``Reason`` says why. The texts are the
sentences that ``creditstream explain`` shows; each names the charge rule that it follows.
"""

import re
from enum import StrEnum
from typing import Final, NamedTuple, Self
from uuid import UUID

from schemas.cell_run import Outcome

PARTITION_MAX: Final = 65_535
"""What the ledger's column holds."""

REDRIVE_HEADER: Final = "creditstream-redrive-of"
"""The Kafka header of a record that is sent again: its dead letter, as `schemas.answers.ParkedEvent.letter`."""


class Position(NamedTuple):
    """Where a record lies in Kafka; as text ``cell-runs[3]@88123``."""

    topic: str
    partition: int
    offset: int

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]@{self.offset}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The other way. ValueError for any other text."""
        shape = _POSITION.fullmatch(text)
        if not shape or int(shape["partition"]) > PARTITION_MAX:
            raise ValueError(f"{text!r} is not a position; write it as topic[partition]@offset: cell-runs[3]@88123")
        return cls(shape["topic"], int(shape["partition"]), int(shape["offset"]))


_POSITION: Final = re.compile(r"(?P<topic>[\w.-]+)\[(?P<partition>[0-9]{1,5})\]@(?P<offset>[0-9]{1,19})", re.ASCII)


class Identity(NamedTuple):
    """What names a run, or an account event: their ids are each workspace's own."""

    workspace_id: str
    id: UUID


class Pool(StrEnum):
    """Which balance a debit draws. ``none`` for actions without a price."""

    NONE = "none"
    ENRICHMENT = "enrichment"
    PREMIUM = "premium"


class Kind(StrEnum):
    """What one Kafka offset was."""

    RUN = "run"
    DUPLICATE = "duplicate"
    DEAD_LETTER = "dead_letter"
    REVERSAL = "reversal"
    PLAN = "plan"
    GRANT = "grant"
    LIMITS = "limits"


class Reason(StrEnum):
    """Why a row is what it is. Debits first, in the order in which they are tried: the first that applies wins.

    Then ``duplicate``, then the dead letters in the order in which a run is checked, then what account events add.
    """

    OWN_API_KEY = "own_api_key"
    FREE_ACTION = "free_action"
    ERROR = "error"
    NO_DATA = "no_data"
    CHARGED_NO_DATA = "charged_no_data"
    CHARGED = "charged"
    DUPLICATE = "duplicate"
    TOO_LARGE = "too_large"
    MALFORMED = "malformed"
    MISROUTED = "misrouted"
    FUTURE_RUN = "future_run"
    STALE_RUN = "stale_run"
    CONFLICTING_DUPLICATE = "conflicting_duplicate"
    UNKNOWN_ACTION = "unknown_action"
    REVERSED = "reversed"
    PLAN_CHANGED = "plan_changed"
    PREMIUM_GRANTED = "premium_granted"
    LIMITS_CHANGED = "limits_changed"
    UNKNOWN_RUN = "unknown_run"
    UNKNOWN_PLAN = "unknown_plan"


POOLS: Final = tuple(Pool)
KINDS: Final = tuple(Kind)
REASONS: Final = tuple(Reason)
OUTCOMES: Final = tuple(Outcome)
DEBIT_REASONS: Final = REASONS[: REASONS.index(Reason.DUPLICATE)]
FREE_REASONS: Final = DEBIT_REASONS[: DEBIT_REASONS.index(Reason.CHARGED_NO_DATA)]
RUN_DEAD_LETTER_REASONS: Final = REASONS[REASONS.index(Reason.TOO_LARGE) : REASONS.index(Reason.REVERSED)]
DEAD_LETTER_REASONS: Final = (*RUN_DEAD_LETTER_REASONS, Reason.UNKNOWN_RUN, Reason.UNKNOWN_PLAN)
REDRIVABLE_REASONS: Final = (Reason.MISROUTED, Reason.FUTURE_RUN, Reason.UNKNOWN_ACTION, Reason.UNKNOWN_PLAN)
"""Dead letters that may be metered when they are sent again by hand."""
ACCOUNT_KINDS: Final = (Kind.REVERSAL, Kind.PLAN, Kind.GRANT, Kind.LIMITS)


def number_of(word: StrEnum) -> int:
    """The number under which the ledger's table stores a kind, pool, reason or outcome: its place, from 1."""
    return _NUMBERS[type(word)][word]


# By type first: as texts, Kind.DUPLICATE and Reason.DUPLICATE are equal.
_NUMBERS: Final[dict[type[StrEnum], dict[StrEnum, int]]] = {
    words: {word: number for number, word in enumerate(words, 1)} for words in (Kind, Pool, Reason, Outcome)
}

RULES: Final[dict[Reason, tuple[str, str]]] = {
    Reason.OWN_API_KEY: ("R05", "A run that uses the workspace's own API key is free, whatever the action costs."),
    Reason.FREE_ACTION: ("R04", "Formatters, destinations and actions priced 0 are free, however often they run."),
    Reason.ERROR: ("R08", "A run that ended in an error is free."),
    Reason.NO_DATA: ("R09", "A run that found nothing is free, unless nothing found is itself the answer."),
    Reason.CHARGED_NO_DATA: ("R09", "For this action nothing found is itself the answer, so it costs the full price."),
    Reason.CHARGED: ("R02", "A run of an action with a price draws that price from the action's pool."),
    Reason.DUPLICATE: (
        "R11",
        "One run is debited once, however often it is delivered; only a new run id is a new run.",
    ),
    Reason.TOO_LARGE: ("intake", "An event may have at most 64 KiB."),
    Reason.MALFORMED: ("intake", "An event must be a cell run by the published JSON Schema."),
    Reason.MISROUTED: ("intake", "The Kafka key must be the workspace id, on the partition of its murmur2 hash."),
    Reason.FUTURE_RUN: ("intake", "A run may lie at most 5 minutes ahead of the broker's clock."),
    Reason.STALE_RUN: ("intake", "A run may be at most 366 days old when it arrives."),
    Reason.CONFLICTING_DUPLICATE: ("intake", "Two events under one run id must agree; the first one stands."),
    Reason.UNKNOWN_ACTION: ("intake", "An action that the catalogue does not know is parked, never charged or free."),
    Reason.REVERSED: ("correction", "A reversal takes back what a run drew, once, on the day of the run."),
    Reason.PLAN_CHANGED: ("R01", "A plan says how many enrichment credits each billing period has."),
    Reason.PREMIUM_GRANTED: ("R07", "A grant fills the premium pool, which never expires."),
    Reason.LIMITS_CHANGED: ("limits", "A workspace may have thresholds of its own."),
    Reason.UNKNOWN_RUN: ("intake", "A reversal of a run that is not in the ledger waits until the run is there."),
    Reason.UNKNOWN_PLAN: ("intake", "A plan that no plan list names is parked, never guessed."),
}
"""Reason → (rule id, the rule in one sentence)."""
