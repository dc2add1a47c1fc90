"""Random histories of a few workspaces, for Hypothesis, and a unit's life without I/O: cuts, evictions, crashes."""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import groupby
from typing import Any, Final, NamedTuple

import pyarrow as pa
from hypothesis import strategies as st

from schemas.cell_run import to_milliseconds
from schemas.ledger import Kind, Pool, number_of
from sinks.accounts import AccountFact, Tail
from sinks.ledger import Chain
from streams import recovery
from streams.rules.balances import Balances, Notice
from streams.rules.facts import fold_event, openings
from streams.rules.messages import Source, alert_of
from streams.rules.periods import to_date
from tests.account_records import Step, Story, at
from tests.limit_voices import Rated, Seen, account_fact_of, debits_of, refer, seen_of, told_of
from tests.records import run_id
from tests.reference_limits import ReferenceLimits, Told

NAMES: Final = ("ws_a", "ws_b", "ws_c")
CHAINS: Final = (Chain("cell-runs", "topic-1", 0), Chain("account-events", "topic-2", 0))
HOUR: Final = timedelta(hours=1)
PAUSES: Final = (timedelta(0), timedelta(seconds=1), HOUR, 13 * HOUR, 22 * HOUR)
"""Between two records. With `SILENCE_MAX` shorter than what a start looks back for."""
SILENCE_MAX: Final = 22 * HOUR
"""The clock is heard at the latest after this: whenever a worker has nothing to read."""
LATENESS: Final = (timedelta(seconds=1), 72 * HOUR, 35 * 24 * HOUR, -timedelta(minutes=4))
EFFECTS: Final = (timedelta(0), -72 * HOUR, 30 * HOUR, -20 * 24 * HOUR)
ACTIONS: Final = ("enrich_person", "find_work_email", "clearbit_enrich_company")
PLAN_NAMES: Final = ("4", "10", "20", "cancelled", "own_lines")
THRESHOLDS: Final = (None, (), (20, 70))


@st.composite
def histories(draw: st.DrawFn, min_size: int = 5) -> list[Step]:
    """Records of `NAMES` in the order of their times, in which they were also taken in."""
    stories = [Story(name) for name in NAMES]
    runs: list[list[int]] = [[] for _ in NAMES]
    effects: list[list[datetime]] = [[] for _ in NAMES]
    steps: list[Step] = []
    now = at("Jan 25 22:00")
    for number in range(draw(st.integers(min_size, 60))):
        now += draw(st.sampled_from(PAUSES))
        who = draw(st.integers(0, len(NAMES) - 1))
        story = stories[who]
        kind = draw(st.sampled_from(["run"] * 8 + ["plan", "plan", "grant", "reversal", "limits"]))
        if kind == "run":
            action = draw(st.sampled_from(ACTIONS))
            ran = now - draw(st.sampled_from(LATENESS))
            runs[who].append(story.run(ran, action, now, run=1 + who * 1000 + number))
        elif kind == "plan":
            effects[who].append(draw(st.sampled_from([now + effect for effect in EFFECTS] + effects[who][-1:])))
            plan, restart = draw(st.sampled_from(PLAN_NAMES)), draw(st.booleans())
            story.plan(plan, effects[who][-1], now, restart=restart)
        elif kind == "grant":
            story.grant(draw(st.sampled_from(["1", "2.5", "6"])), now + draw(st.sampled_from(EFFECTS)), now)
        elif kind == "reversal":
            story.reverse(draw(st.sampled_from(runs[who] or [999_999])), now)
        else:
            below = draw(st.sampled_from([None, "3"]))
            story.limits(now, draw(st.sampled_from(THRESHOLDS)), below)
        steps.append(story.steps[-1])
    return steps


def referred(records: Sequence[Rated]) -> dict[str, ReferenceLimits]:
    """The reference of each workspace, brought to the time of the last record."""
    found: dict[str, ReferenceLimits] = {}
    for record in records:
        if record.expected.kind not in ("dead_letter", "duplicate"):
            refer(found.setdefault(record.step.workspace_id, ReferenceLimits()), record)
    for limits in found.values():
        limits.come(records[-1].step.recorded)
    return found


class Written(NamedTuple):
    """One row of the ledger, and the insert that it came with."""

    insert: int
    record: Rated


class Life:
    """A unit's balances as `streams.unit` and `streams.assignment` drive them, over a ledger that is a list."""

    def __init__(self, accounts_max: int) -> None:
        self._accounts_max = accounts_max
        self.ledger: list[Written] = []
        self.unwritten: list[Rated] = []
        self.committed = [-1, -1]
        """The last offsets of both chains that Kafka's commit has seen."""
        self.told: dict[Any, Told] = {}
        self.states: dict[tuple[str, Pool], Seen] = {}
        """What was told last of each pool."""
        self.balances = Balances(accounts_max, 0)
        self.balances.knows_all = True
        self._inserts = 0
        self.heard = datetime.min.replace(tzinfo=UTC)
        """When the clock was heard last."""

    @property
    def marks(self) -> list[int]:
        """The last offset of each chain in the ledger."""
        return [
            max((row.record.offset for row in self.ledger if row.record.step.of_account == of_account), default=-1)
            for of_account in (False, True)
        ]

    def take(self, records: Sequence[Rated]) -> None:
        """Fold cell runs as one take."""
        debits = debits_of(records)
        self.balances.begin(int(debits.recorded_ms[0]))
        self._load(debits.drawing())
        for notice in self.balances.fold(debits):
            self._tell(notice, Source(CHAINS[0], records[notice.row].offset))
        self.unwritten += records
        self.balances.evict(*self.marks)

    def write(self, number: int | None = None) -> None:
        """Insert what was folded first, or all of it: what follows of one chain together."""
        rows, self.unwritten = self.unwritten[:number], self.unwritten[len(self.unwritten[:number]) :]
        for _, together in groupby(rows, lambda record: record.step.of_account):
            self._inserts += 1
            self.ledger += [Written(self._inserts, record) for record in together]

    def take_events(self, records: Sequence[Rated]) -> None:
        """Fold a chunk of account events; one with a reversal, and everything before it, is written first."""
        rows = [row for record in records if (row := account_fact_of(record))]
        self.balances.begin(to_milliseconds(records[0].step.recorded))
        self._load([row.workspace_id for row in rows])
        self.unwritten += records
        if any(record.expected.kind == "reversal" for record in records):
            self.write()
        for row in rows:
            for notice in fold_event(self.balances, row):
                self._tell(notice, Source(CHAINS[1], notice.row))

    def come(self, when: datetime) -> None:
        """Nothing waits, and the clock says so."""
        self.heard = when
        for notice in self.balances.come(to_milliseconds(when)):
            self._tell(notice, None)

    def tell_states(self) -> None:
        """The states that changed are told, of whoever is in memory."""
        for name, pool in {*self.balances.moved, *self.balances.urgent}:
            if name in self.balances:
                self.states[name, pool] = seen_of(self.balances[name].standing(pool))
        self.balances.moved.clear()
        self.balances.urgent.clear()

    def commit(self) -> None:
        """Kafka has seen that alerts and states are out and rows are in."""
        self.tell_states()
        self.committed = self.marks

    def crash(self) -> None:
        """Everything in memory is lost; the next owner recovers as `Loader` does."""
        self.unwritten = []
        self.balances = Balances(self._accounts_max, 0)
        seen = [row.record for row in self.ledger if row.record.offset <= self.committed[row.record.step.of_account]]
        self.balances.now_ms = max((to_milliseconds(record.step.recorded) for record in seen), default=0)
        tail = self._tail()
        if names := recovery.names_of(tail):
            self.balances.begin(recovery.first_ms(tail))
            since = recovery.first_day(self.balances.now_ms)
            self.balances.load(
                openings(names, *recovery.without(tail, self._facts_of(names), self._draws(names, since)))
            )
            for notice, source in recovery.refold(self.balances, tail, CHAINS):
                self._tell(notice, source)
        self._look_back()

    def _look_back(self) -> None:
        now_ms = self.balances.now_ms
        from_ms = now_ms - recovery.LOOK_BACK_MS
        for name in NAMES:
            rows = self._facts_of([name])
            for instant in recovery.instants_of(rows, from_ms, now_ms):
                draws = self._draws([name], recovery.first_day(from_ms), recorded_by=instant - 1)
                opening = openings([name], [], draws)[name]
                for notice, source in recovery.told_at(name, rows, instant, opening):
                    self._tell(notice, source)
        self._load(NAMES)

    def assert_used(self) -> None:
        """Every account in memory has used what the ledger holds, and what is on its way there."""
        folded = [*(row.record for row in self.ledger), *self.unwritten]
        for account in self.balances:
            for pool, days in ((Pool.ENRICHMENT, account.period), (Pool.PREMIUM, range(1 << 20))):
                drawn = [
                    record.expected.credits
                    for record in folded
                    if record.step.workspace_id == account.name and record.expected.pool == pool and record.day in days
                ]
                assert seen_of(account.standing(pool)).used == sum(drawn)

    def _load(self, names: Iterable[str]) -> None:
        if missing := self.balances.missing(names):
            draws = self._draws(missing, recovery.first_day(self.balances.now_ms))
            self.balances.load(openings(missing, self._facts_of(missing), draws))

    def _tell(self, notice: Notice, source: Source | None) -> None:
        alert = alert_of(notice, source if notice.row >= 0 else None, None)
        told = told_of(alert)
        assert self.told.setdefault((alert.workspace_id, alert.alert_id), told) == told, (
            f"one id for two crossings: {self.told[alert.workspace_id, alert.alert_id]} {told}"
        )

    def _events(self) -> list[tuple[int, AccountFact]]:
        rows = [(row.insert, account_fact_of(row.record)) for row in self.ledger if row.record.step.of_account]
        return [(insert, row) for insert, row in rows if row]

    def _facts_of(self, names: Sequence[str]) -> list[AccountFact]:
        return [row for _, row in self._events() if row.workspace_id in names and row.kind != Kind.REVERSAL]

    def _draws(
        self, names: Sequence[str], since: date, recorded_by: int | None = None
    ) -> list[tuple[str, str, int, int]]:
        sums: dict[tuple[str, str, int], int] = {}
        for row in self.ledger:
            step, _, expected, day = row.record
            late = recorded_by is not None and to_milliseconds(step.recorded) > recorded_by
            if expected.kind not in ("run", "reversal") or expected.pool == "none" or late:
                continue
            premium = expected.pool == "premium"
            if step.workspace_id in names and (premium or to_date(day) >= since):
                key = step.workspace_id, expected.pool, 0 if premium else day
                sums[key] = sums.get(key, 0) + int(expected.credits * 1000)
        return [(*key, credits) for key, credits in sums.items()]

    def _tail(self) -> Tail:
        runs = [
            row
            for row in self.ledger
            if row.record.expected.kind == "run"
            and row.record.expected.credits
            and row.record.offset > self.committed[0]
        ]
        columns: dict[str, list[Any]] = {
            "workspace_id": [row.record.step.workspace_id for row in runs],
            "pool": [number_of(Pool(row.record.expected.pool)) for row in runs],
            "credits": [int(row.record.expected.credits * 1000) for row in runs],
            "day": [row.record.day for row in runs],
            "recorded_ms": [to_milliseconds(row.record.step.recorded) for row in runs],
            "kafka_offset": [row.record.offset for row in runs],
            "run_id": [str(run_id(0)) for _ in runs],
            "read_ms": [row.insert for row in runs],
        }
        columns |= {name: [""] * len(runs) for name in ("table_id", "column_id", "action")}
        kinds = {"pool": pa.int8()} | dict.fromkeys(
            ("credits", "day", "recorded_ms", "kafka_offset", "read_ms"), pa.int64()
        )
        table = pa.table({name: pa.array(values, kinds.get(name, pa.string())) for name, values in columns.items()})
        return Tail(table, [(insert, row) for insert, row in self._events() if row.offset > self.committed[1]])


def live(records: Sequence[Rated]) -> Life:
    """The uncut fold: one record at a time, nothing ever evicted, never a crash, the clock always heard."""
    life = Life(100)
    for record in records:
        life.come(record.step.recorded)
        (life.take_events if record.step.of_account else life.take)([record])
        life.tell_states()
    return life
