"""What a worker hears of others on `limit-states`."""

import time

import pytest
from confluent_kafka import Producer

from streams.follower import Follower, Heard
from streams.topics import LIMIT_STATES
from tests.client_kafka import WAIT_S_MAX, fresh_settings

STATE = b'{"workspace_id": "ws_1", "pool": "premium", "owner": "other", "as_of": %s}'
AS_OF = b'{"log": "a+b", "cell_runs": 1, "account_events": 0, "at": "2026-01-15T00:00:00Z"}'


@pytest.mark.parametrize(
    "odd",
    [b'{"workspace_id": "\xff"}', b'{"x": ' + b"[" * 100_000, b"{", b"", STATE % b"1"],
    ids=["no text", "deep", "no JSON", "deleted", "another"],
)
def test_f18_a_record_that_is_no_state_ends_no_follower(kafka: str, odd: bytes) -> None:
    """It is somebody's mistake; the stale states behind it are heard."""
    settings = fresh_settings(kafka, LIMIT_STATES)
    heard: list[Heard] = []
    producer = Producer({"bootstrap.servers": kafka, "log_level": 0})
    for value in (odd, STATE % AS_OF):
        producer.produce(settings.topic_prefix + LIMIT_STATES, value, b"premium/ws_1", 1)
    producer.flush(WAIT_S_MAX)
    follower = Follower(settings, lambda partition, states: heard.extend(states))
    follower.follow({1: 0})
    deadline = time.monotonic() + WAIT_S_MAX
    while not heard and time.monotonic() < deadline:
        time.sleep(0.05)
    follower.close()
    assert [state.workspace_id for state in heard] == ["ws_1"]
