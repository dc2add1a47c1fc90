"""Who may spend: the gate's rules, of the gate that follows Kafka and of its double alike."""

import itertools
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Final

import pytest

from creditstream.client import Because, Gate
from creditstream.client.decision import GateRules, Policy
from creditstream.client.testing import MemoryGate
from schemas.catalogue import Catalogue
from schemas.ledger import Pool
from schemas.limits import LimitState, State, state_key
from streams.kafka.topics import LIMIT_STATES
from streams.settings import Settings
from tests.client_kafka import as_of, fresh_settings, limit_state, publish, record_of, wait_until
from tests.records import EXAMPLES, enrichment, write_catalogue

NUMBERS: Final = itertools.count(1)
YESTERDAY: Final = datetime.now(UTC).date() - timedelta(days=1)
NEXT_WEEK: Final = datetime.now(UTC).date() + timedelta(days=7)
POLICIES: Final[tuple[Policy, ...]] = ("allow", "deny")


class MemoryWorld:
    """States go straight into the doubles, one for each `on_unknown`."""

    def __init__(self) -> None:
        self.gates: dict[Policy, GateRules] = {policy: MemoryGate(on_unknown=policy) for policy in POLICIES}

    def publish(self, *records: tuple[bytes, bytes | None]) -> None:
        """Make these states known."""
        for gate, record in itertools.product(self.gates.values(), records):
            gate.states.apply(*record)


class KafkaWorld:
    """States go through a topic of one partition to two gates that follow it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.gates: dict[Policy, GateRules] = {
            policy: Gate(settings, on_unknown=policy, on_stale="deny", stale_after_s=600) for policy in POLICIES
        }
        for gate in self.gates.values():
            gate.wait_ready(60)

    def publish(self, *records: tuple[bytes, bytes | None]) -> None:
        """Make these states known: return once the gates have them."""
        last = f"last_{next(NUMBERS)}"
        publish(self._settings, [*records, record_of(limit_state(last))])
        for gate in self.gates.values():
            wait_until(lambda gate=gate: gate.check(last, "enrich_person").reason == Because.ENOUGH, "followed")


@pytest.fixture(scope="module", params=["memory", "kafka"])
def world(request: pytest.FixtureRequest) -> Iterator[MemoryWorld | KafkaWorld]:
    """Gates, and a way to tell them states."""
    if request.param == "memory":
        yield MemoryWorld()
        return
    made = KafkaWorld(fresh_settings(request.getfixturevalue("kafka"), LIMIT_STATES, partitions=1))
    yield made
    for gate in made.gates.values():
        assert isinstance(gate, Gate)
        gate.close()


@pytest.fixture
def gate(world: MemoryWorld | KafkaWorld) -> GateRules:
    """The gate that says no to what it does not know."""
    return world.gates["deny"]


@pytest.fixture
def ws() -> str:
    """A workspace that no other test has."""
    return f"ws_{next(NUMBERS)}"


def tell(world: MemoryWorld | KafkaWorld, *states: LimitState) -> None:
    """Make states known."""
    world.publish(*(record_of(state) for state in states))


def test_histories_19999_used_yes_to_1_credit_and_no_to_2(
    world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str
) -> None:
    """With one of 20,000 credits left, a run of 1 credit may start, one of 2 not, nor two of 1."""
    tell(world, limit_state(ws, "1", state=State.WARNING, used="19999", allowance="20000", period_end=NEXT_WEEK))
    one = gate.check(ws, "enrich_person")
    assert (one.allowed, one.reason, one.price, one.remaining) == (True, Because.ENOUGH, "1", "1")
    two = gate.check(ws, "find_work_email")
    assert (two.allowed, two.reason, two.price, two.remaining) == (False, Because.NOT_ENOUGH, "2", "1")
    assert not gate.check(ws, "enrich_person", cells=2)
    assert gate.check(ws, "enrich_person", cells=0)


def test_histories_20001_used_is_exhausted(world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str) -> None:
    """With nothing left every priced run waits, and the answer says what is left: nothing."""
    tell(world, limit_state(ws, "0", state=State.EXHAUSTED, used="20001", allowance="20000", overage="1"))
    answer = gate.check(ws, "enrich_person")
    assert (answer.allowed, answer.reason, answer.remaining) == (False, Because.EXHAUSTED, "0")
    assert not answer


@pytest.mark.parametrize(
    ("action", "own_api_key", "reason", "allowed"),
    [
        ("enrich_person", True, Because.OWN_API_KEY, True),
        ("clearbit_enrich_company", True, Because.OWN_API_KEY, True),
        ("hubspot_send", True, Because.OWN_API_KEY, True),
        ("hubspot_send", False, Because.FREE_ACTION, True),
        ("format_date", False, Because.FREE_ACTION, True),
        ("new_vendor", False, Because.UNKNOWN_ACTION, False),
        ("new_vendor", True, Because.UNKNOWN_ACTION, False),
    ],
)
def test_r04_r05_what_costs_nothing_passes_and_an_unknown_action_does_not(
    world: MemoryWorld | KafkaWorld, ws: str, action: str, own_api_key: bool, reason: Because, allowed: bool
) -> None:
    """Whatever is left, whatever is known of the workspace: own key and free actions yes, unknown actions no."""
    for gate in world.gates.values():
        answer = gate.check(ws, action, own_api_key, 10**6)
        assert (answer.allowed, answer.reason, answer.price, answer.remaining) == (allowed, reason, "0", None)


def test_r07_premium_actions_draw_the_premium_pool(world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str) -> None:
    """Neither pool's credits pay for the other's actions."""
    premium = limit_state(ws, "2", pool=Pool.PREMIUM, period_start=None)
    tell(world, premium, limit_state(ws, "0", state=State.EXHAUSTED, period_end=NEXT_WEEK, next_allowance="4"))
    assert gate.check(ws, "clearbit_enrich_company", cells=2)
    assert gate.check(ws, "clearbit_enrich_company", cells=3).reason == Because.NOT_ENOUGH
    assert gate.check(ws, "enrich_person").reason == Because.EXHAUSTED


@pytest.mark.parametrize("policy", POLICIES)
def test_an_unknown_workspace_is_the_callers_choice(world: MemoryWorld | KafkaWorld, ws: str, policy: Policy) -> None:
    """Without a state, and without one of the enrichment pool where that is asked for, `on_unknown` decides."""
    answer = world.gates[policy].check(ws, "enrich_person")
    assert (answer.allowed, answer.reason, answer.as_of) == (policy == "allow", Because.UNKNOWN_WORKSPACE, None)
    assert world.gates[policy].check(ws, "clearbit_enrich_company").reason == Because.UNKNOWN_WORKSPACE
    tell(world, limit_state(ws, pool=Pool.PREMIUM))
    assert world.gates[policy].check(ws, "enrich_person").reason == Because.UNKNOWN_WORKSPACE


@pytest.mark.parametrize("policy", POLICIES)
def test_r07_without_a_grant_the_premium_pool_is_exhausted(
    world: MemoryWorld | KafkaWorld, ws: str, policy: Policy
) -> None:
    """A workspace that is known and has no premium state was granted nothing: no, as `creditstream check` says."""
    tell(world, limit_state(ws))
    answer = world.gates[policy].check(ws, "clearbit_enrich_company")
    assert (answer.allowed, answer.reason, answer.remaining, answer.as_of) == (False, Because.EXHAUSTED, "0", None)
    tell(world, limit_state(ws, "1", pool=Pool.PREMIUM))
    assert world.gates[policy].check(ws, "clearbit_enrich_company")
    world.publish((state_key(ws, Pool.PREMIUM), None))
    assert world.gates[policy].check(ws, "clearbit_enrich_company").reason == Because.EXHAUSTED


@pytest.mark.parametrize("policy", POLICIES)
def test_a_workspace_without_a_plan_is_the_callers_choice(
    world: MemoryWorld | KafkaWorld, ws: str, policy: Policy
) -> None:
    """In state `unknown_plan`, before and after the end of the calendar month, `on_unknown` decides."""
    tell(world, limit_state(ws, "0", state=State.UNKNOWN_PLAN, allowance="0", period_end=NEXT_WEEK))
    answer = world.gates[policy].check(ws, "enrich_person")
    assert (answer.allowed, answer.reason, answer.as_of) == (policy == "allow", Because.UNKNOWN_PLAN, as_of(1))
    tell(world, limit_state(ws, "0", 2, state=State.UNKNOWN_PLAN, allowance="0", period_end=YESTERDAY))
    assert world.gates[policy].check(ws, "enrich_person").reason == Because.UNKNOWN_PLAN


def test_r10_past_the_end_of_the_period_it_goes_on_with_the_next_allowance(
    world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str
) -> None:
    """What was left does not roll over, what was overdrawn is forgotten, and no message is needed for it."""
    tell(world, limit_state(ws, "19000", period_end=YESTERDAY, next_allowance="3.5"))
    assert gate.check(ws, "enrich_person").remaining == "3.5"
    assert not gate.check(ws, "enrich_person", cells=4)
    tell(world, limit_state(ws, "0", 2, state=State.EXHAUSTED, period_end=YESTERDAY, next_allowance="20000"))
    assert gate.check(ws, "enrich_person", cells=20_000)
    tell(world, limit_state(ws, "7", 3, period_end=YESTERDAY))
    assert gate.check(ws, "enrich_person").reason == Because.UNKNOWN_PLAN


def test_a_state_that_has_seen_less_is_ignored(world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str) -> None:
    """What a paused worker says when it wakes does not bring back an old balance; a new log starts afresh."""
    tell(world, limit_state(ws, "5", 7), limit_state(ws, "9", 6))
    assert (gate.check(ws, "enrich_person").remaining, gate.check(ws, "enrich_person").as_of) == ("5", as_of(7))
    tell(world, limit_state(ws, "4", 7))
    assert gate.check(ws, "enrich_person").remaining == "4"
    tell(world, limit_state(ws, "3", as_of=as_of(0, "another log")))
    assert gate.check(ws, "enrich_person").as_of == as_of(0, "another log")


def test_a_tombstone_drops_one_pool(world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str) -> None:
    """After it nothing is known of this pool, and all of the other."""
    tell(world, limit_state(ws), limit_state(ws, pool=Pool.PREMIUM))
    world.publish((state_key(ws, Pool.ENRICHMENT), None))
    assert gate.check(ws, "enrich_person").reason == Because.UNKNOWN_WORKSPACE
    assert gate.check(ws, "clearbit_enrich_company")
    world.publish((state_key(ws, Pool.PREMIUM), None))
    assert gate.check(ws, "clearbit_enrich_company").reason == Because.UNKNOWN_WORKSPACE
    assert ws not in gate.states.rows


def test_a_broken_state_changes_nothing(world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str) -> None:
    """What is no limit state is counted, and what was known before stands."""
    before = gate.states.unreadable
    tell(world, limit_state(ws, "5"))
    key = state_key(ws, Pool.ENRICHMENT)
    world.publish((key, b"{"), (key, b"\xff"), (b"what/ws", None), record_of(limit_state(ws, "-1", 2)))
    assert gate.check(ws, "enrich_person").remaining == "5"
    assert gate.states.unreadable == before + 4


def test_the_answer_says_how_old_it_is(world: MemoryWorld | KafkaWorld, gate: GateRules, ws: str) -> None:
    """An answer that rests on a state carries the state's place and the age of what the gate knows."""
    tell(world, limit_state(ws, seen=12))
    answer = gate.check(ws, "enrich_person")
    assert answer.as_of == as_of(12)
    assert answer.age_ms is not None
    assert gate.check(ws, "hubspot_send").age_ms is None


def test_fewer_than_no_cells_are_a_mistake(gate: GateRules, ws: str) -> None:
    """A negative number of cells is a defect of the caller, not a free run."""
    with pytest.raises(ValueError, match="-1 cells"):
        gate.check(ws, "enrich_person", cells=-1)


def test_the_price_is_that_of_now(tmp_path: Path) -> None:
    """A price changes at its instant; an action that a version does not list keeps its newest earlier price."""
    directory = write_catalogue(
        tmp_path,
        (1, "2026-01-01T00:00:00Z", {"a": enrichment("1"), "gone": enrichment("3")}),
        (2, "2026-02-01T00:00:00Z", {"a": enrichment("0.5"), "later": enrichment("4")}),
    )
    now = [0]
    gate = MemoryGate(Catalogue.load(directory), clock=lambda: now[0])
    gate.set("ws", "100")
    found = {}
    for day in (date(2025, 12, 31), date(2026, 1, 31), date(2026, 2, 1), date(2026, 1, 2)):
        now[0] = int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) * 10**9
        found[day] = [gate.check("ws", action).price for action in ("a", "gone", "later")]
    assert list(found.values()) == [["1", "3", "4"], ["1", "3", "4"], ["0.5", "3", "4"], ["1", "3", "4"]]


def test_a_period_ends_with_its_last_nanosecond() -> None:
    """The instant before `period_end`'s midnight belongs to the period, midnight to the next one."""
    midnight = int(datetime(2026, 2, 15, tzinfo=UTC).timestamp()) * 10**9
    now = [midnight - 1]
    gate = MemoryGate(EXAMPLES, clock=lambda: now[0])
    gate.set("ws", "1", period_end=date(2026, 2, 15), next_allowance="4")
    assert gate.check("ws", "enrich_person").remaining == "1"
    now[0] = midnight
    assert gate.check("ws", "enrich_person").remaining == "4"


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_stale_is_the_callers_choice(policy: Policy) -> None:
    """After contact was lost `on_stale` decides, but for what costs nothing and for unknown actions."""
    gate = MemoryGate(on_stale=policy)
    gate.set("ws", "0")
    gate.lose_contact()
    answer = gate.check("ws", "enrich_person")
    assert (answer.allowed, answer.reason, answer.age_ms) == (policy == "allow", Because.STALE, None)
    assert gate.check("ws", "hubspot_send")
    assert gate.check("ws", "enrich_person", own_api_key=True)
    assert gate.check("ws", "new_vendor").reason == Because.UNKNOWN_ACTION


def test_an_answer_can_be_read_in_a_log() -> None:
    """Printed, it says what was decided, why, and about how many credits."""
    gate = MemoryGate()
    gate.set("ws", "1.5")
    assert repr(gate.check("ws", "find_work_email")) == "Decision(no, not_enough, price=2, remaining=1.5)"
    assert repr(gate.check("ws", "hubspot_send")) == "Decision(yes, free_action, price=0)"


def test_a_policy_that_is_none_is_refused() -> None:
    """A typing error must not decide who may spend."""
    with pytest.raises(ValueError, match='"allow" or "deny"'):
        MemoryGate(on_unknown="alow")  # type: ignore[arg-type]
