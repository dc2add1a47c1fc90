"""Kafka records of cell runs made by hand, and the road that a unit drives them along: what the meter's tests share."""

import json
import threading
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
import pyarrow as pa
from clickhouse_connect.driver.client import Client
from hypothesis import HealthCheck, settings

from schemas.catalogue import EXAMPLE_CATALOGUES, Catalogue
from schemas.cell_run import from_milliseconds
from schemas.ledger import KINDS, POOLS, REASONS, Identity, Reason
from sinks.ledger import Batch, Chain, Ledger
from streams.rules.duplicates import KeyFilter, Original, decide
from streams.rules.intake import read_chunk
from streams.rules.rating import RatingTable
from streams.rules.rows import Take, apply_verdicts, candidates, ledger_rows, originals, rate_take
from tests.ledger_rows import AUGUST_MS

STEADY: Final = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
"""The same examples on every machine and at every load. `tests.conftest` makes it the default."""

EXAMPLES: Final = Catalogue.load(EXAMPLE_CATALOGUES)


class Record(msgspec.Struct):
    """One Kafka record. ``timestamp`` is the broker's append time, Unix ms."""

    offset: int
    value: bytes | None
    key: bytes | None = b"ws_1"
    timestamp: int = AUGUST_MS
    headers: Sequence[tuple[str, bytes]] = ()


class Row(NamedTuple):
    """What a ledger row says, in words."""

    offset: int
    kind: str
    reason: str
    pool: str
    credits: Decimal
    catalogue: int
    detail: str


def event(**fields: Any) -> bytes:
    """A cell run as JSON; without ``fields`` a run of `enrich_person` that returned data at `AUGUST_MS`."""
    return json.dumps(fields_of(**fields)).encode()


def fields_of(**fields: Any) -> dict[str, Any]:
    """The same as a dictionary. ``run`` numbers the run, ``ran_ms`` dates it in Unix ms; None leaves a field out."""
    ran_at = timestamp_text(fields.pop("ran_ms", AUGUST_MS))
    plain = {
        "run_id": str(run_id(fields.pop("run", 1))),
        "workspace_id": "ws_1",
        "table_id": "tbl_1",
        "column_id": "col_1",
        "row_id": "row_1",
        "action": "enrich_person",
        "outcome": "data",
        "ran_at": ran_at,
    }
    return {name: value for name, value in (plain | fields).items() if value is not None}


def run_id(number: int) -> UUID:
    """The id of run ``number``, shaped like a UUIDv7."""
    return UUID(int=0x0190F4A0_0000_7000_8000_000000000000 + number)


def timestamp_text(milliseconds: int) -> str:
    """Unix ms as RFC 3339 in UTC."""
    return from_milliseconds(milliseconds).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Road:
    """One partition's road without I/O, as `streams.unit` drives it. The ledger is a dictionary of debits."""

    def __init__(
        self,
        catalogue: Catalogue = EXAMPLES,
        *,
        partition: int = 0,
        partitions: int = 1,
        filter_bytes_max: int = 1 << 16,
        is_complete: bool = True,
        chain: Chain | None = None,
    ) -> None:
        self.chain: Final = chain or Chain("cell-runs", "topic-1", partition)
        self.last = -1
        self.ledger: dict[Identity, Original] = {}
        self.unwritten: list[Take] = []
        self.run_filter: Final = KeyFilter(filter_bytes_max)
        self.run_filter.is_complete = is_complete
        self._partitions = partitions
        self._table = RatingTable(catalogue)

    def take(self, *chunks: Sequence[Record]) -> Take:
        """Drive one take."""
        parts = [read_chunk(chunk, self.chain.partition, self._partitions) for chunk in chunks]
        take = rate_take(self.chain, self.last, chunks, parts, self._table)
        self._decide_copies(take)
        self.run_filter.add(take.new_run_keys())
        self.unwritten.append(take)
        self.last = take.last
        return take

    def table(self, *chunks: Sequence[Record]) -> pa.Table:
        """Drive one take; its rows as they go into the ledger."""
        return ledger_rows(self.take(*chunks))

    def rows(self, *chunks: Sequence[Record]) -> list[Row]:
        """Drive one take; its rows in words."""
        return in_words(self.table(*chunks))

    def reasons(self, *records: Record) -> list[Reason]:
        """Drive one take of one chunk; why each row is what it is."""
        return [Reason(row.reason) for row in self.rows(records)]

    def write(self) -> None:
        """What was on its way is now in the ledger."""
        for take in self.unwritten:
            self.ledger |= originals(take, take.runs.keys)
        self.unwritten.clear()

    def _decide_copies(self, take: Take) -> None:
        suspicion = self.run_filter.suspect(take.runs.keys)
        found = candidates(take, suspicion.any)
        known: dict[Identity, Original] = {}
        if suspicion.before.any():
            for earlier in self.unwritten:
                known |= originals(earlier, take.runs.keys[suspicion.before])
        for candidate in found:
            if suspicion.before[candidate.row] and candidate.identity in self.ledger:
                known[candidate.identity] = self.ledger[candidate.identity]
        apply_verdicts(take, decide(found, known))


def in_words(table: pa.Table) -> list[Row]:
    """Ledger rows with their numbers as words."""
    names = ("kafka_offset", "kind", "reason", "pool", "credits", "catalogue", "detail")
    return [
        Row(offset, str(KINDS[kind - 1]), str(REASONS[reason - 1]), str(POOLS[pool - 1]), credits, catalogue, detail)
        for offset, kind, reason, pool, credits, catalogue, detail in zip(
            *(table.column(name).to_pylist() for name in names), strict=True
        )
    ]


def write_rows(client: Client, chain: Chain, rows: pa.Table) -> None:
    """Append a take's rows to the ledger by its protocol."""
    ledger = Ledger(client)
    mark = ledger.mark(chain)
    month = pa.repeat(pa.scalar(202608, pa.uint32()), len(rows))
    last = rows.column("kafka_offset")[-1].as_py()
    batch = Batch(chain, mark.last, last, rows.append_column("batch_month", month))
    ledger.append(batch, mark, threading.Event())


def write_catalogue(directory: Path, *versions: tuple[int, str, dict[str, str]]) -> Path:
    """Catalogue files: number, effective_from, and action id → TOML of what is not a plain enrichment of 1 credit."""
    for number, effective_from, actions in versions:
        entries = [
            f'[[actions]]\nid = "{action}"\nname = "{action.title()}"\nprovider = "test"\n{toml}'
            for action, toml in actions.items()
        ]
        text = "\n".join([f"version = {number}", f"effective_from = {effective_from}", *entries])
        (directory / f"{number}.toml").write_text(text)
    return directory


def enrichment(price: str, **flags: str) -> str:
    """TOML of an enrichment for `write_catalogue`."""
    more = "".join(f"\n{name} = {value}" for name, value in flags.items())
    return f'category = "enrichment"\nprice = "{price}"{more}'
