"""Records that are delivered by hand: bounded in time, and the loss is told."""

import time

import pytest

from creditstream import producing
from creditstream.producing import Outgoing, deliver
from schemas.problem import Unreachable
from streams.settings import read_settings

NOWHERE = "127.0.0.1:1"


def test_a_queue_that_stays_full_holds_up_nobody_for_longer_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """More records than the Kafka client takes, and no Kafka: one wait for all of them, not for each."""
    monkeypatch.setattr(producing, "DELIVERY_S_MAX", 1.0)
    monkeypatch.setitem(producing.PRODUCER_CONFIG, "queue.buffering.max.messages", 10)
    records = [Outgoing("cell-runs", "ws_1", b"{}")] * 50
    started = time.monotonic()
    with pytest.raises(Unreachable) as unreachable:
        deliver(read_settings({}, kafka_bootstrap=NOWHERE), records, "runs were", "Send them again.")
    assert 1 <= time.monotonic() - started < len(records) / 2
    assert str(unreachable.value) == (
        f"50 of 50 runs were not delivered: {NOWHERE}: no answer within 1 s. Send them again."
    )
