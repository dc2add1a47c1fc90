"""What an action costs before it is run (R13): the picture beside an action in the product. Pure."""

from schemas.answers import Price
from schemas.catalogue import Action, Catalogue, Version
from schemas.credits import format_credits
from schemas.problem import UnknownId


def prices(catalogue: Catalogue, now_ms: int) -> list[Price]:
    """Every action of the version in force at ``now_ms`` (Unix ms), by id."""
    version = catalogue.versions[max(0, catalogue.era_at(now_ms))]
    return [_price(version, action, own_api_key=False) for _, action in sorted(version.actions.items())]


def price_of(catalogue: Catalogue, action: str, now_ms: int, own_api_key: bool) -> Price:
    """One action at ``now_ms``: 0 credits for free actions and with an own key. UnknownId when no version lists it."""
    found = catalogue.find(action, catalogue.era_at(now_ms))
    if not found:
        raise UnknownId(f"no action {action!r} in the catalogue", "", "See `creditstream rules list`.")
    return _price(*found, own_api_key=own_api_key)


def _price(version: Version, action: Action, *, own_api_key: bool) -> Price:
    return Price(
        action=action.id,
        name=action.name,
        category=action.category,
        provider=action.provider,
        price=format_credits(action.price),
        pool=action.pool,
        charges_no_data=action.charges_no_data,
        credits=format_credits(0 if own_api_key else action.price),
        catalogue=version.number,
        effective_from=version.effective_from,
    )
