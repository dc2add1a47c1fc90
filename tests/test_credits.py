"""Credits are exact: text with at most 3 decimals outside, integer thousandths inside, nothing rounded on the way."""

from decimal import Decimal, localcontext

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.credits import format_credits, group_credits, parse_credits

MAX_MILLICREDITS = 10**18 - 1
"""What the ledger's Decimal(18, 3) holds."""
amounts = st.integers(-MAX_MILLICREDITS, MAX_MILLICREDITS)


@given(amounts)
def test_format_then_parse_gives_the_same_amount(millicredits: int) -> None:
    assert parse_credits(format_credits(millicredits)) == millicredits


@given(amounts)
def test_text_is_the_exact_decimal_value(millicredits: int) -> None:
    assert Decimal(format_credits(millicredits)) * 1000 == millicredits


@given(st.decimals(-(10**14), 10**14, places=3))
def test_parse_is_exact_whatever_the_decimal_context(amount: Decimal) -> None:
    """An application that computes with few digits must not change what a run costs."""
    with localcontext(prec=3):
        parsed = parse_credits(f"{amount:f}")
    assert parsed == int(amount * 1000)


@given(st.lists(st.sampled_from(["0.1", "0.2", "0.7", "1", "2"]), max_size=50))
def test_r12_a_thousand_runs_cost_a_thousand_times_one_run(prices: list[str]) -> None:
    """Sums have no rounding error: 0.1 + 0.2 is 0.3."""
    assert Decimal(format_credits(1000 * sum(map(parse_credits, prices)))) == 1000 * sum(map(Decimal, prices))


@pytest.mark.parametrize(
    ("text", "millicredits"),
    [("2", 2000), ("0.5", 500), ("-1.250", -1250), ("-0.001", -1), ("007", 7000), ("-0", 0), ("0.100", 100)],
)
def test_parse(text: str, millicredits: int) -> None:
    assert parse_credits(text) == millicredits


@pytest.mark.parametrize(
    "text",
    ["", " 1", "1\n", "+1", "1.", ".5", "1.2345", "1e3", "1,000", "NaN", "1_000", "٢", "1.٥", "--1", "1" * 16],
)
def test_any_other_shape_is_refused_and_named(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of credits") as refusal:
        parse_credits(text)
    assert repr(text) in str(refusal.value)


def test_the_largest_amount_is_what_the_ledger_holds() -> None:
    """Decimal(18, 3) on both sides of zero."""
    assert parse_credits("9" * 15 + ".999") == MAX_MILLICREDITS
    assert format_credits(-MAX_MILLICREDITS) == "-" + "9" * 15 + ".999"


@given(amounts)
def test_grouping_only_adds_commas(millicredits: int) -> None:
    assert group_credits(millicredits).replace(",", "") == format_credits(millicredits)


@pytest.mark.parametrize(
    ("millicredits", "text"),
    [(19_998_000, "19,998"), (-1_000_500, "-1,000.5"), (-500, "-0.5"), (0, "0"), (999_999, "999.999")],
)
def test_grouping(millicredits: int, text: str) -> None:
    assert group_credits(millicredits) == text
