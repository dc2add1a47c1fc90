"""One checked-in example for each dead-letter reason: the records that provoke it (see ``examples/dead-letters``)."""

import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from string import Template
from typing import Final

import msgspec

from schemas.ledger import Reason
from streams.kafka.topics import CELL_RUNS

DIRECTORY: Final = Path(__file__).parent / "examples" / "dead-letters"
RECORDED_AT: Final = datetime(2026, 11, 22, 12, tzinfo=UTC)


class DeadLetterExample(msgspec.Struct, frozen=True):
    """``events`` are (key, value) of ``topic`` in Kafka's order; the last is the dead letter, those before it stand."""

    reason: Reason
    detail: str
    """A part of the message that the dead letter must carry."""
    events: tuple[tuple[bytes, bytes], ...]
    topic: str


class _Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    value: str
    """JSON, where ``${ran_at}`` stands for a time; so may a plan's ``effective_at``."""
    ran_before_recorded_s: int = 1
    padded_to_bytes: int = 0


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: Reason
    detail: str
    events: list[_Event]
    topic: str = CELL_RUNS


def dead_letter_examples() -> list[DeadLetterExample]:
    """All examples, in the order of the reasons."""
    files = [msgspec.convert(tomllib.loads(file.read_text()), _File) for file in DIRECTORY.glob("*.toml")]
    examples = [
        DeadLetterExample(file.reason, file.detail, tuple(map(_record, file.events)), file.topic) for file in files
    ]
    return sorted(examples, key=lambda example: list(Reason).index(example.reason))


def _record(event: _Event) -> tuple[bytes, bytes]:
    ran_at = RECORDED_AT - timedelta(seconds=event.ran_before_recorded_s)
    value = Template(event.value).substitute(ran_at=ran_at.isoformat())
    return event.key.encode(), value.encode().ljust(event.padded_to_bytes)
