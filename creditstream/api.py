"""The read API that a worker serves while it holds the ledger. GET only, on 127.0.0.1 unless it is told otherwise.

It has no login: whoever reaches the port may read. OpenAPI is generated from these signatures, at ``/schema``.
"""

import contextlib
import errno
import functools
import socket
from collections.abc import Iterator, Sequence
from datetime import date, datetime
from typing import Annotated, Any, Final, NamedTuple, get_args
from uuid import UUID

import mode
import uvicorn
from litestar import Litestar, Request, Response, get
from litestar.exceptions import HTTPException
from litestar.handlers import HTTPRouteHandler
from litestar.openapi import ResponseSpec
from litestar.openapi.config import OpenAPIConfig
from litestar.params import FromPath, FromQuery, PathParameter, QueryParameter
from prometheus_client import CONTENT_TYPE_LATEST

from creditstream import __version__, accounts, spending
from creditstream.asking import ledger_failed
from creditstream.client.decision import Policy
from creditstream.clock import now_ms
from creditstream.metrics import exposition
from creditstream.status import not_ready_because, status_of
from schemas.answers import (
    CELLS_MAX,
    LIST_MAX,
    By,
    DeadLetter,
    Estimate,
    EventRow,
    Explanation,
    Failure,
    GrantRow,
    LedgerRow,
    LimitsInForce,
    ParkedEvent,
    PartitionAudit,
    PeriodRow,
    PinnedVersion,
    PlanRow,
    PoolBalance,
    Price,
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
from schemas.codec import choices, with_choices
from schemas.ledger import DEAD_LETTER_REASONS, DEBIT_REASONS, PARTITION_MAX, Position, Reason
from schemas.limits import AlertKind
from schemas.prices import price_of, prices
from schemas.problem import Problem
from sinks import account_queries, queries
from sinks import dead_letters as letters
from sinks.catalogue_versions import catalogue_versions
from sinks.clickhouse import DatabaseError
from streams.meter import Meter

STATUS_OF_EXIT_CODE = {4: 404, 5: 503}
ROWS_MAX = 100_000

_FAILURES: Final = {
    400: "the question is wrong",
    404: "nothing is known under this id",
    503: "the ledger, or the worker, does not answer now",
}
answer: Final = functools.partial(
    get,
    responses={
        status: ResponseSpec(Failure, description=what, generate_examples=False) for status, what in _FAILURES.items()
    },
)
"""A question's route."""


def create_api(meter: Meter) -> Litestar:
    """The API over one meter."""

    @answer("/v1/usage")
    async def usage(
        workspace_id: FromQuery[str],
        by: FromQuery[By] = By.COLUMN,
        start: FirstDay = None,
        end: EndDay = None,
        period: Annotated[date | None, QueryParameter(description="instead: a UTC day in the billing period")] = None,
    ) -> list[UsageRow]:
        """Credits and runs of a workspace, most credits first; by day in the order of days."""
        _require_days(start, end, period)
        if period:
            return await meter.ask(accounts.period_usage, workspace_id, by, period, meter.plans_of(workspace_id))
        return await meter.ask(queries.usage, workspace_id, by, start, end)

    @answer("/v1/runs/example")
    async def example(reason: FromQuery[Reason] = Reason.CHARGED) -> UUID | None:
        """The id of a recent run with this reason."""
        _require_reason(DEBIT_REASONS, reason)
        return await meter.ask(queries.example_run, reason)

    @answer("/v1/runs")
    async def runs(
        workspace_id: FromQuery[str],
        table_id: FromQuery[str] = "",
        column_id: FromQuery[str] = "",
        row_id: FromQuery[str] = "",
        reason: FromQuery[Reason | None] = None,
        start: FirstDay = None,
        end: EndDay = None,
        limit: Limit = 100,
    ) -> list[RunRow]:
        """The newest runs of a workspace, free ones too."""
        _require_days(start, end)
        _require_reason(DEBIT_REASONS, reason)
        cell = {"table_id": table_id, "column_id": column_id, "row_id": row_id}
        return await meter.ask(
            queries.runs, workspace_id, **cell, reason=reason or "", start=start, end=end, limit=limit
        )

    @answer("/v1/runs/{run_id:str}")
    async def explain(run_id: FromPath[UUID], workspace_id: FromQuery[str] = "") -> Explanation:
        """Why a run cost what it cost, and every delivery of it. Ids are each workspace's own."""
        return await meter.ask(accounts.explanation, meter.catalogue, run_id, workspace_id)

    @answer("/v1/actions")
    async def actions() -> list[Price]:
        """The catalogue in force now."""
        return prices(meter.catalogue, now_ms())

    @answer("/v1/actions/{action:str}")
    async def action(action: FromPath[str], own_api_key: FromQuery[bool] = False) -> Price:
        """What a run of an action would cost now (R13)."""
        return price_of(meter.catalogue, action, now_ms(), own_api_key)

    @answer("/v1/audit/partitions")
    async def audit_partitions() -> list[PartitionAudit]:
        """What each partition's rows say of themselves, of both topics. Reads every row of them."""
        topics = meter.topic.name, meter.event_topic.name
        return [audit for topic in topics for audit in await meter.ask(queries.audit_partitions, topic)]

    @answer("/v1/audit/catalogue")
    async def audit_catalogue() -> list[PinnedVersion]:
        """The catalogue versions that workers have loaded."""
        return await meter.ask(catalogue_versions)

    @answer("/v1/audit/sums")
    async def audit_sums() -> SumAudit:
        """Sums through projections beside sums over raw rows."""
        return await meter.ask(queries.audit_sums)

    @answer("/v1/audit/rows")
    async def audit_rows(
        topic_id: FromQuery[str],
        partition: Annotated[int, QueryParameter(ge=0, le=PARTITION_MAX)],
        after: FromQuery[int] = -1,
        limit: Annotated[int, QueryParameter(ge=1, le=ROWS_MAX)] = 10_000,
    ) -> list[LedgerRow]:
        """Rows of one partition in Kafka's order; each as an array, in the order of these fields."""
        return await meter.ask(queries.ledger_rows, topic_id, partition, after, limit)

    @answer("/v1/status")
    async def status() -> Status:
        """What the worker does now."""
        return status_of(meter)

    @get("/livez", include_in_schema=False)
    async def livez() -> dict[str, str]:
        return {"status": "ok"}

    @get("/readyz", include_in_schema=False)
    async def readyz() -> Response[dict[str, Any]]:
        reasons = not_ready_because(meter)
        return Response({"ready": not reasons, "because": reasons}, status_code=503 if reasons else 200)

    @get("/metrics", include_in_schema=False, media_type=CONTENT_TYPE_LATEST)
    async def metrics() -> bytes:
        return exposition(status_of(meter))

    return Litestar(
        [
            usage, runs, example, explain, actions, action,
            audit_partitions, audit_catalogue, audit_sums, audit_rows, status, metrics, livez, readyz,
            *_letter_routes(meter), *_account_routes(meter), *_spending_routes(meter),
        ],
        before_request=_refuse_parameters,
        exception_handlers={
            Problem: _answer_problem, DatabaseError: _answer_database_error, HTTPException: _answer_refusal
        },
        openapi_config=OpenAPIConfig(title="creditstream", version=__version__, use_handler_docstrings=True),
        logging_config=None,
    )  # fmt: skip


AsOf = Annotated[datetime | None, QueryParameter(description="as the ledger knew it then; default: now")]
OnDay = Annotated[datetime | None, QueryParameter(description="on this UTC day, as the ledger knows it now")]
FirstDay = Annotated[date | None, QueryParameter(name="from", description="first UTC day")]
EndDay = Annotated[date | None, QueryParameter(name="to", description="day after the last one")]
Limit = Annotated[int, QueryParameter(ge=1, le=LIST_MAX)]
PathPartition = Annotated[int, PathParameter(ge=0, le=PARTITION_MAX)]
PathOffset = Annotated[int, PathParameter(ge=0, le=2**63 - 1)]
Cells = Annotated[int, QueryParameter(ge=1, le=CELLS_MAX)]


def _letter_routes(meter: Meter) -> list[HTTPRouteHandler]:
    """What could not be metered: `sinks.dead_letters`."""

    @answer("/v1/dead-letters")
    async def dead_letters(
        reason: FromQuery[Reason | None] = None,
        limit: Limit = 100,
        only_open: FromQuery[bool] = False,
    ) -> list[DeadLetter]:
        """The newest dead letters; `only_open`: those that were not sent again."""
        _require_reason(DEAD_LETTER_REASONS, reason)
        return await meter.ask(letters.dead_letters, reason or "", limit, only_open)

    @answer("/v1/parked-events")
    async def parked_events(reasons: FromQuery[list[Reason]], limit: Limit = 1000) -> list[ParkedEvent]:
        """Open dead letters of these reasons with their bytes (base64), the oldest first."""
        _require_reason(DEAD_LETTER_REASONS, *reasons)
        return await meter.ask(letters.parked_events, reasons, limit)

    @answer("/v1/parked-events/{topic:str}/{partition:int}/{offset:int}")
    async def parked_event(topic: FromPath[str], partition: PathPartition, offset: PathOffset) -> ParkedEvent:
        """One dead letter with its bytes."""
        return await meter.ask(letters.parked_event, Position(topic, partition, offset))

    @answer("/v1/dead-letters/{topic:str}/{partition:int}/{offset:int}")
    async def dead_letter(topic: FromPath[str], partition: PathPartition, offset: PathOffset) -> DeadLetter:
        """One dead letter by its position."""
        return await meter.ask(letters.dead_letter, Position(topic, partition, offset))

    return [dead_letters, dead_letter, parked_events, parked_event]


def _account_routes(meter: Meter) -> list[HTTPRouteHandler]:
    """Plans, balances and alerts: `creditstream.accounts`."""

    @answer("/v1/balance")
    async def balance(workspace_id: FromQuery[str], as_of: AsOf = None) -> list[PoolBalance]:
        """Where both pools of a workspace stand."""
        return await meter.ask(accounts.balance, workspace_id, as_of)

    @answer("/v1/periods")
    async def periods(workspace_id: FromQuery[str], as_of: AsOf = None) -> list[PeriodRow]:
        """Every billing period of a workspace up to now."""
        return await meter.ask(accounts.periods, workspace_id, as_of)

    @answer("/v1/statement")
    async def statement(
        workspace_id: FromQuery[str],
        day: Annotated[date | None, QueryParameter(name="period", description="any UTC day of the period")] = None,
        as_of: AsOf = None,
    ) -> list[StatementLine]:
        """Both pools over one billing period, from opening to closing."""
        return await meter.ask(accounts.statement, workspace_id, day, as_of)

    @answer("/v1/plans")
    async def plans(workspace_id: FromQuery[str], as_of: AsOf = None) -> list[PlanRow]:
        """A workspace's plans, also those to come."""
        return await meter.ask(accounts.plans, workspace_id, as_of)

    @answer("/v1/grants")
    async def grants(workspace_id: FromQuery[str], as_of: AsOf = None) -> list[GrantRow]:
        """A workspace's premium grants, also those to come."""
        return await meter.ask(accounts.grants, workspace_id, as_of)

    @answer("/v1/limits")
    async def limits(workspace_id: FromQuery[str], as_of: AsOf = None) -> LimitsInForce:
        """At what a workspace is told, and who said so."""
        return await meter.ask(accounts.limits, workspace_id, as_of)

    @answer("/v1/account-events/{event_id:str}")
    async def account_event(event_id: FromPath[UUID], workspace_id: FromQuery[str]) -> list[EventRow]:
        """What became of an account event; empty while it is not metered."""
        return await meter.ask(account_queries.event_rows, workspace_id, event_id)

    @answer("/v1/alerts")
    async def alerts(
        workspace_id: FromQuery[str] = "",
        kind: FromQuery[AlertKind | None] = None,
        limit: Limit = 100,
        as_of: AsOf = None,
    ) -> list[PublishedAlert]:
        """The newest limit alerts that left the meter."""
        return await meter.ask(accounts.alerts, workspace_id, kind or "", limit, as_of)

    return [balance, periods, statement, plans, grants, limits, account_event, alerts]


def _spending_routes(meter: Meter) -> list[HTTPRouteHandler]:
    """Credits that are not drawn yet: `creditstream.spending`."""

    @answer("/v1/check")
    async def check(
        workspace_id: FromQuery[str],
        action: FromQuery[str],
        cells: Cells = 1,
        own_api_key: FromQuery[bool] = False,
        on_unknown: FromQuery[Policy] = "deny",
        as_of: AsOf = None,
    ) -> SpendCheck:
        """May a workspace run an action in so many cells? As the gate decides."""
        return await meter.ask(
            spending.check, meter.catalogue, workspace_id, action,
            cells=cells, own_api_key=own_api_key, on_unknown=on_unknown, as_of=as_of,
        )  # fmt: skip

    @answer("/v1/estimate")
    async def estimate(
        workspace_id: FromQuery[str],
        action: FromQuery[str],
        cells: Cells,
        table_id: FromQuery[str] = "",
        column_id: FromQuery[str] = "",
        own_api_key: FromQuery[bool] = False,
        as_of: AsOf = None,
    ) -> Estimate:
        """What a bulk run will cost, at worst and expected, against what is left (R14)."""
        _require_column(table_id, column_id)
        return await meter.ask(
            spending.estimate, meter.catalogue, workspace_id, action,
            cells=cells, table_id=table_id, column_id=column_id, own_api_key=own_api_key, as_of=as_of,
        )  # fmt: skip

    @answer("/v1/top")
    async def top(by: FromQuery[TopBy] = TopBy.USED, limit: Limit = 20, as_of: OnDay = None) -> list[TopRow]:
        """Pools that are closest to their limit, or will be used up soonest."""
        return await meter.ask(spending.top, by, limit, as_of)

    return [check, estimate, top]


def _require_days(start: date | None, end: date | None, period: date | None = None) -> None:
    """Problem when they name no day, or two things at once."""
    if period and (start or end):
        raise Problem(
            "period and days cannot be combined", f"period {period} already names the days", "Leave one of them out."
        )
    if start and end and end <= start:
        raise Problem(
            "the range holds no day", f"to={end} is not after from={start}", "`to` is the day after the last."
        )


def _require_reason(found: Sequence[Reason], *asked: Reason | None) -> None:
    """Problem for a reason that none of the rows can have: an empty answer would pass for a workspace without any."""
    if wrong := [reason for reason in asked if reason and reason not in found]:
        raise Problem(f"nothing here has the reason {wrong[0]}", f"it takes {', '.join(found)}", "Ask for one of them.")


def _require_column(table_id: str, column_id: str) -> None:
    """Problem for a table alone: the worst case would pass for what the table's history lets expect."""
    if table_id and not column_id:
        raise Problem("the history belongs to a column", "`table_id` only narrows it", "Give `column_id` too.")


class _Parameter(NamedTuple):
    """One of a question's: as who asks calls it, and what it takes."""

    name: str
    kind: Any
    is_list: bool

    @property
    def is_instant(self) -> bool:
        """Then msgspec would take a number for Unix seconds, and who asks may mean milliseconds, or a day."""
        return datetime in get_args(self.kind)


def _parameters(request: Request[Any, Any, Any]) -> dict[str, _Parameter]:
    """Those of a question, by their names in its function."""
    asked = request.scope["route_handler"].parsed_fn_signature.parameters
    return {
        name: _Parameter(
            getattr(field.kwarg_definition, "name", None) or name, field.annotation, field.is_non_string_sequence
        )
        for name, field in asked.items()
    }


def _refuse_parameters(request: Request[Any, Any, Any]) -> None:
    """A misspelt name, or a second value of one, must not be answered as if it were not there: the sum would be another
    one.
    """
    if not request.url.path.startswith("/v1/"):
        return
    given, asked = request.query_params, _parameters(request).values()
    if unknown := sorted(given.keys() - {each.name for each in asked}):
        raise HTTPException(f"no parameter is called {', '.join(map(repr, unknown))}", status_code=400)
    if numbers := sorted(each.name for each in asked if each.is_instant and given.get(each.name, "").isdecimal()):
        raise HTTPException(f"{', '.join(numbers)}: a number is no RFC3339 encoded datetime", status_code=400)
    lists = {each.name for each in asked if each.is_list}
    if repeated := sorted(name for name in given.keys() - lists if len(given.getall(name)) > 1):
        raise HTTPException(f"{', '.join(map(repr, repeated))} may be given only once", status_code=400)


def _answer_problem(_: Request[Any, Any, Any], problem: Problem) -> Response[Failure]:
    return _failure(problem, STATUS_OF_EXIT_CODE.get(problem.exit_code, 400))


def _answer_database_error(request: Request[Any, Any, Any], error: DatabaseError) -> Response[Failure]:
    return _answer_problem(request, ledger_failed(error))


def _answer_refusal(request: Request[Any, Any, Any], error: HTTPException) -> Response[Failure]:
    """What Litestar refuses before anything is asked, as we say it."""
    wrong = error.extra if isinstance(error.extra, list) else []
    asked = _parameters(request) if wrong else {}
    said = []
    for one in wrong:
        parameter = asked.get(one["key"], _Parameter(one["key"], None, False))
        said.append(f"{parameter.name}: {with_choices(one['message'], choices(parameter.kind))}")
    why = "; ".join(said) or error.detail
    return _failure(Problem(f"{request.method} {request.url.path} is refused", why, "See /schema."), error.status_code)


def _failure(problem: Problem, status: int) -> Response[Failure]:
    return Response(Failure(problem.what, problem.why, problem.fix, problem.exit_code), status_code=status)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the worker's signals belong to the worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any free one. Problem when the port is taken, or the host is no IPv4 address of this
    machine.
    """
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        is_port = error.errno in (errno.EADDRINUSE, errno.EACCES)
        fix = "CREDITSTREAM_API_PORT (0: any free port)." if is_port else "CREDITSTREAM_API_HOST to an IPv4 address."
        raise Problem("the read API cannot start", f"{host}:{port}: {error.strerror}", f"Set {fix}") from error


class ApiService(mode.Service):
    """The API as one of the worker's services, in the worker's event loop."""

    def __init__(self, meter: Meter, bound: socket.socket, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        config = uvicorn.Config(create_api(meter), log_config=None, access_log=False, lifespan="off", ws="none")
        self._server = _Server(config)
        self._socket = bound

    @mode.Service.task
    async def _serve(self) -> None:
        await self._server.serve(sockets=[self._socket])

    async def on_stop(self) -> None:
        """Answer what was asked, and end."""
        self._server.should_exit = True
