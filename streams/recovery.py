"""How a unit's balances come back: from the ledger, never from Kafka's own idea of what was done.

1. Rows that Kafka's commit has not seen, (committed, mark], are in the ledger, but their alerts may not have left: they
   are folded once more, from the balances without them, in the order in which they were written.
2. The workspaces that were active last are loaded, a bounded number; all others when a record asks for them.
3. In the background: what time alone has told since 48 h before the commit, and who waits for an instant to come.

Without a commit, with one beyond the ledger, or with too many rows behind it, there is no history to fold again: then
the states and what stands crossed are told, marked ``seeded``.
"""

from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any, Final, NamedTuple
from uuid import UUID

import numpy as np

from schemas.ledger import Kind, Pool, number_of
from sinks.accounts import AccountFact, Tail
from sinks.ledger import Chain
from streams.rules.balances import DAYS_KEPT, METERED, Balances, Debits, Notice, Opening, notice_of_time
from streams.rules.facts import fold_event, with_event
from streams.rules.limits import FOREVER_MS, NOT_OK, Facts, Standing, Terms, terms_of
from streams.rules.messages import Source, seeded_alert
from streams.rules.periods import day_of, to_date
from streams.rules.records import UpTo
from streams.voice import Voice

TAIL_ROWS_MAX: Final = 1_000_000
"""More rows than this behind the commit are not folded again."""
PRELOADED_MAX: Final = 500
"""Workspaces of a unit that are loaded at its assignment; the others when they run."""
LOADED_AT_ONCE: Final = 2_000
LOOK_BACK_MS: Final = 48 * 60 * 60 * 1000


class Start(NamedTuple):
    """From where a unit's balances are recovered. ``is_seeded``: no history is folded again."""

    runs_after: int
    events_after: int
    is_seeded: bool


def starting_point(marks: UpTo, committed: tuple[int | None, int | None], log_starts: tuple[int, int]) -> Start:
    """From Kafka's commits (next offsets, None: none) and the ledger's marks.

    A chain without rows may have a commit at the start of its log, or before it: it says where the group began, and
    that nothing has been read since.
    """
    after = [
        mark if commit is None or (mark < 0 and commit <= start) else commit - 1
        for mark, commit, start in zip(marks, committed, log_starts, strict=True)
    ]
    is_seeded = any(
        (commit is None and mark >= 0) or last > mark or mark - last > TAIL_ROWS_MAX
        for commit, mark, last in zip(committed, marks, after, strict=True)
    )
    runs, events = marks if is_seeded else after
    return Start(runs, events, is_seeded)


def names_of(tail: Tail) -> list[str]:
    """The workspaces that the tail is about."""
    drew = tail.debits.column("workspace_id").unique().to_pylist()
    return sorted({*drew, *(row.workspace_id for _, row in tail.events)})


def first_ms(tail: Tail) -> int:
    """The broker's time of its first record."""
    recorded: list[int] = tail.debits.column("recorded_ms").to_pylist()[:1]
    return min(recorded + [row.recorded_ms for _, row in tail.events[:1]])


def without(
    tail: Tail, events: Sequence[AccountFact], draws: Sequence[tuple[str, str, int, int]]
) -> tuple[list[AccountFact], list[tuple[str, str, int, int]]]:
    """What the ledger holds of the tail's workspaces (`facts_of`, `draws_of`), without the tail itself."""
    taken = {row[:4] for _, row in tail.events}  # workspace, kind, when and where it was recorded
    earlier = [row for row in events if row[:4] not in taken]
    sums = tail.debits.group_by(["workspace_id", "pool", "day"]).aggregate([("credits", "sum")])
    undone = [
        (name, Pool.PREMIUM if pool == _PREMIUM else Pool.ENRICHMENT, 0 if pool == _PREMIUM else day, -credits)
        for name, pool, day, credits in zip(*sums.to_pydict().values(), strict=True)
    ]
    undone += [
        (row.workspace_id, Pool(row.pool), 0 if row.pool == Pool.PREMIUM else row.day, -row.credits)
        for _, row in tail.events
        if row.kind == Kind.REVERSAL
    ]
    return earlier, [*draws, *undone]


_PREMIUM: Final = number_of(Pool.PREMIUM)


def refold(balances: Balances, tail: Tail, chains: tuple[Chain, Chain]) -> list[tuple[Notice, Source | None]]:
    """Fold the tail in the order in which it was written: by the instants at which its batches' marks were read."""
    notices: list[tuple[Notice, Source | None]] = []
    table = tail.debits
    read_ms = table.column("read_ms").to_numpy()
    first = 0
    for at_ms, event in [*tail.events, (None, None)]:
        last = len(table) if at_ms is None else int(np.searchsorted(read_ms, at_ms, side="right"))
        if last > first:
            part = table.slice(first, last - first)
            notices += [(notice, _source(part, notice, chains[0])) for notice in balances.fold(_debits(part))]
            first = last
        if event is not None:
            found = fold_event(balances, event)
            notices += [(n, Source(chains[1], n.row) if n.row >= 0 else None) for n in found]
    return notices


def _debits(table: Any) -> Debits:
    names = table.column("workspace_id").combine_chunks().dictionary_encode()
    columns = {name: table.column(name).to_numpy() for name in ("pool", "credits", "day", "recorded_ms")}
    return Debits(
        workspaces=names.dictionary.to_pylist(),
        codes=names.indices.to_numpy().astype(np.int64),
        offsets=table.column("kafka_offset").to_numpy(),
        **columns,
    )


def _source(table: Any, notice: Notice, chain: Chain) -> Source | None:
    if notice.row < 0:
        return None
    record = {name: table.column(name)[notice.row].as_py() for name in ("run_id", "table_id", "column_id", "action")}
    offset = table.column("kafka_offset")[notice.row].as_py()
    return Source(chain, offset, **record | {"run_id": UUID(record["run_id"])})


def seed(balances: Balances, voice: Voice, folded: UpTo, names: Sequence[str]) -> None:
    """Tell the states of workspaces and, marked ``seeded``, the thresholds that stand crossed: these notify nobody."""
    alerts = []
    for name in names:
        account = balances[name]
        for pool in METERED:
            if account.standing(pool).state in NOT_OK and account.standing(pool).passed:
                alerts.append(seeded_alert(account, pool, balances.now_ms))
            balances.urgent[name, pool] = None
    if alerts:
        voice.publish_alerts(alerts)
    voice.tell(balances, folded, [])


def instants_of(rows: Sequence[AccountFact], from_ms: int, to_ms: int) -> tuple[int, ...]:
    """The instants between two times at which time alone may have changed what is told of a workspace, each by what was
    known then. ``rows``: all of its account events.
    """
    instants: list[int] = []
    now_ms = from_ms
    while True:
        known = _known_at(rows, now_ms)
        comes = min(terms_of(known, pool, now_ms).until_ms for pool in METERED)
        learns = min([row.recorded_ms for row in rows if row.recorded_ms > now_ms], default=FOREVER_MS)
        if min(comes, learns) > to_ms:
            return tuple(instants)
        if comes <= learns:
            instants.append(comes)
        now_ms = min(comes, learns)


def told_at(
    name: str, rows: Sequence[AccountFact], instant: int, opening: Opening
) -> list[tuple[Notice, Source | None]]:
    """What an instant told of a workspace, by what was known then. ``opening``: the debits recorded before it; of
    ``rows``, too, those recorded later are left out. With them it would have told something else.
    """
    known = _known_at(rows, instant - 1)
    notices: list[Notice] = []
    for pool in METERED:
        old, new = (_standing(terms_of(known, pool, at_ms), opening) for at_ms in (instant - 1, instant))
        notices += notice_of_time(name, known, old, new, instant)
    return [(notice, None) for notice in notices]


def _known_at(rows: Sequence[AccountFact], at_ms: int) -> Facts:
    """What had been recorded by then."""
    facts = Facts()
    for row in rows:
        if row.recorded_ms <= at_ms:
            facts = with_event(facts, row)
    return facts


def _standing(terms: Terms, opening: Opening) -> Standing:
    if terms.period is None:
        return Standing(terms, opening.premium)
    return Standing(terms, sum(credits for day, credits in opening.enrichment.items() if day in terms.period))


def in_parts(names: Sequence[str]) -> Iterator[Sequence[str]]:
    """At most `LOADED_AT_ONCE` at once."""
    for start in range(0, len(names), LOADED_AT_ONCE):
        yield names[start : start + LOADED_AT_ONCE]


def active_since(now_ms: int) -> date:
    """Workspaces with runs since this day are loaded first."""
    return to_date(max(0, day_of(now_ms) - 1))


def first_day(now_ms: int) -> date:
    """The first day whose debits an account holds, as of an instant."""
    return to_date(max(0, day_of(now_ms) - DAYS_KEPT))
