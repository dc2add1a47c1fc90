"""The catalogue: what the example charges, what is refused, and which version prices a run."""

from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from schemas.catalogue import EXAMPLE_CATALOGUES, Action, Catalogue, Category, Version, read_version
from schemas.cell_run import EARLIEST_RAN_AT, to_milliseconds
from schemas.ledger import Pool
from schemas.problem import Problem

EXAMPLE: Final = Catalogue.load(EXAMPLE_CATALOGUES)
CONFORMANCE: Final = {
    "enrich_person": (Category.ENRICHMENT, 1000, Pool.ENRICHMENT, False),
    "find_work_email": (Category.ENRICHMENT, 2000, Pool.ENRICHMENT, False),
    "find_and_enrich_person_google": (Category.ENRICHMENT, 2000, Pool.ENRICHMENT, False),
    "google_keyword_search": (Category.ENRICHMENT, 1000, Pool.ENRICHMENT, True),
    "website_keyword_search": (Category.ENRICHMENT, 1000, Pool.ENRICHMENT, True),
    "job_role_count": (Category.ENRICHMENT, 1000, Pool.ENRICHMENT, True),
    "tech_stack": (Category.ENRICHMENT, 1000, Pool.ENRICHMENT, True),
    "clearbit_enrich_company": (Category.PREMIUM, 1000, Pool.PREMIUM, False),
    "format_date": (Category.FORMATTER, 0, Pool.NONE, False),
    "hubspot_send": (Category.DESTINATION, 0, Pool.NONE, False),
}
NAMED_BY_THE_RULES: Final = {
    "Enrich Company": Category.ENRICHMENT,
    "Find New Events": Category.ENRICHMENT,
    "Enrich LinkedIn": Category.ENRICHMENT,
    "People Data Labs": Category.PREMIUM,
    "Clearbit": Category.PREMIUM,
    "Owler": Category.PREMIUM,
    "Salesforce": Category.DESTINATION,
    "Outreach": Category.DESTINATION,
}
EVERY_VERSION: Final = pytest.mark.parametrize("version", EXAMPLE.versions, ids=lambda version: version.file)


def entry(id: str = "a", price: str = "1", category: str = "enrichment", more: str = "") -> str:
    return f'[[actions]]\nid = "{id}"\nname = "A"\ncategory = "{category}"\nprovider = "P"\nprice = {price}\n{more}\n'


def document(*entries: str, number: int = 1, since: str = "2026-01-01T00:00:00Z") -> str:
    return f"version = {number}\neffective_from = {since}\n" + "".join(entries or [entry()])


@EVERY_VERSION
@pytest.mark.parametrize("action", CONFORMANCE)
def test_the_example_prices_the_conformance_table(version: Version, action: str) -> None:
    found = version.actions[action]
    assert (found.category, found.price, found.pool, found.charges_no_data) == CONFORMANCE[action]


@EVERY_VERSION
@pytest.mark.parametrize("name", NAMED_BY_THE_RULES)
def test_the_example_holds_every_action_that_the_rules_name(version: Version, name: str) -> None:
    assert any(name in action.name and action.category == NAMED_BY_THE_RULES[name] for action in actions(version))


@EVERY_VERSION
def test_the_example_is_large_and_has_fractions_and_prices_of_zero(version: Version) -> None:
    assert len(version.actions) >= 50
    assert any(action.price % 1000 for action in actions(version))
    assert any(not action.price and action.category == Category.ENRICHMENT for action in actions(version))


@EVERY_VERSION
def test_r04_formatters_and_destinations_of_the_example_are_free(version: Version) -> None:
    free = [action for action in actions(version) if action.category in (Category.FORMATTER, Category.DESTINATION)]
    assert len(free) >= 10
    assert {(action.price, action.pool) for action in free} == {(0, Pool.NONE)}


@EVERY_VERSION
def test_r07_premium_actions_of_the_example_draw_from_the_premium_pool(version: Version) -> None:
    pools = {(action.category == Category.PREMIUM, action.pool) for action in actions(version) if action.price}
    assert pools == {(True, Pool.PREMIUM), (False, Pool.ENRICHMENT)}


def test_every_legal_run_has_a_version_of_the_example() -> None:
    assert EXAMPLE.versions[0].effective_from == EARLIEST_RAN_AT


def test_the_versions_of_the_example_differ() -> None:
    assert all(old.actions != new.actions for old, new in pairwise(EXAMPLE.versions))


@EVERY_VERSION
def test_the_example_says_that_it_is_one(version: Version) -> None:
    header = EXAMPLE_CATALOGUES.joinpath(version.file).read_text().split("version =")[0]
    assert "example" in header
    assert "none of it is anyone's real price list" in header


def actions(version: Version) -> list[Action]:
    return list(version.actions.values())


REFUSED: Final = {
    "two_actions_of_one_id": (document(entry("x"), entry("x", "2")), "action `x`", "`id`", "twice"),
    "negative_integer": (document(entry("x", "-1")), "action `x`", "`price`", "negative"),
    "negative_text": (document(entry("x", '"-0.5"')), "action `x`", "`price`", "negative"),
    "float": (document(entry("x", "0.5")), "action `x`", "`price`", 'price = "0.5"'),
    "whole_float": (document(entry("x", "1.0")), "action `x`", "`price`", "never a float"),
    "more_than_the_ledger_holds": (document(entry("x", '"1000000000000"')), "action `x`", "`price`", "below 10^12"),
    "four_decimals": (document(entry("x", '"0.1234"')), "action `x`", "`price`", "3 decimals"),
    "boolean_price": (document(entry("x", "true")), "action `x`", "`price`", "bool"),
    "r04_priced_formatter": (document(entry("x", "1", "formatter")), "action `x`", "`price`", "R04"),
    "r04_priced_destination": (document(entry("x", "1", "destination")), "action `x`", "`price`", "R04"),
    "r07_premium_from_enrichment": (
        document(entry("x", "1", "premium", 'pool = "enrichment"')), "action `x`", "`pool`", "draws from `premium`",
    ),
    "r09_free_action_charges": (
        document(entry("x", "0", more="charges_no_data = true")), "action `x`", "`charges_no_data`", "cannot charge",
    ),
    "unknown_category": (document(entry("x", "1", "gadget")), "action `x`", "`category`", "gadget"),
    "unknown_field": (document(entry("x", more="cost = 1")), "action `x`", "`cost`", "unknown"),
    "missing_price": (document(entry("x").replace("price = 1\n", "")), "action `x`", "`price`", "missing"),
    "missing_id": (document(entry(), entry().replace('id = "a"\n', "")), "action `number 2`", "`id`", "missing"),
    "no_table": ("actions = [7]\n" + document(" "), "action `number 1`", "Expected `object`", ""),
    "unknown_top_field": ("prices = 1\n" + document(), "prices", "unknown", ""),
    "missing_version": (document().replace("version = 1\n", ""), "`version`", "missing", ""),
    "version_0": (document(number=0), "$.version", ">= 1", ""),
    "local_time": (document(since="2026-01-01T00:00:00"), "$.effective_from", "timezone", ""),
    "microseconds": (document(since="2026-01-01T00:00:00.0005Z"), "`effective_from`", "millisecond", ""),
    "bad_toml": ("version = \n", "not TOML", "line 1", ""),
    "too_deep": ("version = " + "[" * 100_000, "not TOML", "recursion", ""),
    "not_utf8": (b"version = 1 # \xff", "not TOML", "utf-8", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_version_is_refused_by_file_action_and_field(case: str, tmp_path: Path) -> None:
    content, *named = REFUSED[case]
    file = tmp_path / "prices.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(Problem) as refusal:
        Catalogue.load(tmp_path)
    assert all(part in refusal.value.why for part in ["prices.toml", *named]), refusal.value.why


@pytest.mark.parametrize(
    ("second", "field"),
    [
        (document(number=2), "effective_from"),
        (document(number=2, since="2026-01-01T01:00:00+01:00"), "effective_from"),
        (document(since="2026-02-01T00:00:00Z"), "version"),
    ],
    ids=["one_date", "one_instant_in_two_zones", "one_number"],
)
def test_two_versions_that_contradict_are_refused_by_both_names(second: str, field: str, tmp_path: Path) -> None:
    tmp_path.joinpath("a.toml").write_text(document())
    tmp_path.joinpath("b.toml").write_text(second)
    with pytest.raises(Problem, match=rf"b\.toml: field `{field}`: .* that of a\.toml"):
        Catalogue.load(tmp_path)


def test_a_directory_without_a_catalogue_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"holds no \.toml file"):
        Catalogue.load(tmp_path)


def test_a_file_that_cannot_be_read_is_a_problem_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"prices\.toml cannot be read: No such file"):
        read_version(tmp_path / "prices.toml")


@pytest.mark.parametrize(("price", "millicredits"), [("2", 2000), ('"2"', 2000), ('"0.5"', 500), ('"0.001"', 1)])
def test_a_price_is_exact_in_millicredits(price: str, millicredits: int, tmp_path: Path) -> None:
    assert version_of(document(entry(price=price)), tmp_path).actions["a"].price == millicredits


def test_r04_an_action_priced_zero_draws_from_no_pool(tmp_path: Path) -> None:
    assert version_of(document(entry(price="0", category="premium")), tmp_path).actions["a"].pool == Pool.NONE


DAYS: Final = [datetime(2026, month, 1, tzinfo=UTC) for month in (1, 3, 5)]


@pytest.fixture
def three(tmp_path: Path) -> Catalogue:
    """Version 1 lists a and old, 2 lists a alone, 3 lists a and new; the files are not in the order of time."""
    listed = ["a", "old"], ["a"], ["a", "new"]
    for number, (day, ids) in enumerate(zip(DAYS, listed, strict=True), 1):
        content = document(*[entry(id, str(number)) for id in ids], number=number, since=f"{day:%Y-%m-%dT00:00:00Z}")
        tmp_path.joinpath(f"{9 - number}.toml").write_text(content)
    return Catalogue.load(tmp_path)


def pricing_version(catalogue: Catalogue, action: str, ran_at_ms: int) -> int | None:
    found = catalogue.find(action, catalogue.era_at(ran_at_ms))
    assert found is None or found[1].price == found[0].number * 1000
    return found and found[0].number


def test_a_version_is_in_force_from_its_first_millisecond(three: Catalogue) -> None:
    starts = [to_milliseconds(day) for day in DAYS]
    assert [three.era_at(start) for start in starts] == [0, 1, 2]
    assert [three.era_at(start - 1) for start in starts] == [-1, 0, 1]


@pytest.mark.parametrize(
    ("action", "month", "version"),
    [
        pytest.param("a", 1, 1, id="in_force"),
        pytest.param("a", 4, 2, id="in_force_later"),
        pytest.param("a", 12, 3, id="in_force_last"),
        pytest.param("old", 6, 1, id="newest_earlier"),
        pytest.param("new", 2, 3, id="first_later"),
        pytest.param("no_such", 2, None, id="none"),
    ],
)
def test_which_version_prices_a_run(three: Catalogue, action: str, month: int, version: int | None) -> None:
    """In force at `ran_at`; else the newest earlier version that lists the action; else the first later one."""
    assert pricing_version(three, action, to_milliseconds(datetime(2026, month, 2, tzinfo=UTC))) == version


def test_before_the_first_version_the_first_that_lists_the_action_prices_it(three: Catalogue) -> None:
    before = to_milliseconds(DAYS[0]) - 1
    assert [pricing_version(three, action, before) for action in ("a", "old", "new")] == [1, 1, 3]


def test_newest_earlier_beats_first_later(tmp_path: Path) -> None:
    """Listed in 1, 2 and 4, and version 3 is in force: 2 prices the run."""
    for number, id in enumerate(["x", "x", "y", "x"], 1):
        content = document(entry(id, str(number)), number=number, since=f"2026-0{number}-01T00:00:00Z")
        tmp_path.joinpath(f"{number}.toml").write_text(content)
    march = to_milliseconds(datetime(2026, 3, 15, tzinfo=UTC))
    assert pricing_version(Catalogue.load(tmp_path), "x", march) == 2


def version_of(content: str, tmp_path: Path) -> Version:
    file = tmp_path / "prices.toml"
    file.write_text(content)
    return read_version(file)


@pytest.mark.parametrize(
    "same",
    [
        document(entry("b", "2"), entry("a", "1")),
        "# a comment\n" + document(entry("a", '"1.000"'), entry("b", '"2"')),
        document(entry("a", "1"), entry("b", "2"), since="2026-01-01T02:00:00+02:00"),
        document(entry("a", "1", more='pool = "enrichment"'), entry("b", "2", more="charges_no_data = false")),
    ],
    ids=["order", "comment_and_spelling", "time_zone", "defaults_written_out"],
)
def test_the_content_hash_ignores_what_charges_nothing(same: str, tmp_path: Path) -> None:
    first = version_of(document(entry("a", "1"), entry("b", "2")), tmp_path)
    assert version_of(same, tmp_path).content_hash == first.content_hash


@pytest.mark.parametrize(
    "other",
    [
        document(entry(price='"1.001"')),
        document(since="2026-01-01T00:00:00.001Z"),
        document(entry(category="premium")),
        document(entry(more="charges_no_data = true")),
        document(entry(), entry("b")),
        document(entry("b")),
    ],
    ids=["price", "date", "category", "charges_no_data", "added", "renamed"],
)
def test_the_content_hash_tells_what_charges_otherwise(other: str, tmp_path: Path) -> None:
    """A worker refuses a version that changed after its first use, and knows it by this hash."""
    assert version_of(other, tmp_path).content_hash != version_of(document(), tmp_path).content_hash
