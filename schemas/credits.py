"""Credits: what a workspace spends. Decimal with at most 3 places outside, integer thousandths inside.

``Millicredits`` is the only form in which the program computes; text is the only form that leaves it.
No float is accepted anywhere: 0.1 + 0.2 credits are 0.3 credits.
"""

import re
from decimal import Decimal

Millicredits = int
"""Thousandths of a credit, signed."""

PER_CREDIT = 1000
CREDITS_MAX = 10**12 * PER_CREDIT
"""One row's credits are below this, in millicredits: the ledger's Decimal(18, 3) times 1000 must still be one."""

_SHAPE = re.compile(r"(-?[0-9]{1,15})(?:\.([0-9]{1,3}))?")


def parse_credits(text: str) -> Millicredits:
    """``"2"``, ``"0.5"``, ``"-1.250"`` in credits; ValueError for any other shape, so nothing is ever rounded."""
    shape = _SHAPE.fullmatch(text)
    if not shape:
        raise ValueError(f"{text!r} is not a number of credits with at most 3 decimals")
    whole, decimals = shape.groups(default="")
    return int(f"{whole}{decimals:0<3}")


def millicredits_of(amount: Decimal) -> Millicredits:
    """Of what the ledger gives: credits with 3 decimals."""
    return int(amount.scaleb(3))


def format_credits(millicredits: Millicredits) -> str:
    """Credits without trailing zeros: ``2000`` is ``"2"``, ``500`` is ``"0.5"``."""
    sign = "-" if millicredits < 0 else ""
    whole, thousandths = divmod(abs(millicredits), PER_CREDIT)
    return f"{sign}{whole}" if not thousandths else f"{sign}{whole}.{thousandths:03d}".rstrip("0")


def group_credits(millicredits: Millicredits) -> str:
    """The same for a person's eye: ``"19,998"``."""
    sign = "-" if millicredits < 0 else ""
    whole, dot, decimals = format_credits(abs(millicredits)).partition(".")
    return f"{sign}{int(whole):,}{dot}{decimals}"
