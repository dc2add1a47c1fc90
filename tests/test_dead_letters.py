"""Dead letters: which are closed, by what, and in which order they are sent again."""

from collections.abc import Sequence

import pytest
from clickhouse_connect.driver.client import Client

from schemas.ledger import REDRIVE_HEADER, Position, Reason
from schemas.problem import UnknownId
from sinks.dead_letters import dead_letter, dead_letters, parked_event, parked_events, redrivable
from sinks.ledger import Chain
from tests.ledger_rows import AUGUST_MS
from tests.records import Record, Road, event, run_id, write_rows

RUNS = Chain("cell-runs", "topic-1", 0)
RUNS_AGAIN = Chain("cell-runs", "topic-3", 0)
EVENTS = Chain("account-events", "topic-2", 0)


def unpriced(offset: int, run: int = 1, at_ms: int = AUGUST_MS, redrive_of: str = "") -> Record:
    """A run of an action that no catalogue knows."""
    headers = [(REDRIVE_HEADER, redrive_of.encode())] if redrive_of else []
    value = event(run=run, action="find_yeti", ran_ms=AUGUST_MS)
    return Record(offset, value, timestamp=at_ms, headers=headers)


def priced(offset: int, at_ms: int, redrive_of: str, run: int = 1) -> Record:
    """A record that becomes a debit, and says whose redrive it is."""
    value = event(run=run, ran_ms=AUGUST_MS)
    return Record(offset, value, timestamp=at_ms, headers=[(REDRIVE_HEADER, redrive_of.encode())])


def write(client: Client, road: Road, records: Sequence[Record]) -> None:
    """As a worker does."""
    write_rows(client, road.chain, road.table(records))


def is_open(client: Client) -> list[str]:
    """Positions of open letters, the oldest first, as both questions say them."""
    listed = [letter.position for letter in dead_letters(client, "", 100, only_open=True)]
    parked = [letter.position for letter in parked_events(client, [Reason.UNKNOWN_ACTION], 100)]
    assert listed == parked[::-1]
    return parked


def test_a_letter_is_closed_by_its_redrive(client: Client) -> None:
    """And one that is refused again is open under its new position."""
    runs = Road(chain=RUNS)
    write(client, runs, [unpriced(0, run=1), unpriced(1, run=2, at_ms=AUGUST_MS + 1)])
    assert is_open(client) == ["cell-runs[0]@0", "cell-runs[0]@1"]
    write(
        client,
        runs,
        [
            priced(2, AUGUST_MS + 2, "topic-1/cell-runs[0]@1", run=2),
            unpriced(3, 1, AUGUST_MS + 3, "topic-1/cell-runs[0]@0"),
        ],
    )
    assert is_open(client) == ["cell-runs[0]@3"]
    assert {letter.position: letter.closed_by for letter in dead_letters(client, "", 100)} == {
        "cell-runs[0]@0": "cell-runs[0]@3", "cell-runs[0]@1": "cell-runs[0]@2", "cell-runs[0]@3": "",
    }  # fmt: skip
    assert dead_letter(client, Position("cell-runs", 0, 1)).closed_by == "cell-runs[0]@2"
    assert parked_event(client, Position("cell-runs", 0, 1)).closed_by == "cell-runs[0]@2"
    with pytest.raises(UnknownId):
        parked_event(client, Position("cell-runs", 0, 2))


def test_a_redrive_closes_no_letter_at_the_same_place_of_another_topic_of_that_name(client: Client) -> None:
    """A topic that is made again counts its offsets afresh: two letters have one position, each closed by its own."""
    runs = Road(chain=RUNS)
    write(client, runs, [unpriced(0), priced(1, AUGUST_MS + 1, "topic-1/cell-runs[0]@0")])
    write(client, Road(chain=RUNS_AGAIN), [unpriced(0, run=2, at_ms=AUGUST_MS + 2)])
    assert is_open(client) == ["cell-runs[0]@0"]
    (letter,) = parked_events(client, [Reason.UNKNOWN_ACTION], 100)
    assert str(run_id(2)).encode() in letter.value

    write(client, runs, [unpriced(2, run=3, at_ms=AUGUST_MS + 3)])
    write(client, Road(chain=RUNS_AGAIN), [unpriced(2, run=4, at_ms=AUGUST_MS + 4)])
    write(client, runs, [priced(3, AUGUST_MS + 5, "topic-1/cell-runs[0]@2", run=3)])
    assert is_open(client) == ["cell-runs[0]@0", "cell-runs[0]@2"]
    assert [letter.letter for letter in parked_events(client, [Reason.UNKNOWN_ACTION], 100)] == [
        "topic-3/cell-runs[0]@0", "topic-3/cell-runs[0]@2",
    ]  # fmt: skip


def test_who_writes_runs_closes_no_letter_of_billings(client: Client) -> None:
    """The header is the sender's word: it counts within its own topic."""
    runs = Road(chain=RUNS)
    write(client, Road(chain=EVENTS), [unpriced(0)])
    write(client, runs, [priced(0, AUGUST_MS + 1, "topic-2/account-events[0]@0")])
    assert is_open(client) == ["account-events[0]@0"]


def test_letters_are_sent_again_byte_for_byte_the_oldest_first(client: Client) -> None:
    """Of two events under one id the first stands, also when both were set aside; with a limit the oldest go first."""
    runs = Road(chain=RUNS)
    odd = event(action="find_yeti").replace(b"{", b'{"note": "caf\xe9", ', 1)
    later = [unpriced(1, run=2, at_ms=AUGUST_MS + 1), unpriced(2, run=3, at_ms=AUGUST_MS + 2)]
    write(client, runs, [Record(0, odd), *later])
    found = parked_events(client, [Reason.UNKNOWN_ACTION], 2)
    assert [letter.value for letter in found] == [odd, later[0].value]
    assert parked_event(client, Position("cell-runs", 0, 0)).value == odd
    assert parked_events(client, [Reason.MISROUTED], 2) == []


def test_a_reversal_of_an_earlier_topic_is_sent_again_too(client: Client) -> None:
    """Whatever the topic's id was when it was set aside."""
    runs = Road(chain=RUNS)
    write(client, runs, [Record(0, event(run=1))])
    client.command(
        "INSERT INTO ledger (topic, topic_id, kafka_partition, kafka_offset, recorded_at, kind, reason, workspace_id, "
        "run_id, raw, raw_key, batch_month, mark_read_at) SELECT 'account-events', 'an earlier one', 0, 0, now64(3), "
        "'dead_letter', 'unknown_run', workspace_id, run_id, 'bytes', 'ws_1', batch_month, now64(3) FROM ledger"
    )
    assert redrivable(client, EVENTS, 10) == [("an earlier one/account-events[0]@0", b"ws_1", b"bytes")]
    assert redrivable(client, Chain("account-events", "topic-2", 1), 10) == []
