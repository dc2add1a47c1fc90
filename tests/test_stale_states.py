"""What a worker hears of others on `limit-states`."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from streams.kafka.topics import LIMIT_STATES, LogRange
from streams.settings import Settings
from streams.stale_states import Follower, Heard
from tests.client_kafka import fresh_settings, publish, wait_until

STATE = b'{"workspace_id": "ws_1", "pool": "premium", "owner": "other", "as_of": %s}'
AS_OF = b'{"log": "a+b", "cell_runs": %d, "account_events": 0, "at": "2026-01-15T00:00:00Z"}'


@pytest.mark.parametrize(
    "odd",
    [b'{"workspace_id": "\xff"}', b'{"x": ' + b"[" * 100_000, b"{", b"", STATE % b"1"],
    ids=["no text", "deep", "no JSON", "deleted", "another"],
)
def test_f18_a_record_that_is_no_state_ends_no_follower(kafka: str, odd: bytes) -> None:
    """It is somebody's mistake; the stale states behind it are heard."""
    settings = fresh_settings(kafka, LIMIT_STATES)
    say(settings, odd, STATE % (AS_OF % 1))
    with following(settings, LogRange(0, 0)) as heard:
        wait_until(lambda: heard, "heard")
    assert [state.workspace_id for state in heard] == ["ws_1"]


def test_f18_what_was_said_before_there_was_an_owner_is_heard_where_it_is_stale(kafka: str) -> None:
    """It stands behind a state that rests on more; all others of that time are good, and none of it is heard again."""
    settings = fresh_settings(kafka, LIMIT_STATES)
    say(settings, *(STATE % (AS_OF % runs) for runs in (5, 3, 5, 6, 4)))
    with following(settings, LogRange(0, 5)) as heard:
        wait_until(lambda: len(heard) == 2, "heard")
        say(settings, STATE % (AS_OF % 7))
        wait_until(lambda: len(heard) == 3, "heard")
    assert [state.as_of.cell_runs for state in heard] == [3, 4, 7]


def say(settings: Settings, *states: bytes) -> None:
    """On partition 1 of `limit-states`, where this key belongs."""
    publish(settings, [(b"premium/ws_2", state) for state in states])


@contextmanager
def following(settings: Settings, log: LogRange) -> Iterator[list[Heard]]:
    """What a worker hears of partition 1, assigned when its log had this range."""
    heard: list[Heard] = []
    follower = Follower(settings, lambda partition, states: heard.extend(states))
    follower.follow({1: log})
    try:
        yield heard
    finally:
        follower.close()
