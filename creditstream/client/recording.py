"""What recording a cell run means, for the producer and for its double in tests."""

from typing import Literal

import msgspec

from schemas.cell_run import CellRun
from schemas.codec import decode_run, encode_run, name_field
from schemas.problem import Problem

OnFull = Literal["spool", "block", "raise"]
"""What becomes of a run that Kafka cannot take now, and for which memory has no room."""


class RunRefused(Problem):
    """A run that was not accepted. It may be recorded again under the same run id: a copy is never charged twice."""


class InvalidRun(RunRefused):
    """A run that would become a dead letter; recording it again cannot help."""


def refused_by_closed() -> RunRefused:
    """The refusal of every run after `close`."""
    return RunRefused("the run was not recorded", "the producer is closed", "Record before closing it.")


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the runs of this process so far, and what waits now."""

    accepted: int = 0
    """`record` returned."""
    refused: int = 0
    """`record` raised."""
    delivered: int = 0
    """Acknowledged by Kafka, adopted ones and repetitions too."""
    spooled: int = 0
    """Written to the spool."""
    adopted: int = 0
    """Found in the spools of dead processes."""
    waiting_in_memory: int = 0
    """Handed to librdkafka and not acknowledged. Those that are not in the spool as well are lost by a ``kill -9``."""
    waiting_in_spool: int = 0
    """On disk, and not yet handed over; after `close` others take it over, and it is not counted here."""
    spool_bytes: int = 0
    unreadable_segments: int = 0
    """Files of the spool that could not be read when that was last tried: their runs wait. The log names them."""


def valid_value(run: CellRun) -> bytes:
    """The run as its Kafka value. InvalidRun, naming the field, for what the meter would not accept.

    The meter's own decoder decides, and before it the types: JSON makes a text of bytes or a UUID, too, which would be
    another one than the Kafka key. No run that it accepts is too large (`MAX_EVENT_BYTES`). Whether one is too old or
    lies in the future is for the broker's clock to say.
    """
    try:
        if not isinstance(run, CellRun):
            raise TypeError(f"it is not a CellRun but {run!r:.80}")
        msgspec.convert(msgspec.structs.asdict(run), CellRun)
        value = encode_run(run)
        decode_run(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRun("the run was not recorded", name_field(str(error)), "Correct the run.") from error
    return value
