"""When a delivery is tried again, and when it is over. Pure: the clock and chance are arguments."""

from http import HTTPStatus
from typing import Final, NamedTuple

import msgspec
from msgspec.structs import replace

from schemas.webhook import Delivery, DeliveryState

_MINUTE, _HOUR = 60, 3600
DELAYS_S: Final = (
    0, 5, 5 * _MINUTE, 30 * _MINUTE, 2 * _HOUR, 5 * _HOUR, 10 * _HOUR, 14 * _HOUR, 20 * _HOUR, 24 * _HOUR,
)  # fmt: skip
"""Before each attempt, from the end of the one before it: those of Standard Webhooks; 75.6 hours in all."""

JITTER: Final = 5
"""A delay is longer by chance, by up to one part in so many: receivers that were down are not all asked at once."""

RETRY_AFTER_S_MAX: Final = DELAYS_S[-1]
"""What a receiver may ask for (`sending`)."""
BUSY_S: Final = 5
"""How long an endpoint that is overloaded is left alone when it does not say."""

OVERLOADED: Final = frozenset(
    {
        HTTPStatus.TOO_MANY_REQUESTS,
        HTTPStatus.BAD_GATEWAY,
        HTTPStatus.SERVICE_UNAVAILABLE,
        HTTPStatus.GATEWAY_TIMEOUT,
    }
)


class Answer(NamedTuple):
    """What came of one attempt. ``status`` 0: no HTTP answer; ``said`` and ``fix`` are for people, without secrets."""

    status: int
    said: str
    fix: str = ""
    retry_after_s: int | None = None
    took_ms: int = 0

    @property
    def is_success(self) -> bool:
        """2xx, and nothing else."""
        return 200 <= self.status < 300

    @property
    def is_gone(self) -> bool:
        """The receiver wants no more of them."""
        return self.status == HTTPStatus.GONE

    @property
    def leave_alone_s(self) -> int:
        """For how long nothing should be sent to this endpoint."""
        if self.status in OVERLOADED:
            return self.retry_after_s or BUSY_S
        return 0


def after(delivery: Delivery, answer: Answer, now_ms: int, chance: int) -> Delivery:
    """The delivery after one more attempt that ended at ``now_ms``. ``chance`` is any non-negative number."""
    tried = replace(delivery, attempts=delivery.attempts + 1, said=answer.said)
    if answer.is_success:
        return replace(tried, state=DeliveryState.DELIVERED, next_at_ms=0, ended_at_ms=now_ms, alert=msgspec.UNSET)
    if answer.is_gone or tried.attempts == len(DELAYS_S):
        return give_up(tried, answer.said, now_ms)
    delay_ms = DELAYS_S[tried.attempts] * 1000
    delay_ms += chance % (delay_ms // JITTER + 1)
    wait_ms = max(delay_ms, (answer.retry_after_s or 0) * 1000)
    return replace(tried, next_at_ms=now_ms + wait_ms)


def give_up(delivery: Delivery, why: str, now_ms: int) -> Delivery:
    """The delivery when no further attempt is made, since there is nobody any more to send it to, say."""
    return replace(delivery, state=DeliveryState.FAILED, next_at_ms=0, ended_at_ms=now_ms, said=why)
