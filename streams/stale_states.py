"""Finds stale states on `limit-states`, and has the units of this worker answer them.

Nothing fences a topic: a worker that was paused, and has lost its partitions, may publish what it knew when it wakes.
The owner sees such a state and answers it with its own. Of states from before there was an owner, those are stale that
lie behind one which rests on more.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import msgspec
import structlog
from confluent_kafka import Consumer, TopicPartition

from schemas.ledger import Pool
from schemas.limits import AsOf
from streams.kafka.connection import librdkafka
from streams.kafka.topics import LIMIT_STATES, LogRange, arrived, position_of
from streams.recovery import LOADED_AT_ONCE
from streams.rules.balances import Key
from streams.settings import Settings
from streams.unit import Unit

POLL_S: Final = 0.2
MESSAGES_AT_ONCE: Final = 500
RECORDS_BEFORE: Final = 2_000
"""How many records from before its assignment are looked at in each partition."""

log: Final = structlog.get_logger()


class Heard(msgspec.Struct, frozen=True):
    """What of a state on the topic tells whether it is stale."""

    workspace_id: str
    pool: Pool
    owner: str
    as_of: AsOf


_decode: Final = msgspec.json.Decoder(Heard).decode
_NO_STATE: Final = (ValueError, RecursionError)
"""Bytes may be no JSON, no text, or nested too deeply."""


class Follower:
    """One thread per worker. ``hear`` (partition, states that may be stale, whoever wrote them) is called in it."""

    def __init__(self, settings: Settings, hear: Callable[[int, list[Heard]], None]) -> None:
        self._topic = settings.topic(LIMIT_STATES)
        self._hear = hear
        self._closing = threading.Event()
        self._wanted: dict[int, LogRange] = {}
        self._newest: dict[int, AsOf] = {}
        self._consumer = Consumer(
            librdkafka(settings)
            | {
                "group.id": f"{settings.topic_prefix}creditstream-states",
                "enable.auto.commit": False,
                "auto.offset.reset": "latest",
                "fetch.queue.backoff.ms": 5,
                "queued.max.messages.kbytes": 4096,
                "log_level": 0,
            }
        )
        self._thread = threading.Thread(target=self._follow, name="states-follower", daemon=True)
        self._thread.start()

    def follow(self, logs: Mapping[int, LogRange]) -> None:
        """From now on these partitions, whose logs had this range at their assignment."""
        self._wanted = dict(logs)

    def close(self) -> None:
        """Stop."""
        self._closing.set()
        self._thread.join()
        self._consumer.close()

    def _follow(self) -> None:
        followed: dict[int, LogRange] = {}
        while not self._closing.is_set():
            if (wanted := self._wanted) is not followed:
                followed = wanted
                self._newest.clear()
                begin = {partition: max(log.start, log.end - RECORDS_BEFORE) for partition, log in wanted.items()}
                self._consumer.assign([TopicPartition(self._topic, *place) for place in begin.items()])
            if not followed:
                self._closing.wait(POLL_S)
                continue
            heard: dict[int, list[Heard]] = {}
            for message in arrived(self._consumer, POLL_S, MESSAGES_AT_ONCE):
                if message.error() or not (value := message.value()):
                    continue
                place = position_of(message)
                if place.partition not in followed:
                    continue
                try:
                    state = _decode(value)
                except _NO_STATE:
                    continue  # not ours: nothing to answer
                if self._is_out_of_order(place.partition, state.as_of) or place.offset >= followed[place.partition].end:
                    heard.setdefault(place.partition, []).append(state)
            for partition, states in heard.items():
                self._hear(partition, states)

    def _is_out_of_order(self, partition: int, as_of: AsOf) -> bool:
        """Whether a state before it rests on more: states of owners in turn rest on more and more."""
        newest = self._newest.get(partition)
        if newest and as_of.is_older_than(newest):
            return True
        self._newest[partition] = as_of
        return False


def foreign_to(owner: str, states: Sequence[Heard]) -> dict[Key, AsOf]:
    """Those of the states that another owner wrote, by key."""
    return {(state.workspace_id, state.pool): state.as_of for state in states if state.owner != owner}


def answer(unit: Unit, foreign: Mapping[Key, AsOf]) -> None:
    """Have the unit answer states of another owner that are older than what it knows. One that is not older yet is kept
    in mind until the unit is past it: it may rest on more runs and on fewer account events.
    """
    if foreign and not unit.voice.unanswered:
        unit.chores.append(_answer)
    unit.voice.unanswered |= foreign


async def _answer(unit: Unit) -> None:
    """A chore, some states at a time, in the unit's sequence as long as there is anything to answer."""
    now, heard = unit.voice.as_of(unit.balances, unit.folded), dict(unit.voice.unanswered)
    stale = [key for key, as_of in heard.items() if as_of.is_older_than(now)][:LOADED_AT_ONCE]
    if stale:
        await unit.load([name for name, _ in stale])  # when it is released meanwhile, they are still unanswered
        unit.balances.urgent |= dict.fromkeys(stale)
        unit.voice.tell(unit.balances, unit.folded, [])
        log.info("stale_states_answered", chain=str(unit.chain), states=len(stale))
    over = {*stale, *(key for key, as_of in heard.items() if as_of == now or as_of.log != now.log)}
    left = unit.voice.unanswered.items()
    unit.voice.unanswered = {key: as_of for key, as_of in left if key not in over or as_of != heard.get(key)}
    if unit.voice.unanswered:
        unit.chores.append(_answer)
