"""What crosses a boundary: events, ledger words, catalogue, answers. Imports stdlib and msgspec only."""
