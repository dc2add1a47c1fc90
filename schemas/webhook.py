"""Webhooks: the file that names the receivers, the body that they get, the record of each delivery.

Signed after Standard Webhooks 1.0. A delivery is one alert for one endpoint; its newest record stands on the compacted
topic ``webhook-deliveries`` under the key ``endpoint/alert_id``, in the partition that the alert has on
``limit-alerts``.
"""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Final
from uuid import UUID

import msgspec
from msgspec import Meta

from schemas.cell_run import Identifier, Instant
from schemas.limits import AlertKind, LimitAlert

TYPE_PREFIX: Final = "credits.limit."
BODY_BYTES_MAX: Final = 20_000
"""What Standard Webhooks asks of a body."""

ENDPOINTS_MAX: Final = 100

ENDPOINT_NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9_-]{0,63}$"
EndpointName = Annotated[str, Meta(pattern=ENDPOINT_NAME_PATTERN)]
Reference = Annotated[str, Meta(min_length=1, max_length=2048)]
"""Where a secret is: ``env:NAME`` or ``file:PATH``. Never the secret."""


class Format(StrEnum):
    """How an endpoint wants its alerts: signed JSON, or an unsigned Slack message."""

    STANDARD = "standard"
    SLACK = "slack"


class EndpointEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One receiver, as the file has it."""

    url: Annotated[str, Meta(min_length=1, max_length=2048, description="https://..., env:NAME or file:PATH")]
    secret: Reference | None = None
    previous_secret: Annotated[Reference | None, Meta(description="still signs too, while the receiver rotates")] = None
    workspaces: Annotated[tuple[Identifier, ...] | None, Meta(description="only these; left out: all")] = None
    kinds: Annotated[tuple[AlertKind, ...] | None, Meta(description="only these; left out: all")] = None
    since: Annotated[Instant | None, Meta(description="alerts before this instant are not for it")] = None
    format: Format = Format.STANDARD
    allow_private: Annotated[bool, Meta(description="may lie in a private network, and be plain http")] = False


class EndpointFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The TOML file: ``[endpoints.NAME]`` for each receiver. A renamed endpoint is another one."""

    endpoints: Annotated[dict[EndpointName, EndpointEntry], Meta(max_length=ENDPOINTS_MAX)]


class Webhook(msgspec.Struct, frozen=True, kw_only=True):
    """The body: ``type`` is `TYPE_PREFIX` and the alert's kind, ``timestamp`` when it happened, ``data`` the alert."""

    type: str
    timestamp: datetime
    data: LimitAlert


class DeliveryState(StrEnum):
    """``waiting`` for its next attempt, ``delivered``, or ``failed`` for good."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    FAILED = "failed"


class Delivery(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One alert for one endpoint. Times are Unix milliseconds.

    ``attempts`` are those that were answered, or were seen to fail. ``alert`` is the message of ``limit-alerts``, byte
    for byte, until it was delivered. What is over stays known for as long as ``limit-alerts`` may repeat it.
    """

    endpoint: str
    alert_id: UUID
    state: DeliveryState
    attempts: int = 0
    next_at_ms: int = 0
    ended_at_ms: int = 0
    said: str = ""
    alert: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET

    @property
    def key(self) -> bytes:
        """The Kafka key."""
        return delivery_key(self.endpoint, self.alert_id)


def delivery_key(endpoint: str, alert_id: UUID) -> bytes:
    """The Kafka key on ``webhook-deliveries``."""
    return f"{endpoint}/{alert_id}".encode()
