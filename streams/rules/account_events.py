"""Account events: from records to ledger rows. Pure: no I/O, no clock.

A chunk of account events is rare and small; it is rated event by event, against what the ledger and the rows on their
way there know (`Known`). Each record becomes exactly one row.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.account import AccountEvent, LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.cell_run import to_milliseconds
from schemas.codec import decode_account_event
from schemas.credits import PER_CREDIT, Millicredits, parse_credits
from schemas.ledger import ACCOUNT_KINDS, Identity, Kind, Pool, Reason, number_of
from schemas.plan import PlanLists
from sinks.accounts import AccountFact, RunToReverse
from sinks.columns import ACCOUNT_SCHEMA, decimals, instants
from sinks.ledger import Chain
from streams.rules.duplicates import Original
from streams.rules.periods import day_of
from streams.rules.records import Record, Refusal, decoded, headers_text, id_keys, partition_of, redrive_of

_NIL: Final = UUID(int=0)
NO_LINE: Final = -PER_CREDIT
"""In the ledger's ``remaining_below``, where there is no absolute line."""


class Received(NamedTuple):
    """One record and what it is: an account event, or why it is none."""

    record: Record
    event: AccountEvent | Refusal


class Known(NamedTuple):
    """What is known of a chunk's ids."""

    events: Mapping[Identity, Original]
    runs: Mapping[Identity, RunToReverse]


NOTHING_KNOWN: Final = Known({}, {})


def known_of(events: Mapping[Identity, tuple[str, UUID, str, AccountFact]], runs: Iterable[RunToReverse]) -> Known:
    """From the ledger's answers (`sinks.accounts.known_events`, `runs_to_reverse`)."""
    originals = {
        identity: Original(position, substance_of(row, run_id, actor))
        for identity, (position, run_id, actor, row) in events.items()
    }
    return Known(originals, {Identity(run.workspace_id, run.run_id): run for run in runs})


class RatedEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the account chain before it is in the ledger, in plain values; instants in Unix ms, credits in
    millicredits.
    """

    record: Record
    kind: Kind
    reason: Reason
    workspace_id: str = ""
    event_id: UUID = _NIL
    run: RunToReverse | None = None
    run_id: UUID = _NIL
    effective_ms: int = 0
    ran_ms: int
    actor: str = ""
    pool: Pool = Pool.NONE
    credits: int = 0
    plan: str = ""
    allowance: int = 0
    restart_period: bool = False
    thresholds: tuple[int, ...] = ()
    remaining_below: Millicredits | None = None
    detail: str = ""


def with_rows(known: Known, rows: Iterable[RatedEvent], chain: Chain) -> Known:
    """With the events of rows on their way to the ledger. A run counts as known only once it is there."""
    events = {
        Identity(row.workspace_id, row.event_id): Original(
            chain.position(row.record.offset), substance_of(fact_of(row), row.run_id, row.actor)
        )
        for row in rows
        if row.kind in ACCOUNT_KINDS
    }
    return known._replace(events={**events, **known.events})


def receive(records: Sequence[Record], partition: int, partitions: int) -> list[Received]:
    """Decode and check, in the published order: ``too_large``, ``malformed``, ``misrouted``."""
    return [Received(record, _decode(record, partition, partitions)) for record in records]


def _decode(record: Record, partition: int, partitions: int) -> AccountEvent | Refusal:
    event = decoded(record.value, decode_account_event)
    if isinstance(event, Refusal):
        return event
    home = partition_of(event.workspace_id, partitions)
    if record.key != event.workspace_id.encode():
        return Refusal(Reason.MISROUTED, f"the Kafka key is not the workspace_id {event.workspace_id!r}")
    if home != partition:
        return Refusal(Reason.MISROUTED, f"partition {partition}, but the key's murmur2 hash gives {home}")
    return event


def event_identities(chunk: Iterable[Received]) -> list[Identity]:
    """The ids under which the ledger may know these events."""
    events = [received.event for received in chunk if not isinstance(received.event, Refusal)]
    return [Identity(event.workspace_id, event.event_id) for event in events]


def keys_of(chunk: Iterable[Received]) -> npt.NDArray[np.uint64]:
    """The filter's keys of the events, refused ones left out."""
    return id_keys(b"".join([event_id.bytes for _, event_id in event_identities(chunk)]))


def to_look_up(chunk: Iterable[Received], suspected: Iterable[bool]) -> list[Received]:
    """Events that the ledger may know, by the masks of their `keys_of`, and those that name a run."""
    events = [received for received in chunk if not isinstance(received.event, Refusal)]
    return [it for it, known in zip(events, suspected, strict=True) if known or isinstance(it.event, RunReversed)]


def run_identities(chunk: Iterable[Received]) -> list[Identity]:
    """The runs that these events reverse."""
    return [_run_of(it.event) for it in chunk if isinstance(it.event, RunReversed)]


def _run_of(event: RunReversed) -> Identity:
    return Identity(event.workspace_id, event.run_id)


def rate_events(chunk: Sequence[Received], chain: Chain, known: Known, plans: PlanLists) -> list[RatedEvent]:
    """Rows of a chunk of this chain, in its order.

    An event id that is known is a duplicate, or a dead letter where it says something else; a run is reversed once,
    under whatever event ids; what names an unknown run or plan is set aside.
    """
    standing = dict(known.events)
    reversed_at = {identity: run.reversed_at for identity, run in known.runs.items() if run.reversed_at}
    rows: list[RatedEvent] = []
    for received in chunk:
        record, event = received
        if isinstance(event, Refusal):
            rows.append(_set_aside(record, event))
            continue
        identity = Identity(event.workspace_id, event.event_id)
        if first := standing.get(identity):
            rows.append(_copy(record, event, first))
            continue
        row = _fresh(record, event, known, reversed_at, plans)
        if row.kind in ACCOUNT_KINDS:
            position = chain.position(record.offset)
            standing[identity] = Original(position, substance(event))
            if isinstance(event, RunReversed):
                reversed_at[_run_of(event)] = position
        rows.append(row)
    return rows


def substance(event: AccountEvent) -> tuple[object, ...]:
    """What a copy must say as well: every field that we know, times in milliseconds."""
    actor = event.actor or ""
    match event:
        case PlanChanged():
            return (Kind.PLAN, actor, event.plan, to_milliseconds(event.effective_at), event.restart_period)
        case PremiumGranted():
            return (Kind.GRANT, actor, parse_credits(event.credits), to_milliseconds(event.effective_at))
        case RunReversed():
            return (Kind.REVERSAL, actor, event.run_id)
        case LimitsChanged():
            return (Kind.LIMITS, actor, _percents(event), _below(event))


def substance_of(row: AccountFact, run_id: UUID, actor: str) -> tuple[object, ...]:
    """The same of an event that is in the ledger."""
    match row.kind:
        case Kind.PLAN:
            return (row.kind, actor, row.plan, row.effective_ms, row.restart_period)
        case Kind.GRANT:
            return (row.kind, actor, row.allowance, row.effective_ms)
        case Kind.REVERSAL:
            return (row.kind, actor, run_id)
    return (row.kind, actor, row.thresholds, row.remaining_below)


def _percents(event: LimitsChanged) -> tuple[int, ...]:
    """100 is always there; a list that was not given falls back to the plan's."""
    return () if event.thresholds is None else tuple(sorted({100, *event.thresholds}))


def _below(event: LimitsChanged) -> Millicredits | None:
    return None if event.remaining_below is None else parse_credits(event.remaining_below)


def _fresh(
    record: Record, event: AccountEvent, known: Known, reversed_at: Mapping[Identity, str], plans: PlanLists
) -> RatedEvent:
    plain: dict[str, Any] = {
        "record": record, "workspace_id": event.workspace_id, "event_id": event.event_id, "actor": event.actor or "",
    }  # fmt: skip
    match event:
        case PlanChanged():
            return _plan(event, plain, plans)
        case PremiumGranted():
            at = to_milliseconds(event.effective_at)
            return RatedEvent(
                kind=Kind.GRANT, reason=Reason.PREMIUM_GRANTED, pool=Pool.PREMIUM, effective_ms=at, ran_ms=at,
                allowance=parse_credits(event.credits), **plain,
            )  # fmt: skip
        case LimitsChanged():
            return RatedEvent(
                kind=Kind.LIMITS, reason=Reason.LIMITS_CHANGED, ran_ms=record.timestamp, thresholds=_percents(event),
                remaining_below=_below(event), **plain,
            )  # fmt: skip
        case RunReversed():
            return _reversal(event, plain, known.runs.get(_run_of(event)), reversed_at)


def _plan(event: PlanChanged, plain: dict[str, Any], plans: PlanLists) -> RatedEvent:
    at = to_milliseconds(event.effective_at)
    plan = plans.find(event.plan, at)
    if plan is None:
        refusal = Refusal(Reason.UNKNOWN_PLAN, f"plan {event.plan!r} is in no plan list")
        return _set_aside(plain["record"], refusal, event)
    return RatedEvent(
        kind=Kind.PLAN, reason=Reason.PLAN_CHANGED, pool=Pool.ENRICHMENT, effective_ms=at, ran_ms=at, plan=plan.id,
        allowance=plan.allowance, restart_period=event.restart_period, thresholds=plan.thresholds,
        remaining_below=plan.remaining_below, **plain,
    )  # fmt: skip


def _reversal(
    event: RunReversed, plain: dict[str, Any], run: RunToReverse | None, reversed_at: Mapping[Identity, str]
) -> RatedEvent:
    if run is None:
        why = f"no run {event.run_id} of {event.workspace_id} in the ledger"  # another workspace may have this run
        return _set_aside(plain["record"], Refusal(Reason.UNKNOWN_RUN, why), event)
    plain |= {"run": run, "run_id": run.run_id, "ran_ms": run.ran_ms}
    if before := reversed_at.get(_run_of(event)):
        return RatedEvent(
            kind=Kind.DUPLICATE, reason=Reason.DUPLICATE, detail=f"the run was reversed at {before}", **plain
        )
    return RatedEvent(
        kind=Kind.REVERSAL, reason=Reason.REVERSED, pool=Pool(run.pool), credits=-run.credits,
        detail="what the run drew is given back", **plain,
    )  # fmt: skip


def _copy(record: Record, event: AccountEvent, first: Original) -> RatedEvent:
    if first.substance != substance(event):
        detail = f"differs from the event at {first.position}, which stands"
        return _set_aside(record, Refusal(Reason.CONFLICTING_DUPLICATE, detail), event)
    return RatedEvent(
        record=record, kind=Kind.DUPLICATE, reason=Reason.DUPLICATE, workspace_id=event.workspace_id,
        event_id=event.event_id, run_id=event.run_id if isinstance(event, RunReversed) else _NIL,
        actor=event.actor or "", ran_ms=record.timestamp, detail=f"a duplicate of the event at {first.position}",
    )  # fmt: skip


def _set_aside(record: Record, refusal: Refusal, event: AccountEvent | None = None) -> RatedEvent:
    return RatedEvent(
        record=record, kind=Kind.DEAD_LETTER, reason=refusal.reason, detail=refusal.detail, ran_ms=record.timestamp,
        workspace_id=event.workspace_id if event else "", event_id=event.event_id if event else _NIL,
        run_id=event.run_id if isinstance(event, RunReversed) else _NIL,
        actor=(event.actor or "") if event else "",
    )  # fmt: skip


def ledger_rows(chain: Chain, after: int, rows: Sequence[RatedEvent], batch_month: int) -> pa.Table:
    """The chunk as rows of the ledger."""
    runs = [row.run for row in rows]
    offsets = np.array([row.record.offset for row in rows], np.int64)
    gaps = np.diff(offsets, prepend=after if after >= 0 else offsets[0] - 1)
    letters = [row.record if row.kind == Kind.DEAD_LETTER else None for row in rows]
    columns: dict[str, Any] = {
        "topic": [chain.topic] * len(rows),
        "topic_id": [chain.topic_id] * len(rows),
        "kafka_partition": [chain.partition] * len(rows),
        "kafka_offset": offsets,
        "offset_gap": gaps,
        "recorded_at": instants([row.record.timestamp for row in rows]),
        "kind": [number_of(row.kind) for row in rows],
        "run_id": [row.run_id.bytes for row in rows],
        **{
            name: [getattr(run, name) if run else "" for run in runs]
            for name in ("table_id", "column_id", "row_id", "action")
        },
        "workspace_id": [row.workspace_id for row in rows],
        "outcome": [0] * len(rows),
        "own_api_key": [False] * len(rows),
        "ran_at": instants([row.ran_ms for row in rows]),
        "triggered_by": [""] * len(rows),
        "actor": [row.actor for row in rows],
        "pool": [number_of(row.pool) for row in rows],
        "credits": decimals(np.array([row.credits for row in rows], np.int64)),
        "reason": [number_of(row.reason) for row in rows],
        "catalogue": [run.catalogue if run else 0 for run in runs],
        "detail": [row.detail for row in rows],
        "raw": [b"" if letter is None else letter.value or b"" for letter in letters],
        "raw_key": [b"" if letter is None else letter.key or b"" for letter in letters],
        "raw_headers": ["" if letter is None else headers_text(letter.headers) for letter in letters],
        "redrive_of": [redrive_of(row.record.headers) for row in rows],
        "batch_month": [batch_month] * len(rows),
        **_account_columns(rows),
    }
    return pa.table([_column(columns[field.name], field.type) for field in ACCOUNT_SCHEMA], schema=ACCOUNT_SCHEMA)


def _account_columns(rows: Sequence[RatedEvent]) -> dict[str, Any]:
    below = [NO_LINE if row.remaining_below is None else row.remaining_below for row in rows]
    return {
        "event_id": [row.event_id.bytes for row in rows],
        "effective_at": instants([row.effective_ms for row in rows]),
        "plan": [row.plan for row in rows],
        "allowance": decimals(np.array([row.allowance for row in rows], np.int64)),
        "restart_period": [row.restart_period for row in rows],
        "thresholds": [list(row.thresholds) for row in rows],
        "remaining_below": decimals(np.array(below, np.int64)),
    }


def _column(values: Any, kind: pa.DataType) -> pa.Array:
    return values if isinstance(values, pa.Array) else pa.array(values, kind)


def fact_of(row: RatedEvent) -> AccountFact:
    """A row as the ledger would give it back."""
    return AccountFact(
        workspace_id=row.workspace_id,
        kind=row.kind,
        recorded_ms=row.record.timestamp,
        offset=row.record.offset,
        effective_ms=row.effective_ms,
        plan=row.plan,
        allowance=row.allowance,
        restart_period=row.restart_period,
        thresholds=row.thresholds,
        remaining_below=row.remaining_below,
        pool=str(row.pool),
        credits=row.credits,
        day=day_of(row.ran_ms),
    )
