"""What a client must do when its process forks, as pre-fork servers and `multiprocessing` do.

Threads do not survive a fork, locks may stay taken for ever, and a Kafka handle of the parent cannot be used, nor even
destroyed, in the child: librdkafka would wait for threads that are not there.

One lock is not ours to make anew: while a thread of the parent resolves a host name, as librdkafka does when it
connects, glibc holds one (`check_pf.c`) that a fork leaves taken, and whoever resolves a name in that child waits for
ever.
"""

import ctypes
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Protocol
from weakref import WeakSet

from creditstream.client.flag import Flag

CONNECT_S: Final = 0.1
"""A fork waits until the youngest client is as old: its first connections are made by then, and names resolved."""
RESOLVE_S_MAX: Final = 2.0
RETRY_S: Final = 0.25
STUCK: Final = (
    "this process was forked while its parent resolved a host name, and glibc resolves no more names in it: "
    "end it and fork again, or make the client after the fork"
)


class Forked(Protocol):
    """Something that must be made anew in a child."""

    def after_fork(self) -> None:
        """Called in the child, before anything else runs there."""


_living: WeakSet[Any] = WeakSet()
_youngest_s = 0.0
_is_child = False


def survive_forks(client: Forked) -> None:
    """Have `after_fork` called in every child, for as long as the object lives."""
    global _youngest_s
    _youngest_s = time.monotonic()
    _living.add(client)


def abandon(handle: object) -> None:
    """Never destroy this object: in a forked child, destroying a Kafka handle hangs the end of the process."""
    if handle is not None:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(handle))


def await_resolver(enough: Flag, on_stuck: Callable[[str], None]) -> None:
    """In a forked child, return once names are resolved, or told `enough`; `on_stuck` hears why it takes for ever."""
    if not _is_child:
        return
    probe = threading.Thread(target=_resolve, name="creditstream-resolver", daemon=True)
    probe.start()
    probe.join(RESOLVE_S_MAX)
    if probe.is_alive():
        on_stuck(STUCK)
    while probe.is_alive() and not enough.is_set:  # a machine that stood still for so long has no lock taken
        enough.wait(RETRY_S)


def _resolve() -> None:
    with suppress(OSError):  # an answer, too
        socket.getaddrinfo(b"127.0.0.1", 0, flags=socket.AI_ADDRCONFIG)


def _before_fork() -> None:
    if _living:
        time.sleep(max(_youngest_s + CONNECT_S - time.monotonic(), 0))


def _in_child() -> None:
    global _is_child
    _is_child = True
    for client in tuple(_living):
        client.after_fork()


os.register_at_fork(before=_before_fork, after_in_child=_in_child)
