"""One debit per run: which of the delivered events are copies. Pure: no I/O, no clock.

The identity of a run is (workspace_id, run_id), over all incarnations of a topic. `KeyFilter` remembers a 64-bit key
of every run of a unit: a key that it does not hold was never seen; one that it holds is a *candidate*, and only
candidates are compared exactly, against earlier events of the same batch, rows on their way, and the ledger. So a
false positive costs a look-up and never a charge, and a false negative cannot occur, since the filter is rebuilt from
the ledger. Account events have another such filter.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from schemas.ledger import Identity, Kind, Reason

Keys = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

MERGE_RATIO: Final = 4
"""A sorted run is merged into the one before it unless that is this many times longer: few runs to search."""

KEYS_AT_ONCE: Final = 100_000
"""Keys whose places in a Bloom filter are computed together: seventy bytes each."""


class KeyFilter:
    """A superset of the ids of one unit, in two tiers under one bound of memory.

    ``recent`` is exact: sorted arrays of keys, 8 bytes each. When it outgrows its half of ``bytes_max``, its oldest
    array moves into ``older``, a Bloom filter in the other half: false positives grow, answers stay safe.
    """

    def __init__(self, bytes_max: int) -> None:
        self._recent: list[Keys] = []
        self._recent_max = bytes_max // 16
        self._older = BloomFilter(bytes_max // 2)
        self.is_complete = False
        """False while older keys are still loading: until then everything is a candidate."""

    @property
    def nbytes(self) -> int:
        """Memory of both tiers, bytes."""
        return sum(run.nbytes for run in self._recent) + self._older.nbytes

    def add(self, keys: Keys) -> None:
        """Remember what has, or is about to have, a ledger row."""
        if not len(keys):
            return
        self._recent.append(np.sort(keys))
        while len(self._recent) > 1 and len(self._recent[-2]) < MERGE_RATIO * len(self._recent[-1]):
            last = self._recent.pop()
            self._recent[-1] = np.sort(np.concatenate([self._recent[-1], last]), kind="stable")
        if sum(map(len, self._recent)) > self._recent_max:
            self.add_older(self._recent.pop(0))

    def add_older(self, keys: Keys) -> None:
        """Remember what is of long ago, in the Bloom filter."""
        self._older.add(keys)

    def suspect(self, keys: Keys) -> "Suspicion":
        """Which of the keys may be copies: of a run that was added before, or of each other."""
        order = np.argsort(keys)
        ordered = keys[order]
        before = np.full(len(keys), not self.is_complete)
        for run in self._recent:
            before |= contains(run, ordered)
        if self._older.nbytes:
            before |= self._older.contains(ordered)
        equal = ordered[1:] == ordered[:-1]
        if not before.any() and not equal.any():
            return Suspicion(before, before)
        repeated = np.zeros(len(keys), np.bool_)
        repeated[1:] |= equal
        repeated[:-1] |= equal
        unsort = np.empty_like(order)
        unsort[order] = np.arange(len(order))
        return Suspicion(before[unsort], (before | repeated)[unsort])


def contains(ordered: Keys, keys: Keys) -> Mask:
    """Which keys stand in a sorted array, which is not empty."""
    place = np.searchsorted(ordered, keys)
    found: Mask = ordered[np.minimum(place, len(ordered) - 1)] == keys
    return found


class Suspicion(NamedTuple):
    """Masks over a batch. ``before``: the ledger, or a row on its way, may have the run. ``any``: that, or the batch
    itself has its key twice. What is only repeated needs no look-up: the filter knows that nobody had it before.
    """

    before: Mask
    any: Mask


class BloomFilter:
    """A blocked Bloom filter: a key's bits lie in one 64-byte line. About 1e-4 false positives at 24 bits a key.

    Putze, Sanders, Singler: "Cache-, Hash- and Space-Efficient Bloom Filters" (2007). Memory is taken at the first key.
    """

    PROBES: Final = 7

    def __init__(self, bytes_max: int) -> None:
        self._lines = max(1, bytes_max // 64)
        self._bits = np.zeros(0, np.uint64)

    @property
    def nbytes(self) -> int:
        """Memory taken, bytes; 0 while it is empty."""
        return self._bits.nbytes

    def add(self, keys: Keys) -> None:
        """Set the bits of the keys."""
        if not len(keys):
            return
        if not len(self._bits):
            self._bits = np.zeros(self._lines * 8, np.uint64)
        for start in range(0, len(keys), KEYS_AT_ONCE):
            for word, bit in self._probes(keys[start : start + KEYS_AT_ONCE]):
                np.bitwise_or.at(self._bits, word, bit)

    def contains(self, keys: Keys) -> Mask:
        """Which keys may have been added; all of those that were."""
        hit = np.full(len(keys), bool(len(self._bits)))
        for word, bit in self._probes(keys) if len(self._bits) else ():
            hit &= (self._bits[word] & bit) != 0
        return hit

    def _probes(self, keys: Keys) -> Iterable[tuple[npt.NDArray[np.int64], Keys]]:
        line = (_scramble(keys) % np.uint64(self._lines)).astype(np.int64) * 8
        places = _scramble(keys ^ np.uint64(0x9E3779B97F4A7C15))
        for probe in range(self.PROBES):
            nine = (places >> np.uint64(9 * probe)) & np.uint64(511)
            yield line + (nine >> np.uint64(6)).astype(np.int64), np.uint64(1) << (nine & np.uint64(63))


def _scramble(keys: Keys) -> Keys:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): ids that somebody made up still spread over all lines."""
    mixed = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Original(NamedTuple):
    """An event under an identity: where it lies in Kafka, and what a copy must say as well."""

    position: str
    substance: tuple[object, ...]
    """Every field that we know, times in milliseconds."""


class Verdict(NamedTuple):
    """What a copy becomes."""

    kind: Kind
    reason: Reason
    detail: str


RUN_SUBSTANCE: Final = (
    "table_id",
    "column_id",
    "row_id",
    "action",
    "outcome",
    "own_api_key",
    "ran_at",
    "triggered_by",
    "actor",
)
"""The fields of a run's `Original.substance`, in their order."""


class Candidate(NamedTuple):
    """One event that may be a copy. ``is_debit``: it would become a ledger debit, so it would occupy its run id."""

    row: int
    identity: Identity
    event: Original
    is_debit: bool


def decide(candidates: Iterable[Candidate], known: dict[Identity, Original]) -> dict[int, Verdict]:
    """Row → verdict for the copies among the candidates, which come in Kafka's order.

    ``known`` holds the debits from before. The first debit under an identity stands; a later event that says the
    same is a duplicate, one that does not conflicts. A dead letter occupies no run id.
    """
    standing = dict(known)
    verdicts: dict[int, Verdict] = {}
    for candidate in candidates:
        original = standing.get(candidate.identity)
        if original is None:
            if candidate.is_debit:
                standing[candidate.identity] = candidate.event
        elif original.substance == candidate.event.substance:
            detail = f"a duplicate of the run at {original.position}"
            verdicts[candidate.row] = Verdict(Kind.DUPLICATE, Reason.DUPLICATE, detail)
        else:
            both = zip(RUN_SUBSTANCE, original.substance, candidate.event.substance, strict=True)
            fields = ", ".join(name for name, old, new in both if old != new)
            detail = f"differs in {fields} from the run at {original.position}, which stands"
            verdicts[candidate.row] = Verdict(Kind.DEAD_LETTER, Reason.CONFLICTING_DUPLICATE, detail)
    return verdicts
