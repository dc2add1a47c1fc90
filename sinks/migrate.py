"""Numbered migrations with checksums. The same statements run on chDB and on a server.

A migration is a file ``NNNN_name.sql`` of idempotent statements, so that one which died half-way is simply run again.
An applied file never changes: its checksum is compared at every start.
"""

import hashlib
import re
from pathlib import Path
from typing import Final

import msgspec
from clickhouse_connect.driver.client import Client

from schemas.problem import Problem
from sinks.clickhouse import connect, database_of

MIGRATIONS: Final = Path(__file__).parent / "migrations"

_BOOK: Final = """
CREATE TABLE IF NOT EXISTS schema_migrations
(
    number UInt32, name String, checksum String, applied_at DateTime64(3, 'UTC') DEFAULT now64(3)
)
ENGINE = MergeTree ORDER BY number
"""


class Migration(msgspec.Struct, frozen=True):
    """One file: its number, name and SHA-256, and its statements in order."""

    number: int
    name: str
    checksum: str
    statements: tuple[str, ...]


def read_migrations(directory: Path = MIGRATIONS) -> list[Migration]:
    """All migrations, in order of their numbers."""
    return [_read(file) for file in sorted(directory.glob("*.sql"))]


def create_database(url: str, password: str = "") -> None:
    """The database that the URL names, on a server that may not have it yet."""
    client = connect(url, password, database="default")
    try:
        client.command(f"CREATE DATABASE IF NOT EXISTS `{database_of(url)}`")
    finally:
        client.close()


def pending(client: Client, migrations: list[Migration]) -> list[Migration]:
    """Those not applied yet. Problem when the database is ahead of, or differs from, this program."""
    client.command(_BOOK)
    found = client.query("SELECT number, any(checksum) FROM schema_migrations GROUP BY number").result_rows
    applied: dict[int, str] = {int(number): str(checksum) for number, checksum in found}
    known = {migration.number: migration for migration in migrations}
    for number, checksum in sorted(applied.items()):
        if number not in known:
            raise Problem(
                "the ledger is newer than this program",
                f"migration {number} is unknown here",
                "Install the newer creditstream.",
            )
        if known[number].checksum != checksum:
            raise Problem(
                "a migration was changed after it ran",
                f"{known[number].name} has another checksum in the ledger",
                "Restore the file; put changes into a new migration.",
            )
    return [migration for migration in migrations if migration.number not in applied]


def migrate(client: Client, migrations: list[Migration] | None = None) -> list[Migration]:
    """Apply what is pending and return it. Safe to run again, also after a crash half-way."""
    todo = pending(client, read_migrations() if migrations is None else migrations)
    for migration in todo:
        for statement in migration.statements:
            client.command(statement)
        client.insert(
            "schema_migrations",
            [[migration.number, migration.name, migration.checksum]],
            column_names=["number", "name", "checksum"],
        )
    return todo


def require_migrated(client: Client) -> None:
    """Problem when `creditstream migrate` has something to do."""
    if todo := pending(client, read_migrations()):
        names = ", ".join(migration.name for migration in todo)
        raise Problem("the ledger is not ready", f"migrations are pending: {names}", "Run `creditstream migrate`.")


def _read(file: Path) -> Migration:
    text = file.read_text()
    number, _, name = file.stem.partition("_")
    return Migration(int(number), name, hashlib.sha256(text.encode()).hexdigest(), _statements(text))


_PIECE: Final = re.compile(r"--[^\n]*|'(?:[^'\\]|\\.)*'|;|[^-';]+|.", re.DOTALL)


def _statements(text: str) -> tuple[str, ...]:
    """What stands between semicolons, without ``--`` comments; a text in quotes may hold either."""
    statements = [""]
    for piece in _PIECE.findall(text):
        if piece == ";":
            statements.append("")
        elif not piece.startswith("--"):
            statements[-1] += piece
    return tuple(statement.strip() for statement in statements if statement.strip())
