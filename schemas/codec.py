"""JSON of what crosses a boundary."""

import msgspec

from schemas.cell_run import CellRun

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(CellRun).decode


def encode_run(run: CellRun) -> bytes:
    """The value of a Kafka record of ``cell-runs``."""
    return _encode(run)


def decode_run(value: bytes) -> CellRun:
    """A cell run; msgspec.ValidationError or msgspec.DecodeError naming the field."""
    return _decode(value)
