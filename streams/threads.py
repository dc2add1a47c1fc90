"""The threads in which a worker asks the ledger, each with a connection of its own.

Who waits for an answer decides which thread it is asked in: ``writer`` inserts and reads marks, ``reader`` answers the
units in their sequence, ``aside`` what no unit waits for, ``answers`` people, ``notes`` writes down alerts.
"""

import asyncio
import functools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Concatenate, Final, Literal, ParamSpec, TypeVar, get_args

import structlog
from clickhouse_connect.driver.client import Client

from sinks.clickhouse import connect
from streams.patience import patiently

P = ParamSpec("P")
T = TypeVar("T")
Name = Literal["writer", "reader", "aside", "answers", "notes"]
NAMES: Final[tuple[Name, ...]] = get_args(Name)
STEPPED_BACK: Final = 10
"""The nice value of threads that wait behind others."""

log: Final = structlog.get_logger()


class Threads:
    """Of one worker. They exist before `open` connects them, so that a worker that was refused can wait for them."""

    def __init__(self) -> None:
        self.troubles: dict[Any, str] = {}
        """What the ledger says, by who asks it, while it does not take what it is given or answer."""
        self._pools = {
            name: ThreadPoolExecutor(1, f"meter-{name}", None if name == "reader" else _step_back) for name in NAMES
        }
        self._clients: dict[Name, Client] = {}

    def open(self, url: str, password: str, prepare: Callable[[Client], None]) -> Client:
        """The writer's connection, prepared. Blocking. In the writer's thread: an engine in this process has its
        threads from there, and they too step back.
        """

        def connect_all() -> Client:
            self._clients.update((name, connect(url, password)) for name in NAMES)
            prepare(self._clients["writer"])
            return self._clients["writer"]

        return self._pools["writer"].submit(connect_all).result()

    async def run(self, name: Name, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """``function(*args, **named)`` in a thread."""
        call = functools.partial(function, *args, **named)
        return await asyncio.get_running_loop().run_in_executor(self._pools[name], call)

    async def ask(
        self, name: Name, question: Callable[Concatenate[Client, P], T], *args: P.args, **named: P.kwargs
    ) -> T:
        """``question(client, *args, **named)`` in a thread, with its connection. DatabaseError as it comes."""
        return await self.run(name, question, self._clients[name], *args, **named)

    async def ask_patiently(
        self, name: Name, question: Callable[Concatenate[Client, P], T], *args: P.args, **named: P.kwargs
    ) -> T:
        """Ask until the database answers, as an insert waits for it: waiting is the back-pressure."""
        ask = functools.partial(self.ask, name, question, *args, **named)
        return await patiently(ask, functools.partial(self.on_trouble, name))

    def on_trouble(self, who: Any, what: str) -> None:
        """Keep and log what the ledger said to ``who``; "" when it is through."""
        self.troubles.pop(who, None)
        if what:
            self.troubles[who] = what
            log.warning("ledger_trouble", what=what)

    def close(self) -> None:
        """Wait for what they do, and let go of the connections."""
        for pool in self._pools.values():
            pool.shutdown()
        for client in self._clients.values():
            client.close()


def _step_back() -> None:
    """Let threads go first that runs, alerts and look-ups wait for: nobody waits for an insert. Linux only, where a
    thread has a priority of its own.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), STEPPED_BACK)
