"""What a client must do when its process forks, as pre-fork servers and `multiprocessing` do.

Threads do not survive a fork, locks may stay taken for ever, and a Kafka handle of the parent cannot be used, nor even
destroyed, in the child: librdkafka would wait for threads that are not there.
"""

import ctypes
import os
from typing import Any, Protocol
from weakref import WeakSet


class Forked(Protocol):
    """Something that must be made anew in a child."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


_living: WeakSet[Any] = WeakSet()


def survive_forks(client: Forked) -> None:
    """Have `after_fork` called in every child, for as long as the object lives."""
    _living.add(client)


def abandon(handle: object) -> None:
    """Never destroy this object: in a forked child, destroying a Kafka handle hangs the end of the process."""
    if handle is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def _in_child() -> None:
    for client in tuple(_living):
        client.after_fork()


os.register_at_fork(after_in_child=_in_child)
