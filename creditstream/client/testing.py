"""Doubles of the client for the tests of enrichment workers: no Kafka, no thread, no disk, the same decisions.

Without pytest: make a `MemoryProducer` and a `MemoryGate`, and hand them to your code. With it: put
``pytest_plugins = ["creditstream.client.fixtures"]`` into ``conftest.py`` and ask for ``cell_runs`` and ``gate``.
"""

import threading
import time
from collections.abc import Callable
from datetime import UTC, date, datetime
from types import TracebackType
from typing import Final, Self

import msgspec

from creditstream.client.decision import UNCONFIRMED_NS, GateRules, Policy
from creditstream.client.recording import Counts, RunRefused, refused_by_closed, valid_value
from creditstream.client.states import NEVER_NS
from schemas.catalogue import EXAMPLE_CATALOGUES, Catalogue
from schemas.cell_run import CellRun
from schemas.credits import parse_credits
from schemas.ledger import Pool
from schemas.limits import AsOf, LimitState, State, state_key


class MemoryProducer:
    """As `CellRunProducer`, but that what it accepts is in ``runs``; it refuses the same runs."""

    def __init__(self) -> None:
        self.runs: Final[list[CellRun]] = []
        """What was recorded, in order."""
        self.refuse_with: RunRefused | None = None
        """Set it, and `record` raises it: how a worker behaves when the disk is full."""
        self.trouble = ""
        self._refused = 0
        self._is_closed = False
        self._lock: Final = threading.Lock()

    def record(self, run: CellRun) -> None:
        """Keep the run. RunRefused when not."""
        with self._lock:
            try:
                valid_value(run)
                if self._is_closed:
                    raise refused_by_closed()
                if self.refuse_with:
                    raise self.refuse_with
            except RunRefused:
                self._refused += 1
                raise
            self.runs.append(run)

    def flush(self, timeout_s: float = 0) -> int:  # noqa: ARG002  # the same interface
        """Nothing ever waits."""
        return 0

    def counts(self) -> Counts:
        """Everything accepted is delivered."""
        return Counts(accepted=len(self.runs), refused=self._refused, delivered=len(self.runs))

    def close(self, timeout_s: float = 0) -> None:  # noqa: ARG002
        """No more runs are accepted."""
        self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class MemoryGate(GateRules):
    """As `Gate`, but that the test says what remains; with the example catalogue, unless another is given."""

    def __init__(
        self,
        catalogue: Catalogue | None = None,
        *,
        on_unknown: Policy = "deny",
        on_stale: Policy = "deny",
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        super().__init__(
            catalogue or Catalogue.load(EXAMPLE_CATALOGUES),
            on_unknown=on_unknown,
            on_stale=on_stale,
            clock=clock,
        )
        self.fresh_ns = NEVER_NS  # what a test says does not age
        self._changes = 0

    def set(
        self,
        workspace_id: str,
        remaining: str,
        *,
        pool: Pool = Pool.ENRICHMENT,
        period_end: date | None = None,
        next_allowance: str | None = None,
    ) -> None:
        """This workspace has so many credits left in the pool, as decimal text, until ``period_end``."""
        if (millicredits := parse_credits(remaining)) < 0:
            raise ValueError(f"{remaining} credits cannot remain")
        state = State.OK if millicredits else State.EXHAUSTED
        self._publish(workspace_id, pool, state, remaining, period_end, next_allowance)

    def set_unknown_plan(self, workspace_id: str) -> None:
        """This workspace runs actions, and has no plan yet."""
        self._publish(workspace_id, Pool.ENRICHMENT, State.UNKNOWN_PLAN, "0", None, None)

    def forget(self, workspace_id: str, pool: Pool = Pool.ENRICHMENT) -> None:
        """Nothing is known of the pool of this workspace any more."""
        self.states.apply(state_key(workspace_id, pool), None)

    def lose_contact(self) -> None:
        """From now on every answer that needs a balance is ``stale``."""
        self.fresh_ns = UNCONFIRMED_NS

    def wait_ready(self, timeout_s: int = 0) -> None:
        """It always is."""

    @property
    def is_ready(self) -> bool:
        """Whether contact was not lost."""
        return self.fresh_ns > UNCONFIRMED_NS

    def close(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _publish(
        self,
        workspace_id: str,
        pool: Pool,
        state: State,
        remaining: str,
        period_end: date | None,
        next_allowance: str | None,
    ) -> None:
        self._changes += 1
        told = LimitState(
            workspace_id=workspace_id,
            pool=pool,
            state=state,
            used="0",
            allowance=remaining,
            remaining=remaining,
            overage="0",
            period_end=period_end,
            next_allowance=next_allowance,
            as_of=AsOf(log="memory", cell_runs=self._changes, account_events=-1, at=datetime.fromtimestamp(0, UTC)),
        )
        self.states.apply(state_key(workspace_id, pool), msgspec.json.encode(told))
