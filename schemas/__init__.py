"""What crosses a boundary: events, ledger words, catalogue, answers. Imports stdlib, msgspec and orjson only."""
