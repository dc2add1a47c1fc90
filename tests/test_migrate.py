"""Migrations and the pinned catalogue: what a ledger accepts of the program that opens it."""

import re
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from clickhouse_connect.driver.client import Client

from schemas.catalogue import Action, Catalogue, Category, Version
from schemas.ledger import Pool
from schemas.problem import Problem
from sinks import catalogue_versions
from sinks.catalogue_versions import pin_catalogue
from sinks.clickhouse import DatabaseError, connect
from sinks.ledger import Chain, Ledger, token_window
from sinks.migrate import migrate, pending, read_migrations, require_migrated
from tests.ledger_rows import assert_books_close, batch, recorded_ms, wait_until_grown, write

CHAIN = Chain("cell-runs", "topic-id-1", 0)
MAKES = re.compile(r"CREATE (?:OR REPLACE )?(?:TABLE|VIEW) (?:IF NOT EXISTS )?(\w+)")
MAKES_A_VIEW = re.compile(r"CREATE OR REPLACE VIEW")
STATEMENTS = [statement for migration in read_migrations() for statement in migration.statements]


APPLIED = {
    "ledger": "831ef3a48099cea0a6e74e123b4916917314924600b1773b1c95f0d8b5471a09",
    "catalogue_versions": "33f8a9fe8f745b3884118473ae0d693c679d93984e2e0edc21fb7347a7c6f89f",
    "published_alerts": "dbee41436f96584d2ff8ff8443ed3316010aff4cfaf5b49240bbe76293cba73d",
    "views": "0700d0f88999570535fb7abb5f96c2546114117ecce12562ccc4ebade66d1da4",
}
"""SHA-256 of each migration that ledgers out there have applied. Append; never change a line."""


@pytest.fixture
def empty(database_url: str) -> Iterator[Client]:
    """A connection to a database without a table."""
    with connect(database_url) as client:
        yield client


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two migrations of a test's own."""
    (tmp_path / "0001_first.sql").write_text(
        "CREATE TABLE IF NOT EXISTS one (n UInt8) ENGINE = MergeTree ORDER BY n;\n"
    )
    (tmp_path / "0002_second.sql").write_text("ALTER TABLE one ADD COLUMN IF NOT EXISTS m UInt8;\n")
    return tmp_path


def tables(client: Client) -> set[str]:
    """Tables and views of the database."""
    return {name for (name,) in client.query("SHOW TABLES").result_rows}


def test_an_applied_migration_never_changes() -> None:
    """Not in a comment either: a ledger refuses a worker whose migration is not the one that it has applied."""
    assert {migration.name: migration.checksum for migration in read_migrations()} == APPLIED


def test_a_fresh_database_gets_every_migration(empty: Client) -> None:
    """They run in order, are booked, and leave a ledger that takes rows."""
    with pytest.raises(Problem, match="migrations are pending: ledger, catalogue_versions"):
        require_migrated(empty)

    applied = migrate(empty)

    assert applied == read_migrations()
    assert [migration.number for migration in applied] == list(range(1, len(applied) + 1))
    assert {"ledger", "catalogue_versions", "schema_migrations", "debits", "dead_letters"} <= tables(empty)
    assert token_window(empty) == 100_000
    require_migrated(empty)
    wait_until_grown(empty)
    write(Ledger(empty), CHAIN, 9)
    assert_books_close(empty, CHAIN, range(10))


def test_again_changes_nothing(empty: Client) -> None:
    """Nothing is applied or booked twice."""
    migrate(empty)
    assert migrate(empty) == []
    assert empty.query("SELECT count() FROM schema_migrations").result_rows == [(len(read_migrations()),)]


def test_a_half_applied_file_is_run_again(client: Client) -> None:
    """Every statement may have been executed before: a migration that died before it was booked runs once more."""
    write(Ledger(client), CHAIN, 9)
    client.command("TRUNCATE TABLE schema_migrations")

    assert migrate(client) == read_migrations()

    write(Ledger(client), CHAIN, 19)
    assert_books_close(client, CHAIN, range(20))


@pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
@pytest.mark.parametrize("done", [n for n, statement in enumerate(STATEMENTS) if not MAKES_A_VIEW.match(statement)])
def test_a_migration_may_die_after_any_statement(empty: Client, done: int) -> None:
    """From each statement on, running everything again leads to the same tables; a view is only made again."""
    for statement in STATEMENTS[:done]:
        empty.command(statement)
    migrate(empty)
    require_migrated(empty)
    made = [found[1] for statement in STATEMENTS if (found := MAKES.match(statement))]
    assert set(tables(empty)) == {*made, "schema_migrations"}


def test_a_migration_that_fails_is_not_booked(empty: Client, directory: Path) -> None:
    """What ran before it stays; corrected, it is applied as if it had not been there."""
    second = directory / "0002_second.sql"
    right = second.read_text()
    second.write_text("ALTER TABLE one ADD COLUMN IF NOT EXISTS m UInt8;\nALTER TABLE absent ADD COLUMN m UInt8;\n")
    with pytest.raises(DatabaseError, match="absent"):
        migrate(empty, read_migrations(directory))

    second.write_text(right)

    assert [migration.name for migration in migrate(empty, read_migrations(directory))] == ["second"]


def test_a_changed_file_is_refused_with_its_name(empty: Client, directory: Path) -> None:
    """An applied migration never changes, not even in a comment."""
    migrate(empty, read_migrations(directory))
    with (directory / "0001_first.sql").open("a") as file:
        file.write("-- a second thought\n")
    with pytest.raises(Problem, match="a migration was changed after it ran: first has another checksum"):
        migrate(empty, read_migrations(directory))


def test_a_newer_database_is_refused(empty: Client, directory: Path) -> None:
    """An older program does not touch a ledger that a newer one has migrated."""
    migrate(empty, read_migrations(directory))
    (directory / "0002_second.sql").unlink()
    with pytest.raises(Problem, match="newer than this program: migration 2 is unknown here"):
        pending(empty, read_migrations(directory))


def test_statements_are_told_apart_by_semicolons(tmp_path: Path) -> None:
    """Comments go, wherever their semicolons are; a text in quotes may hold both."""
    (tmp_path / "0007_some_views.sql").write_text(
        "-- A comment; with semicolons;\n"
        "SELECT 1,  -- one; two;\n"
        "       'a; b', '-- no comment'; -- the end;\n"
        "  -- indented;\n"
        "\n"
        "SELECT 2 - 1\n"
        ";\n"
        ";\n"
        "SELECT 'it''s; so', 'a \\'quoted;\n"
        "line'\n"
    )
    (migration,) = read_migrations(tmp_path)
    assert (migration.number, migration.name) == (7, "some_views")
    assert [" ".join(statement.split()) for statement in migration.statements] == [
        "SELECT 1, 'a; b', '-- no comment'",
        "SELECT 2 - 1",
        "SELECT 'it''s; so', 'a \\'quoted; line'",
    ]


# The catalogue, pinned in the same database.


LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
IN_FORCE_AT = datetime.fromtimestamp(recorded_ms(5) / 1000, UTC)


def version(number: int, effective_from: datetime) -> Version:
    """A version of which only its number, time and content count."""
    return Version(
        number=number, effective_from=effective_from, content_hash="as it was", actions={}, file=f"v{number}.toml"
    )


def pinned(client: Client) -> list[tuple[int, str]]:
    """Number and content of the versions on record."""
    found = client.query("SELECT number, content_hash FROM catalogue_versions ORDER BY number")
    return [(number, content_hash) for number, content_hash in found.result_rows]


def test_versions_are_recorded_once(client: Client) -> None:
    """At the first use, however often a worker starts; a later version joins them."""
    first, second = version(1, LONG_AGO), version(2, LONG_AGO + timedelta(days=1))
    for versions in ([first], [first], [first, second], [first, second]):
        pin_catalogue(client, Catalogue(versions))
    assert pinned(client) == [(1, "as it was"), (2, "as it was")]


def test_a_changed_version_is_refused(client: Client) -> None:
    """Its runs are priced; another content would price them otherwise at a replay."""
    first = version(1, LONG_AGO)
    pin_catalogue(client, Catalogue([first]))
    changed = msgspec.structs.replace(first, content_hash="changed", file="renamed.toml")
    with pytest.raises(Problem, match=r"changed: renamed.toml: a worker has loaded version 1 with other content"):
        pin_catalogue(client, Catalogue([changed]))
    assert pinned(client) == [(1, "as it was")]


def test_of_two_contents_that_come_at_once_the_first_stands(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers look, and neither finds the version: the one that writes it down second must not price by its own."""
    others = version(1, LONG_AGO)
    own = msgspec.structs.replace(others, content_hash="changed", file="mine.toml")

    def another_is_first(_: Client, found: Version, later: Sequence[int]) -> None:
        monkeypatch.undo()
        pin_catalogue(client, Catalogue([others]))
        assert found is own

    monkeypatch.setattr(catalogue_versions, "_refuse_late", another_is_first)
    with pytest.raises(Problem, match=r"changed: mine.toml: a worker has loaded version 1 with other content"):
        pin_catalogue(client, Catalogue([own]))
    pin_catalogue(client, Catalogue([others]))


def test_a_removed_version_is_refused(client: Client) -> None:
    """Without it the runs of its time would be priced by another."""
    pin_catalogue(client, Catalogue([version(1, LONG_AGO), version(2, LONG_AGO + timedelta(days=1))]))
    with pytest.raises(Problem, match=r"gone: a worker has loaded version 1\. Restore its file\."):
        pin_catalogue(client, Catalogue([version(2, LONG_AGO + timedelta(days=1))]))


def test_a_version_that_comes_late_is_refused(client: Client) -> None:
    """Runs since its effective_from are in the ledger at another price; at a later time it is welcome."""
    first = version(1, LONG_AGO)
    pin_catalogue(client, Catalogue([first]))
    write(Ledger(client), CHAIN, 9)
    with pytest.raises(Problem, match=r"too late: v2.toml: runs that it .* already priced: 5"):
        pin_catalogue(client, Catalogue([first, version(2, IN_FORCE_AT)]))
    assert pinned(client) == [(1, "as it was")]
    pin_catalogue(client, Catalogue([first, version(2, IN_FORCE_AT + timedelta(seconds=5))]))
    assert len(pinned(client)) == 2


def test_a_version_before_the_one_that_priced_earlier_runs_is_refused(client: Client) -> None:
    """An action that no version knew when it ran has the price of the first that lists it: one that comes in between
    and lists it, too, would price its next run of that day, or a copy at a replay, otherwise.
    """
    after = [IN_FORCE_AT + timedelta(days=days) for days in (1, 2)]
    price = Action(
        id="find_email", name="-", category=Category.ENRICHMENT, provider="-", price=1000, pool=Pool.ENRICHMENT,
        charges_no_data=False,
    )  # fmt: skip
    known, between = (msgspec.structs.replace(version(n, after[2 - n]), actions={price.id: price}) for n in (1, 2))
    assert between.effective_from < known.effective_from
    between = msgspec.structs.replace(between, actions={r"it's \ odd": price, **between.actions})
    pin_catalogue(client, Catalogue([known]))
    write(Ledger(client), CHAIN, 9)
    with pytest.raises(Problem, match=r"too late: v2.toml: .* already priced: 10"):
        pin_catalogue(client, Catalogue([known, between]))
    pin_catalogue(client, Catalogue([known, msgspec.structs.replace(between, actions={})]))
    assert len(pinned(client)) == 2


def test_copies_and_dead_letters_do_not_make_a_version_late(client: Client) -> None:
    """Only what was priced counts."""
    ledger = Ledger(client)
    pin_catalogue(client, Catalogue([version(1, LONG_AGO)]))
    write(ledger, CHAIN, 4)
    own = batch(CHAIN, 4, 9, copies=dict.fromkeys(range(5, 10), 1))
    ledger.append(own, ledger.mark(CHAIN), threading.Event())
    pin_catalogue(client, Catalogue([version(1, LONG_AGO), version(2, IN_FORCE_AT)]))
