"""What the filters of a unit are filled with: a key of 64 bits for each run and each account event of its chains.

``since`` is Unix seconds. A chain's rows are those of all its topic ids: a run may be a copy of one in a topic that was
later made again.
"""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from clickhouse_connect.driver.client import Client

from sinks.accounts import EVENTS
from sinks.ledger import Chain, batch_month

_OF_CHAIN: Final = "topic = {topic:String} AND kafka_partition = {partition:UInt16}"
_RUNS: Final = "kind = 'run'"


def event_keys(client: Client, chain: Chain) -> npt.NDArray[np.uint64]:
    """Keys of the chain's account events."""
    return _keys(client, "event_id", EVENTS, _of(chain))


def recent_run_keys(client: Client, chain: Chain, since: float) -> npt.NDArray[np.uint64]:
    """Keys of the chain's runs in the batch month of that instant, and in all later ones."""
    return _keys(client, "run_id", f"{_RUNS} AND batch_month >= {{month:UInt32}}", _of(chain, since))


def older_months(client: Client, chain: Chain, since: float) -> list[int]:
    """The batch months before those of `recent_run_keys`, newest first: with them, they hold every run once."""
    found = client.query(
        f"SELECT DISTINCT batch_month FROM ledger WHERE {_OF_CHAIN} AND batch_month < {{month:UInt32}} "
        "ORDER BY batch_month DESC",
        parameters=_of(chain, since),
    )
    return [month for (month,) in found.result_rows]


def run_keys_of(client: Client, chain: Chain, month: int) -> npt.NDArray[np.uint64]:
    """Keys of the chain's runs in one batch month."""
    return _keys(client, "run_id", f"{_RUNS} AND batch_month = {month:d}", _of(chain))


def key_of(column: str) -> str:
    """SQL: a duplicate filter's key of a UUID. `streams.rules.records.id_keys` is the same in numpy, and a test holds
    them equal.
    """
    return f"bitXor(reinterpretAsUInt64({column}), toUInt64(toUInt128({column})))"


def _keys(client: Client, column: str, condition: str, parameters: dict[str, Any]) -> npt.NDArray[np.uint64]:
    table = client.query_arrow(
        f"SELECT {key_of(column)} AS key FROM ledger WHERE {_OF_CHAIN} AND {condition}", parameters=parameters
    )
    return np.asarray(table.column("key").to_numpy(), np.uint64)


def _of(chain: Chain, since: float | None = None) -> dict[str, Any]:
    place: dict[str, Any] = {"topic": chain.topic, "partition": chain.partition}
    if since is None:
        return place
    return place | {"month": batch_month(int(since * 1000))}
