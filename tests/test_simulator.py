"""The simulator over many seeds, and the proof that it can fail: protocols with one part taken out."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from clickhouse_connect.driver.client import Client

from sinks.clickhouse import connect
from sinks.ledger import Batch, Incident, Insert, Mark, ReadMark, Steps, append_steps
from sinks.migrate import migrate
from tests.ledger_rows import assert_books_close, wait_until_grown
from tests.simulator import Simulation, prepare

SEEDS = range(60)
SEEDS_A_BLOCK = 15
SEEDS_OF_SABOTAGE = range(8, 38)
"""From a seed on at which every sabotage shows soon."""


@pytest.fixture(scope="module")
def ground(chdb_dir: Path) -> Iterator[Client]:
    """One table for all seeds: each has a chain of its own."""
    with connect(f"chdb://{chdb_dir}?database=simulator") as client:
        migrate(client)
        wait_until_grown(client)
        prepare(client)
        yield client
        client.command("DROP DATABASE simulator SYNC")


@pytest.fixture
def table(ground: Client) -> Client:
    """The table, empty."""
    ground.command("TRUNCATE TABLE ledger")
    return ground


@pytest.mark.parametrize("first", SEEDS[::SEEDS_A_BLOCK])
def test_every_seed_ends_in_the_ledger_of_a_clean_run(table: Client, first: int) -> None:
    """Crashes of owners and of the server, overlapping owners, lost, late and doubled inserts, sleeps past the token
    window: nothing shows.
    """
    for seed in SEEDS[first : first + SEEDS_A_BLOCK]:
        simulation = Simulation(table, seed)
        try:
            simulation.run()
        except (AssertionError, Incident) as error:
            error.add_note(f"seed {seed}")
            raise
    assert_books_close(table, simulation.log.chain, simulation.log.offsets)


def seed_that_fails(simulate: Callable[[int], Simulation]) -> int:
    """The first seed at which a sabotaged protocol goes wrong. Fails the test when there is none."""
    for seed in SEEDS_OF_SABOTAGE:
        try:
            simulate(seed).run()
        except (AssertionError, Incident):
            return seed
    pytest.fail(f"the simulator saw nothing wrong in {len(SEEDS_OF_SABOTAGE)} seeds")


def token_with_the_end(batch: Batch, mark: Mark, epoch: int, now: Callable[[], float]) -> Steps:
    """Sabotage: the token names the range, as is the usual advice, so two cuts of one place are two tokens."""
    steps = append_steps(batch, mark, epoch, now)
    answer: Mark | bool | None = None
    while True:
        try:
            step = steps.send(answer) if answer is not None else next(steps)
        except StopIteration as done:
            written: Mark = done.value
            return written
        if isinstance(step, Insert):
            step = msgspec.structs.replace(step, token=f"{step.token}-{batch.last}")
        answer = yield step


def no_read_back(batch: Batch, mark: Mark, epoch: int, now: Callable[[], float]) -> Steps:
    """Sabotage: an acknowledged insert is believed. The database acknowledges what it drops."""
    first = next(append_steps(batch, mark, epoch, lambda: mark.age_from))
    assert isinstance(first, Insert)
    while True:
        fresh = yield ReadMark()
        assert isinstance(fresh, Mark)
        if (yield msgspec.structs.replace(first, mark_read_at=fresh.read_at)):
            return msgspec.structs.replace(fresh, last=batch.last)


def takes_a_token_of_its_own(batch: Batch, mark: Mark, epoch: int, now: Callable[[], float]) -> Steps:
    """Sabotage: after the death of a server nobody waits until the token is known to be spent."""
    steps = append_steps(batch, mark, epoch, now)
    step = next(steps)
    while True:
        if isinstance(step, Insert) and mark.is_of_earlier_life:
            step = msgspec.structs.replace(step, token=f"{step.token}/after {mark.read_at}")
        answer = yield step
        mark = answer if isinstance(answer, Mark) else mark
        try:
            step = steps.send(answer)
        except StopIteration as done:
            written: Mark = done.value
            return written


class ResumesFromTheCommit(Simulation):
    """Sabotage: a new owner begins where Kafka's committed offset says."""

    def resume(self, mark: Mark) -> Mark:
        return msgspec.structs.replace(mark, last=self.committed)


def test_the_simulator_catches_a_token_with_the_end(table: Client) -> None:
    """Two owners who cut one place differently both land."""
    assert seed_that_fails(lambda seed: Simulation(table, seed, token_with_the_end)) >= 0


def test_the_simulator_catches_a_missing_read_back(table: Client) -> None:
    """A longer batch that was dropped for a shorter one leaves a hole."""
    assert seed_that_fails(lambda seed: Simulation(table, seed, no_read_back)) >= 0


def test_the_simulator_catches_a_spent_token_that_nobody_gives_up(
    table: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that died amid an insert ends the chain."""
    monkeypatch.setattr("sinks.ledger.SPENT_MAX", 0)
    assert seed_that_fails(lambda seed: Simulation(table, seed)) >= 0


def test_the_simulator_catches_a_token_that_is_given_up_too_soon(table: Client) -> None:
    """Under it, and under the next one, both land."""
    assert seed_that_fails(lambda seed: Simulation(table, seed, takes_a_token_of_its_own)) >= 0


def test_the_simulator_catches_a_resume_from_the_committed_offset(table: Client) -> None:
    """A commit that a crash left behind the mark keeps every new owner at a place that is taken."""
    assert seed_that_fails(lambda seed: ResumesFromTheCommit(table, seed)) >= 0


def test_the_simulator_catches_a_table_without_its_constraint(table: Client) -> None:
    """An insert that is executed after its token was forgotten lands a second time."""
    table.command("ALTER TABLE ledger DROP CONSTRAINT mark_is_fresh")
    try:
        assert seed_that_fails(lambda seed: Simulation(table, seed)) >= 0
    finally:
        prepare(table)
