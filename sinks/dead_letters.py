"""Dead letters: events that could not be metered, whether they were sent again, and what may be.

A letter is closed by a row of its topic that says it is its redrive (docs/ledger.md). Such a row names it by topic id
and position, since a topic that is made again counts its offsets afresh. Rows of other topics do not count: whoever may
write runs cannot close a letter of billing's.
"""

from collections.abc import Sequence
from typing import Any, Final

from clickhouse_connect.driver.client import Client

from schemas.answers import DeadLetter, ParkedEvent
from schemas.ledger import Position, Reason
from schemas.problem import UnknownId
from sinks.ledger import POSITION, Chain

_LETTERS: Final = f"""
SELECT letters.*, closing.position AS closed_by
FROM
(
    SELECT *, {POSITION} AS position, concat(topic_id, '/', position) AS letter
    FROM ledger WHERE kind = 'dead_letter' AND {{condition}}
) AS letters
LEFT JOIN
(
    SELECT topic, redrive_of, argMax({POSITION}, recorded_at) AS position
    FROM ledger WHERE redrive_of != '' AND {{closing}} GROUP BY topic, redrive_of
) AS closing ON letters.topic = closing.topic AND letters.letter = closing.redrive_of
"""
_RAW: Final[dict[str, str | dict[str, str]]] = {"raw": "bytes", "raw_key": "bytes"}


def _letters(
    client: Client, condition: str, order: str, parameters: dict[str, Any], closing: str = "true"
) -> list[dict[str, Any]]:
    sql = _LETTERS.format(condition=condition, closing=closing) + order
    found = client.query(sql, parameters=parameters, column_formats=_RAW)
    return [dict(zip(found.column_names, row, strict=True)) for row in found.result_rows]


def dead_letters(client: Client, reason: str, limit: int, only_open: bool = False) -> list[DeadLetter]:
    """The newest dead letters, of one reason or (empty) of all; ``only_open``: those that were not sent again."""
    rows = _letters(
        client,
        "({reason:String} = '' OR reason = {reason:String})",
        ("WHERE closed_by = '' " if only_open else "")
        + "ORDER BY letters.recorded_at DESC, kafka_partition, kafka_offset DESC LIMIT {limit:UInt32}",
        {"reason": reason, "limit": limit},
    )
    return [_shown(row) for row in rows]


def dead_letter(client: Client, position: Position) -> DeadLetter:
    """The dead letter at a position, of the newest topic of that name. UnknownId when the ledger holds none there."""
    return _shown(_at(client, position))


def parked_events(client: Client, reasons: Sequence[Reason], limit: int) -> list[ParkedEvent]:
    """Open letters of these reasons, the oldest first: sent again in this order, the event that came first stands."""
    rows = _letters(
        client,
        "has({reasons:Array(String)}, toString(reason))",
        "WHERE closed_by = '' ORDER BY letters.recorded_at, kafka_partition, kafka_offset LIMIT {limit:UInt32}",
        {"reasons": [str(reason) for reason in reasons], "limit": limit},
    )
    return [_parked(row) for row in rows]


def parked_event(client: Client, position: Position) -> ParkedEvent:
    """The letter at a position, open or not. UnknownId as `dead_letter`."""
    return _parked(_at(client, position))


def _at(client: Client, position: Position) -> dict[str, Any]:
    rows = _letters(
        client,
        "topic = {topic:String} AND kafka_partition = {partition:UInt16} AND kafka_offset = {offset:UInt64}",
        "ORDER BY letters.recorded_at DESC LIMIT 1",
        position._asdict(),
    )
    if not rows:
        raise UnknownId(
            f"no dead letter at {position}", "the ledger holds none there", "See `creditstream dead-letters list`."
        )
    return rows[0]


def redrivable(client: Client, chain: Chain, limit: int) -> list[tuple[str, bytes, bytes]]:
    """(letter, key, value) of open letters of a chain's topic and partition, over all topic ids: reversals whose run is
    in the ledger by now, the oldest first.
    """
    rows = _letters(
        client,
        "topic = {topic:String} AND kafka_partition = {partition:UInt16} AND reason = 'unknown_run'",
        "WHERE closed_by = '' AND (letters.workspace_id, letters.run_id) IN (SELECT workspace_id, run_id FROM ledger "
        "WHERE kind = 'run' AND run_id IN (SELECT run_id FROM ledger WHERE topic = {topic:String} "
        "AND kafka_partition = {partition:UInt16} AND kind = 'dead_letter' AND reason = 'unknown_run')) "
        "ORDER BY letters.recorded_at, kafka_offset LIMIT {limit:UInt32}",
        {"topic": chain.topic, "partition": chain.partition, "limit": limit},
        closing="topic = {topic:String} AND kind != 'run'",
    )
    return [(row["letter"], _bytes(row["raw_key"]), _bytes(row["raw"])) for row in rows]


def _shown(row: dict[str, Any]) -> DeadLetter:
    return DeadLetter(
        position=row["position"],
        recorded_at=row["recorded_at"],
        reason=row["reason"],
        detail=row["detail"],
        workspace_id=row["workspace_id"],
        run_id=str(row["run_id"]) if row["run_id"].int else "",
        raw_key=_text(row["raw_key"]),
        raw_headers=row["raw_headers"],
        raw=_text(row["raw"]),
        raw_bytes=len(_bytes(row["raw"])),
        closed_by=row["closed_by"],
    )


def _parked(row: dict[str, Any]) -> ParkedEvent:
    return ParkedEvent(
        letter=row["letter"],
        position=row["position"],
        topic=row["topic"],
        reason=row["reason"],
        value=_bytes(row["raw"]),
        closed_by=row["closed_by"],
    )


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode()


def _text(value: str | bytes) -> str:
    return _bytes(value).decode(errors="backslashreplace")
