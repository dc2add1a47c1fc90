"""Balances: whatever is cut, evicted, loaded or lost on the way, they are the ledger's, and so are the alerts."""

import random
from collections import Counter
from decimal import Decimal
from itertools import takewhile

from hypothesis import given, settings
from hypothesis import strategies as st

from creditstream.reference_limits import ReferenceLimits
from schemas.cell_run import to_milliseconds
from streams.balances import METERED
from tests.account_records import Step
from tests.limit_histories import NAMES, SILENCE_MAX, Life, histories, live, referred
from tests.limit_voices import Rated, Seen, rated, seen_of
from tests.records import STEADY


def lived(records: list[Rated], dice: random.Random, accounts_max: int) -> Life:
    """A life full of accidents: takes of any length, late inserts, evictions, crashes and commits at random."""
    life = Life(accounts_max)
    at = [0, 0]
    by_topic = [[r for r in records if r.step.of_account == of_account] for of_account in (False, True)]
    while sum(at) < len(records):
        following = records_from(records, at)
        of_account = following[0].step.of_account
        part = list(takewhile(lambda r: r.step.of_account == of_account, following[: dice.choice([1, 1, 2, 5])]))  # noqa: B023
        (life.take_events if of_account else life.take)(part)
        at[of_account] += len(part)
        if dice.random() < 0.5:
            life.write(dice.choice([None, 1]))
            life.tell_states()
        if dice.random() < 0.3 and not life.unwritten:
            life.commit()
        if dice.random() < 0.5 or part[-1].step.recorded - life.heard > SILENCE_MAX:
            life.come(part[-1].step.recorded)
        if dice.random() < 0.2:
            life.crash()
            at = [mark + 1 for mark in life.marks]
    life.write()
    life.come(records[-1].step.recorded)
    assert at == [len(topic) for topic in by_topic]
    return life


def records_from(records: list[Rated], at: list[int]) -> list[Rated]:
    """What has not been taken in, in the order of time."""
    return [record for record in records if record.offset >= at[record.step.of_account]]


@settings(STEADY, max_examples=100)
@given(histories(), st.integers(0, 1 << 32), st.sampled_from([1, 2, 100]))
def test_f19_accidents_change_no_balance_and_no_alert(steps: list[Step], seed: int, accounts_max: int) -> None:
    """Cuts, evictions, loads, crashes: balances are the reference's, alerts and ids those of the uncut fold."""
    records = rated(steps)
    reference = referred(records)
    expected = Counter((name, told) for name, limits in reference.items() for told in limits.alerts)

    uncut = live(records)
    assert Counter((name, told) for (name, _), told in uncut.told.items()) == expected

    life = lived(records, random.Random(seed), accounts_max)
    assert life.told == uncut.told
    assert_balances(life, reference, records)
    life.crash()
    life.come(records[-1].step.recorded)
    assert life.told == uncut.told
    assert_balances(life, reference, records)
    life.commit()
    life.crash()
    assert len(life.balances) == len(NAMES)
    assert_balances(life, reference, records)


def assert_balances(life: Life, reference: dict[str, ReferenceLimits], records: list[Rated]) -> None:
    """Every account in memory is where the reference says; one that waits for nothing may not know yet that a period
    has begun: its next record will tell it.
    """
    now = records[-1].step.recorded
    for account in life.balances:
        if account.name in reference and account.until_ms > to_milliseconds(now):
            for pool in METERED:
                found = reference[account.name].balance(pool, now)
                seen = Seen(found.used, found.allowance or Decimal(0), found.state, found.period, found.plan)
                assert seen_of(account.standing(pool)) == seen, account.name
