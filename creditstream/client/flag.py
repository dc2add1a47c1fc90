"""What one thread of a client sets and another one waits for."""

from contextlib import suppress
from queue import Empty, SimpleQueue


class Flag:
    """As `threading.Event`, but that a signal may come in the middle of any call: its handler may set the flag, too, or
    raise. The lock of an `Event` would stay taken, and whoever touched it next would wait for ever.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._wakes: SimpleQueue[None] = SimpleQueue()

    def set(self) -> None:
        """Wake whoever waits, and who will."""
        if not self.is_set:
            self.is_set = True
            self._wakes.put(None)

    def clear(self) -> None:
        """Begin anew."""
        self.is_set = False
        with suppress(Empty):
            while True:
                self._wakes.get_nowait()

    def wait(self, timeout_s: float) -> bool:
        """Whether it is set by then."""
        if not self.is_set:
            with suppress(Empty):
                self._wakes.get(timeout=timeout_s)
            if self.is_set:
                self._wakes.put(None)  # there may be others who wait
        return self.is_set
