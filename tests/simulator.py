"""A seeded simulator of P1 on a real ledger: what a bad hour of many workers does, in half a second.

Owners of one chain are generators around the protocol. A scheduler drawn from the seed interleaves their steps: they
start, crash at any step and lose all they knew, sleep past the token window, overlap; an insert is executed,
executed without an answer, refused, sent twice, or executed much later, when its owner may have gone, or the server
dies in its middle: the token stays, the rows do not. What a row holds follows from the log, so at the end there is one
right ledger, and one owner completes it in peace.

Time is virtual: a tick lasts `TICK_S`, and an insert's ``mark_read_at`` is moved back by the ticks since its mark was
read, so that the table's own constraint judges it. `prepare` makes the table's token window as small as the design
allows for these ticks: older tokens are forgotten, as a real window forgets them.
"""

import random
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, Final
from uuid import UUID

import msgspec
from clickhouse_connect.driver.client import Client

from sinks.clickhouse import DatabaseError
from sinks.ledger import Batch, Chain, ForeignMark, Insert, Ledger, Mark, ReadMark, Step, Steps, append_steps
from tests.ledger_rows import batch, content, content_of, run_id

TICK_S: Final = 20.0
TICKS_OF_TROUBLE: Final = 50
TICKS_OF_PEACE_MAX: Final = 200
TOKEN_WINDOW: Final = 8
"""120 s are 6 ticks, and a tick has one insert: this many tokens, and two to spare."""
OWNERS_MAX: Final = 3
ROWS_MAX: Final = 3
RECORDS: Final = 24
COPIES_SHARE: Final = 0.15
LATE_S: Final = (60.0, 900.0)
"""Means of how late an insert is executed: within the life of its token, or long after."""

Protocol = Callable[[Batch, Mark, int, Callable[[], float]], Steps]


class LookUp(msgspec.Struct, frozen=True):
    """Ask which of these runs have a debit in the ledger; answered by a set."""

    runs: list[UUID]


class Commit(msgspec.Struct, frozen=True):
    """Tell Kafka the last offset that is done."""

    offset: int


class Owner(msgspec.Struct):
    """A live worker: its generator, the step that it waits for, and when it wakes."""

    steps: Generator[Any, Any, None]
    step: Any
    wakes_at: float = 0.0


class Late(msgspec.Struct, frozen=True):
    """An insert on the wire, whatever becomes of its sender."""

    step: Insert
    lands_at: float


class Log:
    """What Kafka holds of one chain: some offsets, and at each a run, or a run that was there before."""

    def __init__(self, chain: Chain, rng: random.Random) -> None:
        self.chain: Final = chain
        self.offsets: Final = [offset for offset in range(RECORDS) if offset in (0, RECORDS - 1) or rng.random() > 0.05]
        self.runs: Final = {offset: offset for offset in self.offsets}
        for offset in self.offsets[1:]:
            if rng.random() < COPIES_SHARE:
                self.runs[offset] = self.runs[rng.choice(self.offsets[: self.offsets.index(offset)])]
        self.repeated: Final = {run for run, times in Counter(self.runs.values()).items() if times > 1}
        """The runs that an owner must look up: what the worker's filter would call candidates."""
        self.last: Final = self.offsets[-1]

    def cut(self, after: int, rows_max: int) -> list[int]:
        """The next offsets, at most so many."""
        return [offset for offset in self.offsets if offset > after][:rows_max]

    def rated(self, after: int, offsets: list[int], known: set[UUID]) -> Batch:
        """These records as an owner writes them who knows of these runs in the ledger."""
        copies, seen = {}, set(known)
        for offset in offsets:
            run = run_id(self.chain, self.runs[offset])
            if run in seen:
                copies[offset] = self.runs[offset]
            seen.add(run)
        missed = [offset for offset in offsets if self.runs[offset] != offset and offset not in copies]
        assert not missed, "copies of runs that the ledger should hold, and does not"
        return batch(self.chain, after, offsets[-1], offsets=offsets, copies=copies)


class Simulation:
    """One seed on one ledger."""

    def __init__(self, client: Client, seed: int, protocol: Protocol = append_steps) -> None:
        self.rng: Final = random.Random(seed)
        self.log: Final = Log(Chain(f"cell-runs-{seed}", f"topic-id-{seed}", 0), self.rng)
        self.now = 0.0
        self.committed = -1
        self._client, self._protocol = client, protocol
        self._ledger = Ledger(client)
        self._owners: list[Owner] = []
        self._late: list[Late] = []
        self._read_when: dict[int, float] = {}
        self._read_at_of_stamp: dict[int, int] = {}
        self._server_began, self._last_then = 0.0, -1
        """When the server started, and the mark as it was then."""

    def run(self) -> None:
        """AssertionError unless the ledger ends as that of a clean run."""
        for _ in range(TICKS_OF_TROUBLE):
            self.now += TICK_S
            self._trouble()
        self._complete()
        clean = self.log.rated(-1, self.log.offsets, set())
        assert content(self._client, self.log.chain) == content_of(clean.rows)

    def resume(self, mark: Mark) -> Mark:
        """Where a new owner begins: at the mark."""
        return mark

    def _own(self, rng: random.Random) -> Generator[Step | LookUp | Commit, Any, None]:
        """A worker's life, as `streams.meter` and `streams.unit` live it."""
        mark = self.resume((yield ReadMark()))
        while offsets := self.log.cut(mark.last, rng.randint(1, ROWS_MAX)):
            candidates = [self.log.runs[offset] for offset in offsets if self.log.runs[offset] in self.log.repeated]
            known = (yield LookUp([run_id(self.log.chain, run) for run in candidates])) if candidates else set()
            mark = yield from self._protocol(self.log.rated(mark.last, offsets, known), mark, 0, lambda: self.now)
            yield Commit(mark.last)

    def _trouble(self) -> None:
        match self.rng.choices(["step", "start", "crash", "sleep"], [70, 12, 4, 4])[0]:
            case "start" if len(self._owners) < OWNERS_MAX:
                self._start()
            case "crash" if self._owners:
                self._owners.remove(self.rng.choice(self._owners))
            case "sleep" if self._owners:
                self.rng.choice(self._owners).wakes_at = self.now + self.rng.uniform(30, 600)
            case _:
                awake = [owner for owner in self._owners if owner.wakes_at <= self.now]
                if not self._land() and awake:
                    self._advance(self.rng.choice(awake), self._fate)

    def _complete(self) -> None:
        """Peace: one owner writes the rest, while what is still on the wire lands."""
        self._owners.clear()
        done = False
        for _ in range(TICKS_OF_PEACE_MAX):
            self.now += TICK_S
            if self._land():
                continue
            if done and not self._late:
                return
            if not self._owners and not done:
                self._start()
            if self._owners:
                done = self._advance(self._owners[0], lambda: "acknowledged")
        raise AssertionError("the chain does not get to its end")

    def _start(self) -> None:
        steps = self._own(random.Random(self.rng.random()))
        self._owners.append(Owner(steps, next(steps)))

    def _advance(self, owner: Owner, fate: Callable[[], str]) -> bool:
        """Let an owner go one step. True when it has written the whole log."""
        answer = self._carry_out(owner.step, fate)
        try:
            owner.step = owner.steps.send(answer)
        except (StopIteration, ForeignMark) as end:
            self._owners.remove(owner)
            return isinstance(end, StopIteration)
        return False

    def _fate(self) -> str:
        fates = {"acknowledged": 50, "answer_lost": 12, "refused": 12, "late": 18, "doubled": 8, "death": 2}
        return self.rng.choices(list(fates), list(fates.values()))[0]

    def _carry_out(self, step: Any, fate: Callable[[], str]) -> Any:
        match step:
            case ReadMark():
                return self._read_mark()
            case LookUp(runs):
                return self._known(runs)
            case Commit(offset):
                self.committed = offset
                return None
            case Insert():
                return self._send(step, fate())

    def _send(self, step: Insert, fate: str) -> bool:
        match fate:
            case "refused":
                return False
            case "late":
                self._late.append(Late(step, self.now + self.rng.expovariate(1 / self.rng.choice(LATE_S))))
                return False
            case "answer_lost":
                self._execute(step)
                return False
            case "death":
                self._die_amid(step)
                return False
            case "doubled":
                self._execute(step)
        return self._execute(step)

    def _die_amid(self, step: Insert) -> None:
        """The server writes down the token, is killed before the part has its name, and starts."""
        chain = self.log.chain
        last = self._ledger.mark(chain).last
        self._execute(step)
        self._client.command(
            f"ALTER TABLE ledger DELETE WHERE topic_id = '{chain.topic_id}' AND kafka_offset > {last} "
            "SETTINGS mutations_sync = 2"
        )
        self._server_began, self._last_then = self.now, last

    def _land(self) -> bool:
        """One insert comes in from the wire, if there is any: a tick has one insert at the most."""
        for late in self._late:
            if late.lands_at <= self.now:
                self._late.remove(late)
                self._execute(late.step)
                return True
        return False

    def _execute(self, step: Insert) -> bool:
        if self._read_when[step.mark_read_at] < self._server_began:
            return False
        age_ms = int((self.now - self._read_when[step.mark_read_at]) * 1000)
        stamp = step.mark_read_at - age_ms
        self._read_at_of_stamp[stamp] = step.mark_read_at
        try:
            self._ledger.insert(msgspec.structs.replace(step, mark_read_at=stamp))
        except DatabaseError as error:
            assert "mark_is_fresh" in str(error), "the only refusal that is meant"  # noqa: PT017
            return False
        return True

    def _read_mark(self) -> Mark:
        mark = self._ledger.mark(self.log.chain)
        self._read_when[mark.read_at] = self.now
        written_under = self._read_at_of_stamp.get(mark.written_under, mark.written_under)
        is_of_earlier_life = mark.last == self._last_then
        return msgspec.structs.replace(
            mark, written_under=written_under, is_of_earlier_life=is_of_earlier_life, age_from=self.now
        )

    def _known(self, runs: list[UUID]) -> set[UUID]:
        found = self._client.query(
            "SELECT run_id FROM ledger WHERE kind = 'run' AND topic_id = {topic_id:String} "
            "AND run_id IN {runs:Array(UUID)}",
            parameters={"topic_id": self.log.chain.topic_id, "runs": [str(run) for run in runs]},
        )
        return {run for (run,) in found.result_rows}


def prepare(client: Client) -> None:
    """The table as on a server that has been up for long, with a token window of `TOKEN_WINDOW`."""
    client.command("ALTER TABLE ledger DROP CONSTRAINT IF EXISTS mark_is_fresh")
    client.command(
        "ALTER TABLE ledger ADD CONSTRAINT mark_is_fresh CHECK mark_read_at >= now64(3) - toIntervalSecond(120)"
    )
    client.set_client_setting("max_threads", 1)
    client.command(f"ALTER TABLE ledger MODIFY SETTING non_replicated_deduplication_window = {TOKEN_WINDOW}")
    client.command("ALTER TABLE ledger MODIFY SETTING remove_empty_parts = 0")  # a token would go with its part
