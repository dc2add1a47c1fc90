"""creditstream: meters cell runs into an exactly-once credit ledger."""

__version__ = "0.1.0"
