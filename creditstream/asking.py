"""Who answers a question: the worker that holds the home, over its API, or the ledger itself when none does.

chDB allows one process per directory, so a command asks the worker while there is one and opens the ledger when
there is none. Both ways run the same queries and give the same records.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date, datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast
from uuid import UUID

import msgspec

from creditstream.home import Home
from schemas.answers import (
    By,
    DeadLetter,
    Estimate,
    Explanation,
    Failure,
    GrantRow,
    LedgerRow,
    LimitsInForce,
    ParkedEvent,
    PartitionAudit,
    PinnedVersion,
    PlanRow,
    PoolBalance,
    PublishedAlert,
    RunRow,
    SpendCheck,
    StatementLine,
    Status,
    SumAudit,
    TopBy,
    TopRow,
    UsageRow,
)
from schemas.ledger import Position, Reason
from schemas.problem import Problem, UnknownId, Unreachable
from streams.settings import Settings

ANSWER_TIMEOUT_S: Final = 60.0
PRICED: Final = ("explanation", "check", "estimate")
"""Questions that need the catalogue, too."""
QUESTIONS: Final = {
    question: module
    for module, questions in {
        "creditstream.accounts": (
            "alerts", "balance", "explanation", "grants", "limits", "period_usage", "plans", "statement",
        ),
        "creditstream.spending": ("check", "estimate", "top"),
        "sinks.catalogue_versions": ("catalogue_versions",),
        "sinks.dead_letters": ("dead_letter", "dead_letters", "parked_event", "parked_events"),
        "sinks.queries": ("audit_partitions", "audit_sums", "example_run", "ledger_rows", "runs", "usage"),
    }.items()
    for question in questions
}  # fmt: skip
"""What can be asked, and the module whose function of that name answers it."""
_PROBLEMS: Final = {problem.exit_code: problem for problem in (Problem, UnknownId, Unreachable)}

if TYPE_CHECKING:
    from urllib.error import HTTPError

T = TypeVar("T")


@contextmanager
def ask(settings: Settings, url: str = "") -> Iterator["Answers"]:
    """Answers from ``url``, from the worker in the home, from the ledger's server, or from the home's own ledger.

    Problem when the home has no ledger yet; Unreachable when a worker or a server does not answer.
    """
    home = Home.at(settings.home)
    if url:
        yield WorkerAnswers(url)
    elif worker := home.worker():
        yield WorkerAnswers(worker.api_url)
    elif settings.ledger_url:
        with _opened(settings) as answers:
            yield answers
    elif not home.ledger.exists():
        raise Problem(
            "there is no ledger yet",
            f"{home.path} holds none",
            "Run `creditstream demo` or `creditstream worker --embedded`, or name a worker elsewhere with --url.",
        )
    else:
        with ExitStack() as held:
            yield _hold(home, settings, held)


def _hold(home: Home, settings: Settings, held: ExitStack) -> "Answers":
    try:
        held.enter_context(home.hold())
    except Problem:
        if worker := home.worker():  # it has started while this one waited
            return WorkerAnswers(worker.api_url)
        raise
    return held.enter_context(_opened(settings))


@contextmanager
def _opened(settings: Settings) -> Iterator["Answers"]:
    from sinks.clickhouse import DatabaseError, connect
    from sinks.migrate import require_migrated

    client = connect(settings.ledger, settings.ledger_password)
    try:
        require_migrated(client)
        yield cast("Answers", LedgerAnswers(client, Path(settings.catalogue_dir)))
    except DatabaseError as error:
        raise ledger_failed(error) from error
    finally:
        client.close()


def ledger_failed(error: Exception) -> Unreachable:
    """What a person is told of a database error."""
    from sinks.clickhouse import first_line

    return Unreachable(
        "the ledger failed", first_line(error), "Fix what it names and try again; the server's log says more."
    )


class LedgerAnswers:
    """Answers to the same questions from a connection of this process: see `QUESTIONS`."""

    def __init__(self, client: Any, catalogue_dir: Path) -> None:
        self._client, self._catalogue_dir = client, catalogue_dir

    def __getattr__(self, question: str) -> Callable[..., Any]:
        from schemas.catalogue import Catalogue
        from sinks.clickhouse import DatabaseError

        if question not in QUESTIONS:
            raise AttributeError(question)
        function = getattr(import_module(QUESTIONS[question]), question)  # late, since it imports the database's client
        prices = [Catalogue.load(self._catalogue_dir)] if question in PRICED else []

        def answer(*args: Any, **named: Any) -> Any:
            try:
                return function(self._client, *prices, *args, **named)
            except DatabaseError as error:
                raise ledger_failed(error) from error

        return answer


class WorkerAnswers:
    """Every question of the command line, and its answer over a worker's read API."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def usage(self, workspace_id: str, by: By, start: date | None, end: date | None) -> list[UsageRow]:
        """See `sinks.queries.usage`."""
        period = {"from": start, "to": end}
        return self._get("/v1/usage", list[UsageRow], workspace_id=workspace_id, by=by, **period)

    def runs(
        self, workspace_id: str, *, start: date | None = None, end: date | None = None, **asked: Any
    ) -> list[RunRow]:
        """See `sinks.queries.runs`."""
        days = {"from": start, "to": end}
        return self._get("/v1/runs", list[RunRow], workspace_id=workspace_id, **days, **asked)

    def explanation(self, run_id: UUID, workspace_id: str = "") -> Explanation:
        """See `creditstream.accounts.explanation`."""
        return self._get(f"/v1/runs/{run_id}", Explanation, workspace_id=workspace_id or None)

    def dead_letters(self, reason: str, limit: int, only_open: bool = False) -> list[DeadLetter]:
        """See `sinks.dead_letters.dead_letters`."""
        return self._get("/v1/dead-letters", list[DeadLetter], reason=reason or None, limit=limit, only_open=only_open)

    def dead_letter(self, position: Position) -> DeadLetter:
        """See `sinks.dead_letters.dead_letter`."""
        return self._get(f"/v1/dead-letters/{position.topic}/{position.partition}/{position.offset}", DeadLetter)

    def parked_events(self, reasons: Sequence[Reason], limit: int) -> list[ParkedEvent]:
        """See `sinks.dead_letters.parked_events`."""
        return self._get("/v1/parked-events", list[ParkedEvent], reasons=list(reasons), limit=limit)

    def parked_event(self, position: Position) -> ParkedEvent:
        """See `sinks.dead_letters.parked_event`."""
        return self._get(f"/v1/parked-events/{position.topic}/{position.partition}/{position.offset}", ParkedEvent)

    def audit_partitions(self, topic: str) -> list[PartitionAudit]:
        """See `sinks.queries.audit_partitions`; the worker knows its own two topics."""
        return [audit for audit in self._get("/v1/audit/partitions", list[PartitionAudit]) if audit.topic == topic]

    def catalogue_versions(self) -> list[PinnedVersion]:
        """See `sinks.catalogue_versions.catalogue_versions`."""
        return self._get("/v1/audit/catalogue", list[PinnedVersion])

    def audit_sums(self) -> SumAudit:
        """See `sinks.queries.audit_sums`."""
        return self._get("/v1/audit/sums", SumAudit)

    def ledger_rows(self, topic_id: str, partition: int, after: int, limit: int) -> list[LedgerRow]:
        """See `sinks.queries.ledger_rows`."""
        asked = {"topic_id": topic_id, "partition": partition, "after": after, "limit": limit}
        return self._get("/v1/audit/rows", list[LedgerRow], **asked)

    def period_usage(self, workspace_id: str, by: By, day: date) -> list[UsageRow]:
        """See `creditstream.accounts.period_usage`."""
        return self._get("/v1/usage", list[UsageRow], workspace_id=workspace_id, by=by, period=day)

    def balance(self, workspace_id: str, as_of: datetime | None) -> list[PoolBalance]:
        """See `creditstream.accounts.balance`."""
        return self._get("/v1/balance", list[PoolBalance], workspace_id=workspace_id, as_of=as_of)

    def statement(self, workspace_id: str, day: date | None, as_of: datetime | None) -> list[StatementLine]:
        """See `creditstream.accounts.statement`."""
        return self._get("/v1/statement", list[StatementLine], workspace_id=workspace_id, period=day, as_of=as_of)

    def plans(self, workspace_id: str, as_of: datetime | None) -> list[PlanRow]:
        """See `creditstream.accounts.plans`."""
        return self._get("/v1/plans", list[PlanRow], workspace_id=workspace_id, as_of=as_of)

    def grants(self, workspace_id: str, as_of: datetime | None) -> list[GrantRow]:
        """See `creditstream.accounts.grants`."""
        return self._get("/v1/grants", list[GrantRow], workspace_id=workspace_id, as_of=as_of)

    def limits(self, workspace_id: str, as_of: datetime | None) -> LimitsInForce:
        """See `creditstream.accounts.limits`."""
        return self._get("/v1/limits", LimitsInForce, workspace_id=workspace_id, as_of=as_of)

    def alerts(self, workspace_id: str, kind: str, limit: int, as_of: datetime | None) -> list[PublishedAlert]:
        """See `creditstream.accounts.alerts`."""
        asked = {"workspace_id": workspace_id, "kind": kind or None, "limit": limit, "as_of": as_of}
        return self._get("/v1/alerts", list[PublishedAlert], **asked)

    def check(self, workspace_id: str, action: str, **asked: Any) -> SpendCheck:
        """See `creditstream.spending.check`."""
        return self._get("/v1/check", SpendCheck, workspace_id=workspace_id, action=action, **asked)

    def estimate(self, workspace_id: str, action: str, **asked: Any) -> Estimate:
        """See `creditstream.spending.estimate`."""
        return self._get("/v1/estimate", Estimate, workspace_id=workspace_id, action=action, **asked)

    def top(self, by: TopBy, limit: int, as_of: datetime | None) -> list[TopRow]:
        """See `creditstream.spending.top`."""
        return self._get("/v1/top", list[TopRow], by=by, limit=limit, as_of=as_of)

    def example_run(self, reason: Reason) -> UUID | None:
        """See `sinks.queries.example_run`."""
        return self._get("/v1/runs/example", UUID | None, reason=reason)  # type: ignore[arg-type]

    def status(self) -> Status:
        """What the worker does now."""
        return self._get("/v1/status", Status)

    def _get(self, path: str, kind: type[T], /, **parameters: Any) -> T:
        import http.client  # a tenth of the time that `--help` may take
        import urllib.error
        import urllib.parse
        import urllib.request

        given = {name: value for name, value in parameters.items() if value is not None}
        plain = {name: value.isoformat() if isinstance(value, date) else value for name, value in given.items()}
        query = urllib.parse.urlencode(plain, doseq=True)
        # A worker's API is to be reached from inside only: not over a proxy that leads out.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            try:
                with opener.open(f"{self._url}{path}?{query}", timeout=ANSWER_TIMEOUT_S) as answer:
                    return msgspec.json.decode(answer.read(), type=kind)
            except urllib.error.HTTPError as error:
                raise _problem_of(error) from error
        except (OSError, ValueError, http.client.HTTPException, msgspec.MsgspecError) as error:
            reason = getattr(error, "reason", error)
            raise Unreachable(
                f"the worker at {self._url} does not answer", str(reason), "Check that it is running."
            ) from error


Answers = WorkerAnswers


def _problem_of(error: "HTTPError") -> Problem:
    body = error.read()
    try:
        told = msgspec.json.decode(body, type=Failure)
        return _PROBLEMS[told.exit_code](told.what, told.why, told.fix)
    except (msgspec.MsgspecError, KeyError):
        said = f"{error.code} {error.reason}"
        return Problem(
            "the worker refused the question", said, "Check that this is the read API of a worker of this version."
        )
