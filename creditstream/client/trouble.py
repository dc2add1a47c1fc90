"""What keeps a client's thread from its work: said, survived, and known until it is over."""

import logging
from types import TracebackType
from typing import Final

from confluent_kafka import KafkaError, KafkaException

_log: Final = logging.getLogger("creditstream.client")


class Trouble:
    """As a context it ends a turn of a thread, and never the thread: without it everything would wait, and nobody
    would hear why.

    That Kafka or the disk says no is to be expected: of a row of such troubles the first is logged, an outage has many.
    All else is a defect: logged with its traceback, and again only when it is another one.
    """

    def __init__(self, what: str) -> None:
        self.reason = ""
        """Empty while all is well."""
        self.noted = 0
        """How often something was noted."""
        self._what: Final = what
        self._defect = ""

    def note(self, error: object) -> None:
        """Something that was to be expected."""
        if isinstance(error, KafkaException):
            error = error.args[0]
        reason = error.str() if isinstance(error, KafkaError) else str(error)
        self.noted += 1
        if not self.reason:
            _log.warning("%s: %s", self._what, reason)
        self.reason = reason

    def end(self) -> None:
        """All is well."""
        self.reason = ""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> bool:
        if isinstance(error, KafkaException | OSError):
            self.note(error)
        elif isinstance(error, Exception):
            self._note_defect(error)
        return isinstance(error, Exception)

    def _note_defect(self, error: Exception) -> None:
        defect = repr(error)
        if defect != self._defect:
            _log.error("%s: a defect, please report it; it is tried again", self._what, exc_info=error)
        self._defect = self.reason = defect
