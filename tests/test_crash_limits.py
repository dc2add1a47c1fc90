"""The real worker, killed: alerts and states through SIGKILL, SIGSTOP, SIGTERM and two owners.

Every test ends with the same questions: has every crossing left that the ledger implies, does no alert say what no
order of the two topics explains, and is the newest state of every pool what the ledger says?
"""

import itertools
import random
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final
from uuid import uuid4

import msgspec
import pytest
from clickhouse_connect.driver.client import Client

from creditstream.producing import open_producer
from creditstream.reconcile import Reconciliation
from schemas.account import PlanChanged, RunReversed
from schemas.ledger import Pool
from schemas.limits import Cause, LimitState, state_key
from streams.app import EXIT_RESTART
from streams.rules.records import partition_of
from tests.clickhouse_server import ClickHouseServer
from tests.limit_messages import (
    ROWS,
    Reference,
    judge,
    newest_states,
    published_alerts,
    small_plans,
    stands_by,
)
from tests.traffic import PLANNED_DAYS_AGO, PlannedTraffic
from tests.worker_process import WAIT_S_MAX, Event, WorkerProcess, ask_ledger, cell_run, event_of, send

NUMBERS: Final = itertools.count(1)
JOIN_S_MAX: Final = 60.0
ANSWER_S_MAX: Final = 15.0
"""For another's stale states to be heard and answered, on a busy machine."""
WAKES_MAX: Final = 3
LEAD: Final = timedelta(seconds=10)
"""For a plan to be metered and its worker killed before it takes effect, on a busy machine."""
REDRIVEN_S_MAX: Final = 120.0
OVER_HTTP: Final = pytest.mark.parametrize("database_url", ["http"], indirect=True)
BACKLOG: Final = 14_000
ROUND: Final = 1_500
SMALL_BATCH: Final = 400
"""Rows: a backlog is many inserts, so that a kill hits every step of one."""


@pytest.fixture
def prefix() -> str:
    """Topics and group of one test on the session's Kafka."""
    return f"limits-{next(NUMBERS)}-"


@pytest.fixture
def plans_dir(tmp_path: Path) -> str:
    """Plans that a test can use up."""
    return small_plans(tmp_path / "plans")


@pytest.fixture(scope="module", autouse=True)
def resident(tmp_path_factory: pytest.TempPathFactory, kafka: str) -> Iterator["Resident"]:
    """A worker that runs from the first test to the last: once a minute it looks whether a reversal's run has come."""
    home = tmp_path_factory.mktemp("resident")
    plans = small_plans(home / "plans")
    with WorkerProcess(home / "home", kafka, "limits-resident-", plans_dir=plans, partitions=1) as worker:
        worker.create_topic()
        worker.start()
        yield Resident(worker)


class Resident:
    """``ws_early``: a reversal that came before its run, then the run; ``ws_told``: nothing special."""

    def __init__(self, worker: WorkerProcess) -> None:
        self.worker = worker
        self.early = cell_run("ws_early", action="find_work_email")
        planned = datetime.now(UTC) - PLANNED_DAYS_AGO
        worker.bill(a_plan(name, "p200", planned) for name in ("ws_early", "ws_told"))
        worker.bill([RunReversed(event_id=uuid4(), workspace_id="ws_early", run_id=self.early.run_id)])
        worker.wait_until_told()
        worker.produce([*draw("ws_early", 99), event_of(self.early), *draw("ws_told", 7)])
        worker.wait_until_told()


def a_plan(name: str, plan: str, effective_at: datetime) -> PlanChanged:
    """A plan event."""
    return PlanChanged(event_id=uuid4(), workspace_id=name, plan=plan, effective_at=effective_at)


def draw(name: str, count: int) -> list[Event]:
    """So many runs of 1 credit."""
    return [event_of(cell_run(name)) for _ in range(count)]


def assert_told(worker: WorkerProcess, reference: Reference) -> None:
    """What left is what the ledger implies: every crossing, no alert that nothing explains, every pool's state."""
    verdict = judge(worker.configured, reference)
    assert verdict.implied
    assert verdict.untold == set(), "crossings that nobody was told"
    assert verdict.unexplained == set(), "alerts that no order of the two topics explains"
    assert verdict.ambiguous_ids == set(), "an id is one crossing's"
    assert verdict.without_state == set(), "pools without a state"
    assert verdict.wrong_states == {}, "states that are not the ledger's balances"


def assert_books_close(books: Reconciliation) -> None:
    """The ledger holds every run once, and nothing else."""
    assert books.closes, [example for book in books.partitions for example in book.examples]
    assert books.behind == 0


def kill_while_it_writes(worker: WorkerProcess, dice: random.Random) -> None:
    """SIGKILL at a random instant of the 0.5 s after its first rows."""
    worker.start()
    worker.wait_until(lambda status: any(status.written.values()), "writing", JOIN_S_MAX)
    time.sleep(dice.uniform(0, 0.5))
    worker.kill()


def kill_while_it_starts(worker: WorkerProcess, dice: random.Random) -> None:
    """SIGKILL at a random instant of its assignment, or of its first takes."""
    worker.start()
    time.sleep(dice.uniform(1.2, 2.6))
    worker.kill()


def test_f1_to_f7_kill_9_loses_no_alert_and_no_state(tmp_path: Path, kafka: str, prefix: str, plans_dir: str) -> None:
    """Ten SIGKILLs while runs and account events are metered: every crossing has left, every state is the ledger's."""
    dice, traffic = random.Random(8), PlannedTraffic(8)
    fields = {"instance": "one", "batch_rows_max": SMALL_BATCH, "plans_dir": plans_dir}
    with WorkerProcess(tmp_path / "home", kafka, prefix, **fields) as worker:
        worker.create_topic()
        worker.bill(traffic.first_plans())
        worker.produce(traffic.cell_runs(BACKLOG))
        kills = [kill_while_it_writes] * 6 + [kill_while_it_starts] * 4
        dice.shuffle(kills)
        for kill in kills:
            worker.bill(traffic.account_events(30))
            worker.produce(traffic.cell_runs(ROUND))
            kill(worker, dice)
        worker.start().wait_until_told(JOIN_S_MAX)
        books = worker.reconcile()
        assert worker.stop() == 0
        (rows,) = ask_ledger(f"chdb://{worker.home.ledger}", ROWS)

    assert_books_close(books)
    assert_told(worker, Reference(rows))


@pytest.fixture
def fields(ledger_url: str, plans_dir: str) -> dict[str, str | int]:
    """Settings of workers that share a ledger over HTTP."""
    return {"ledger_url": ledger_url, "batch_rows_max": SMALL_BATCH, "plans_dir": plans_dir}


@OVER_HTTP
def test_f18_a_paused_owner_that_wakes_leaves_no_stale_state(
    tmp_path: Path, kafka: str, prefix: str, fields: dict[str, str | int], client: Client
) -> None:
    """It stands still until another has its partitions, then wakes and says what it knew: it is answered, and ends."""
    traffic = PlannedTraffic(18)
    with (
        WorkerProcess(tmp_path / "paused", kafka, prefix, instance="paused", **fields) as paused,
        WorkerProcess(tmp_path / "other", kafka, prefix, instance="other", **fields) as other,
    ):
        paused.create_topic()
        paused.bill(traffic.first_plans())
        other.start()
        for _ in range(WAKES_MAX):
            pause_and_wake(paused, other, traffic)
            if has_logged(other, "stale_states_answered"):
                break
        else:
            pytest.fail("the woken owner never said anything stale")

        other.produce(traffic.cell_runs(500))
        other.wait_until_told()
        assert_books_close(other.reconcile())
        assert other.stop() == 0

    assert_told(other, Reference(client.query(ROWS).result_rows))


def pause_and_wake(paused: WorkerProcess, other: WorkerProcess, traffic: PlannedTraffic) -> None:
    """One takes half of the partitions and stands still until the other has them; when it wakes it ends. It may end
    before it has told what it knew.
    """
    paused.start()
    for worker in (paused, other):
        worker.wait_until(lambda status: len(status.units) == 2, "sharing", JOIN_S_MAX)
    paused.produce(traffic.cell_runs(2000))
    paused.wait_until_told()
    feed_until_stopped(paused, traffic)

    other.wait_until(lambda status: len(status.units) == 4, "the only owner", JOIN_S_MAX)
    other.bill(traffic.account_events(40))
    other.produce(traffic.cell_runs(2000))
    other.wait_until_told()
    paused.signal(signal.SIGCONT)
    assert paused.wait() == EXIT_RESTART


def feed_until_stopped(worker: WorkerProcess, traffic: PlannedTraffic) -> None:
    """SIGSTOP between a fold and the second in which its states are told."""
    for _ in range(10):
        worker.produce(traffic.cell_runs(50))
        time.sleep(0.05)
    worker.signal(signal.SIGSTOP)


def has_logged(worker: WorkerProcess, event: str) -> bool:
    """Whether the log says so, now or soon."""
    deadline = time.monotonic() + ANSWER_S_MAX
    while not worker.log_events(event):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@OVER_HTTP
def test_f20_of_two_processes_with_one_instance_id_the_first_ends_and_names_it(
    tmp_path: Path, kafka: str, prefix: str, fields: dict[str, str | int], client: Client
) -> None:
    """The second takes over, kill -9 and all; the first ends with 75 instead of stealing its partitions back. What it
    says is right, too, where it was Kafka that stood still: then it only has to be started again.
    """
    traffic = PlannedTraffic(20)
    with (
        WorkerProcess(tmp_path / "first", kafka, prefix, instance="twin", **fields) as first,
        WorkerProcess(tmp_path / "second", kafka, prefix, instance="twin", **fields) as second,
    ):
        first.create_topic()
        first.bill(traffic.first_plans())
        first.produce(traffic.cell_runs(1000))
        first.start().wait_until_told()
        second.start()
        assert first.wait(JOIN_S_MAX) == EXIT_RESTART
        (fatal,) = first.log_events("fatal")
        assert "'twin'" in fatal["error"]
        assert "CREDITSTREAM_INSTANCE" in fatal["error"]
        assert "or Kafka stood still" in fatal["error"]
        assert "Start it again" in fatal["error"]

        for _ in range(2):
            second.bill(traffic.account_events(20))
            second.produce(traffic.cell_runs(4000))
            second.wait_until(lambda status: any(status.written.values()), "writing", JOIN_S_MAX)
            second.kill()
            second.start()
        second.wait_until_told(JOIN_S_MAX)
        assert_books_close(second.reconcile())
        assert not second.log_events("fatal")
        assert second.stop() == 0

    assert_told(second, Reference(client.query(ROWS).result_rows))


@OVER_HTTP
def test_f9_alerts_leave_while_clickhouse_is_down(
    tmp_path: Path, kafka: str, prefix: str, fields: dict[str, str | int], http_server: ClickHouseServer, client: Client
) -> None:
    """The worker lives through an outage amid copies, crossings and new workspaces; no alert waits for its end."""
    traffic = PlannedTraffic(9)
    with WorkerProcess(tmp_path / "home", kafka, prefix, **fields) as worker:
        worker.create_topic()
        worker.bill([*traffic.first_plans(), a_plan("ws_spender", "p200", datetime.now(UTC) - PLANNED_DAYS_AGO)])
        worker.produce(traffic.cell_runs(2000))
        worker.start().wait_until_told()
        http_server.kill()
        try:
            worker.produce(draw("ws_spender", 200))
            wait_until(lambda: ("ws_spender", "exhausted") in alerted(worker), "alerting without a ledger")
            worker.produce(traffic.cell_runs(1000))
            worker.bill(traffic.account_events(20))
            worker.wait_until(lambda status: not status.ready, "aware of the outage")
        finally:
            http_server.start()
        worker.wait_until_told(JOIN_S_MAX)
        worker.wait_until_ready()
        assert_books_close(worker.reconcile())
        assert worker.stop() == 0

    assert_told(worker, Reference(client.query(ROWS).result_rows))


@OVER_HTTP
def test_f4_what_is_in_the_ledger_and_was_not_told_is_told_after_a_kill_9(
    tmp_path: Path, kafka: str, prefix: str, fields: dict[str, str | int], http_server: ClickHouseServer, client: Client
) -> None:
    """Killed between an insert and its answer: the successor has no record to read, and tells alert and states."""
    with WorkerProcess(tmp_path / "home", kafka, prefix, instance="one", **fields) as worker:
        worker.create_topic()
        worker.bill([a_plan("ws_1", "p200", datetime.now(UTC) - PLANNED_DAYS_AGO)])
        worker.start().wait_until_told()
        runs = [cell_run("ws_1") for _ in range(100)]
        worker.produce([event_of(run) for run in runs])
        worker.wait_until_told()

        reversal = RunReversed(event_id=uuid4(), workspace_id="ws_1", run_id=runs[0].run_id)
        kill_once_it_is_in_the_ledger(worker, http_server, lambda: worker.bill([reversal]))
        assert ("ws_1", "recovered") not in alerted(worker)
        worker.start().wait_until_told()
        assert ("ws_1", "recovered") in alerted(worker)
        assert worker.stop() == 0

    assert_told(worker, Reference(client.query(ROWS).result_rows))


def kill_once_it_is_in_the_ledger(worker: WorkerProcess, server: ClickHouseServer, produce: Callable[[], None]) -> None:
    """SIGKILL while the worker waits for the answer of the insert that this causes."""
    server.forget_log()
    server.fault("late_after", 5, containing="ledger")
    produce()
    server.wait_for(fault="late_after", state="executed", seconds=WAIT_S_MAX)
    worker.kill()


def alerted(worker: WorkerProcess) -> set[tuple[str, str]]:
    """Whom the alerts on the topic are about, and what they tell."""
    return {(alert.workspace_id, str(alert.kind)) for alert in published_alerts(worker.configured)}


def test_sigterm_under_load_leaves_nothing_to_fold_again(
    tmp_path: Path, kafka: str, prefix: str, plans_dir: str
) -> None:
    """It ends with 0 amid a backlog, and its successor begins where it has told everything."""
    traffic = PlannedTraffic(15)
    with WorkerProcess(tmp_path / "home", kafka, prefix, plans_dir=plans_dir, batch_rows_max=SMALL_BATCH) as worker:
        worker.create_topic()
        worker.bill(traffic.first_plans())
        worker.produce(traffic.cell_runs(BACKLOG))
        worker.bill(traffic.account_events(40))
        worker.start()
        status = worker.wait_until(lambda status: any(status.written.values()), "writing", JOIN_S_MAX)
        assert worker.stop() == 0
        assert sum(unit.mark + 1 for unit in status.units) < BACKLOG, "it was done before it was stopped"

        worker.start().wait_until_told(JOIN_S_MAX)
        assert worker.log_events("folded_again") == []
        assert_books_close(worker.reconcile())
        assert worker.stop() == 0
        (rows,) = ask_ledger(f"chdb://{worker.home.ledger}", ROWS)

    assert_told(worker, Reference(rows))


def test_time_alone_tells_of_a_plan_that_takes_effect(tmp_path: Path, kafka: str, prefix: str, plans_dir: str) -> None:
    """State and alert come without any record, and after a kill -9 before the instant; nothing is told that was not."""

    def told() -> set[tuple[str, str, tuple[int, ...]]]:
        return {
            (alert.workspace_id, str(alert.kind), alert.thresholds)
            for alert in published_alerts(worker.configured)
            if alert.cause == Cause.TIME
        }

    with WorkerProcess(tmp_path / "home", kafka, prefix, plans_dir=plans_dir) as worker:
        worker.create_topic()
        now = datetime.now(UTC)
        worker.bill(a_plan(name, "p200", now - PLANNED_DAYS_AGO) for name in ("ws_freed", "ws_slow", "ws_down"))
        worker.start().wait_until_told()
        worker.produce(draw("ws_freed", 150) + draw("ws_new", 210) + draw("ws_slow", 50) + draw("ws_down", 120))
        worker.wait_until_told()
        soon = datetime.now(UTC) + timedelta(seconds=2)
        worker.bill([a_plan("ws_freed", "p900", soon), a_plan("ws_new", "p200", soon), a_plan("ws_slow", "p900", soon)])
        by_then = {("ws_freed", "recovered", ()), ("ws_new", "exhausted", (50, 80, 100))}
        wait_until(lambda: told() == by_then, "told by time alone")
        states = newest_states(worker.configured)
        assert [str(states[name, "enrichment"].state) for name in ("ws_freed", "ws_new", "ws_slow")] == [
            "ok", "exhausted", "ok",
        ]  # fmt: skip

        worker.produce(draw("ws_slow", 200))
        soon = datetime.now(UTC) + LEAD
        worker.bill([a_plan("ws_down", "p900", soon)])
        worker.wait_until_told()
        worker.kill()
        assert datetime.now(UTC) < soon
        before = told()
        assert before == by_then
        time.sleep(max(0, (soon - datetime.now(UTC)).total_seconds()))
        worker.start()
        wait_until(lambda: told() - before, "told after the start")
        assert worker.stop() == 0

    assert told() - before == {("ws_down", "recovered", ())}
    state = newest_states(worker.configured)["ws_down", "enrichment"]
    assert (state.plan, state.used, str(state.state)) == ("p900", "120", "ok")


def wait_until(condition: Callable[[], object], what: str, seconds: float = WAIT_S_MAX) -> None:
    """Return once the condition holds. AssertionError when it does not in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not {what} within {seconds:.0f} s"
        time.sleep(0.2)


def test_f18_a_stale_state_from_elsewhere_is_answered_once_the_owner_is_past_it(resident: "Resident") -> None:
    """It knows more runs than the owner and fewer account events: not older yet, and still wrong."""
    worker = resident.worker
    before = newest_states(worker.configured)["ws_told", "enrichment"]
    as_of = msgspec.structs.replace(before.as_of, cell_runs=before.as_of.cell_runs + 5, account_events=0)
    stale = msgspec.structs.replace(before, used="150", remaining="50", as_of=as_of, owner="elsewhere")
    say(worker, stale)
    assert newest_states(worker.configured)["ws_told", "enrichment"] == stale
    worker.produce(draw("ws_other", 20))
    wait_until(lambda: newest_states(worker.configured)["ws_told", "enrichment"].owner == before.owner, "answered")
    assert stands_by(newest_states(worker.configured)["ws_told", "enrichment"]) == stands_by(before)


def test_f18_a_stale_state_of_a_time_without_an_owner_is_answered_by_the_next(
    tmp_path: Path, kafka: str, prefix: str, plans_dir: str
) -> None:
    """One that was paused wakes when its successor has gone as well, says what it knew, and is gone, too."""
    with WorkerProcess(tmp_path / "home", kafka, prefix, plans_dir=plans_dir) as worker:
        worker.create_topic()
        worker.bill([a_plan("ws_told", "p200", datetime.now(UTC) - PLANNED_DAYS_AGO)])
        worker.produce(draw("ws_told", 150))
        worker.start().wait_until_told()
        assert worker.stop() == 0
        before = newest_states(worker.configured)["ws_told", "enrichment"]
        as_of = msgspec.structs.replace(before.as_of, cell_runs=before.as_of.cell_runs - 140)
        stale = msgspec.structs.replace(before, used="10", remaining="190", as_of=as_of, owner="elsewhere")
        say(worker, stale)

        worker.start()
        wait_until(lambda: newest_states(worker.configured)["ws_told", "enrichment"] != stale, "answered")
        assert worker.stop() == 0
    assert stands_by(newest_states(worker.configured)["ws_told", "enrichment"]) == stands_by(before)


def say(worker: WorkerProcess, state: LimitState) -> None:
    """As another owner would, of an enrichment pool."""
    key, topic = state_key(state.workspace_id, Pool.ENRICHMENT), f"{worker.configured.topic_prefix}limit-states"
    partition = partition_of(state.workspace_id, worker.configured.partitions)
    send(open_producer(worker.configured), topic, [Event(key, msgspec.json.encode(state), partition)])


def test_a_reversal_waits_for_its_run_and_late_runs_and_copies_tell_nothing(resident: "Resident") -> None:
    """What is given back can be crossed again, under a new id; a closed period and a copy leave the line alone."""
    worker = resident.worker
    late = cell_run("ws_early", ran_at=datetime.now(UTC) - timedelta(days=10))
    worker.produce([event_of(late), event_of(resident.early)])

    def used() -> str:
        return newest_states(worker.configured)["ws_early", "enrichment"].used

    wait_until(lambda: used() == "99", "reversed by the worker itself", REDRIVEN_S_MAX)
    worker.produce(draw("ws_early", 1))
    worker.wait_until_told()
    assert_books_close(worker.reconcile())
    assert worker.stop() == 0
    (rows,) = ask_ledger(f"chdb://{worker.home.ledger}", ROWS)
    assert_told(worker, Reference(rows))
    alerts = {
        alert.alert_id: alert for alert in published_alerts(worker.configured) if alert.workspace_id == "ws_early"
    }
    assert [(alert.kind, alert.cause, alert.thresholds) for alert in alerts.values()] == [
        ("crossed", "run", (50,)),
        ("recovered", "reversal", ()),
        ("crossed", "run", (50,)),
    ]
