"""May a workspace run an action now? The rules of the gate (who may spend), and its answer. No I/O, no thread."""

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final, Literal

import msgspec

from creditstream.client.states import ABSENT, BALANCE, NEVER_NS, OFFSET_OF_POOL, PLANLESS, StateMirror
from schemas.catalogue import Catalogue
from schemas.credits import Millicredits, format_credits
from schemas.limits import AsOf

Policy = Literal["allow", "deny"]
"""What the caller wants where the gate does not know."""

CONTACT_LOST_S: Final = 15
"""Knowledge that has not been confirmed for so long is stale, by default."""
STALE_AFTER_S_MIN: Final = 2
"""`Gate` asks once a second: what must be younger is stale between two answers."""
UNCONFIRMED_NS: Final = -NEVER_NS
"""`GateRules.fresh_ns` before any confirmation."""
_NS: Final = 1_000_000_000
_MS: Final = 1_000_000

_NO_GRANT: Final = (0, PLANLESS, NEVER_NS)
"""The balance of a premium pool of which no state came: its workspace is known, so the first grant would be, too."""
_balance_at: Final = BALANCE.unpack_from
_monotonic_ns: Final = time.monotonic_ns

_Priced = tuple[Millicredits, int]
"""Price of one cell, and where the pool's half begins in a row."""


class Because(StrEnum):
    """Why a decision is what it is: the first that applies, in this order."""

    UNKNOWN_ACTION = "unknown_action"
    """No version of the catalogue lists the action: no. It would be parked, with an own key too."""
    OWN_API_KEY = "own_api_key"
    """It costs nothing with the workspace's own key (R05): yes."""
    FREE_ACTION = "free_action"
    """It has no price (R04): yes."""
    STALE = "stale"
    """The gate is not, or no longer, up to date: as ``on_stale`` says."""
    UNKNOWN_WORKSPACE = "unknown_workspace"
    """No state of this workspace, or none of its enrichment pool: as ``on_unknown`` says."""
    UNKNOWN_PLAN = "unknown_plan"
    """The workspace has no plan yet, or none for the period that has begun: as ``on_unknown`` says."""
    ENOUGH = "enough"
    """What remains in the pool covers the cells: yes."""
    NOT_ENOUGH = "not_enough"
    """Something remains, but less than the cells cost: no."""
    EXHAUSTED = "exhausted"
    """Nothing remains: no."""


# Bound once: looking up a member of an enum takes a tenth of a check.
_UNKNOWN_ACTION: Final = Because.UNKNOWN_ACTION
_OWN_API_KEY: Final = Because.OWN_API_KEY
_FREE_ACTION: Final = Because.FREE_ACTION
_STALE: Final = Because.STALE
_UNKNOWN_WORKSPACE: Final = Because.UNKNOWN_WORKSPACE
_UNKNOWN_PLAN: Final = Because.UNKNOWN_PLAN
_ENOUGH: Final = Because.ENOUGH
_NOT_ENOUGH: Final = Because.NOT_ENOUGH
_EXHAUSTED: Final = Because.EXHAUSTED


class Decision(msgspec.Struct, frozen=True, gc=False):
    """An answer of the gate; true where it allows.

    ``millicredits`` is what the cells will cost at the most, and ``remaining_millicredits`` what the pool has left:
    -1 where that is not known or does not matter. Nothing is reserved: runs under way still draw credits.
    """

    allowed: bool
    reason: Because
    millicredits: Millicredits
    remaining_millicredits: Millicredits
    _gate: "GateRules"
    _row: bytes = b""
    _offset: int = 0
    _age_ns: int = NEVER_NS

    def __bool__(self) -> bool:
        return self.allowed

    def __repr__(self) -> str:
        left = f", remaining={self.remaining}" if self.remaining is not None else ""
        return f"Decision({'yes' if self.allowed else 'no'}, {self.reason}, price={self.price}{left})"

    @property
    def price(self) -> str:
        """What the cells will cost at the most, in credits."""
        return format_credits(self.millicredits)

    @property
    def remaining(self) -> str | None:
        """What the pool had left, in credits; None where it is not known or does not matter."""
        return None if self.remaining_millicredits < 0 else format_credits(self.remaining_millicredits)

    @property
    def as_of(self) -> AsOf | None:
        """Up to where the meter had folded when it wrote the state that decided; None when none did."""
        return self._gate.states.as_of(self._row, self._offset)

    @property
    def age_ms(self) -> int | None:
        """How long before the decision the gate last knew that it held all of the topic. None: it never did, or
        no balance was asked for.
        """
        return max(0, self._age_ns) // _MS if self._age_ns < NEVER_NS else None


class GateRules:
    """The decisions, over whatever fills ``states``: `Gate` from Kafka, `testing.MemoryGate` from a test.

    ``on_unknown`` and ``on_stale`` choose for what is not known; ``stale_after_s`` says when it is not known any more.
    ``clock`` gives Unix nanoseconds: for prices and the ends of periods, not for staleness, since it may be set back.
    The catalogue's versions are those of the start: a new file needs a restart, in time before it comes into force.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        *,
        on_unknown: Policy,
        on_stale: Policy,
        stale_after_s: int = CONTACT_LOST_S,
        clock: Callable[[], int],
    ) -> None:
        if unknown := {on_unknown, on_stale} - {"allow", "deny"}:
            raise ValueError(f'{unknown}: a policy is "allow" or "deny"')
        if stale_after_s < STALE_AFTER_S_MIN:
            raise ValueError(f"stale_after_s={stale_after_s} is not {STALE_AFTER_S_MIN} or more")
        self.states: Final = StateMirror()
        self.fresh_ns = UNCONFIRMED_NS
        """Monotonic ns of the last instant of which it is known that all states until then are held; `NEVER_NS`: they
        do not age. While the machine sleeps it does not age either: a clock that goes on costs a tenth of a check.
        """
        self._rows: Final = self.states.rows
        self._catalogue: Final = catalogue
        self._on_unknown: Final = on_unknown == "allow"
        self._on_stale: Final = on_stale == "allow"
        self._stale_after_ns: Final = stale_after_s * _NS
        self._clock: Final = clock
        self._prices: tuple[int, int, dict[str, _Priced]] = (0, 0, {})

    def check(self, workspace_id: str, action: str, own_api_key: bool = False, cells: int = 1) -> Decision:
        """May this workspace run this action in so many cells? Takes no lock and does no I/O.

        Yes is worth what the state is worth that it rests on: see `Decision.as_of`. ValueError for negative ``cells``.
        """
        now = self._clock()
        since, until, prices = self._prices
        if not since <= now < until:
            prices = self._prices_at(now)
        priced = prices.get(action)
        if priced is None:
            return Decision(False, _UNKNOWN_ACTION, 0, -1, self)
        price, offset = priced
        if own_api_key:
            return Decision(True, _OWN_API_KEY, 0, -1, self)
        if not price:
            return Decision(True, _FREE_ACTION, 0, -1, self)
        if cells < 0:
            raise ValueError(f"{cells} cells")
        cost = price * cells
        age = _monotonic_ns() - self.fresh_ns
        if age > self._stale_after_ns:
            self._on_stale_answer()
            return Decision(self._on_stale, _STALE, cost, -1, self, b"", 0, age)
        row = self._rows.get(workspace_id)
        if row is None:
            return Decision(self._on_unknown, _UNKNOWN_WORKSPACE, cost, -1, self, b"", 0, age)
        remaining, following, end = _balance_at(row, offset) if len(row) > offset else _NO_GRANT
        if now >= end and remaining >= 0:
            remaining = following
        if remaining < 0:
            because = _UNKNOWN_WORKSPACE if remaining == ABSENT else _UNKNOWN_PLAN
            return Decision(self._on_unknown, because, cost, -1, self, row, offset, age)
        if cost <= remaining:
            return Decision(True, _ENOUGH, cost, remaining, self, row, offset, age)
        because = _NOT_ENOUGH if remaining else _EXHAUSTED
        return Decision(False, because, cost, remaining, self, row, offset, age)

    def _on_stale_answer(self) -> None:
        """Called before each answer ``stale``; for a gate that has something to do then."""

    def _prices_at(self, now_ns: int) -> dict[str, _Priced]:
        """The prices now in force, kept until the next version comes into force (or the clock goes back)."""
        starts = self._catalogue.starts_ms
        era = self._catalogue.era_at(now_ns // _MS)
        actions = {action for version in self._catalogue.versions for action in version.actions}
        prices = {}
        for name in actions:
            if found := self._catalogue.find(name, era):
                action = found[1]
                prices[name] = (action.price, OFFSET_OF_POOL.get(action.pool, 0))
        since = starts[era] * _MS if era >= 0 else -NEVER_NS
        until = starts[era + 1] * _MS if era + 1 < len(starts) else NEVER_NS
        self._prices = (since, until, prices)
        return prices
