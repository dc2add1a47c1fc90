"""The metered event: one execution of one cell by an enrichment worker.

The types are the schema: constraints stand in the annotations, decoding is validation, and the JSON Schema in
``schemas/generated`` is made from them. Unknown fields are ignored, so that a producer may be newer than the meter.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated
from uuid import UUID

import msgspec
from msgspec import Meta

MAX_EVENT_BYTES = 64 * 1024
"""A larger Kafka value is a dead letter (``too_large``) and is never decoded."""

EARLIEST_RAN_AT = datetime(2020, 1, 1, tzinfo=UTC)
"""An older ``ran_at`` is ``malformed``: a clock that was never set, not a late event."""

LATEST_RAN_AT = datetime.max.replace(tzinfo=UTC)
"""A later ``ran_at`` is ``malformed``: west of Greenwich, year 9999 holds hours that no UTC instant can name."""

Identifier = Annotated[str, Meta(min_length=1, max_length=128)]
Label = Annotated[str, Meta(max_length=128)]
Instant = Annotated[datetime, Meta(tz=True)]


class Outcome(StrEnum):
    """How the run ended. An answer of zero counts as ``no_data``; "could not look" is an ``error``."""

    DATA = "data"
    NO_DATA = "no_data"
    ERROR = "error"


class CellRun(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One cell run, emitted once, after its last try. Kafka key: ``workspace_id``.

    ``run_id`` is the same on redelivery and new on every re-run; with ``workspace_id`` it is the idempotency key.
    ``ran_at`` carries an offset and is truncated to milliseconds by the meter.
    """

    run_id: Annotated[UUID, Meta(description="names this run; the same on redelivery, new on every re-run")]
    workspace_id: Annotated[Identifier, Meta(description="who pays; also the Kafka key")]
    table_id: Identifier
    column_id: Identifier
    row_id: Identifier
    action: Annotated[Identifier, Meta(description="what the column runs; an id of the catalogue")]
    outcome: Outcome
    ran_at: Annotated[Instant, Meta(description="when the run ended; RFC 3339 with an offset, 2020 or later")]
    own_api_key: Annotated[bool, Meta(description="the run used the workspace's own API key")] = False
    triggered_by: Annotated[
        Label | None, Meta(description="open list: manual, auto_update, schedule, api, waterfall, ...")
    ] = None
    actor: Annotated[Label | None, Meta(description="who started it, where somebody did")] = None

    def __post_init__(self) -> None:
        if not isinstance(self.ran_at, datetime):
            raise TypeError(f"`ran_at` is not a datetime but {self.ran_at!r}: write datetime.now(UTC), for example")
        if self.ran_at.utcoffset() is None:
            raise ValueError("`ran_at` has no offset from UTC: write datetime.now(UTC), for example")
        if self.ran_at < EARLIEST_RAN_AT:
            raise ValueError("`ran_at` is before 2020")
        if self.ran_at > LATEST_RAN_AT:
            raise ValueError("`ran_at` is after the year 9999 in UTC")


def to_milliseconds(instant: datetime) -> int:
    """Unix milliseconds, truncated and never rounded. Exact: no float on the way."""
    since = instant - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000


def from_milliseconds(milliseconds: int) -> datetime:
    """The UTC instant of Unix milliseconds."""
    seconds, rest = divmod(milliseconds, 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=rest * 1000)


_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
