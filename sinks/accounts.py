"""What a unit asks of the ledger: debits that may be copied or reversed, accounts, and what the commit has not seen.

A question names workspaces, in the statement and not as a parameter, since a server takes none of more than 128 KiB;
or a partition by the hash of its workspaces: `kafkaMurmurHash` is Kafka's own, so the ``usage`` projection answers for
one partition of a topic without a column for it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from typing import Any, Final, NamedTuple
from uuid import UUID

import pyarrow as pa
from clickhouse_connect.driver.client import Client

from schemas.credits import Millicredits, format_credits
from schemas.ledger import Identity, Kind, Position
from schemas.limits import DEFAULT_THRESHOLDS, TopColumn
from sinks.ledger import POSITION, Chain

TOP_COLUMNS: Final = 3
NEAR_OFFSETS: Final = 100_000
"""A range of offsets that the index of offsets finds in a few parts, however large the ledger."""
EPOCH: Final = date(1970, 1, 1)
"""In place of the days of a pool without a period."""
_MARKED: Final = "topic_id = {topic_id:String} AND kafka_partition = {partition:UInt16}"
_OF_PARTITION: Final = "bitAnd(kafkaMurmurHash(workspace_id), 0x7FFFFFFF) % {partitions:UInt32} = {partition:UInt16}"
_DRAWS: Final = "kind IN ('run', 'reversal') AND pool IN ('enrichment', 'premium')"
EVENTS: Final = "kind IN ('plan', 'grant', 'limits', 'reversal')"


class AccountFact(NamedTuple):
    """One account event as its ledger row says it; instants in Unix ms, credits in millicredits.

    ``allowance``: of a plan's period, or what was granted. ``credits``, ``pool`` and ``day`` (since 1970-01-01) are a
    reversal's.
    """

    workspace_id: str
    kind: Kind
    recorded_ms: int
    offset: int
    effective_ms: int
    plan: str
    allowance: Millicredits
    restart_period: bool
    thresholds: tuple[int, ...]
    remaining_below: Millicredits | None
    pool: str
    credits: Millicredits
    day: int


_ACCOUNT_FACT: Final = (
    "workspace_id, toString(kind), toUnixTimestamp64Milli(recorded_at), kafka_offset, "
    "toUnixTimestamp64Milli(effective_at), toString(plan), toInt64(allowance * 1000), restart_period, thresholds, "
    "toInt64(remaining_below * 1000), toString(pool), toInt64(credits * 1000), toInt32(toUInt16(day))"
)


def _account_facts(found: Iterable[Sequence[Any]]) -> list[AccountFact]:
    rows = []
    for name, kind, recorded, offset, effective, plan, allowance, restart, thresholds, below, *rest in found:
        limits = (tuple(thresholds), None if below < 0 else below)
        rows.append(
            AccountFact(name, Kind(kind), recorded, offset, effective, plan, allowance, restart, *limits, *rest)
        )
    return rows


def facts_of(client: Client, workspaces: Sequence[str]) -> list[AccountFact]:
    """Every plan, grant and threshold of these workspaces, over all topic ids."""
    found = client.query(
        f"SELECT {_ACCOUNT_FACT} FROM ledger WHERE workspace_id IN %(names)s AND kind IN ('plan', 'grant', 'limits')",
        parameters={"names": list(workspaces)},
    )
    return _account_facts(found.result_rows)


def draws_of(client: Client, workspaces: Sequence[str], since: date) -> list[tuple[str, str, int, Millicredits]]:
    """(workspace, pool, day since 1970-01-01, credits): enrichment by day from ``since`` on, premium in one sum."""
    return _draws(client, {"names": list(workspaces), "since": since})


def draws_recorded_by(
    client: Client, instants: Mapping[str, int], since: date
) -> list[tuple[str, str, int, Millicredits]]:
    """As `draws_of`, but of each workspace only what was recorded by its instant (Unix ms)."""
    return _draws(
        client,
        {"names": list(instants), "instants": list(instants.values()), "since": since},
        "AND toUnixTimestamp64Milli(recorded_at) <= "
        "transform(toString(workspace_id), %(names)s, %(instants)s, toInt64(0))",
    )


def _draws(client: Client, parameters: dict[str, Any], condition: str = "") -> list[tuple[str, str, int, Millicredits]]:
    rows: Any = client.query(
        "SELECT workspace_id, toString(pool), if(pool = 'premium', 0, toInt32(toUInt16(day))) AS number, "
        f"toInt64(sum(credits) * 1000) FROM ledger WHERE workspace_id IN %(names)s AND {_DRAWS} "
        f"AND (pool = 'premium' OR day >= %(since)s) {condition} GROUP BY workspace_id, pool, number",
        parameters=parameters,
    ).result_rows
    return list(rows)


def workspaces_of(client: Client, partition: int, partitions: int, limit: int, since: date) -> list[str]:
    """Some workspaces of a partition that have a run, or an account event, dated since then. Stops at the limit."""
    found = client.query(
        f"SELECT DISTINCT workspace_id FROM ledger WHERE {_OF_PARTITION} AND kind != 'dead_letter' "
        "AND workspace_id != '' AND day >= {since:Date} LIMIT {limit:UInt32}",
        parameters={"partition": partition, "partitions": partitions, "limit": limit, "since": since},
    )
    return [name for (name,) in found.result_rows]


def restless(client: Client, partition: int, partitions: int, since: date, from_ms: int) -> list[str]:
    """Workspaces of a partition that time alone may move: a superset, found by one look at plans and sums.

    Whoever drew since then (more than a period before ``from_ms``) as much as its lowest line under any of its plans,
    and whoever has a plan or a grant that takes effect after ``from_ms``.
    """
    found = client.query(_RESTLESS, parameters={
        "partition": partition, "partitions": partitions, "since": since, "from": from_ms,
    })  # fmt: skip
    return [name for (name,) in found.result_rows]


_RESTLESS: Final = f"""
SELECT workspace_id
FROM (
    SELECT workspace_id, countIf(kind = 'plan') AS plans, countIf(kind = 'limits') AS own, max(effective_at) AS latest,
           minIf(least(toInt64(allowance * 1000)
                       * if(empty(thresholds), {min(DEFAULT_THRESHOLDS)}, toInt64(arrayMin(thresholds))),
                       toInt64((allowance - greatest(remaining_below, 0)) * 1000) * 100), kind = 'plan') AS lowest
    FROM ledger
    WHERE kind IN ('plan', 'grant', 'limits') AND {_OF_PARTITION}
    GROUP BY workspace_id
) AS accounts
LEFT JOIN (
    SELECT workspace_id, toInt64(sum(credits) * 1000) * 100 AS drawn
    FROM ledger
    WHERE kind IN ('run', 'reversal') AND pool = 'enrichment' AND day >= {{since:Date}} AND {_OF_PARTITION}
    GROUP BY workspace_id
) AS sums USING (workspace_id)
WHERE latest > fromUnixTimestamp64Milli({{from:Int64}}, 'UTC')
   OR plans > 0 AND (drawn >= lowest OR own > 0 AND drawn > 0)
"""
"""Sums in percents of millicredits: integers."""


class RunToReverse(NamedTuple):
    """A run's debit, as a reversal needs it."""

    workspace_id: str
    run_id: UUID
    table_id: str
    column_id: str
    row_id: str
    action: str
    pool: str
    credits: Millicredits
    ran_ms: int
    catalogue: int
    reversed_at: str
    """Where its reversal lies in Kafka; empty: it stands."""


def find_runs(client: Client, identities: Iterable[Identity]) -> list[tuple[Identity, str, tuple[Any, ...]]]:
    """The debits under these: identity, position in Kafka, and what a copy must say as well."""
    wanted = set(identities)
    found = client.query(
        f"SELECT workspace_id, run_id, {POSITION}, table_id, column_id, row_id, action, outcome, own_api_key, "
        "toUnixTimestamp64Milli(ran_at), triggered_by, actor "
        "FROM ledger WHERE kind = 'run' AND workspace_id IN %(workspaces)s AND run_id IN %(ids)s",
        parameters=_apart(wanted),
    ).result_rows
    debits = [(Identity(name, run_id), position, tuple(said)) for name, run_id, position, *said in found]
    return [debit for debit in debits if debit[0] in wanted]


def runs_to_reverse(client: Client, identities: Iterable[Identity]) -> list[RunToReverse]:
    """The debits under these, each with its reversal if there is one."""
    wanted = set(identities)
    found = client.query(
        "SELECT workspace_id, run_id, anyIf(table_id, kind = 'run'), anyIf(column_id, kind = 'run'), "
        "anyIf(row_id, kind = 'run'), anyIf(action, kind = 'run'), toString(anyIf(pool, kind = 'run')), "
        "toInt64(anyIf(credits, kind = 'run') * 1000), anyIf(toUnixTimestamp64Milli(ran_at), kind = 'run'), "
        f"anyIf(catalogue, kind = 'run'), anyIf({POSITION}, kind = 'reversal') FROM ledger "
        "WHERE kind IN ('run', 'reversal') AND workspace_id IN %(workspaces)s AND run_id IN %(ids)s "
        "GROUP BY workspace_id, run_id HAVING countIf(kind = 'run') > 0",
        parameters=_apart(wanted),
    )
    return [RunToReverse(*row) for row in found.result_rows if Identity(row[0], row[1]) in wanted]


def known_events(client: Client, identities: Iterable[Identity]) -> dict[Identity, tuple[str, UUID, str, AccountFact]]:
    """Account events in the ledger under these: position in Kafka, id of the run, actor, and all else that they say."""
    wanted = set(identities)
    found = client.query(
        f"SELECT event_id, run_id, toString(actor), topic, kafka_partition, {_ACCOUNT_FACT} FROM ledger "
        f"WHERE {EVENTS} AND workspace_id IN %(workspaces)s AND event_id IN %(ids)s",
        parameters=_apart(wanted),
    )
    known = {}
    for event_id, run_id, actor, topic, partition, *row in found.result_rows:
        (fact,) = _account_facts([row])
        identity = Identity(fact.workspace_id, event_id)
        if identity in wanted:
            position = str(Position(topic, partition, fact.offset))
            known[identity] = (position, run_id, actor, fact)
    return known


def _apart(identities: Iterable[Identity]) -> dict[str, list[str]]:
    """Workspaces and ids as two lists, which the ledger's indexes can use: rows of other pairs are found, too."""
    names, ids = zip(*identities, strict=True)
    return {"workspaces": sorted(set(names)), "ids": sorted(map(str, ids))}


class Tail(NamedTuple):
    """Rows of a unit that Kafka's commit has not seen: their alerts may not have left."""

    debits: pa.Table
    """Of the run chain, in Kafka's order."""
    events: list[tuple[int, AccountFact]]
    """(mark_read_at in Unix ms, row) of the account chain, in Kafka's order."""


def tail_of(client: Client, runs: Chain, runs_after: int, events: Chain, events_after: int) -> Tail:
    """The rows of both chains after these offsets."""
    debits = client.query_arrow(
        "SELECT toString(workspace_id) AS workspace_id, toInt8(pool) AS pool, toInt64(credits * 1000) AS credits, "
        "toInt64(toUInt16(day)) AS day, toUnixTimestamp64Milli(recorded_at) AS recorded_ms, "
        "toInt64(kafka_offset) AS kafka_offset, toString(run_id) AS run_id, toString(table_id) AS table_id, "
        "toString(column_id) AS column_id, toString(action) AS action, toUnixTimestamp64Milli(mark_read_at) AS read_ms "
        f"FROM ledger WHERE {_MARKED} AND kafka_offset > {{after:Int64}} AND kind = 'run' AND credits != 0 "
        "ORDER BY kafka_offset",
        parameters=_after(runs, runs_after),
        use_strings=True,
    )
    found = client.query(
        f"SELECT toUnixTimestamp64Milli(mark_read_at), {_ACCOUNT_FACT} FROM ledger WHERE {_MARKED} "
        f"AND kafka_offset > {{after:Int64}} AND {EVENTS} ORDER BY kafka_offset",
        parameters=_after(events, events_after),
    ).result_rows
    rows = _account_facts([row[1:] for row in found])
    return Tail(debits, [(int(read[0]), row) for read, row in zip(found, rows, strict=True)])


def last_recorded_ms(client: Client, chain: Chain, up_to: int) -> int:
    """The broker's time of a chain's newest row up to an offset. Where the chain has none, that of the newest row of
    its partition in an earlier topic of this name; 0 when there is none either.
    """
    questions = (
        f"{_MARKED} AND kafka_offset <= {{after:Int64}} AND kafka_offset > {{after:Int64}} - {NEAR_OFFSETS}",
        f"{_MARKED} AND kafka_offset <= {{after:Int64}}",
        "topic = {topic:String} AND kafka_partition = {partition:UInt16} AND topic_id != {topic_id:String}",
    )
    for condition in questions:
        ((found,),) = client.query(
            f"SELECT toUnixTimestamp64Milli(max(recorded_at)) FROM ledger WHERE {condition}",
            parameters=_after(chain, up_to) | {"topic": chain.topic},
        ).result_rows
        if found > 0:
            return int(found)
    return 0


def _after(chain: Chain, offset: int) -> dict[str, Any]:
    return {"topic_id": chain.topic_id, "partition": chain.partition, "after": offset}


class TopQuestion(NamedTuple):
    """Which columns drew most of a pool in the UTC days [start, end); None: of all time."""

    workspace_id: str
    pool: str
    start: date | None
    end: date | None


def top_columns(client: Client, questions: Sequence[TopQuestion]) -> dict[TopQuestion, tuple[TopColumn, ...]]:
    """The columns that drew most, most first, for each question."""
    found = client.query(
        "SELECT workspace_id, toString(pool), day, table_id, column_id, action, toInt64(sum(credits) * 1000) "
        "FROM ledger WHERE workspace_id IN %(names)s AND kind IN ('run', 'reversal') "
        "AND day >= %(since)s GROUP BY workspace_id, pool, day, table_id, column_id, action",
        parameters={
            "names": sorted({question.workspace_id for question in questions}),
            "since": min(question.start or EPOCH for question in questions),
        },
    )
    drawn: dict[TopQuestion, Counter[tuple[str, str, str]]] = {question: Counter() for question in questions}
    asked: defaultdict[tuple[str, str], list[TopQuestion]] = defaultdict(list)
    for question in drawn:
        asked[question.workspace_id, question.pool].append(question)
    for name, pool, day, *column, credits in found.result_rows:
        for question in asked.get((name, pool), ()):
            if question.start is None or question.end is None or question.start <= day < question.end:
                drawn[question][column[0], column[1], column[2]] += credits
    return {
        question: tuple(
            TopColumn(table_id=table, column_id=column, action=action, credits=format_credits(credits))
            for (table, column, action), credits in columns.most_common(TOP_COLUMNS)
            if credits > 0
        )
        for question, columns in drawn.items()
    }
