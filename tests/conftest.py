"""What tests share: one chDB, one ClickHouse over HTTP and one Kafka for the session, a database for each test."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from clickhouse_connect.driver.client import Client
from hypothesis import settings

from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from sinks.clickhouse import connect
from sinks.migrate import create_database, migrate
from tests.clickhouse_server import ClickHouseServer
from tests.ledger_rows import wait_until_grown
from tests.records import STEADY
from tests.webhook_receiver import WebhookReceiver

NUMBERS: Final = itertools.count(1)

settings.register_profile("steady", STEADY)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def chdb_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The one directory that chDB may open in this process. The engine would stop with its last client."""
    directory = tmp_path_factory.mktemp("chdb")
    with connect(f"chdb://{directory}?database=default"):
        yield directory


@pytest.fixture(scope="module")
def engine(chdb_dir: Path) -> Iterator[Client]:
    """The engine alone, without a ledger."""
    with connect(f"chdb://{chdb_dir}?database=default") as client:
        yield client


@pytest.fixture(scope="session")
def http_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouseServer]:
    """A ClickHouse over HTTP that tests may break. A test that kills it starts it again."""
    with ClickHouseServer(tmp_path_factory.mktemp("clickhouse")) as server:
        yield server


@pytest.fixture(params=["chdb", "http"])
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty database, on chDB in this process and over HTTP: a test that asks for it runs on both."""
    name = f"test_{next(NUMBERS)}"
    if request.param == "chdb":
        url = f"chdb://{request.getfixturevalue('chdb_dir')}?database={name}"
    else:
        server: ClickHouseServer = request.getfixturevalue("http_server")
        server.forget_log()
        url = f"{server.url}/{name}"
    create_database(url)
    yield url
    with connect(url) as client:
        client.command(f"DROP DATABASE `{name}` SYNC")


@pytest.fixture
def ledger_url(database_url: str) -> str:
    """A migrated database that takes inserts at once."""
    with connect(database_url) as client:
        migrate(client)
        wait_until_grown(client)
    return database_url


@pytest.fixture
def client(ledger_url: str) -> Iterator[Client]:
    """A connection to `ledger_url`."""
    with connect(ledger_url) as client:
        yield client


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The bootstrap address of one Kafka; every test makes topics of its own."""
    home = Home.at(tmp_path_factory.mktemp("home"))
    with home.hold(), EmbeddedKafka(home, print) as broker:
        yield broker.bootstrap


@pytest.fixture
def receiver() -> Iterator[WebhookReceiver]:
    """A receiver of webhooks, which behaves as the test says."""
    with WebhookReceiver() as receiver:
        yield receiver
