"""From decoded records (`streams.rules.intake`) to ledger rows: rate ▸ decide copies ▸ rows. Without I/O.

A *take* is everything that waited for a unit at one moment: some chunks of one partition, in Kafka's order. Each of its
records becomes exactly one row.
"""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.ledger import KINDS, OUTCOMES, REASONS, Identity, Kind, Pool, Reason, number_of
from sinks.columns import LEDGER_SCHEMA, constant, decimals, instants, sparse
from sinks.ledger import Chain
from streams.rules.balances import Debits
from streams.rules.duplicates import Candidate, Original, Verdict
from streams.rules.intake import TEXTS, Runs
from streams.rules.messages import Source
from streams.rules.periods import DAY_MS
from streams.rules.rating import RatedRuns, RatingTable
from streams.rules.records import Record, Refusal, headers_text, redrive_of

_RUN: Final = number_of(Kind.RUN)
_DEAD_LETTER: Final = number_of(Kind.DEAD_LETTER)


class Take(msgspec.Struct, frozen=True, eq=False):
    """Rated records of one chain. ``debits`` is changed where a copy is decided; refusals are in it already."""

    chain: Chain
    after: int
    """The offset before the first record: that of the previous take, or the mark."""
    records: list[Record]
    """As they came, for the bytes of dead letters; emptied once the rows are made."""
    runs: Runs
    debits: RatedRuns
    details: dict[int, str]
    """Row → what a person should know about it: duplicates and dead letters only."""

    @property
    def last(self) -> int:
        """The offset of the last record."""
        return int(self.runs.offsets[-1])

    def new_run_keys(self) -> npt.NDArray[np.uint64]:
        """Filter keys of the rows that occupy their run ids."""
        keys: npt.NDArray[np.uint64] = self.runs.keys[self.debits.kind == _RUN]
        return keys


def rate_take(
    chain: Chain, after: int, chunks: Sequence[Sequence[Record]], parts: Sequence[Runs], table: RatingTable
) -> Take:
    """Rate decoded chunks (``parts``, by `read_chunk`): everything that one event alone, and the catalogue, decide."""
    runs = _join_runs(parts)
    debits = table.rate(runs.coded("action"), runs.outcome, runs.own_api_key, runs.ran_ms)
    take = Take(chain, after, [record for chunk in chunks for record in chunk], runs, debits, {})
    for row in map(int, np.flatnonzero(debits.reason == number_of(Reason.UNKNOWN_ACTION))):
        take.details[row] = f"action {runs.texts('action', [row])[0]!r} is in no version of the catalogue"
    for row, refusal in runs.refusals.items():
        _overrule(take, row, Verdict(Kind.DEAD_LETTER, refusal.reason, refusal.detail))
    return take


def _join_runs(parts: Sequence[Runs]) -> Runs:
    """Consecutive chunks as one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0] + [len(part.offsets) for part in parts])
    refusals: dict[int, Refusal] = {
        row + int(start): refusal
        for start, part in zip(starts, parts, strict=False)
        for row, refusal in part.refusals.items()
    }
    arrays = {
        name: np.concatenate([getattr(part, name) for part in parts])
        for name in ("offsets", "recorded_ms", "ran_ms", "keys", "own_api_key", "outcome")
    }
    run_ids = b"".join([part.run_ids for part in parts])
    lean = [run for part in parts for run in part.lean] if all(part.lean for part in parts) else []
    made = {} if lean else {name: pa.concat_arrays([part.columns[name] for part in parts]) for name in parts[0].columns}
    return Runs(**arrays, run_ids=run_ids, lean=lean, made=made, refusals=refusals)


def join_takes(takes: Sequence[Take]) -> Take:
    """Consecutive takes as one."""
    if len(takes) == 1:
        return takes[0]
    starts = np.cumsum([0] + [len(take.records) for take in takes]).tolist()
    details = {
        row + start: detail for start, take in zip(starts, takes, strict=False) for row, detail in take.details.items()
    }
    debits = RatedRuns(*(
        np.concatenate([getattr(take.debits, name) for take in takes]) for name in RatedRuns.__struct_fields__
    ))  # fmt: skip
    records = [record for take in takes for record in take.records]
    return Take(takes[0].chain, takes[0].after, records, _join_runs([take.runs for take in takes]), debits, details)


def candidates(take: Take, suspected: npt.NDArray[np.bool_]) -> list[Candidate]:
    """The suspected rows that have an identity, in Kafka's order."""
    rows = [row for row in map(int, np.flatnonzero(suspected)) if row not in take.runs.refusals]
    return [
        Candidate(row, identity, Original(_position(take, row), substance), bool(take.debits.kind[row] == _RUN))
        for row, (identity, substance) in zip(rows, _identities(take, rows), strict=True)
    ]


def originals(take: Take, keys: npt.NDArray[np.uint64]) -> dict[Identity, Original]:
    """Debits of a take that is on its way to the ledger and whose filter keys are among ``keys``."""
    rows = list(map(int, np.flatnonzero(np.isin(take.runs.keys, keys) & (take.debits.kind == _RUN))))
    return {
        identity: Original(_position(take, row), substance)
        for row, (identity, substance) in zip(rows, _identities(take, rows), strict=True)
    }


def _position(take: Take, row: int) -> str:
    return take.chain.position(int(take.runs.offsets[row]))


def _identities(take: Take, rows: list[int]) -> list[tuple[Identity, tuple[object, ...]]]:
    runs = take.runs
    texts = zip(*(runs.texts(name, rows) for name in TEXTS), strict=True)
    found: list[tuple[Identity, tuple[object, ...]]] = []
    for row, (workspace_id, table_id, column_id, row_id, action, triggered_by, actor) in zip(rows, texts, strict=True):
        substance = (
            table_id, column_id, row_id, action, str(OUTCOMES[runs.outcome[row] - 1]), bool(runs.own_api_key[row]),
            int(runs.ran_ms[row]), triggered_by, actor,
        )  # fmt: skip
        found.append((Identity(workspace_id, runs.run_id(row)), substance))
    return found


def apply_verdicts(take: Take, verdicts: dict[int, Verdict]) -> None:
    """Turn copies into duplicates and conflicting duplicates."""
    for row, verdict in verdicts.items():
        _overrule(take, row, verdict)


def _overrule(take: Take, row: int, verdict: Verdict) -> None:
    debits = take.debits
    debits.kind[row], debits.reason[row] = number_of(verdict.kind), number_of(verdict.reason)
    debits.pool[row], debits.credits[row], debits.catalogue[row] = number_of(Pool.NONE), 0, 0
    take.details[row] = verdict.detail


def drawn(take: Take) -> Debits:
    """What the take's rows draw, for the fold of balances."""
    workspaces, debits = take.runs.coded("workspace_id"), take.debits
    return Debits(
        workspaces=workspaces.names,
        codes=workspaces.codes,
        pool=debits.pool,
        credits=debits.credits,
        day=take.runs.ran_ms // DAY_MS,
        recorded_ms=take.runs.recorded_ms,
        offsets=take.runs.offsets,
    )


def source_of(take: Take, row: int) -> Source:
    """A record of the take, as an alert names the one that caused it."""
    runs = take.runs
    text = {name: runs.texts(name, [row])[0] for name in ("table_id", "column_id", "action")}
    return Source(take.chain, int(runs.offsets[row]), runs.run_id(row), **text)


def ledger_rows(take: Take) -> pa.Table:
    """The take as rows of the ledger, without ``batch_month``: that is the batch's, not the take's."""
    runs, debits, length = take.runs, take.debits, len(take.records)
    dead = debits.kind == _DEAD_LETTER
    ran_ms = np.where(dead, runs.recorded_ms, runs.ran_ms) if dead.any() else runs.ran_ms
    arrays = {
        "topic": constant(take.chain.topic, length, pa.string()),
        "topic_id": constant(take.chain.topic_id, length, pa.string()),
        "kafka_partition": constant(take.chain.partition, length, pa.uint16()),
        "kafka_offset": pa.array(runs.offsets.astype(np.uint64)),
        "offset_gap": pa.array(_gaps(take).astype(np.uint64)),
        "recorded_at": instants(runs.recorded_ms),
        "kind": pa.array(debits.kind),
        **runs.columns,
        "outcome": pa.array(runs.outcome),
        "own_api_key": pa.array(runs.own_api_key),
        "ran_at": instants(ran_ms),
        "pool": pa.array(debits.pool),
        "credits": decimals(debits.credits),
        "reason": pa.array(debits.reason),
        "catalogue": pa.array(debits.catalogue),
        **_sparse_columns(take, dead),
        "redrive_of": _redrives(take.records),
    }
    return pa.table([arrays[field.name] for field in _TAKE_SCHEMA], schema=_TAKE_SCHEMA)


_TAKE_SCHEMA: Final = pa.schema([field for field in LEDGER_SCHEMA if field.name != "batch_month"])


def _gaps(take: Take) -> npt.NDArray[np.int64]:
    """Distance to the record before: 1, or more where compaction or transaction markers left a gap in Kafka."""
    gaps = np.diff(take.runs.offsets, prepend=take.after)
    if take.after < 0:
        gaps[0] = 1
    return gaps


def _sparse_columns(take: Take, dead: npt.NDArray[np.bool_]) -> dict[str, pa.Array]:
    """Details, and for dead letters the bytes as they came."""
    letters = {row: take.records[row] for row in map(int, np.flatnonzero(dead))}
    found: dict[str, tuple[str | bytes, Mapping[int, str | bytes]]] = {
        "detail": ("", take.details),
        "raw": (b"", {row: record.value or b"" for row, record in letters.items()}),
        "raw_key": (b"", {row: record.key or b"" for row, record in letters.items()}),
        "raw_headers": ("", {row: headers_text(record.headers) for row, record in letters.items()}),
    }
    length = len(take.records)
    return {name: sparse(*told, length, LEDGER_SCHEMA.field(name).type) for name, told in found.items()}


def _redrives(records: Sequence[Record]) -> pa.Array:
    """The dead letters that these records are sent again for; nearly always none."""
    found = {row: redrive_of(record.headers) for row, record in enumerate(records) if record.headers}
    return sparse("", found, len(records), pa.string())


def counts(take: Take) -> dict[str, int]:
    """How many rows of each kind and reason, for counters and the live view: ``run/charged`` → 12."""
    pairs, numbers = np.unique(take.debits.kind.astype(np.int64) * 256 + take.debits.reason, return_counts=True)
    return {
        f"{KINDS[pair // 256 - 1]}/{REASONS[pair % 256 - 1]}": number
        for pair, number in zip(pairs.tolist(), numbers.tolist(), strict=True)
    }
