"""Rating: what one cell run costs, and why. Pure: (run, catalogue in force at ``ran_at``) → debit.

No clock, no plan, no balance. `rate` is the definition; `RatingTable` is the same answer for whole columns, an index
into the few combinations that occur, each of them filled by `rate`.
"""

from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from schemas.catalogue import Action, Catalogue
from schemas.cell_run import Outcome
from schemas.credits import Millicredits
from schemas.ledger import OUTCOMES, Kind, Pool, Reason, number_of
from streams.rules.intake import FEW, Coded

COMBINATIONS_MAX: Final = 100_000
"""Remembered answers; unknown actions are an attacker's to invent, so the memory is bounded."""

Numbers = npt.NDArray[np.int8]


class Debit(NamedTuple):
    """What a run draws from which pool, and the reason. Without a price the pool is ``none``."""

    reason: Reason
    pool: Pool
    credits: Millicredits


def rate(action: Action, outcome: Outcome, own_api_key: bool) -> Debit:
    """R02-R05, R07-R09, in the published order of reasons: the first that applies wins."""
    if own_api_key:
        return Debit(Reason.OWN_API_KEY, action.pool, 0)
    if not action.price:
        return Debit(Reason.FREE_ACTION, action.pool, 0)
    match outcome:
        case Outcome.ERROR:
            return Debit(Reason.ERROR, action.pool, 0)
        case Outcome.NO_DATA if not action.charges_no_data:
            return Debit(Reason.NO_DATA, action.pool, 0)
        case Outcome.NO_DATA:
            return Debit(Reason.CHARGED_NO_DATA, action.pool, action.price)
        case Outcome.DATA:
            return Debit(Reason.CHARGED, action.pool, action.price)


class RatedRuns(msgspec.Struct, frozen=True):
    """The ledger's numbers of kind, reason and pool, millicredits and catalogue version, one row a run."""

    kind: Numbers
    reason: Numbers
    pool: Numbers
    credits: npt.NDArray[np.int64]
    catalogue: npt.NDArray[np.uint16]


class RatingTable:
    """Rates whole columns by one catalogue. An unknown action becomes a dead letter, never free and never guessed."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue: Final = catalogue
        self._starts = np.array(catalogue.starts_ms, np.int64)
        self._answers: dict[tuple[int, str, int, bool], tuple[int, int, int, int, int]] = {}

    def rate(
        self, actions: Coded, outcome: Numbers, own_api_key: npt.NDArray[np.bool_], ran_ms: npt.NDArray[np.int64]
    ) -> RatedRuns:
        """Debits of all rows. ``outcome`` holds the ledger's numbers (1 data, 2 no_data, 3 error; 0 blank)."""
        eras = np.searchsorted(self._starts, ran_ms, side="right") - 1
        codes = ((eras + 1) * len(actions.names) + actions.codes) * 8 + outcome * 2 + own_api_key
        if len(codes) <= FEW:
            rows = self._answers_to(codes, actions.names)
        else:
            distinct, place = np.unique(codes, return_inverse=True)
            rows = self._answers_to(distinct, actions.names)[place]
        return RatedRuns(
            kind=rows[:, 0].astype(np.int8),
            reason=rows[:, 1].astype(np.int8),
            pool=rows[:, 2].astype(np.int8),
            credits=rows[:, 3].copy(),
            catalogue=rows[:, 4].astype(np.uint16),
        )

    def _answers_to(self, codes: npt.NDArray[np.int64], names: list[str]) -> npt.NDArray[np.int64]:
        return np.array([self._answer(code, names) for code in codes.tolist()], np.int64).reshape(-1, 5)

    def _answer(self, code: int, names: list[str]) -> tuple[int, int, int, int, int]:
        rest, flags = divmod(code, 8)
        era, name = divmod(rest, len(names))
        question = era - 1, names[name], flags >> 1, bool(flags & 1)
        if (known := self._answers.get(question)) is None:
            if len(self._answers) >= COMBINATIONS_MAX:
                self._answers.clear()
            known = self._answers[question] = self._rate_one(*question)
        return known

    def _rate_one(self, era: int, name: str, outcome: int, own_api_key: bool) -> tuple[int, int, int, int, int]:
        found = self.catalogue.find(name, era)
        if not found:
            return number_of(Kind.DEAD_LETTER), number_of(Reason.UNKNOWN_ACTION), number_of(Pool.NONE), 0, 0
        version, action = found
        debit = rate(action, OUTCOMES[outcome - 1], own_api_key)
        return (
            number_of(Kind.RUN),
            number_of(debit.reason),
            number_of(debit.pool),
            debit.credits,
            version.number,
        )
