"""Simulated enrichment workers: cell runs as a product makes them, for the demo, the tests and the benchmarks.

Deterministic for a seed, except for run ids and times where none is given. A share of the events is what a real stream
has too: copies, actions that nobody has priced yet, broken JSON.
"""

import itertools
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import NamedTuple

import msgspec
from uuid_utils.compat import uuid7

from schemas.cell_run import CellRun, Outcome
from schemas.codec import encode_run

WORKSPACES = 12
"""``ws_0001`` and so on."""
COPY_SHARE = 0.01
UNKNOWN_SHARE = 0.002
BROKEN_SHARE = 0.002
OWN_KEY_SHARE = 0.08

_ACTIONS = (
    ("enrich_person", 30), ("enrich_company", 14), ("find_work_email", 18), ("google_keyword_search", 6),
    ("job_role_count", 4), ("tech_stack", 4), ("clearbit_enrich_company", 4), ("find_and_enrich_person_google", 4),
    ("format_date", 10), ("hubspot_send", 6),
)  # fmt: skip
_OUTCOMES = ((Outcome.DATA, 78), (Outcome.NO_DATA, 16), (Outcome.ERROR, 6))
_TRIGGERS = ("manual", "auto_update", "schedule", "api", "waterfall")


class Event(NamedTuple):
    """One Kafka record to produce."""

    key: str
    value: bytes


class Column(NamedTuple):
    """A column of a table: one action in every cell."""

    workspace_id: str
    table_id: str
    column_id: str
    action: str


def events(seed: int, ran_at: datetime | None = None) -> Iterator[Event]:
    """Endless cell runs. ``ran_at`` None: now, at each event."""
    dice = random.Random(seed)  # noqa: S311  # a simulation
    columns = _columns(dice)
    weights = [1 / (1 + int(column.workspace_id[-4:])) for column in columns]
    last: Event | None = None
    row = 0
    while True:
        row += 1
        fate = dice.random()
        if last and fate < COPY_SHARE:
            yield last
            continue
        (column,) = dice.choices(columns, weights)
        run = _run(dice, column, row, ran_at or datetime.now(UTC))
        if fate > 1 - UNKNOWN_SHARE:
            run = msgspec.structs.replace(run, action="brand_new_enrichment")
        value = encode_run(run)
        if fate > 1 - UNKNOWN_SHARE - BROKEN_SHARE and run.action != "brand_new_enrichment":
            value = value.replace(b'"outcome"', b'"outcom"')
        last = Event(run.workspace_id, value)
        yield last


def bulk_runs(seed: int) -> Iterator[Event]:
    """Endless cell runs as bulk runs make them: each of 200 columns is run for 500 rows before the next one begins.

    Fast to make; 0.1 % are copies of the run before, 0.02 % are malformed.
    """
    dice = random.Random(seed)  # noqa: S311  # a simulation
    active = [column for _ in range(2) for column in _columns(dice)][:200]
    ran_at = datetime.now(UTC)
    for number in itertools.count():
        column = active[number // 500 % len(active)]
        event = Event(column.workspace_id, encode_run(_run(dice, column, number, ran_at)))
        yield event if number % 5000 else Event(event.key, event.value[:-1])
        if number % 1000 == 999:
            yield event


def _columns(dice: random.Random) -> list[Column]:
    actions = [action for action, weight in _ACTIONS for _ in range(weight)]
    return [
        Column(f"ws_{workspace:04d}", f"tbl_{table}", f"col_{table}{column}", dice.choice(actions))
        for workspace in range(1, WORKSPACES + 1)
        for table in range(1, 3)
        for column in range(1, 6)
    ]


def _run(dice: random.Random, column: Column, row: int, ran_at: datetime) -> CellRun:
    (outcome,) = dice.choices([outcome for outcome, _ in _OUTCOMES], [weight for _, weight in _OUTCOMES])
    return CellRun(
        run_id=uuid7(),
        workspace_id=column.workspace_id,
        table_id=column.table_id,
        column_id=column.column_id,
        row_id=f"row_{row:07d}",
        action=column.action,
        outcome=outcome,
        ran_at=ran_at,
        own_api_key=dice.random() < OWN_KEY_SHARE,
        triggered_by=dice.choice(_TRIGGERS),
    )
