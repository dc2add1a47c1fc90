"""Asks the database again when it does not answer; whoever waits for the answer waits meanwhile."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from sinks.clickhouse import DatabaseError, first_line

TROUBLE_WAIT_S: Final = 1.0

T = TypeVar("T")


async def patiently(
    ask: Callable[[], Awaitable[T]], on_trouble: Callable[[str], None], whose: str = "", s_max: float = math.inf
) -> T:
    """The answer. ``on_trouble`` hears what the database said, prefixed by ``whose``; then "", once it has answered or
    the caller has given up.

    DatabaseError when it has not answered for longer than ``s_max`` seconds.
    """
    clock = asyncio.get_running_loop().time
    closing, had_trouble = clock() + s_max, False
    try:
        while True:
            try:
                return await ask()
            except DatabaseError as error:
                if clock() > closing:
                    raise
                had_trouble = True
                on_trouble(f"{whose}{first_line(error)}")
                await asyncio.sleep(TROUBLE_WAIT_S)
    finally:
        if had_trouble:
            on_trouble("")
