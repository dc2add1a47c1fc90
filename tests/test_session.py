"""What the profile of the ledger's user says does not reach the protocol, nor the questions."""

from typing import Any, Final

import pytest
from clickhouse_connect.driver.client import Client

from schemas.catalogue import Catalogue, Version
from schemas.cell_run import from_milliseconds
from schemas.ledger import Pool, Reason
from schemas.problem import Problem
from sinks import account_queries, accounts, clickhouse, dead_letters, filter_keys
from sinks.catalogue_versions import pin_catalogue
from sinks.clickhouse import DatabaseError, connect
from sinks.ledger import Chain, Insert, Ledger
from streams.recovery import names_of
from tests.account_rows import AccountRows, at
from tests.ledger_rows import assert_books_close, batch, recorded_ms, run_id, write

CHAIN: Final = Chain("cell-runs", "topic-1", 0)
EVENTS: Final = Chain("account-events", "topic-2", 0)
NEVER_WRITTEN: Final = Chain("cell-runs", "topic-3", 1)
ROWS: Final = 100
Profile = dict[str, Any]


def connect_under(profile: Profile, url: str, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A connection whose session begins with these settings, as that of a user who has such a profile."""
    monkeypatch.setattr(clickhouse, "SESSION", profile | clickhouse.SESSION)
    return connect(url)


@pytest.mark.parametrize(
    "profile",
    [
        {"async_insert": 1},
        {"deduplicate_insert": "disable"},
        {"deduplicate_insert": "backward_compatible_choice", "insert_deduplicate": 0},
        {"use_strict_insert_block_limits": 1, "max_insert_block_size_bytes": 1000},
    ],
    ids=str,
)
def test_an_insert_is_one_part_and_lands_once(
    ledger_url: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Put-if-absent rests on the token, all or nothing on the single part."""
    with connect_under(profile, ledger_url, monkeypatch) as client:
        ledger = Ledger(client)
        step = Insert(batch(CHAIN, -1, ROWS - 1), "0/topic-1/0/0", ledger.mark(CHAIN).read_at)
        ledger.insert(step)
        ledger.insert(step)
        assert_books_close(client, CHAIN, range(ROWS))


def test_an_older_server_is_not_asked_for_what_it_does_not_know(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse every statement; and it has no switch of that name to turn over."""
    monkeypatch.setattr(clickhouse, "_NEWER", {"a_switch_of_tomorrow": 1})
    with connect(database_url) as client:
        assert client.query("SELECT 1").result_rows == [(1,)]


def answers(client: Client) -> dict[str, Any]:
    """Questions of which each has something that a profile could turn over."""
    tail = accounts.tail_of(client, CHAIN, -1, EVENTS, -1)
    return {
        "a mark without rows": [mark.last for mark in (Ledger(client).mark(NEVER_WRITTEN),)],
        "the tail": (sorted(tail.debits.to_pylist(), key=str), tail.debits.schema, names_of(tail)),
        "the newest of no row": accounts.last_recorded_ms(client, NEVER_WRITTEN, 7),
        "the sum of no row": account_queries.drawn(client, "nobody", Pool.ENRICHMENT, (0, 65_535), None),
        "a run that stands": [run.reversed_at for run in accounts.runs_to_reverse(client, [("ws_1", STANDING)])],
        "open letters": [letter.letter for letter in dead_letters.parked_events(client, list(Reason), 10)],
        "balances": client.query("SELECT * EXCEPT plan FROM balances ORDER BY workspace_id, pool").result_rows,
    }


STANDING: Final = run_id(CHAIN, 0)


@pytest.fixture
def filled(client: Client) -> Client:
    """A ledger with an account, a run that stands, and an open letter."""
    write(Ledger(client), CHAIN, ROWS - 1)
    rows = AccountRows()
    rows.plan(at("2026-01-15"))
    rows.run(at("2026-08-20"), run_id=STANDING, topic_id="topic-0")
    rows.run(at("2026-08-20"), kind="dead_letter", reason="unknown_run", topic_id="topic-0", credits=0)
    rows.write(client)
    return client


@pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
@pytest.mark.parametrize(
    "profile",
    [
        {"join_use_nulls": 1},
        {"aggregate_functions_null_for_empty": 1},
        {"empty_result_for_aggregation_by_empty_set": 1},
        {"prefer_column_name_to_alias": 1},
        {"single_join_prefer_left_table": 0},
        {"output_format_arrow_string_as_string": 0},
        {"output_format_arrow_low_cardinality_as_dictionary": 1},
        {"use_query_cache": 1},
        {"additional_table_filters": "{'ledger': 'workspace_id = 0'}"},
        {"additional_result_filter": "0"},
        {"limit": 1},
        {"offset": 1},
        {"compatibility": "22.8"},
        {"session_timezone": "America/New_York"},
    ],
    ids=str,
)
def test_questions_have_the_same_answers(
    filled: Client, ledger_url: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NULL in place of 0, another name for a column or an answer of earlier would be another answer."""
    expected = answers(filled)
    assert expected["open letters"] == ["topic-0/cell-runs[0]@1"]
    with connect_under(profile, ledger_url, monkeypatch) as client:
        assert answers(client) == expected


@pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
@pytest.mark.parametrize(
    "profile",
    [
        {"read_overflow_mode": "break", "max_rows_to_read": 10},
        {"read_overflow_mode_leaf": "break", "max_rows_to_read_leaf": 10},
        {"result_overflow_mode": "break", "max_result_rows": 10},
    ],
    ids=str,
)
def test_an_answer_that_reaches_a_limit_fails_and_is_not_cut(
    filled: Client, ledger_url: str, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter with some of the runs would let a copy be charged."""
    with (
        connect_under(profile | {"max_block_size": 5}, ledger_url, monkeypatch) as client,
        pytest.raises(DatabaseError, match=r"(?i)limit"),
    ):
        filter_keys.recent_run_keys(client, CHAIN, 0)


@pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
def test_a_late_catalogue_version_is_seen_in_any_time_zone(
    client: Client, ledger_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its effective_from is an instant: read as one of the server's zone, a version would come in behind its runs."""
    write(Ledger(client), CHAIN, ROWS - 1)
    late = Version(
        number=1, effective_from=from_milliseconds(recorded_ms(0)), content_hash="", actions={}, file="v1.toml"
    )
    with (
        connect_under({"session_timezone": "America/New_York"}, ledger_url, monkeypatch) as abroad,
        pytest.raises(Problem, match=f"already priced: {ROWS}"),
    ):
        pin_catalogue(abroad, Catalogue([late]))
