"""A run whose action nobody had priced: parked, and charged once the catalogue knows it, as of the day that it ran."""

from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from clickhouse_connect.driver.client import Client

from schemas.account import PlanChanged
from schemas.catalogue import Catalogue
from schemas.cell_run import to_milliseconds
from schemas.ledger import REDRIVE_HEADER
from streams.rules.rating import RatingTable
from tests.account_records import SECOND, account_record, at, event_id
from tests.records import Record, enrichment, event, write_catalogue
from tests.unit_bench import Bench

FIRST = (1, "2026-01-01T00:00:00Z", {"enrich_person": enrichment("1")})
SECOND_VERSION = (2, "2026-01-25T00:00:00Z", {"enrich_person": enrichment("1"), "new_vendor": enrichment("3")})


@pytest.mark.parametrize("database_url", ["chdb"], indirect=True)
async def test_a_parked_run_is_redriven_a_month_later(client: Client, tmp_path: Path) -> None:
    """It costs 3 by the version that lists it, is dated by its run, is late and alerts nobody; its letter is closed."""
    ran, redriven = at("Jan 20"), at("Feb 20")
    catalogues = []
    for name, versions in (("before", (FIRST,)), ("after", (FIRST, SECOND_VERSION))):
        (tmp_path / name).mkdir()
        catalogues.append(RatingTable(Catalogue.load(write_catalogue(tmp_path / name, *versions))))
    value = event(action="new_vendor", ran_ms=to_milliseconds(ran))
    plan = PlanChanged(event_id=event_id(1), workspace_id="ws_1", plan="4", effective_at=at("Jan 15"))

    first = await Bench.open(client, rating=catalogues[0])
    first.deliver([account_record(0, plan, at("Jan 15") + SECOND)], of_account=True)
    first.deliver([Record(0, value, timestamp=to_milliseconds(ran + SECOND))])
    await first.until(lambda: first.acknowledged == 2)
    second = await Bench.open(client, rating=catalogues[1], committed=first.committed)
    letter = f"{second.chains[0].topic_id}/{second.chains[0]}@0"
    again = Record(1, value, timestamp=to_milliseconds(redriven), headers=[(REDRIVE_HEADER, letter.encode())])
    second.deliver([again])
    await second.until(lambda: second.acknowledged == 1)

    rows = client.query(
        "SELECT toString(kind), toString(reason), credits, day, redrive_of FROM ledger WHERE action = 'new_vendor' "
        "ORDER BY kafka_offset"
    ).result_rows
    assert rows == [
        ("dead_letter", "unknown_action", Decimal(0), (ran + timedelta(seconds=1)).date(), ""),
        ("run", "charged", Decimal(3), date(2026, 1, 20), letter),
    ]
    assert client.query("SELECT count() FROM late_runs WHERE action = 'new_vendor'").result_rows == [(1,)]
    assert second.alerts == [], "a closed period never alerts"
