"""Reversals that came before their run: dead letters that a worker sends again once the run is in the ledger."""

import asyncio
from collections.abc import Awaitable, Callable, Set
from typing import Any, Final

import structlog

from schemas.ledger import REDRIVE_HEADER
from sinks import dead_letters
from sinks.ledger import Chain
from streams.kafka.topics import ACCOUNT_EVENTS
from streams.unit import Unit

REDRIVE_EVERY_S: Final = 60.0
REDRIVEN_AT_ONCE: Final = 1_000

log: Final = structlog.get_logger()

LookUp = Callable[..., Awaitable[Any]]
"""A question of `sinks` and its arguments → the answer."""


async def keep_redriving(unit: Unit, look_up: LookUp, send: Callable[..., None]) -> None:
    """Look once a minute, for the unit's life; an incident ends it. ``send``: as `Publisher.send`."""
    sent: Set[str] = set()
    while True:
        await asyncio.sleep(REDRIVE_EVERY_S)
        if unit.incident:
            return
        sent = await redrive(unit.event_chain, sent, look_up, send)


async def redrive(chain: Chain, sent: Set[str], look_up: LookUp, send: Callable[..., None]) -> Set[str]:
    """Send the open letters that were not ``sent`` yet. Those that are on their way now: a closed one is forgotten."""
    letters = await look_up(dead_letters.redrivable, chain, REDRIVEN_AT_ONCE)
    for letter, key, value in letters:
        if letter not in sent:
            send(ACCOUNT_EVENTS, chain.partition, key, value, [(REDRIVE_HEADER, letter.encode())])
            log.info("redriven", letter=letter)
    return {letter for letter, _, _ in letters}
