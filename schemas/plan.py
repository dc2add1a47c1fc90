"""Plan lists: what a plan's name means. One TOML file is one effective-dated version.

A plan event names a plan; the version in force at its ``effective_at`` gives allowance and thresholds, which are
written into the ledger with it. So a changed list changes no workspace until billing says so.
"""

import tomllib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from schemas.account import Percents
from schemas.cell_run import Identifier, Instant, to_milliseconds
from schemas.credits import CREDITS_MAX, Millicredits, parse_credits
from schemas.problem import Problem

EXAMPLE_PLANS: Final = Path(__file__).parent / "plans"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One plan. ``allowance`` in millicredits a billing period; ``thresholds`` empty: the default ones."""

    id: str
    allowance: Millicredits
    thresholds: tuple[int, ...] = ()
    remaining_below: Millicredits | None = None


class PlanVersion(NamedTuple):
    """One file. ``starts_ms``: its ``effective_from``, Unix ms."""

    starts_ms: int
    number: int
    plans: dict[str, Plan]


class PlanLists:
    """All versions, oldest first. An instance never changes."""

    def __init__(self, versions: Sequence[PlanVersion]) -> None:
        self._starts: Final = [version.starts_ms for version in versions]
        self._plans: Final = [version.plans for version in versions]

    @classmethod
    def load(cls, directory: Path) -> "PlanLists":
        """Read every ``*.toml`` of a directory; Problem when one is wrong, or their numbers and times disagree."""
        files = sorted(directory.glob("*.toml"))
        if not files:
            raise Problem("no plan list", f"{directory} holds no .toml file", "Set CREDITSTREAM_PLANS_DIR.")
        versions = sorted(_read(file) for file in files)
        for earlier, later in pairwise(versions):
            if earlier.starts_ms == later.starts_ms or earlier.number >= later.number:
                why = f"{directory}: version {later.number} does not begin after version {earlier.number}"
                raise Problem("plan lists refused", why, "Give a later `effective_from` a higher `version`.")
        return cls(versions)

    def find(self, plan: str, at_ms: int) -> Plan | None:
        """A plan at an instant (Unix ms): by the version in force; where that does not list it, by the newest earlier
        one that does; where there is none, by the first later one.
        """
        era = bisect_right(self._starts, at_ms)
        for plans in (*reversed(self._plans[:era]), *self._plans[era:]):
            if found := plans.get(plan):
                return found
        return None

    def newest(self) -> list[Plan]:
        """The plans of the newest version, by allowance."""
        return sorted(self._plans[-1].values(), key=lambda plan: plan.allowance)


class _WirePlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: Identifier
    allowance: str
    thresholds: Percents = ()
    remaining_below: str | None = None


class _WireList(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1)]
    effective_from: Instant
    plans: list[_WirePlan]


def _read(file: Path) -> PlanVersion:
    try:
        wire = msgspec.convert(tomllib.loads(file.read_text()), _WireList)
        plans = [_plan(entry) for entry in wire.plans]
    except OSError as error:
        raise Problem(f"plan list {file.name} cannot be read", error.strerror or "", f"Check {file}.") from error
    except (ValueError, RecursionError) as error:
        raise Problem("plan list refused", f"{file.name}: {error}", "Correct the file.") from error
    if len({plan.id for plan in plans}) < len(plans):
        raise Problem("plan list refused", f"{file.name}: two plans have the same id", "Give each plan its own id.")
    return PlanVersion(to_milliseconds(wire.effective_from), wire.version, {plan.id: plan for plan in plans})


def _plan(entry: _WirePlan) -> Plan:
    try:
        allowance = parse_credits(entry.allowance)
        below = None if entry.remaining_below is None else parse_credits(entry.remaining_below)
    except ValueError as error:
        raise ValueError(f"plan `{entry.id}`: {error}") from error
    if not (0 <= allowance < CREDITS_MAX and 0 <= (below or 0) < CREDITS_MAX):
        raise ValueError(f"plan `{entry.id}`: credits must be between 0 and 10^12")
    thresholds = tuple(sorted(set(entry.thresholds)))
    return Plan(id=entry.id, allowance=allowance, thresholds=thresholds, remaining_below=below)
