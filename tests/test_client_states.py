"""The compact copy of the limit states, against the plain records that it stands for."""

import os
from datetime import UTC, date, datetime, timedelta

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from creditstream.client.decision import GateRules
from creditstream.client.states import HALF, OFFSET_OF_POOL, StateMirror, is_older
from creditstream.client.testing import MemoryGate
from schemas.credits import format_credits, parse_credits
from schemas.ledger import Pool
from schemas.limits import AsOf, LimitState, State, state_key
from tests.client_kafka import limit_state, record_of
from tests.records import STEADY

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
NOON_NS = int(NOON.timestamp()) * 10**9
COSTS = {Pool.ENRICHMENT: "enrich_person", Pool.PREMIUM: "clearbit_enrich_company"}

seen = st.builds(
    AsOf,
    log=st.sampled_from(["one", "two"]),
    cell_runs=st.integers(-1, 3),
    account_events=st.integers(-1, 3),
    at=st.integers(0, 3).map(lambda us: NOON + timedelta(microseconds=us)),
)
credit_texts = st.integers(0, 9_999_999).map(format_credits)
states = st.builds(
    LimitState,
    workspace_id=st.sampled_from(["ws_1", "ws_2", "ws/3 é"]),
    pool=st.sampled_from([Pool.ENRICHMENT, Pool.PREMIUM]),
    state=st.sampled_from(State),
    used=credit_texts,
    allowance=credit_texts,
    remaining=credit_texts,
    overage=credit_texts,
    period_end=st.none() | st.dates(date(2026, 1, 30), date(2026, 2, 2)),
    next_allowance=st.none() | credit_texts,
    as_of=seen,
)
tombstones = st.tuples(st.sampled_from(["ws_1", "ws_2", "ws/3 é"]), st.sampled_from(list(COSTS)))


@STEADY
@given(st.lists(states | tombstones, max_size=20), st.integers(0, 30))
def test_the_gate_answers_as_the_plain_records_would(changes: list[LimitState | tuple[str, Pool]], cells: int) -> None:
    """Whatever states and tombstones come in whatever order, a check says what the newest plain record says."""
    gate = MemoryGate(on_unknown="deny", clock=lambda: NOON_NS)
    held: dict[tuple[str, Pool], LimitState] = {}
    for change in changes:
        if isinstance(change, tuple):
            gate.states.apply(state_key(*change), None)
            held.pop(change, None)
            continue
        gate.states.apply(*record_of(change))
        key = (change.workspace_id, change.pool)
        if not (key in held and change.as_of.is_older_than(held[key].as_of)):
            held[key] = change
    for workspace_id in ("ws_1", "ws_2", "ws/3 é"):
        for pool in COSTS:
            _compare(gate, held, workspace_id, pool, cells)


def _compare(
    gate: GateRules, held: dict[tuple[str, Pool], LimitState], workspace_id: str, pool: Pool, cells: int
) -> None:
    answer = gate.check(workspace_id, COSTS[pool], cells=cells)
    state = held.get((workspace_id, pool))
    assert answer.as_of == (state.as_of if state else None)
    if pool == Pool.PREMIUM and state is None and (workspace_id, Pool.ENRICHMENT) in held:
        remaining = "0"  # who is known, and has no premium state, has no grant
    elif state is None or state.state == State.UNKNOWN_PLAN:
        remaining = None
    elif state.period_end and NOON.date() >= state.period_end:
        remaining = state.next_allowance
    else:
        remaining = state.remaining
    assert answer.remaining == remaining
    assert answer.allowed == (remaining is not None and cells * 1000 <= parse_credits(remaining))


@STEADY
@given(seen, seen)
def test_older_means_what_it_means_for_plain_records(one: AsOf, other: AsOf) -> None:
    """The compact comparison is `AsOf.is_older_than`."""

    def compact(as_of: AsOf) -> tuple[int, int, int, int]:
        us = (as_of.at - NOON) // timedelta(microseconds=1)
        return as_of.cell_runs, as_of.account_events, us, ["one", "two"].index(as_of.log)

    assert is_older(compact(one), compact(other)) == one.is_older_than(other)


@STEADY
@given(st.binary(max_size=40) | st.none(), st.binary(max_size=60) | st.none())
def test_no_record_stops_the_gate(key: bytes | None, value: bytes | None) -> None:
    """Any bytes are a state, a tombstone, or counted as unreadable."""
    mirror = StateMirror()
    mirror.apply(key, value)
    assert mirror.unreadable + bool(value is None) >= 1 or mirror.rows


@pytest.mark.parametrize(
    "fields",
    [
        {"period_end": "2300-01-01"},
        {"as_of": {"log": "one", "cell_runs": 2**63, "account_events": 0, "at": "2026-11-25T00:00:00Z"}},
        {"as_of": {"log": "one", "cell_runs": 1, "account_events": 0, "at": "2026-11-25T00:00:00"}},
        {"remaining": "-0.001"},
        {"next_allowance": "1000000000000000"},
    ],
    ids=["far_away", "too_large", "no_offset", "negative", "too_many"],
)
def test_a_state_out_of_bounds_is_ignored(fields: dict[str, object]) -> None:
    """It neither ends the gate's thread nor touches what was known before."""
    mirror = StateMirror()
    mirror.apply(b"enrichment/ws_1", msgspec.json.encode(limit_state()))
    known = dict(mirror.rows)
    mirror.apply(b"enrichment/ws_1", msgspec.json.encode(msgspec.to_builtins(limit_state()) | fields))
    assert (mirror.unreadable, mirror.rows) == (1, known)


@STEADY
@given(st.sampled_from(["remaining", "period_end", "next_allowance", "pool", "as_of", "workspace_id"]), st.text())
def test_a_state_with_one_wrong_field_is_ignored(field: str, value: str) -> None:
    """A field that holds anything at all makes the state unreadable, or a state with that field."""
    mirror = StateMirror()
    plain = msgspec.to_builtins(limit_state()) | {field: value}
    mirror.apply(b"enrichment/ws_1", msgspec.json.encode(plain))
    assert mirror.unreadable == (not mirror.rows)


def test_what_is_not_taken_is_counted() -> None:
    """A state that is older than the one held, and a tombstone of no pool."""
    mirror = StateMirror()
    mirror.apply(*record_of(limit_state()))
    as_of = limit_state().as_of
    older = msgspec.structs.replace(as_of, at=as_of.at - timedelta(seconds=1))
    mirror.apply(*record_of(limit_state(as_of=older)))
    mirror.apply(b"ws_1", None)
    assert (mirror.overtaken, mirror.unreadable) == (1, 1)


def test_a_row_is_small() -> None:
    """52 bytes a pool, and a workspace without a premium state pays for one only."""
    mirror = StateMirror()
    mirror.apply(*record_of(limit_state()))
    assert (HALF, len(mirror.rows["ws_1"])) == (52, 52)
    mirror.apply(*record_of(limit_state(pool=Pool.PREMIUM)))
    assert (len(mirror.rows["ws_1"]), OFFSET_OF_POOL[Pool.PREMIUM]) == (104, 52)


def test_numbers_that_do_not_fit_are_refused() -> None:
    """A balance beyond the ledger's widest number is unreadable, not another number."""
    mirror = StateMirror()
    mirror.apply(*record_of(limit_state(remaining="9" * 16)))
    mirror.apply(*record_of(limit_state(remaining="999999999999999.999")))
    assert mirror.unreadable == 1
    assert len(mirror.rows) == 1


def test_the_client_needs_only_the_base_install() -> None:
    """No Faust, no ClickHouse, no numpy, no event loop: also the doubles come without pytest."""
    import subprocess
    import sys
    from pathlib import Path

    from tests.test_tidy import WORKER_ONLY

    blocked = (*WORKER_ONLY, "pytest", "hypothesis")
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import creditstream.client, creditstream.client.testing\n"
        "own = [name for name in sys.modules if name.split('.')[0] in ('sinks', 'streams')]\n"
        "print(sorted(own))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, env=os.environ)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (
        0,
        "['streams', 'streams.kafka', 'streams.kafka.connection', 'streams.kafka.topics', 'streams.settings']",
        "",
    )
