"""Every question that is asked of the ledger, one function each: ``question(client, ...)`` → plain values.

The worker's own questions come first, then those of people, which the CLI and the read API share.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import numpy as np
import numpy.typing as npt
from clickhouse_connect.driver.client import Client

from schemas.catalogue import Catalogue
from schemas.problem import Problem
from sinks.clickhouse import DatabaseError
from sinks.ledger import Chain

__all__ = ["DatabaseError", "find_runs", "pin_catalogue", "recent_run_keys", "token_window"]

RUN_KEY_SQL: Final = "bitXor(reinterpretAsUInt64(run_id), toUInt64(toUInt128(run_id)))"
"""The duplicate filter's key; `streams.intake.run_keys` is the same in numpy, and a test holds them equal."""

_RUNS_OF_CHAIN: Final = "topic = {topic:String} AND kafka_partition = {partition:UInt16} AND kind = 'run'"


def recent_run_keys(client: Client, chain: Chain, since: float) -> npt.NDArray[np.uint64]:
    """Filter keys of the chain's runs recorded since then (Unix seconds), over all topic ids."""
    return _run_keys(client, chain, since, "batch_month >= {month:UInt32} - 1 AND recorded_at >= {since:DateTime64(3)}")


def older_run_keys(client: Client, chain: Chain, since: float, month: int) -> npt.NDArray[np.uint64]:
    """Filter keys of one batch month's runs recorded before then."""
    return _run_keys(client, chain, since, f"batch_month = {month:d} AND recorded_at < {{since:DateTime64(3)}}")


def months_before(client: Client, chain: Chain, since: float) -> list[int]:
    """Batch months that hold rows of the chain recorded before then, newest first."""
    found = client.query(
        "SELECT DISTINCT batch_month FROM ledger WHERE batch_month <= {month:UInt32} AND topic = {topic:String} "
        "AND kafka_partition = {partition:UInt16} AND recorded_at < {since:DateTime64(3)} ORDER BY batch_month DESC",
        parameters=_since(chain, since),
    )
    return [month for (month,) in found.result_rows]


def _run_keys(client: Client, chain: Chain, since: float, condition: str) -> npt.NDArray[np.uint64]:
    table = client.query_arrow(
        f"SELECT {RUN_KEY_SQL} AS key FROM ledger WHERE {_RUNS_OF_CHAIN} AND {condition}",
        parameters=_since(chain, since),
    )
    return np.asarray(table.column("key").to_numpy(), np.uint64)


def _since(chain: Chain, since: float) -> dict[str, Any]:
    instant = datetime.fromtimestamp(since, UTC)
    return {
        "topic": chain.topic,
        "partition": chain.partition,
        "since": instant,
        "month": instant.year * 100 + instant.month,
    }


def find_runs(
    client: Client, identities: Iterable[tuple[str, UUID]]
) -> list[tuple[tuple[str, UUID], str, tuple[Any, ...]]]:
    """The debits under these (workspace id, run id): identity, position in Kafka, and the facts that a copy must match."""
    wanted = set(identities)
    found = client.query(
        "SELECT workspace_id, run_id, concat(topic, '[', toString(kafka_partition), ']@', toString(kafka_offset)), "
        "table_id, column_id, row_id, action, outcome, own_api_key, toUnixTimestamp64Milli(ran_at), triggered_by, actor "
        "FROM ledger WHERE kind = 'run' AND workspace_id IN %(workspaces)s AND run_id IN %(runs)s",
        parameters={
            "workspaces": sorted({workspace for workspace, _ in wanted}),
            "runs": sorted(str(run) for _, run in wanted),
        },
    )
    return [((row[0], row[1]), row[2], tuple(row[3:])) for row in found.result_rows if (row[0], row[1]) in wanted]


def token_window(client: Client) -> int:
    """How many insert tokens the ledger's table remembers."""
    (engine,) = client.query(
        "SELECT engine_full FROM system.tables WHERE database = currentDatabase() AND name = 'ledger'"
    ).result_rows[0]
    _, _, tail = engine.partition("non_replicated_deduplication_window = ")
    return int(tail.split(",")[0]) if tail else 0


def pin_catalogue(client: Client, catalogue: Catalogue) -> None:
    """Record versions at their first use. Problem when one was changed, removed, or comes after its own time.

    A version is immutable and deployed before it takes effect, so that a run is priced the same whenever it is rated.
    """
    pinned = {
        number: (content, starts)
        for number, content, starts in client.query(
            "SELECT number, any(content_hash), any(effective_from) FROM catalogue_versions GROUP BY number"
        ).result_rows
    }
    by_number = {version.number: version for version in catalogue.versions}
    for number, (content, _) in sorted(pinned.items()):
        if number not in by_number:
            raise Problem("a catalogue version is gone", f"version {number} has priced runs", "Restore its file.")
        if by_number[number].content_hash != content:
            raise Problem(
                "a catalogue version was changed",
                f"{by_number[number].file}: version {number} has priced runs with another content",
                "Restore the file; a new price is a new version.",
            )
    for version in catalogue.versions:
        if version.number in pinned:
            continue
        ((late,),) = client.query(
            "SELECT count() FROM ledger WHERE kind = 'run' AND ran_at >= {starts:DateTime64(3)}",
            parameters={"starts": version.effective_from},
        ).result_rows
        if late:
            raise Problem(
                "a catalogue version comes too late",
                f"{version.file}: {late:,} runs since its effective_from are priced already",
                "Give it an effective_from in the future.",
            )
        client.insert(
            "catalogue_versions",
            [[version.number, version.content_hash, version.effective_from, version.file]],
            column_names=["number", "content_hash", "effective_from", "file"],
        )
