"""The catalogue: versioned, effective-dated lists of actions with their prices and flags.

One TOML file is one immutable version. ``Catalogue.load`` reads a directory of them and refuses whatever could charge
wrongly, naming file, action and field. A run is priced by the version in force at its ``ran_at``.
"""

import hashlib
import re
import tomllib
from bisect import bisect_right
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta

from schemas.cell_run import Identifier, Instant, to_milliseconds
from schemas.credits import CREDITS_MAX, Millicredits, parse_credits
from schemas.ledger import Pool
from schemas.problem import Problem

EXAMPLE_CATALOGUES: Final = Path(__file__).parent / "catalogues"


class Category(StrEnum):
    """What kind of thing an action is. Formatters and destinations never have a price (R04)."""

    ENRICHMENT = "enrichment"
    PREMIUM = "premium"
    FORMATTER = "formatter"
    DESTINATION = "destination"


POOL_OF_CATEGORY: Final = {
    Category.ENRICHMENT: Pool.ENRICHMENT,
    Category.PREMIUM: Pool.PREMIUM,
    Category.FORMATTER: Pool.NONE,
    Category.DESTINATION: Pool.NONE,
}


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """One action of one version. ``price`` in millicredits; ``charges_no_data`` is R09's exception."""

    id: str
    name: str
    category: Category
    provider: str
    price: Millicredits
    pool: Pool
    charges_no_data: bool


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One immutable version: ``number`` and ``content_hash`` are pinned by the ledger at first use."""

    number: int
    effective_from: datetime
    content_hash: str
    actions: dict[str, Action]
    file: str


class Catalogue:
    """All versions, oldest first. Look-ups are pure; an instance never changes."""

    def __init__(self, versions: list[Version]) -> None:
        self.versions: Final = tuple(sorted(versions, key=lambda version: version.effective_from))
        self.starts_ms: Final = tuple(to_milliseconds(version.effective_from) for version in self.versions)
        """Unix milliseconds at which each version comes into force, ascending."""

    @classmethod
    def load(cls, directory: Path) -> "Catalogue":
        """Read every ``*.toml`` of a directory; Problem when one is wrong or two contradict."""
        files = sorted(directory.glob("*.toml"))
        if not files:
            raise Problem("no catalogue", f"{directory} holds no .toml file", "Set CREDITSTREAM_CATALOGUE_DIR.")
        versions = [read_version(file) for file in files]
        _refuse_equal(versions, "version", lambda version: version.number)
        _refuse_equal(versions, "effective_from", lambda version: version.effective_from)
        return cls(versions)

    def era_at(self, ran_at_ms: int) -> int:
        """Index of the version in force: -1 before the first."""
        return bisect_right(self.starts_ms, ran_at_ms) - 1

    def find(self, action: str, era: int) -> tuple[Version, Action] | None:
        """What prices a run of ``era``: the version in force; where that does not list the action, the newest
        earlier one that does; where there is none, the first later one.
        """
        backward = reversed(self.versions[: era + 1])
        forward = self.versions[era + 1 :]
        for version in (*backward, *forward):
            if found := version.actions.get(action):
                return version, found
        return None


def read_version(file: Path) -> Version:
    """One version from its TOML file; Problem naming file, action and field."""
    try:
        document = tomllib.loads(file.read_bytes().decode())
        wire = msgspec.convert(document, _WireVersion)
    except OSError as error:
        raise Problem(
            f"catalogue {file.name} cannot be read", error.strerror or str(error), f"Check the path {file}."
        ) from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise _wrong(file, f"it is not TOML ({error})") from error
    except msgspec.ValidationError as error:
        raise _wrong(file, _name_action(str(error), document)) from error
    if wire.effective_from.microsecond % 1000:
        raise _wrong(file, f"field `effective_from`: {wire.effective_from} is finer than a millisecond")
    actions: dict[str, Action] = {}
    for entry in wire.actions:
        if entry.id in actions:
            raise _wrong(file, f"action `{entry.id}`, field `id`: it stands there twice")
        actions[entry.id] = _action(file, entry)
    return Version(
        number=wire.version,
        effective_from=wire.effective_from.astimezone(UTC),
        content_hash=_content_hash(wire.effective_from.astimezone(UTC), actions),
        actions=actions,
        file=file.name,
    )


def _action(file: Path, entry: "_WireAction") -> Action:
    def wrong(field: str, why: str) -> Problem:
        return _wrong(file, f"action `{entry.id}`, field `{field}`: {why}")

    if isinstance(entry.price, float):
        raise wrong("price", f'write it as text, price = "{entry.price}": credits are never a float')
    if str(entry.price).startswith("-"):
        raise wrong("price", f"{entry.price} is negative")
    try:
        price = parse_credits(str(entry.price))
    except ValueError as error:
        raise wrong("price", str(error)) from error
    if price >= CREDITS_MAX:
        raise wrong("price", f"{entry.price} is not below 10^12 credits")
    free = entry.category in (Category.FORMATTER, Category.DESTINATION)
    if price and free:
        raise wrong("price", f"a {entry.category} is always free (R04), not {entry.price} credits")
    pool = POOL_OF_CATEGORY[entry.category] if price else Pool.NONE
    if entry.pool is not None and entry.pool != pool:
        raise wrong("pool", f"a {entry.category} priced {entry.price} draws from `{pool}`, not `{entry.pool}`")
    if entry.charges_no_data and not price:
        raise wrong("charges_no_data", "an action without a price cannot charge")
    return Action(
        id=entry.id,
        name=entry.name,
        category=entry.category,
        provider=entry.provider,
        price=price,
        pool=pool,
        charges_no_data=entry.charges_no_data,
    )


class _WireAction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: Identifier
    name: Identifier
    category: Category
    provider: Identifier
    price: str | int | float
    pool: Pool | None = None
    charges_no_data: bool = False


class _WireVersion(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    version: Annotated[int, Meta(ge=1, le=65_535)]
    effective_from: Instant
    actions: list[_WireAction]


def _wrong(file: Path, why: str) -> Problem:
    return Problem("catalogue refused", f"{file.name}: {why}", "Correct the file; nothing was loaded.")


def _name_action(message: str, document: dict[str, Any]) -> str:
    """Turn msgspec's ``$.actions[3].price`` into the action's id and its field."""
    place = re.search(r"\$\.actions\[(\d+)\](?:\.(\w+))?", message)
    if not place:
        return message
    entry = document["actions"][int(place[1])]
    unnamed = f"number {int(place[1]) + 1}"
    action = entry.get("id", unnamed) if isinstance(entry, dict) else unnamed
    missing = re.search(r"field `(\w+)`", message)
    field = place[2] or (missing[1] if missing else "?")
    return f"action `{action}`, field `{field}`: {message.split(' - at ')[0]}"


def _content_hash(effective_from: datetime, actions: dict[str, Action]) -> str:
    """What a version charges, and from when: comments, names, providers and the order of the file do not count."""
    charges = [
        (action.id, action.category, action.price, action.pool, action.charges_no_data)
        for _, action in sorted(actions.items())
    ]
    return hashlib.sha256(msgspec.json.encode((effective_from, charges))).hexdigest()


def _refuse_equal(versions: list[Version], field: str, key: Any) -> None:
    seen: dict[Any, str] = {}
    for version in versions:
        if (value := key(version)) in seen:
            raise Problem(
                "catalogue refused",
                f"{version.file}: field `{field}`: {value} is also that of {seen[value]}",
                "Versions are immutable: give the new one its own number and date.",
            )
        seen[value] = version.file
