"""The ClickHouse of the tests: what clickhouse-connect's HTTP client gets from it, and its faults."""

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path

import clickhouse_connect
import pyarrow as pa
import pytest
from clickhouse_connect.driver import Client
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError

from tests.clickhouse_server import ROOT, ClickHouseServer

RUN_ID = uuid.UUID("0198c0de-0000-7000-8000-0123456789ab")
RAN_AT = datetime(2026, 8, 31, 23, 59, 59, 999000, tzinfo=UTC)
TABLE = """CREATE TABLE rows (run_id UUID, ran_at DateTime64(3, 'UTC'), credits Decimal(18, 3),
    kind Enum8('run' = 1, 'duplicate' = 2), action LowCardinality(String), n UInt64)
    ENGINE = MergeTree ORDER BY n SETTINGS non_replicated_deduplication_window = 100"""


@pytest.fixture
def server(http_server: ClickHouseServer) -> ClickHouseServer:
    """The session's server with an empty database."""
    http_server.forget_log()
    with connect(http_server, "default") as client:
        client.command("DROP DATABASE IF EXISTS meter SYNC")
        client.command("CREATE DATABASE meter")
    with connect(http_server) as client:
        client.command(TABLE)
    http_server.forget_log()
    return http_server


@pytest.fixture
def client(server: ClickHouseServer) -> Iterator[Client]:
    with connect(server) as client:
        yield client


def connect(server: ClickHouseServer, database: str = "meter", *, timeout_s: int = 10, compress: str = "lz4") -> Client:
    return clickhouse_connect.get_client(
        host=server.host,
        port=server.port,
        username="default",
        password=server.password,
        compress=compress,
        database=database,
        send_receive_timeout=timeout_s,
        autogenerate_session_id=False,
        dedicated_pool=True,
    )


def batch(*positions: int) -> pa.Table:
    size = len(positions)
    return pa.table(
        {
            "run_id": pa.array([RUN_ID.bytes] * size, pa.binary(16)),
            "ran_at": pa.array([RAN_AT] * size, pa.timestamp("ms", "UTC")),
            "credits": pa.array([Decimal("1.250")] * size, pa.decimal128(18, 3)),
            "kind": pa.array(["run"] * size),
            "action": pa.array(["find_email"] * size).dictionary_encode(),
            "n": pa.array(positions, pa.uint64()),
        }
    )


def once(token: str) -> dict[str, object]:
    return {"insert_deduplication_token": token, "async_insert": 0}


def insert(client: Client, token: str, *positions: int) -> None:
    client.insert_arrow("rows", batch(*positions), settings=once(token))


def insert_in_vain(client: Client) -> None:
    with pytest.raises(OperationalError):
        insert(client, "a", 1)


def numbers(client: Client) -> list[int]:
    return [n for (n,) in client.query("SELECT n FROM rows ORDER BY n").result_rows]


def count(client: Client) -> int:
    return int(client.query("SELECT count() FROM rows").result_rows[0][0])


def in_background(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_an_insert_sent_twice_under_one_token_lands_once(server: ClickHouseServer, client: Client) -> None:
    insert(client, "0/topic/1/7", 7, 8)
    insert(client, "0/topic/1/7", 7, 8)
    insert(client, "0/topic/1/9", 9)
    assert numbers(client) == [7, 8, 9]
    assert [line["token"] for line in server.log("insert")] == ["0/topic/1/7", "0/topic/1/7", "0/topic/1/9"]


def test_every_column_type_comes_back_as_it_went_in(client: Client) -> None:
    insert(client, "a", 1)
    row = client.query("SELECT * FROM rows").result_rows[0]
    assert row == (RUN_ID, RAN_AT.replace(tzinfo=None), Decimal("1.250"), "run", "find_email", 1)
    table = client.query_arrow("SELECT toString(run_id) AS run_id, ran_at, credits, action, n FROM rows")
    assert table.to_pylist()[0] == {
        "run_id": str(RUN_ID),
        "ran_at": RAN_AT,
        "credits": Decimal("1.250"),
        "action": "find_email",
        "n": 1,
    }


def test_rows_as_python_objects_and_raw_lines_are_inserted_too(client: Client) -> None:
    names = ["run_id", "ran_at", "credits", "kind", "action", "n"]
    client.insert("rows", [[RUN_ID, RAN_AT, Decimal("2"), "duplicate", "x", 1]], column_names=names)
    client.raw_insert("rows", ["n"], b'{"n":2}\n{"n":3}\n', fmt="JSONEachRow")
    client.command("INSERT INTO rows (n) VALUES (4)")
    client.command("INSERT INTO rows (n) FORMAT CSV", data="5\n6\n")
    client.command("INSERT INTO rows (n) SELECT 7")
    assert numbers(client) == [1, 2, 3, 4, 5, 6, 7]
    assert client.query("SELECT kind FROM rows WHERE n = 1").result_rows == [("duplicate",)]


@pytest.mark.parametrize("compress", ["lz4", "zstd", "gzip"])
def test_compressed_inserts_are_understood(server: ClickHouseServer, compress: str) -> None:
    with connect(server, compress=compress) as client:
        client.insert("rows", [[n] for n in range(1000)], column_names=["n"])
        assert count(client) == 1000


def test_parameters_reach_the_statement_unharmed(client: Client) -> None:
    text = "it's a 100% \\ {test} \t ✓"
    assert client.query("SELECT {text:String}", parameters={"text": text}).result_rows == [(text,)]
    assert client.command("SELECT {n:UInt64} + 1", parameters={"n": 41}) == 42
    many = [f"workspace-{n}" for n in range(5000)]
    found = client.query("SELECT length({many:Array(String)})", parameters={"many": many})
    assert found.result_rows == [(5000,)], "parameters beyond the length of a URL travel as a form"


def test_settings_reach_one_statement_only(client: Client) -> None:
    query = "SELECT getSetting('max_threads'), getSetting('async_insert')"
    assert client.query(query, settings={"max_threads": 3, "async_insert": 0}).result_rows == [(3, False)]
    assert client.query(query).result_rows[0][0] != 3


def test_the_clock_and_the_age_of_the_server_can_be_asked(client: Client) -> None:
    now, uptime = client.query("SELECT now64(3), uptime()").result_rows[0]
    assert abs((now.replace(tzinfo=UTC) - datetime.now(UTC)).total_seconds()) < 5
    assert 0 <= uptime < 600


def test_ping_and_raw_queries_answer(client: Client) -> None:
    assert client.ping()
    assert client.raw_query("SELECT 1 AS a", fmt="JSONEachRow") == b'{"a":1}\n'
    assert client.command("SELECT n FROM rows") == ""
    assert client.query("SELECT n, kind FROM rows LIMIT 0").column_names == ("n", "kind")


@pytest.mark.parametrize(
    ("statement", "code"),
    [
        ("SELEC 1", 62),
        ("SELECT * FROM absent", 60),
        ("SELECT * FROM absent.rows", 81),
        ("SELECT 1 SETTINGS no_such_setting = 1", 115),
        ("INSERT INTO rows (n) VALUES ('x')", 6),
    ],
)
def test_an_error_has_its_code_and_its_text(client: Client, statement: str, code: int) -> None:
    with pytest.raises(DatabaseError, match=f"Code: {code}\\. DB::Exception") as error:
        client.command(statement)
    assert error.value.code == code


def test_an_unknown_database_is_refused_at_connect(server: ClickHouseServer) -> None:
    with pytest.raises(DatabaseError, match="Code: 81"):
        connect(server, "absent")


def test_a_constraint_refuses_an_insert(client: Client) -> None:
    client.command("ALTER TABLE rows ADD CONSTRAINT small CHECK n < 100")
    with pytest.raises(DatabaseError, match="Code: 469"):
        insert(client, "a", 100)
    assert count(client) == 0


def test_two_requests_at_once_in_one_session_are_refused(server: ClickHouseServer) -> None:
    with (
        clickhouse_connect.get_client(host=server.host, port=server.port, session_id="one") as first,
        clickhouse_connect.get_client(host=server.host, port=server.port, session_id="one") as second,
    ):
        server.fault("hold", on="select")
        held = in_background(lambda: first.command("SELECT 1"))
        server.wait_for(fault="hold")
        with pytest.raises(DatabaseError, match="Code: 373"):
            second.command("SELECT 2")
        server.release()
        held.join(5)


def test_concurrent_inserts_under_one_token_land_once(server: ClickHouseServer, client: Client) -> None:
    def race(first: int) -> None:
        with connect(server) as racer:
            for position in range(5):
                insert(racer, f"position-{position}", first, first + 1)

    racers = [in_background(partial(race, first)) for first in (0, 10, 20, 30)]
    for racer in racers:
        racer.join(20)
    assert count(client) == 10


def test_closed_before_is_not_executed(server: ClickHouseServer, client: Client) -> None:
    server.fault("close_before")
    with pytest.raises(OperationalError):
        insert(client, "a", 1)
    assert count(client) == 0


def test_closed_after_is_executed_and_may_be_sent_again(server: ClickHouseServer, client: Client) -> None:
    server.fault("close_after")
    with pytest.raises(OperationalError):
        insert(client, "a", 1)
    assert count(client) == 1
    insert(client, "a", 1)
    assert count(client) == 1


def test_the_client_itself_sends_a_plain_insert_again(server: ClickHouseServer, client: Client) -> None:
    """clickhouse-connect replays `insert` once after a close; only the token makes that harmless."""
    server.fault("close_after")
    client.insert("rows", [[1]], column_names=["n"], settings=once("a"))
    assert [line["fault"] for line in server.log("insert")] == ["close_after", ""]
    assert count(client) == 1


def test_status_503_is_not_executed(server: ClickHouseServer, client: Client) -> None:
    server.fault("status_503")
    with pytest.raises(OperationalError):
        insert(client, "a", 1)
    assert count(client) == 0


def test_late_after_is_executed_at_once_and_times_out(server: ClickHouseServer, client: Client) -> None:
    server.fault("late_after", 1.5)
    with connect(server, timeout_s=1) as impatient, pytest.raises(OperationalError):
        insert(impatient, "a", 1)
    assert count(client) == 1


def test_late_before_lands_after_the_client_gave_up(server: ClickHouseServer, client: Client) -> None:
    server.fault("late_before", 1.5)
    with connect(server, timeout_s=1) as impatient, pytest.raises(OperationalError):
        insert(impatient, "a", 1)
    assert count(client) == 0
    server.wait_for(fault="late_before", state="executed")
    assert count(client) == 1


def test_a_held_insert_loses_its_position_to_the_one_that_overtakes_it(
    server: ClickHouseServer, client: Client
) -> None:
    server.fault("hold")
    held = in_background(lambda: insert(client, "a", 1))
    server.wait_for(fault="hold")
    with connect(server) as other:
        insert(other, "a", 2)
        server.release()
        held.join(5)
        assert numbers(other) == [2]


@pytest.mark.parametrize(("fault", "rows"), [("exception", 0), ("exception_after", 1)])
def test_an_injected_exception_carries_its_code(
    server: ClickHouseServer, client: Client, fault: str, rows: int
) -> None:
    server.fault(fault, 252)
    with pytest.raises(DatabaseError, match="Code: 252"):
        insert(client, "a", 1)
    assert count(client) == rows


def test_faults_come_in_order_and_choose_their_statement(server: ClickHouseServer, client: Client) -> None:
    server.fault("pass")
    server.fault("exception", 252)
    server.fault("exception", 241, on="select", containing="max(n)")
    insert(client, "a", 1)
    assert count(client) == 1
    with pytest.raises(DatabaseError, match="Code: 241"):
        client.query("SELECT max(n) FROM rows")
    with pytest.raises(DatabaseError, match="Code: 252"):
        insert(client, "b", 2)


@pytest.mark.parametrize(("fault", "rows"), [("kill_before", 0), ("kill_after", 1)])
def test_a_killed_server_keeps_what_it_executed(tmp_path: Path, fault: str, rows: int) -> None:
    with ClickHouseServer(tmp_path) as server:
        port = server.port
        with connect(server, "default") as client:
            client.command(TABLE)
            server.fault(fault)
            with pytest.raises(OperationalError):
                insert(client, "a", 1)
            server.wait_until_down()
            assert server.start().port == port
            assert count(client) == rows
            insert(client, "a", 1)
            assert count(client) == 1, "the token outlives the process"
            server.stop()
            assert server.forget_tokens() == 1
            server.start()
            insert(client, "a", 1)
            assert count(client) == 2, "and is gone with its log"


def test_a_wrong_password_is_refused(tmp_path: Path) -> None:
    with ClickHouseServer(tmp_path, password="right") as server:
        with connect(server, "default") as client:
            assert client.command("SELECT 1") == 1
        server.password = "wrong"
        with pytest.raises(DatabaseError, match="Code: 516"):
            connect(server, "default")


def test_a_server_stops_in_time_with_requests_held(tmp_path: Path) -> None:
    with ClickHouseServer(tmp_path) as server, connect(server, "default") as client:
        client.command(TABLE)
        server.fault("hold")
        held = in_background(lambda: insert_in_vain(client))
        server.wait_for(fault="hold")
        server.restart()
        held.join(5)
        assert count(client) == 0


def test_a_server_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from tests.clickhouse_server import ClickHouseServer\n"
        "print(ClickHouseServer(Path(sys.argv[1])).start().pid, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        threading.Event().wait(0.05)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the server outlived its parent")
