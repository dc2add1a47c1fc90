"""Account events: what only billing may say of a workspace. One tagged union on one topic, ``account-events``.

Like cell runs they are immutable, keyed by ``workspace_id``, and idempotent, by ``event_id``. Unknown fields are
ignored.
"""

from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import msgspec
from msgspec import Meta

from schemas.cell_run import EARLIEST_RAN_AT, Identifier, Instant, Label
from schemas.credits import Millicredits, parse_credits

LATEST_EFFECTIVE_AT = datetime(2100, 1, 1, tzinfo=UTC)
"""From here on an ``effective_at`` is ``malformed``: the ledger's days end in 2149, and nobody plans so far."""


def is_in_range(instant: datetime) -> bool:
    """Whether an event may take effect then, and a question be asked as of then: from 2020 to 2099."""
    return EARLIEST_RAN_AT <= instant < LATEST_EFFECTIVE_AT


Credits = Annotated[
    str,
    # The ledger's Decimal(18, 3) times 1000 must still be one.
    Meta(pattern=r"^[0-9]{1,12}(\.[0-9]{1,3})?$", description="credits as text, at most 3 decimals, below 10^12"),
]
Percent = Annotated[int, Meta(ge=1, le=100)]
Percents = Annotated[tuple[Percent, ...], Meta(max_length=20)]


def _parse(field: str, credits: str) -> Millicredits:
    """What the pattern leaves to be refused: in Python its ``$`` also matches before a last line feed."""
    try:
        return parse_credits(credits)
    except ValueError as error:
        raise ValueError(f"`{field}`: {error}") from error


class _AccountEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag_field="type"):
    event_id: Annotated[UUID, Meta(description="names this event; the same on redelivery")]
    workspace_id: Annotated[Identifier, Meta(description="whose account; also the Kafka key")]
    actor: Annotated[Label | None, Meta(description="who did it, where somebody did")] = None


class _Effective(_AccountEvent, frozen=True, kw_only=True, omit_defaults=True):
    effective_at: Annotated[Instant, Meta(description="from when on it holds, past or future; from 2020 to 2099")]

    def __post_init__(self) -> None:
        if not is_in_range(self.effective_at):
            raise ValueError("`effective_at` is before 2020 or after 2099")


class PlanChanged(_Effective, frozen=True, kw_only=True, omit_defaults=True, tag="plan_changed"):
    """The workspace has this plan from ``effective_at`` on. Cancelling is a plan with allowance 0."""

    plan: Annotated[Identifier, Meta(description="a plan of the plan lists")]
    restart_period: Annotated[bool, Meta(description="a new billing period starts on that UTC day")] = False


class PremiumGranted(_Effective, frozen=True, kw_only=True, omit_defaults=True, tag="premium_granted"):
    """Premium credits were added; they never expire."""

    credits: Annotated[Credits, Meta(description="credits granted, more than 0")]

    def __post_init__(self) -> None:
        super().__post_init__()
        if _parse("credits", self.credits) <= 0:
            raise ValueError("`credits` must be more than 0")


class RunReversed(_AccountEvent, frozen=True, kw_only=True, omit_defaults=True, tag="run_reversed"):
    """What this run drew is given back, once, on the day of the run."""

    run_id: Annotated[UUID, Meta(description="the cell run to reverse")]


class LimitsChanged(_AccountEvent, frozen=True, kw_only=True, omit_defaults=True, tag="limits_changed"):
    """The workspace's own thresholds, from now on. What is left out falls back to the plan's."""

    thresholds: Annotated[
        Percents | None, Meta(description="percent of the allowance at which to alert; 100 is always there")
    ] = None
    remaining_below: Annotated[
        Credits | None, Meta(description="alert, too, when no more than these credits remain")
    ] = None

    def __post_init__(self) -> None:
        if self.remaining_below is not None:
            _parse("remaining_below", self.remaining_below)


AccountEvent = PlanChanged | PremiumGranted | RunReversed | LimitsChanged
