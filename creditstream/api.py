"""The read API that a worker serves while it holds the ledger. GET only, on 127.0.0.1 unless it is told otherwise.

It has no login: whoever reaches the port may read. OpenAPI is generated from these signatures, at ``/schema``.
"""

import contextlib
import socket
import time
from collections.abc import Iterator
from datetime import date
from typing import Annotated, Any
from uuid import UUID

import mode
import uvicorn
from litestar import Litestar, Request, Response, get
from litestar.openapi.config import OpenAPIConfig
from litestar.params import FromPath, FromQuery, QueryParameter

from creditstream import __version__
from schemas.answers import (
    By,
    DeadLetter,
    Explanation,
    LedgerRow,
    PartitionAudit,
    Price,
    Status,
    SumAudit,
    UnitStatus,
    UsageRow,
    WorkspaceTotal,
)
from schemas.ledger import Reason
from schemas.prices import price_of, prices
from schemas.problem import Problem
from sinks import queries
from streams.meter import Meter

STATUS_OF_EXIT_CODE = {3: 409, 4: 404, 5: 503}
ROWS_MAX = 100_000


def create_api(meter: Meter) -> Litestar:
    """The API over one meter."""

    @get("/v1/usage")
    async def usage(
        workspace_id: FromQuery[str],
        by: FromQuery[By] = By.COLUMN,
        start: Annotated[date | None, QueryParameter(name="from", description="first UTC day")] = None,
        end: Annotated[date | None, QueryParameter(name="to", description="the day after the last one")] = None,
    ) -> list[UsageRow]:
        """Credits and runs of a workspace, most credits first."""
        rows: list[UsageRow] = await meter.ask(queries.usage, workspace_id, by, start, end)
        return rows

    @get("/v1/workspaces")
    async def workspaces(limit: Annotated[int, QueryParameter(ge=1, le=10_000)] = 20) -> list[WorkspaceTotal]:
        """The workspaces that drew most, over all time."""
        totals: list[WorkspaceTotal] = await meter.ask(queries.workspaces, limit)
        return totals

    @get("/v1/runs/example")
    async def example(reason: FromQuery[Reason] = Reason.CHARGED) -> UUID | None:
        """The id of a recent run with this reason."""
        found: UUID | None = await meter.ask(queries.example_run, reason)
        return found

    @get("/v1/runs/{run_id:uuid}")
    async def explain(run_id: FromPath[UUID]) -> Explanation:
        """Why a run cost what it cost, and every delivery of it."""
        explanation: Explanation = await meter.ask(queries.explanation, run_id, meter.catalogue)
        return explanation

    @get("/v1/dead-letters")
    async def dead_letters(
        reason: FromQuery[Reason | None] = None, limit: Annotated[int, QueryParameter(ge=1, le=10_000)] = 100
    ) -> list[DeadLetter]:
        """The newest dead letters."""
        letters: list[DeadLetter] = await meter.ask(queries.dead_letters, reason or "", limit)
        return letters

    @get("/v1/dead-letters/{partition:int}/{offset:int}")
    async def dead_letter(partition: FromPath[int], offset: FromPath[int]) -> DeadLetter:
        """One dead letter by its position."""
        letter: DeadLetter = await meter.ask(queries.dead_letter, partition, offset)
        return letter

    @get("/v1/actions")
    async def actions() -> list[Price]:
        """The catalogue in force now."""
        return prices(meter.catalogue, _now_ms())

    @get("/v1/actions/{action:str}")
    async def action(action: FromPath[str], own_api_key: FromQuery[bool] = False) -> Price:
        """What a run of an action would cost now (R13)."""
        return price_of(meter.catalogue, action, _now_ms(), own_api_key)

    @get("/v1/audit/partitions")
    async def audit_partitions() -> list[PartitionAudit]:
        """What each partition's rows say of themselves. Reads every row of the topic."""
        audits: list[PartitionAudit] = await meter.ask(queries.audit_partitions, meter.topic.name)
        return audits

    @get("/v1/audit/sums")
    async def audit_sums() -> SumAudit:
        """Sums through projections beside sums over raw rows."""
        audit: SumAudit = await meter.ask(queries.audit_sums)
        return audit

    @get("/v1/audit/rows")
    async def audit_rows(
        topic_id: FromQuery[str],
        partition: FromQuery[int],
        after: FromQuery[int] = -1,
        limit: Annotated[int, QueryParameter(ge=1, le=ROWS_MAX)] = 10_000,
    ) -> list[LedgerRow]:
        """Rows of one partition in Kafka's order."""
        rows: list[LedgerRow] = await meter.ask(queries.ledger_rows, topic_id, partition, after, limit)
        return rows

    @get("/v1/status")
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

    return Litestar(
        [
            usage, workspaces, example, explain, dead_letters, dead_letter, actions, action,
            audit_partitions, audit_sums, audit_rows, status, livez, readyz,
        ],
        exception_handlers={Problem: _answer_problem},
        openapi_config=OpenAPIConfig(title="creditstream", version=__version__),
        logging_config=None,
    )  # fmt: skip


def status_of(meter: Meter) -> Status:
    """The meter as people and ``demo`` see it."""
    return Status(
        version=__version__,
        ready=not not_ready_because(meter),
        not_ready_because=not_ready_because(meter),
        topic=meter.topic.name,
        kafka_bootstrap=meter.settings.kafka_bootstrap,
        units=[
            UnitStatus(
                partition=partition,
                mark=unit.mark.last,
                rows_unwritten=unit.rows_unwritten,
                incident=str(unit.incident or ""),
            )
            for partition, unit in sorted(meter.units.items())
        ],
        written=dict(meter.written),
        uptime_s=int(time.time() - meter.started_at),
        duplicate_filter_bytes=sum(unit.run_filter.nbytes for unit in meter.units.values()),
    )


def not_ready_because(meter: Meter) -> list[str]:
    """Why it does not meter everything that it should; empty when it does."""
    if not meter.assigned:
        return ["no assignment yet"]
    return [f"{unit.chain}: {unit.incident}" for unit in meter.units.values() if unit.incident] + (
        [f"ledger: {meter.trouble}"] if meter.trouble else []
    )


def _answer_problem(_: Request[Any, Any, Any], problem: Problem) -> Response[dict[str, str | int]]:
    body: dict[str, str | int] = {
        "what": problem.what, "why": problem.why, "fix": problem.fix, "exit_code": problem.exit_code
    }  # fmt: skip
    return Response(body, status_code=STATUS_OF_EXIT_CODE.get(problem.exit_code, 400))


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the worker's signals belong to the worker."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 takes any free one. Problem when the port is taken."""
    try:
        return socket.create_server((host, port), backlog=128)
    except OSError as error:
        raise Problem(
            "the read API cannot start",
            f"{host}:{port}: {error.strerror}",
            "Set CREDITSTREAM_API_PORT (0: any free port).",
        ) from error


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
