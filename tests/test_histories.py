"""The published histories and the rules of limits, by three voices that must agree: fold, reference, unit + SQL."""

from collections.abc import Iterator
from decimal import Decimal
from functools import cache
from itertools import count
from pathlib import Path
from typing import Final

import pytest
from clickhouse_connect.driver.client import Client

from sinks.clickhouse import connect
from sinks.migrate import create_database, migrate
from tests.account_records import Story
from tests.ledger_rows import wait_until_grown
from tests.limit_stories import HISTORIES, RULES
from tests.limit_voices import Heard, by_fold, by_reference, by_unit, by_unit_from_backlog

NUMBERS: Final = count(1)
TOLD: Final = HISTORIES | RULES


@pytest.fixture(scope="module")
def ledger(chdb_dir: Path) -> Iterator[Client]:
    """One ledger for all stories: each has a workspace and chains of its own."""
    url = f"chdb://{chdb_dir}?database=histories"
    create_database(url)
    with connect(url) as client:
        migrate(client)
        wait_until_grown(client)
        yield client
        client.command("DROP DATABASE histories SYNC")


@cache
def told(name: str, of_whom: str = "ws") -> Story:
    """One story, in the order in which it was recorded."""
    story = Story(f"{of_whom}_{name}")
    TOLD[name](story)
    story.steps.sort(key=lambda step: step.recorded)
    return story


@cache
def referred(name: str) -> Heard:
    """What the slow reference says of it."""
    return by_reference(told(name))


@pytest.fixture(autouse=True)
def short_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units look at the clock more often, so that time comes sooner, and so do the states that a story waits for."""
    monkeypatch.setattr("streams.unit.TICK_S", 0.02)
    monkeypatch.setattr("streams.settling.STATES_EVERY_S", 0.02)


every_story = pytest.mark.parametrize("name", TOLD)


def assert_heard(heard: Heard, story: Story) -> None:
    """Balances, states, periods and alerts are those of the story."""
    assert [(alert.kind, alert.thresholds) for alert in heard.alerts] == story.alerts
    for check, seen in zip(story.checks, heard.seen, strict=True):
        assert (seen.used, seen.allowance, seen.state) == (check.used, check.allowance, check.state), check
        assert check.period in (None, seen.period)


@every_story
def test_the_fold_tells_each_story(name: str) -> None:
    """Balances and alerts of the pure fold are the published ones."""
    assert_heard(by_fold(told(name)), told(name))


@every_story
def test_the_reference_tells_each_story(name: str) -> None:
    """The slow second implementation says what the rules say, and of every alert the same as the fold."""
    heard = referred(name)
    assert_heard(heard, told(name))
    assert heard == by_fold(told(name))


@every_story
async def test_a_unit_and_sql_tell_each_story(name: str, ledger: Client) -> None:
    """A real unit publishes the same alerts, and the views say the same balances and periods."""
    story = told(name)
    heard = await by_unit(story, ledger, next(NUMBERS))
    assert_heard(heard, story)
    assert heard == referred(name)
    for start, end, used, allowance in story.periods:
        found = ledger.query(
            "SELECT sum(credits), any(allowance) FROM usage_by_period FULL JOIN billing_periods AS periods "
            "ON periods.workspace_id = usage_by_period.workspace_id AND periods.period_start = "
            "usage_by_period.period_start WHERE periods.workspace_id = {name:String} AND "
            "periods.period_start = {start:Date} AND periods.period_end = {end:Date}",
            parameters={"name": story.workspace_id, "start": start, "end": end},
        ).result_rows
        assert found == [(Decimal(used), Decimal(allowance))], (start, end)


@pytest.mark.parametrize(
    "name",
    [
        "r06_an_upgrade_at_any_time", "plans_are_ordered_by_their_effect", "a_reversal_once_and_a_line_crossed_again",
        "restart_period_begins_a_period_on_that_day", "r07_premium_draws_from_grants",
    ],
)  # fmt: skip
@pytest.mark.parametrize("account_first", [False, True])
async def test_a_backlog_tells_the_same_alerts(name: str, account_first: bool, ledger: Client) -> None:
    """Chunks of hours are folded in the broker's order, whatever else they hold, and whichever topic is fetched first:
    as live traffic was.
    """
    story = told(name, f"late_{account_first}")
    assert await by_unit_from_backlog(story, ledger, next(NUMBERS), account_first) == referred(name).alerts
