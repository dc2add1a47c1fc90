"""What `reconcile` must not overlook: a copy that is none, and a row that says something else than its event."""

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import msgspec
import pytest

from creditstream.asking import WorkerAnswers
from creditstream.reconcile import Reconciliation, reconcile
from creditstream.reference import ReferenceBilling, ReferenceRater
from schemas.account import PlanChanged, PremiumGranted, RunReversed
from schemas.answers import LedgerRow, PartitionAudit
from schemas.catalogue import EXAMPLE_CATALOGUES
from schemas.cell_run import CellRun, Outcome, to_milliseconds
from schemas.codec import encode_account_event, encode_run
from schemas.ledger import Reason
from schemas.problem import Problem
from streams.kafka.topics import ACCOUNT_EVENTS, CELL_RUNS
from streams.rules.records import partition_of
from tests.account_records import PLANS_DIR
from tests.dead_letter_examples import RECORDED_AT, DeadLetterExample, dead_letter_examples
from tests.worker_process import WorkerProcess, cell_run, event_of

NOW: Final = datetime(2026, 11, 20, 12, tzinfo=UTC)
RUN: Final = cell_run(action="find_work_email", ran_at=NOW, triggered_by="manual", actor="ada")
OTHERWISE: Final[dict[str, object]] = {
    "table_id": "tbl_2",
    "column_id": "col_2",
    "row_id": "row_2",
    "action": "enrich_person",
    "outcome": Outcome.NO_DATA,
    "ran_at": NOW + timedelta(milliseconds=1),
    "own_api_key": True,
    "triggered_by": "api",
    "actor": None,
}
"""Another value for every field but the two that are the identity."""


def verdicts(*values: bytes) -> list[str]:
    """The reasons that the reference rater gives to records of one workspace."""
    rater = ReferenceRater(EXAMPLE_CATALOGUES, 0, 1)
    recorded_ms = int(NOW.timestamp()) * 1000
    return [rater.expect(RUN.workspace_id.encode(), value, recorded_ms).reason for value in values]


def with_field(field: str) -> CellRun:
    return msgspec.structs.replace(RUN, **{field: OTHERWISE[field]})


def test_every_field_of_a_run_is_told_apart() -> None:
    """A new field gets a value here, or copies that differ in it would pass unnoticed."""
    assert set(OTHERWISE) | {"run_id", "workspace_id"} == set(CellRun.__struct_fields__)


@pytest.mark.parametrize("field", OTHERWISE)
def test_a_copy_that_differs_in_one_field_is_a_conflict(field: str) -> None:
    """Whatever the field, in either order: the first stands."""
    first, second = encode_run(RUN), encode_run(with_field(field))
    assert verdicts(first, second, first)[1:] == ["conflicting_duplicate", "duplicate"]
    assert verdicts(second, first, second)[1:] == ["conflicting_duplicate", "duplicate"]


def test_a_copy_that_says_the_same_is_a_duplicate() -> None:
    """However it says it: in another order, in another zone, below a millisecond, with fields that nobody knows, with
    what may be left out.
    """
    plain = msgspec.to_builtins(msgspec.json.decode(encode_run(RUN)))
    abroad = msgspec.structs.replace(RUN, ran_at=NOW.astimezone(timezone(timedelta(hours=5, minutes=30))))
    finer = msgspec.structs.replace(RUN, ran_at=NOW + timedelta(microseconds=999))
    copies = [
        encode_run(RUN),
        msgspec.json.encode(dict(reversed(plain.items()))),
        encode_run(abroad),
        encode_run(finer),
        msgspec.json.encode(plain | {"mood": "good", "own_api_key": False}),
    ]
    assert verdicts(*copies) == ["charged", *["duplicate"] * 4]


@pytest.mark.parametrize("example", dead_letter_examples(), ids=lambda example: str(example.reason))
def test_the_reference_sets_aside_what_the_meter_does(example: DeadLetterExample) -> None:
    """For the same reason, of either topic; on another partition all of it is misrouted."""
    home, recorded_ms = partition_of(example.events[0][0].decode(), 4), to_milliseconds(RECORDED_AT)
    for partition in (home, (home + 1) % 4):
        rater = ReferenceRater(EXAMPLE_CATALOGUES, partition, 4)
        billing = ReferenceBilling(PLANS_DIR, partition, 4, rater.debits)
        found = [
            rater.expect(key, value, recorded_ms) if example.topic == CELL_RUNS else billing.expect(key, value)
            for key, value in example.events
        ]
        if partition == home or example.reason in (Reason.TOO_LARGE, Reason.MALFORMED):
            assert (found[-1].kind, found[-1].reason) == ("dead_letter", example.reason)
        else:
            assert {(each.kind, each.reason) for each in found} == {("dead_letter", "misrouted")}


def test_the_reference_knows_the_edges_of_time() -> None:
    """Five minutes ahead and 366 days back are in time, a millisecond more is not."""
    millisecond = timedelta(milliseconds=1)
    for edge, beyond, reason in (
        (timedelta(minutes=5), millisecond, "future_run"),
        (timedelta(days=-366), -millisecond, "stale_run"),
    ):
        runs = [msgspec.structs.replace(RUN, ran_at=NOW + ahead) for ahead in (edge, edge + beyond)]
        assert [verdicts(encode_run(run)) for run in runs] == [["charged"], [reason]]


def test_what_the_reference_forgets_it_rates_again() -> None:
    """A run that was set aside and sent again later is charged then; so is an event whose run had not arrived."""
    rater = ReferenceRater(EXAMPLE_CATALOGUES, 0, 1)
    billing = ReferenceBilling(PLANS_DIR, 0, 1, rater.debits)
    key, run, recorded_ms = RUN.workspace_id.encode(), encode_run(RUN), int(NOW.timestamp()) * 1000
    reversal = RunReversed(event_id=uuid4(), workspace_id=RUN.workspace_id, run_id=RUN.run_id)
    assert rater.expect(key, run, recorded_ms).reason == "charged"
    rater.forget(RUN.workspace_id, str(RUN.run_id))
    assert billing.expect(key, encode_account_event(reversal)).reason == "unknown_run"
    assert rater.expect(key, run, recorded_ms).reason == "charged"
    for _ in range(2):
        assert billing.expect(key, encode_account_event(reversal)).reason == "reversed"
        billing.forget()


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, kafka: str) -> Iterator[WorkerProcess]:
    """A worker that has metered two runs of one workspace, a copy, and a broken event."""
    with WorkerProcess(tmp_path_factory.mktemp("reconcile"), kafka, "reconcile-") as process:
        process.create_topic()
        run = msgspec.structs.replace(RUN, ran_at=datetime.now(UTC))
        broken = event_of(run)._replace(value=b"{")
        process.produce([event_of(run), event_of(run), event_of(cell_run()), broken])
        process.start().wait_until_metered()
        yield process


def books_of(worker: WorkerProcess, at: int = 0, **changed: Any) -> Reconciliation:
    """The books when the ledger's rows at an offset, the first, said something else."""

    class Ledger(WorkerAnswers):
        def ledger_rows(self, topic_id: str, partition: int, after: int, limit: int) -> list[LedgerRow]:
            rows = super().ledger_rows(topic_id, partition, after, limit)
            return [msgspec.structs.replace(row, **changed) if row.offset == at else row for row in rows]

    home = worker.home.worker()
    assert home is not None
    return reconcile(Ledger(home.api_url), worker.configured)


def test_books_that_agree_close(worker: WorkerProcess) -> None:
    """Copies and dead letters among them."""
    books = books_of(worker)
    assert (books.closes, books.events, books.rows, books.different) == (True, 4, 4, 0)
    assert [book.examples for book in books.partitions if book.examples] == []


def test_what_is_not_metered_yet_is_told(worker: WorkerProcess) -> None:
    """A ledger that is behind closes, but does not pass for all that Kafka holds."""
    books = books_of(worker)
    assert (books.behind, "not metered yet" in books.sentence) == (0, False)
    behind = msgspec.structs.replace(books, behind=1200)
    assert behind.sentence == f"{books.sentence}; 1,200 more offsets in Kafka are not metered yet"


def test_a_ledger_of_another_kafka_is_not_compared(worker: WorkerProcess) -> None:
    """Its rows stand under other topics' ids: without an error, books of nothing would close."""

    class Elsewhere(WorkerAnswers):
        def audit_partitions(self, topic: str) -> list[PartitionAudit]:
            audits = super().audit_partitions(topic)
            return [msgspec.structs.replace(audit, topic_id=f"other-{audit.topic_id}") for audit in audits]

    home = worker.home.worker()
    assert home is not None
    with pytest.raises(Problem, match="the ledger has no event of these topics"):
        reconcile(Elsewhere(home.api_url), worker.configured)


def test_another_catalogue_than_the_workers_is_not_compared_by(worker: WorkerProcess, tmp_path: Path) -> None:
    """One version short, or with another content: what would differ is the catalogue, and not the books."""
    home = worker.home.worker()
    assert home is not None
    answers = WorkerAnswers(home.api_url)
    settings = msgspec.structs.replace(worker.configured, catalogue_dir=str(tmp_path))
    first, second = sorted(EXAMPLE_CATALOGUES.glob("*.toml"))

    shutil.copy(first, tmp_path)
    with pytest.raises(Problem, match=f"differs from the workers': version 2 is not there in {tmp_path}"):
        reconcile(answers, settings)
    (tmp_path / second.name).write_text(second.read_text().replace('price = "2"', 'price = "3"', 1))
    with pytest.raises(Problem, match=f"version 2 is another in {tmp_path}. Set CREDITSTREAM_CATALOGUE_DIR"):
        reconcile(answers, settings)


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("kind", "duplicate", "duplicate/charged 2 enrichment of ws_0001"),
        ("reason", "charged_no_data", "run/charged_no_data 2 enrichment of ws_0001"),
        ("pool", "premium", "run/charged 2 premium of ws_0001"),
        ("credits", 1999, "run/charged 1.999 enrichment of ws_0001"),
        ("workspace_id", "ws_0002", "run/charged 2 enrichment of ws_0002"),
    ],
)
def test_one_row_that_differs_in_one_field_is_reported(
    worker: WorkerProcess, field: str, value: object, told: str
) -> None:
    """With its place, what the ledger says, and what the reference rater expects; the others are as they were."""
    books = books_of(worker, **{field: value})
    assert (books.closes, books.missing, books.doubled, books.different) == (False, 0, 0, 1)
    ((example,),) = [book.examples for book in books.partitions if book.examples]
    assert example.startswith("reconcile-cell-runs[")
    assert example.endswith(f"]@0: ledger {told}, expected run/charged 2 enrichment of ws_0001")


def test_a_reversal_of_a_run_that_kafka_no_longer_has_counts_once(tmp_path: Path, kafka: str) -> None:
    """Runs are kept for days, account events for a year: sent again, under whatever event id, it is a duplicate; and
    one that gave back twice is found.
    """
    with WorkerProcess(tmp_path / "home", kafka, "reconcile-old-") as worker:
        worker.create_topic()
        run = cell_run()
        worker.produce([event_of(run)])
        worker.start().wait_until_told()
        reversal = RunReversed(event_id=uuid4(), workspace_id=run.workspace_id, run_id=run.run_id)
        worker.bill([reversal, msgspec.structs.replace(reversal, event_id=uuid4()), reversal])
        worker.wait_until_told()
        worker.drop_runs(worker.log_ends())

        books = worker.reconcile()
        assert (books.closes, books.events, books.credits) == (True, 3, "-1"), books.partitions

        twice = books_of(worker, at=1, kind="reversal", reason="reversed", pool="enrichment", credits=-1000)
        assert (twice.closes, twice.different) == (False, 1)


def test_account_events_sent_again_to_a_topic_made_again_are_duplicates(tmp_path: Path, kafka: str) -> None:
    """Of the events in the deleted topic, at whatever offset they lie now; no other row passes for one."""
    with WorkerProcess(tmp_path / "home", kafka, "reconcile-again-") as worker:
        worker.create_topic()
        run, now = cell_run(), datetime.now(UTC)
        said = {"workspace_id": run.workspace_id, "effective_at": now}
        events = [
            PlanChanged(event_id=uuid4(), plan="20k", **said),
            PremiumGranted(event_id=uuid4(), credits="5", **said),
            RunReversed(event_id=uuid4(), workspace_id=run.workspace_id, run_id=run.run_id),
        ]
        worker.produce([event_of(run)])
        worker.start().wait_until_told()
        worker.bill(events)
        worker.wait_until_told()
        assert worker.stop() == 0
        worker.make_topic_again(ACCOUNT_EVENTS)
        worker.bill([PlanChanged(event_id=uuid4(), plan="50k", **said), *events])
        worker.start().wait_until_told()

        books = worker.reconcile()
        assert (books.closes, books.different) == (True, 0), books.partitions

        nowhere = f"a duplicate of the event at account-events[{partition_of(run.workspace_id, 4)}]@9"
        wrong = books_of(worker, at=1, detail=nowhere)
        assert (wrong.closes, wrong.different) == (False, 1)
