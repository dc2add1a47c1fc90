"""Every run that the ledger has is in one of the two tiers of a unit's filter, whenever its batch began."""

from datetime import datetime

import pytest
from clickhouse_connect.driver.client import Client

from schemas.ledger import Kind
from sinks.filter_keys import older_months, recent_run_keys, run_keys_of
from sinks.ledger import Chain
from tests.account_rows import AccountRows, at

CHAIN = Chain("cell-runs", "topic-1", 0)


@pytest.mark.parametrize("since", [at("2026-01-02 12:00:00"), at("2026-01-31 12:00:00"), at("2026-03-01")])
def test_the_tiers_have_every_run_once(client: Client, since: datetime) -> None:
    """A batch belongs to the month of its first record: after an outage over new year 202512 holds January's."""
    rows = AccountRows()
    for batch_month, days in ((202511, ("2025-11-30",)), (202512, ("2025-12-31", "2026-01-03", "2026-02-02")),
                              (202601, ("2026-01-04", "2026-02-01")), (202603, ("2026-03-05",))):  # fmt: skip
        for day in days:
            rows.run(at(f"{day} 10:00:00"), 1, recorded_at=at(f"{day} 10:00:01"), batch_month=batch_month)
    rows.write(client)
    ((runs,),) = client.query("SELECT count() FROM ledger WHERE kind = {kind:String}", {"kind": Kind.RUN}).result_rows
    keys = list(recent_run_keys(client, CHAIN, since.timestamp()))
    for month in older_months(client, CHAIN, since.timestamp()):
        keys += list(run_keys_of(client, CHAIN, month))
    assert len(keys) == len(set(keys)) == runs == 7
