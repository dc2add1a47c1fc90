"""JSON of what crosses a boundary."""

import re
from datetime import datetime
from enum import EnumType
from typing import Any, Final, Literal, get_args, get_origin

import msgspec

from schemas.account import AccountEvent
from schemas.cell_run import CellRun
from schemas.webhook import EndpointEntry

_FINER_THAN_MICROSECONDS: Final = re.compile(r"(\.[0-9]{6})[0-9]+")


_LastOf: Any = msgspec.defstruct(
    "_LastOf", [(name, msgspec.Raw | msgspec.UnsetType, msgspec.UNSET) for name in CellRun.__struct_fields__]
)
_encode: Final = msgspec.json.Encoder().encode
_decode: Final = msgspec.json.Decoder(CellRun).decode
_decode_text: Final = msgspec.json.Decoder(str).decode
_last_of: Final = msgspec.json.Decoder(_LastOf).decode
_decode_account: Final = msgspec.json.Decoder(AccountEvent).decode
_fields_of: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def encode_run(run: CellRun) -> bytes:
    """The value of a Kafka record of ``cell-runs``."""
    return _encode(run)


def decode_run(value: bytes) -> CellRun:
    """A cell run; msgspec.DecodeError, a ValueError, for all else, naming the field where there is one.

    msgspec rounds a time that is finer than microseconds, and the last 500 ns of a month would be billed to the next:
    the rule is truncation, so such a time is cut here. Of a field that stands there twice the last one counts, as
    nearly everywhere in JSON, whatever the others hold.
    """
    try:
        fields = _last_of(value)
        run = _decode(_encode(fields))
        text = _decode_text(fields.ran_at)
        if not _FINER_THAN_MICROSECONDS.search(text):
            return run
        truncated = msgspec.convert(_FINER_THAN_MICROSECONDS.sub(r"\1", text), datetime)
        return msgspec.structs.replace(run, ran_at=truncated)
    except msgspec.DecodeError:
        raise
    except RecursionError as error:
        raise msgspec.DecodeError("JSON is nested too deeply") from error
    except ValueError as error:
        raise msgspec.DecodeError(str(error)) from error


def encode_account_event(event: AccountEvent) -> bytes:
    """The value of a Kafka record of ``account-events``."""
    return _encode(event)


def decode_account_event(value: bytes) -> AccountEvent:
    """An account event; msgspec.DecodeError for all else, naming the field. Times are cut as `decode_run` cuts them."""
    try:
        fields = _fields_of(value)
        time = msgspec.json.decode(fields.get("effective_at", b"null"))
        if isinstance(time, str):
            fields["effective_at"] = msgspec.Raw(_encode(_FINER_THAN_MICROSECONDS.sub(r"\1", time)))
        event: AccountEvent = _decode_account(_encode(fields))
        return event
    except msgspec.DecodeError:
        raise
    except RecursionError as error:
        raise msgspec.DecodeError("JSON is nested too deeply") from error
    except ValueError as error:
        raise msgspec.DecodeError(str(error)) from error


def choices(annotation: object) -> tuple[str, ...]:
    """The words that a type takes, or what it holds: an enum's, a Literal's. None where others are right, too."""
    if isinstance(annotation, EnumType):
        return tuple(map(str, annotation))
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return tuple(map(str, parts))
    return next((words for part in parts if (words := choices(part))), ())


def with_choices(message: str, words: tuple[str, ...]) -> str:
    """msgspec's message on a word that is none of these, with them."""
    return f"{message}; it takes {', '.join(words)}" if message.startswith("Invalid enum value") else message


_CHOICES: Final = {
    field.name: choices(field.type) for kind in (CellRun, EndpointEntry) for field in msgspec.structs.fields(kind)
}


def name_field(message: str) -> str:
    """msgspec's message with the field in front: ``field `ran_at`: ...``."""
    why, _, place = message.partition(" - at `$.")
    if not place:
        return message
    field = place.rstrip("`")
    return f"field `{field}`: {with_choices(why, _CHOICES.get(field.partition('[')[0], ()))}"
