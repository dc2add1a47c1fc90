"""Alerts that a person sends: a test, or one that was given up. No notifier is needed, and none is disturbed."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Final, NamedTuple
from uuid import UUID, uuid4

from creditstream.webhooks.endpoints import Endpoint
from creditstream.webhooks.outbox import Outbox, decode_alert, find_alert
from creditstream.webhooks.schedule import Answer, after
from creditstream.webhooks.sending import send
from schemas.ledger import Pool
from schemas.limits import AlertKind, Cause, LimitAlert, State, TopColumn
from schemas.problem import Problem, UnknownId
from schemas.webhook import Delivery, DeliveryState, delivery_key
from streams.kafka.topics import LIMIT_ALERTS, WEBHOOK_DELIVERIES, Broker
from streams.settings import Settings


class Resent(NamedTuple):
    """What one endpoint answered."""

    endpoint: str
    answer: Answer


def example_alert(now: datetime) -> LimitAlert:
    """An alert like a real one, marked ``test``, under an id of its own."""
    return LimitAlert(
        alert_id=uuid4(),
        kind=AlertKind.CROSSED,
        workspace_id="ws_example",
        pool=Pool.ENRICHMENT,
        state=State.WARNING,
        used="16001",
        allowance="20000",
        remaining="3999",
        overage="0",
        at=now,
        cause=Cause.RUN,
        thresholds=(80,),
        plan="example",
        table_id="tbl_example",
        column_id="col_example",
        action="find_work_email",
        top_columns=(
            TopColumn(table_id="tbl_example", column_id="col_example", action="find_work_email", credits="9120"),
        ),
        test=True,
    )


def send_test(endpoint: Endpoint) -> Answer:
    """Send one test alert now."""
    now = datetime.now(UTC)
    return send(endpoint, example_alert(now), int(now.timestamp()))


def resend(
    settings: Settings, endpoints: Mapping[str, Endpoint], alert_id: UUID, only: str | None = None
) -> Iterator[Resent]:
    """Send an alert once more under the same id: to one endpoint, or to all that want it.

    A delivery that was given up is noted as delivered when this one succeeds; one that a notifier still has is left
    to it. UnknownId when ``limit-alerts`` does not have the alert, Problem when it is for nobody.
    """
    topic = Broker(settings).require(LIMIT_ALERTS)
    found = find_alert(settings, topic.name, range(topic.partitions), alert_id)
    if found is None:
        fix = "See `creditstream alerts list`; alerts are kept for 40 days."
        raise UnknownId(f"no alert {alert_id}", f"{topic.name} does not hold it", fix)
    partition, message = found
    alert = decode_alert(message)
    assert alert is not None
    chosen = [endpoints[only]] if only else [endpoint for endpoint in endpoints.values() if endpoint.wants(alert)]
    if not chosen:
        raise Problem(f"nobody wants alert {alert_id}", "no endpoint matches it", "Name one with --endpoint.")
    outbox = Outbox(settings)
    known = outbox.read([partition], lambda _: None)[partition]
    for endpoint in chosen:
        now = datetime.now(UTC)
        answer = send(endpoint, alert, int(now.timestamp()))
        _note(outbox, partition, known.get(delivery_key(endpoint.name, alert_id)), answer, now)
        yield Resent(endpoint.name, answer)


def _note(outbox: Outbox, partition: int, delivery: Delivery | None, answer: Answer, now: datetime) -> None:
    # A notifier never writes again what it has given up, so there is nobody to write against.
    if delivery and delivery.state is DeliveryState.FAILED and answer.is_success:
        outbox.put(partition, delivery.key, after(delivery, answer, int(now.timestamp() * 1000), 0))
        outbox.flush()


FAILED_FIRST: Final = (DeliveryState.FAILED, DeliveryState.WAITING, DeliveryState.DELIVERED)


def deliveries(settings: Settings) -> list[Delivery]:
    """Every delivery that is known: those that failed first, then the next ones, then what is done."""
    topic = Broker(settings).require(WEBHOOK_DELIVERIES)
    found = Outbox(settings).read(range(topic.partitions), lambda _: None)
    records = [record for newest in found.values() for record in newest.values()]
    return sorted(
        records, key=lambda record: (FAILED_FIRST.index(record.state), record.next_at_ms, -record.ended_at_ms)
    )
