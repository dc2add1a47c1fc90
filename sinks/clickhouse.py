"""One ``connect`` for chDB in this process and for a ClickHouse server over HTTP(S): the same client, the same SQL."""

import logging
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import clickhouse_connect
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, OperationalError

from schemas.problem import Problem, Unreachable

CONNECT_TIMEOUT_S: Final = 5
ANSWER_TIMEOUT_S: Final = 30

SESSION: Final[dict[str, Any]] = {
    # An insert keeps its token, and is one part.
    "async_insert": 0,
    "insert_deduplicate": 1,
    # An answer is of now, and of all rows: where a limit is reached it fails.
    "use_query_cache": 0,
    "additional_table_filters": "{}",
    "additional_result_filter": "",
    "limit": 0,
    "offset": 0,
    "read_overflow_mode_leaf": "throw",
    **{
        f"{what}_overflow_mode": "throw"
        for what in ("read", "result", "timeout", "group_by", "sort", "distinct", "set", "join")
    },
    # What is not there is 0 or empty, not NULL, and a name means what it means by default.
    "join_use_nulls": 0,
    "aggregate_functions_null_for_empty": 0,
    "empty_result_for_aggregation_by_empty_set": 0,
    "prefer_column_name_to_alias": 0,
    "single_join_prefer_left_table": 1,
    "output_format_arrow_string_as_string": 1,
    "output_format_arrow_low_cardinality_as_dictionary": 0,
    "optimize_use_projections": 1,
    # Look-ups of duplicates name many runs.
    "max_query_size": 16 * 1024 * 1024,
    # Indexes are few and small: more threads for them cost more than they spare.
    "max_threads_for_indexes": 1,
}
"""Set on every connection: what the protocol and the questions rest on must not depend on the ledger user's profile."""
_NEWER: Final[dict[str, Any]] = {
    # Stands above ``insert_deduplicate`` (since 26.2).
    "deduplicate_insert": "enable",
    # Would part an insert (26.4).
    "use_strict_insert_block_limits": 0,
    # A look at indexes while reading costs more than it spares, too (25.9).
    "use_skip_indexes_on_data_read": 0,
}
"""Set likewise where the server knows them; an older server refuses names that it does not know."""

# What it logs it also raises; without a handler Python would print it beside a command's one line.
logging.getLogger("clickhouse_connect").addHandler(logging.NullHandler())

DatabaseError = ClickHouseError
"""Whatever the database or its transport may raise."""


def connect(
    url: str, password: str = "", *, database: str | None = None, answer_timeout_s: int = ANSWER_TIMEOUT_S
) -> Client:
    """A client of ``chdb:///directory?database=name`` or of ``http(s)://user@host:port/database``.

    Thread-safe, one statement at a time on chDB. ``database`` replaces the one of the URL;
    ``answer_timeout_s`` is for HTTP only.
    Unreachable when nobody answers; Problem when the URL is wrong or another process holds the chDB directory.
    """
    parts = urlsplit(url)
    try:
        _ = parts.port
    except ValueError as error:
        raise Problem("the ledger's URL is wrong", str(error), "Set CREDITSTREAM_LEDGER_URL.") from error
    match parts.scheme:
        case "chdb":
            return _open_chdb(Path(parts.path), database or database_of(url))
        case "http" | "https":
            return _open_http(url, password, database or database_of(url), answer_timeout_s)
    raise Problem("the ledger's URL is wrong", "it is neither http(s):// nor chdb://", "Set CREDITSTREAM_LEDGER_URL.")


def database_of(url: str) -> str:
    """The database that a URL names, ``creditstream`` when it names none."""
    parts = urlsplit(url)
    named = parts.query.removeprefix("database=") if parts.scheme == "chdb" else unquote(parts.path.strip("/"))
    return named or "creditstream"


def _open_chdb(directory: Path, database: str) -> Client:
    directory.mkdir(parents=True, exist_ok=True)
    try:
        client = clickhouse_connect.get_client(interface="chdb", path=str(directory), settings=SESSION, tz_mode="aware")
        _set_newer(client)
    except ImportError as error:
        raise Problem(
            "chDB is not installed", str(error), "Install creditstream[embedded] or set CREDITSTREAM_LEDGER_URL."
        ) from error
    except (ClickHouseError, RuntimeError) as error:
        raise Problem(
            "the ledger cannot be opened",
            f"another process holds {directory}, or it is damaged" if _is_lock_error(error) else str(error),
            "Ask the worker that is running there, or stop it first.",
        ) from error
    client.command(f"CREATE DATABASE IF NOT EXISTS `{database}`")
    client.database = database
    return client


def _is_lock_error(error: Exception) -> bool:
    return any(sign in str(error) for sign in ("Cannot lock file", "EmbeddedServer", "BAD_ARGUMENTS"))


def _open_http(url: str, password: str, database: str, answer_timeout_s: int) -> Client:
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    port = parts.port or (8443 if parts.scheme == "https" else 8123)
    place = f"{host}:{port}"
    try:
        client = clickhouse_connect.get_client(
            interface=parts.scheme,
            host=host,
            port=port,
            username=unquote(parts.username or "default"),
            password=unquote(parts.password or "") or password,
            database=database,
            connect_timeout=CONNECT_TIMEOUT_S,
            send_receive_timeout=answer_timeout_s,
            autogenerate_session_id=False,
            tz_mode="aware",
            settings=SESSION,
        )
        _set_newer(client)
        return client
    except ClickHouseError as error:
        if isinstance(error, OperationalError):
            cause: BaseException = error
            while cause.__cause__:
                cause = cause.__cause__
            raise Unreachable(
                f"ClickHouse at {place} does not answer", first_line(cause), "Start it or set CREDITSTREAM_LEDGER_URL."
            ) from error
        raise Problem(
            f"ClickHouse at {place} refused the connection",
            first_line(error),
            "Check user, password and database; run `creditstream migrate`.",
        ) from error


def _set_newer(client: Client) -> None:
    for name in _NEWER.keys() & client.server_settings.keys():
        client.set_client_setting(name, _NEWER[name])


def first_line(error: BaseException) -> str:
    """What a database error says, without its stack."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
