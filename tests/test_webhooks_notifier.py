"""The notifier on a real Kafka: nothing lost, nothing under two ids, nothing that is done repeated; whatever dies."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import count, pairwise
from typing import Any, Final
from uuid import UUID, uuid4

import msgspec
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource
from structlog.testing import capture_logs

from creditstream.producing import open_producer
from creditstream.webhooks import notifier as notifier_module
from creditstream.webhooks.deliveries import IN_FLIGHT_MAX, KNOWN_MS, PATIENCE_MS
from creditstream.webhooks.endpoints import Address, Endpoint
from creditstream.webhooks.notifier import Notifier, Step, World
from creditstream.webhooks.resending import deliveries, example_alert, resend
from creditstream.webhooks.schedule import DELAYS_S, Answer
from creditstream.webhooks.sending import send
from creditstream.webhooks.signing import new_secret, parse_secret
from schemas.cell_run import from_milliseconds
from schemas.limits import LimitAlert
from schemas.problem import Problem, UnknownId, Unreachable
from schemas.webhook import Delivery, DeliveryState
from streams.kafka.topics import LIMIT_ALERTS, WEBHOOK_DELIVERIES, Broker
from streams.settings import Settings
from tests.webhook_receiver import STALL, Behaviour, Received, Reply, WebhookReceiver

WAIT_S_MAX: Final = 60.0
QUIET_TURNS: Final = 10
"""Turns without anything new, after which a test believes that nothing more comes."""

POLL_S: Final = 0.02
ANSWERS_AFTER_S: Final = 2.0
"""Later than a member hears of a rebalance, sooner than it stops to wait for its attempts."""

PARTITIONS: Final = 2
NUMBERS: Final = count(1)
SECRET: Final = new_secret()
NO_TEXT: Final = b'"\xff"'
DEEP: Final = b"[" * 20_000 + b"]" * 20_000


class Clock:
    """The notifier's clock; it moves when a test moves it."""

    def __init__(self) -> None:
        self.ms = time.time_ns() // 1_000_000

    def __call__(self) -> int:
        return self.ms

    def advance(self, seconds: int) -> None:
        self.ms += seconds * 1000


class Killed(BaseException):
    """The process ends here."""


class Stage:
    """Topics of its own, a clock, and the settings that lead there."""

    def __init__(self, bootstrap: str) -> None:
        prefix = f"hooks{next(NUMBERS)}-"
        self.settings: Final = Settings(kafka_bootstrap=bootstrap, topic_prefix=prefix, partitions=PARTITIONS)
        self.clock: Final = Clock()
        self._producer: Final = open_producer(self.settings)
        for name in (LIMIT_ALERTS, WEBHOOK_DELIVERIES):
            Broker(self.settings).ensure(name)

    def alert(self, *alerts: LimitAlert, partition: int = 0) -> None:
        """The meter sends alerts."""
        for alert in alerts:
            self.produce(msgspec.json.encode(alert), partition)

    def produce(self, value: bytes, partition: int = 0) -> None:
        self._producer.produce(self.settings.topic(LIMIT_ALERTS), value, partition=partition)
        assert self._producer.flush(WAIT_S_MAX) == 0

    @contextmanager
    def notifier(self, *endpoints: Endpoint, alone: bool = True, **world: Any) -> Iterator[Notifier]:
        """A notifier; one that is alone has all partitions when the block begins."""
        outside = World(
            **{"now_ms": self.clock, "chance": lambda _: 0, "send": partial(send, answer_s_max=WAIT_S_MAX), **world}
        )
        notifier = Notifier(self.settings, {endpoint.name: endpoint for endpoint in endpoints}, outside)
        try:
            turn_until(lambda: notifier.partitions or not alone, notifier)
            yield notifier
        finally:
            notifier.close()

    def records(self) -> list[Delivery]:
        """What stands in the outbox."""
        return deliveries(self.settings)


@pytest.fixture
def stage(kafka: str, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(notifier_module, "POLL_S", POLL_S)
    return Stage(kafka)


def some_alert(**fields: Any) -> LimitAlert:
    return msgspec.structs.replace(example_alert(datetime.now(UTC)), **{"alert_id": uuid4(), "test": False} | fields)


def endpoint(receiver: WebhookReceiver, name: str = "one") -> Endpoint:
    return Endpoint(name, Address.parse(receiver.url, True), (parse_secret(SECRET),), allow_private=True)


def turn_until(condition: Callable[[], object], *notifiers: Notifier) -> None:
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        for notifier in notifiers:
            notifier.turn()


def turn_quietly(*notifiers: Notifier) -> None:
    """Give it the chance to do what it should not."""
    for _ in range(QUIET_TURNS):
        for notifier in notifiers:
            notifier.turn()


def test_an_alert_is_delivered_once_through_restarts(stage: Stage, receiver: WebhookReceiver) -> None:
    """Delivered under its own id, to each endpoint; the next notifier has nothing to do."""
    with WebhookReceiver() as other:
        one, two = endpoint(receiver), endpoint(other, "two")
        alerts = [some_alert() for _ in range(3)]
        stage.alert(*alerts[:2])
        stage.alert(alerts[2], partition=1)
        with stage.notifier(one, two) as notifier:
            turn_until(lambda: notifier.counts["delivered"] == 6, notifier)
        with stage.notifier(one, two) as notifier:
            turn_quietly(notifier)

        assert sorted(receiver.ids) == sorted(other.ids) == sorted(str(alert.alert_id) for alert in alerts)
    assert {record.state for record in stage.records()} == {DeliveryState.DELIVERED}


@pytest.mark.parametrize(
    ("step", "down_first"),
    [*((step, False) for step in Step), (Step.ANSWERED, True), (Step.RECORDED, True)],
    ids=lambda value: {True: "refused", False: "accepted"}.get(value, value),
)
def test_killed_after_any_step_it_loses_and_repeats_nothing(
    stage: Stage, receiver: WebhookReceiver, step: Step, down_first: bool
) -> None:
    """Wherever it dies: each alert arrives under its one id, at most one attempt is made again, and done is done."""
    alerts = [some_alert() for _ in range(2)]
    stage.alert(*alerts)

    def die(reached: Step) -> None:
        if reached is step:
            raise Killed

    receiver.behave = lambda _: 500 if down_first else 204
    with pytest.raises(Killed), stage.notifier(endpoint(receiver), reached=die) as notifier:
        turn_until(lambda: False, notifier)
    receiver.behave = lambda _: 204
    stage.clock.advance(DELAYS_S[1])
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: len(delivered(stage)) == 2, notifier)
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_quietly(notifier)

    ids = sorted(str(alert.alert_id) for alert in alerts)
    assert sorted(set(receiver.ids)) == ids
    assert all(receiver.ids.count(webhook_id) <= 2 for webhook_id in ids)
    assert [record.state for record in stage.records()] == [DeliveryState.DELIVERED] * 2
    if step in (Step.READ, Step.PLANNED, Step.COMMITTED):
        assert len(receiver.received) == 2
    if step is Step.RECORDED and not down_first:
        # The other one may have been on its way when the first was recorded.
        assert min(receiver.ids.count(webhook_id) for webhook_id in ids) == 1


def test_nothing_goes_on_before_kafka_has_what_it_rests_on(stage: Stage, receiver: WebhookReceiver) -> None:
    """No record of a plan is still on its way when that is committed, and none of an outcome when it counts."""
    under_way: dict[Step, int] = {}

    def note(reached: Step) -> None:
        under_way[reached] = len(notifier._outbox._producer)

    with stage.notifier(endpoint(receiver), reached=note) as notifier:
        stage.alert(some_alert())
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)
        (place,) = notifier._consumer.committed([TopicPartition(stage.settings.topic(LIMIT_ALERTS), 0)], WAIT_S_MAX)
    assert (under_way[Step.PLANNED], under_way[Step.RECORDED], place.offset) == (0, 0, 1)


def test_what_kafka_refuses_to_keep_is_neither_sent_nor_passed_over(stage: Stage, receiver: WebhookReceiver) -> None:
    """The notifier ends, and says why; the next one has the alert."""
    alert, outbox = some_alert(), stage.settings.topic(WEBHOOK_DELIVERIES)
    stage.alert(alert)
    bound_record_bytes(stage.settings, outbox, 100)
    why = "webhook-deliveries on .* cannot be written: .*too large"
    with pytest.raises(Unreachable, match=why), stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: False, notifier)
    assert receiver.ids == []

    bound_record_bytes(stage.settings, outbox, 1_000_000)
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)
    assert receiver.ids == [str(alert.alert_id)]


def bound_record_bytes(settings: Settings, topic: str, number: int) -> None:
    """The broker takes no larger records from now on."""
    entry = ConfigEntry("max.message.bytes", str(number), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap})
    admin.incremental_alter_configs([resource])[resource].result(WAIT_S_MAX)


def delivered(stage: Stage) -> list[Delivery]:
    return [record for record in stage.records() if record.state is DeliveryState.DELIVERED]


def test_one_dead_endpoint_does_not_delay_another(stage: Stage, receiver: WebhookReceiver) -> None:
    """While one receiver takes requests and never answers, another gets everything."""
    with WebhookReceiver(lambda _: STALL) as dead:
        stage.alert(*(some_alert() for _ in range(20)))
        with stage.notifier(endpoint(dead, "dead"), endpoint(receiver)) as notifier:
            turn_until(lambda: notifier.counts["delivered"] == 20 and len(dead.received) >= IN_FLIGHT_MAX, notifier)

            assert len(dead.received) == IN_FLIGHT_MAX
            assert notifier.waiting == 20
            dead.ended.set()
            turn_until(lambda: notifier.counts["failed_attempts"] >= IN_FLIGHT_MAX, notifier)


def test_after_ten_attempts_over_three_days_it_is_given_up_and_can_be_resent(
    stage: Stage, receiver: WebhookReceiver
) -> None:
    """The whole schedule, with a restart before each attempt; what failed stays visible until a person resends it."""
    alert, receiver.behave = some_alert(), lambda _: 500
    stage.alert(alert)
    for number, delay_s in enumerate(DELAYS_S, 1):
        stage.clock.advance(delay_s - 1)
        with stage.notifier(endpoint(receiver)) as notifier:
            if delay_s:
                turn_quietly(notifier)
                assert len(receiver.received) == number - 1
            stage.clock.advance(1)
            turn_until(lambda: notifier.counts.total() == 1, notifier)

    assert receiver.ids == [str(alert.alert_id)] * len(DELAYS_S)
    stamps = [int(received.headers["webhook-timestamp"]) for received in receiver.received]
    assert [later - earlier for earlier, later in pairwise(stamps)] == list(DELAYS_S[1:])
    (failed,) = stage.records()
    assert (failed.state, failed.attempts, failed.said) == (DeliveryState.FAILED, 10, "500 Internal Server Error")

    endpoints = {"one": endpoint(receiver)}
    assert [resent.answer.status for resent in resend(stage.settings, endpoints, alert.alert_id)] == [500]
    receiver.behave = lambda _: 204
    assert [resent.answer.status for resent in resend(stage.settings, endpoints, alert.alert_id, "one")] == [204]
    assert receiver.ids == [str(alert.alert_id)] * 12
    assert [record.state for record in stage.records()] == [DeliveryState.DELIVERED]


def test_what_cannot_be_resent(stage: Stage, receiver: WebhookReceiver) -> None:
    """An id that limit-alerts does not have, or that is a run's, or stands in what is no alert; an alert for nobody."""
    seeded, run_id = some_alert(seeded=True), uuid4()
    stage.produce(f"no alert {run_id}".encode())
    stage.alert(some_alert(run_id=run_id), seeded)
    endpoints = {"one": endpoint(receiver)}

    for unknown in (UUID(int=1), run_id):
        with pytest.raises(UnknownId, match="no alert"):
            list(resend(stage.settings, endpoints, unknown))
    with pytest.raises(Problem, match="nobody wants"):
        list(resend(stage.settings, endpoints, seeded.alert_id))


def test_a_replay_of_alerts_is_delivered_to_nobody_twice(stage: Stage, receiver: WebhookReceiver) -> None:
    """The meter repeats an id after a crash, in one batch or days later; whoever has it does not get it again."""
    alert = some_alert()
    stage.alert(alert, alert)
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)
        stage.alert(alert)
        turn_quietly(notifier)
    stage.clock.advance(30 * 24 * 3600)
    marker = some_alert()
    stage.alert(alert, marker)
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)

    assert receiver.ids == [str(alert.alert_id), str(marker.alert_id)]


def test_a_replay_of_what_waits_sends_nothing_before_its_time(stage: Stage, receiver: WebhookReceiver) -> None:
    """The meter repeats an alert between two attempts: it goes on with its second attempt, and when that is due."""
    alert, marker, receiver.behave = some_alert(), some_alert(), lambda _: 500
    stage.alert(alert)
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["failed_attempts"] == 1, notifier)
        stage.alert(alert, marker)
        turn_until(lambda: notifier.counts["failed_attempts"] == 2, notifier)
        turn_quietly(notifier)

    assert receiver.ids == [str(alert.alert_id), str(marker.alert_id)]
    assert [record.attempts for record in stage.records()] == [1, 1]


def test_what_is_over_leaves_the_outbox_after_48_days(stage: Stage, receiver: WebhookReceiver) -> None:
    """A tombstone for what nobody can ask for any more."""
    stage.alert(some_alert())
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)
        stage.clock.advance(KNOWN_MS // 1000 - 1)
        turn_quietly(notifier)
        assert len(stage.records()) == 1
        stage.clock.advance(61)
        turn_until(lambda: stage.records() == [], notifier)


def test_410_disables_an_endpoint_until_the_file_is_read_again(stage: Stage, receiver: WebhookReceiver) -> None:
    """After Gone nothing more is sent there; what was meant for it is kept as failed."""
    first, second, third = (some_alert() for _ in range(3))
    receiver.behave = lambda _: 410
    stage.alert(first)
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["given_up"] == 1, notifier)
        stage.alert(second)
        turn_until(lambda: notifier.counts["given_up"] == 2, notifier)
        receiver.behave = lambda _: 204
        notifier.reload({"one": endpoint(receiver)})
        stage.alert(third)
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)

    assert receiver.ids == [str(first.alert_id), str(third.alert_id)]
    assert {record.said for record in stage.records()} == {"410 Gone", "410 Gone, earlier", "204 No Content"}


@pytest.mark.parametrize("reply", [410, Reply(429, ("retry-after", "3600"))], ids=str)
def test_what_an_endpoint_that_was_replaced_answers_says_nothing_of_the_new_one(
    stage: Stage, receiver: WebhookReceiver, reply: Behaviour
) -> None:
    """A URL is corrected while an attempt at the old one is under way: the delivery goes to the new one, and no other
    is lost or held up by what the old one says at last.
    """
    first, second = some_alert(), some_alert()
    asked, answer = threading.Event(), threading.Event()

    def behave(_: Received) -> int | Reply:
        asked.set()
        answer.wait(WAIT_S_MAX)
        assert not callable(reply)
        return reply

    with WebhookReceiver(behave) as old, stage.notifier(endpoint(old)) as notifier:
        stage.alert(first)
        turn_until(asked.is_set, notifier)
        notifier.reload({"one": endpoint(receiver)})
        answer.set()
        turn_until(lambda: notifier.counts["failed_attempts"] == 1, notifier)
        stage.alert(second)
        stage.clock.advance(DELAYS_S[1])
        turn_until(lambda: notifier.counts["delivered"] == 2, notifier)

    assert sorted(receiver.ids) == sorted([str(first.alert_id), str(second.alert_id)])


@pytest.mark.parametrize(
    ("reply", "quiet_s"), [(Reply(429, ("retry-after", "3600")), 3600), (503, 5), (502, 5), (504, 5)], ids=str
)
def test_an_overloaded_endpoint_is_left_alone(
    stage: Stage, receiver: WebhookReceiver, reply: Behaviour, quiet_s: int
) -> None:
    """429, 502, 503 and 504, and Retry-After, hold back every delivery to this endpoint, new ones included."""
    receiver.behave = lambda _: reply
    stage.alert(some_alert())
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["failed_attempts"] == 1, notifier)
        receiver.behave = lambda _: 204
        stage.alert(some_alert())
        stage.clock.advance(quiet_s - 1)
        turn_until(lambda: notifier.waiting == 2, notifier)
        turn_quietly(notifier)
        assert len(receiver.received) == 1
        stage.clock.advance(1)
        turn_until(lambda: notifier.counts["delivered"] == 2, notifier)


def test_too_much_that_waits_holds_back_alerts_and_loses_none(
    stage: Stage, receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the bound nothing more is read for a while, and the log says so; once deliveries end, the rest follows."""
    monkeypatch.setattr(notifier_module, "WAITING_MAX", 2)
    receiver.behave = lambda _: 500
    with stage.notifier(endpoint(receiver)) as notifier, capture_logs() as lines:
        stage.alert(some_alert(), some_alert())
        turn_until(lambda: notifier.counts["failed_attempts"] == 2, notifier)
        stage.alert(some_alert(), partition=1)
        turn_quietly(notifier)
        assert (notifier.waiting, len(stage.records())) == (2, 2)
        receiver.behave = lambda _: 204
        stage.clock.advance(DELAYS_S[1])
        turn_until(lambda: notifier.counts["delivered"] == 3, notifier)
    assert [line["event"] for line in lines if "alerts_" in line["event"]] == ["alerts_held_back", "alerts_read_again"]


def test_each_minute_the_log_says_what_waits_and_what_became_of_the_rest(
    stage: Stage, receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The age of the oldest alert that waits, and the counts, also when nothing has happened since, and when the clock
    was set back by a day.
    """
    receiver.behave = lambda _: Reply(500, ("retry-after", "86400"))
    old, new = (some_alert(at=from_milliseconds(stage.clock.ms - age_s * 1000)) for age_s in (7200, 3600))
    stage.alert(old, new)
    with stage.notifier(endpoint(receiver)) as notifier, capture_logs() as lines:

        def said() -> list[dict[str, int]]:
            return [
                {name: value for name, value in line.items() if isinstance(value, int)}
                for line in lines
                if line["event"] == "deliveries"
            ]

        turn_until(lambda: notifier.counts["failed_attempts"] == 2, notifier)
        stage.clock.advance(60)
        turn_until(said, notifier)
        monkeypatch.setattr(notifier_module, "WAITING_MAX", 1)
        turn_quietly(notifier)
        stage.clock.advance(60)
        turn_until(lambda: len(said()) == 2, notifier)
        stage.clock.advance(-24 * 3600)
        turn_until(lambda: len(said()) == 3, notifier)

    quiet = {"partitions": 2, "in_flight": 0, "delivered": 0, "failed_attempts": 2}
    assert said()[0] == {**quiet, "waiting": 2, "oldest_s": 7260, "given_up": 0, "gave_way": 0}
    assert said()[1] == {**quiet, "waiting": 1, "oldest_s": 3720, "given_up": 1, "gave_way": 1}
    assert said()[2] == {**said()[1], "oldest_s": 0}


def test_an_endpoint_over_its_share_gives_way_and_holds_up_nobody(
    stage: Stage, receiver: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading waits for it for a while; then its oldest deliveries are given up, and others get all that is new."""
    monkeypatch.setattr(notifier_module, "WAITING_MAX", 4)
    alerts = [some_alert() for _ in range(4)]
    with WebhookReceiver(lambda _: 500) as dead, stage.notifier(endpoint(dead, "dead"), endpoint(receiver)) as notifier:
        stage.alert(*alerts[:2])
        turn_until(lambda: notifier.counts["failed_attempts"] == notifier.counts["delivered"] == 2, notifier)
        stage.alert(*alerts[2:])
        turn_quietly(notifier)
        assert notifier.counts["delivered"] == 2

        stage.clock.advance(PATIENCE_MS // 1000)
        turn_until(lambda: notifier.counts["delivered"] == 4 and notifier.counts["given_up"] == 2, notifier)

    gone = [record for record in stage.records() if record.state is DeliveryState.FAILED]
    assert {record.alert_id for record in gone} == {alert.alert_id for alert in alerts[:2]}
    assert {(record.endpoint, record.said) for record in gone} == {("dead", "gave way to newer ones: 2 wait for it")}


def test_a_defect_in_an_attempt_is_its_failure(
    stage: Stage, receiver: WebhookReceiver, capsys: pytest.CaptureFixture[str]
) -> None:
    """The notifier goes on, and tries again by the schedule; the log has the trace once."""
    attempts = count(1)

    def breaks_first(target: Endpoint, alert: LimitAlert, at_s: int) -> Answer:
        if next(attempts) == 1:
            raise ValueError("nobody thought of this")
        return send(target, alert, at_s)

    stage.alert(some_alert())
    with stage.notifier(endpoint(receiver), send=breaks_first) as notifier:
        turn_until(lambda: notifier.counts["failed_attempts"] == 1, notifier)
        (record,) = stage.records()
        assert (record.attempts, record.said) == (1, "it broke here: ValueError")
        stage.clock.advance(DELAYS_S[1])
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)

    assert capsys.readouterr().out.count("ValueError: nobody thought of this") == 1


def test_seeded_and_unreadable_alerts_are_for_nobody(stage: Stage, receiver: WebhookReceiver) -> None:
    """They are passed over; what comes after them is delivered."""
    alert = some_alert(test=True)
    stage.alert(some_alert(seeded=True))
    stage.produce(b"no alert")
    for damage in (NO_TEXT, DEEP):
        stage.produce(msgspec.json.encode(some_alert()).replace(b'"ws_example"', damage))
    stage.produce(msgspec.json.encode(some_alert(plan="x" * 64 * 1024)))
    stage.produce(msgspec.json.encode(some_alert()).replace(b'Z"', b'"'))
    stage.alert(alert)
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["delivered"] == 1, notifier)

    (got,) = receiver.received
    assert (got.id, json.loads(got.body)["data"]["test"]) == (str(alert.alert_id), True)


def test_an_endpoint_that_left_the_file(stage: Stage, receiver: WebhookReceiver) -> None:
    """What still waits for it is given up, visibly."""
    receiver.behave = lambda _: 500
    stage.alert(some_alert())
    with stage.notifier(endpoint(receiver)) as notifier:
        turn_until(lambda: notifier.counts["failed_attempts"] == 1, notifier)
        notifier.reload({})
        stage.clock.advance(DELAYS_S[1])
        turn_until(lambda: notifier.counts["given_up"] == 1, notifier)

    (record,) = stage.records()
    assert (record.state, record.attempts, record.said) == (DeliveryState.FAILED, 1, "not in the file")


def test_two_notifiers_share_the_partitions_and_hand_over(stage: Stage, receiver: WebhookReceiver) -> None:
    """A second one takes a partition with what waits there; when the first one ends, it has everything."""
    waiting = [some_alert(), some_alert()]
    receiver.behave = lambda _: 500
    for partition, alert in enumerate(waiting):
        stage.alert(alert, partition=partition)
    with stage.notifier(endpoint(receiver)) as first:
        turn_until(lambda: first.counts["failed_attempts"] == 2, first)
        receiver.behave = lambda _: 204
        with stage.notifier(endpoint(receiver), alone=False) as second:
            turn_until(lambda: len(first.partitions) == len(second.partitions) == 1, first, second)
            stage.clock.advance(DELAYS_S[1])
            turn_until(lambda: first.counts["delivered"] == second.counts["delivered"] == 1, first, second)
            first.stop()
            first.close()
            turn_until(lambda: second.partitions == {0, 1}, second)
            for partition, alert in enumerate(waiting):
                stage.alert(alert, some_alert(), partition=partition)
            turn_until(lambda: second.counts["delivered"] == 3, second)

    assert all(receiver.ids.count(str(alert.alert_id)) == 2 for alert in waiting)
    assert len(receiver.ids) == 6


def test_what_is_in_flight_is_recorded_before_the_end(stage: Stage, receiver: WebhookReceiver) -> None:
    """A stop waits for its answer; the next notifier does not ask again."""
    release = gated(receiver)
    stage.alert(some_alert())
    with stage.notifier(endpoint(receiver)) as first:
        turn_until(lambda: receiver.received, first)
        release()
        first.stop()
    with stage.notifier(endpoint(receiver)) as second:
        turn_quietly(second)

    assert len(receiver.received) == 1
    assert [record.state for record in stage.records()] == [DeliveryState.DELIVERED]


def test_what_is_in_flight_is_recorded_before_a_partition_is_handed_over(
    stage: Stage, receiver: WebhookReceiver
) -> None:
    """A rebalance waits for its answer; whoever owns the partition afterwards does not ask again."""
    release = gated(receiver)
    stage.alert(some_alert())
    with stage.notifier(endpoint(receiver)) as first:
        turn_until(lambda: receiver.received, first)
        answer = threading.Timer(ANSWERS_AFTER_S, release)
        with stage.notifier(endpoint(receiver), alone=False) as second:
            answer.start()
            turn_until(lambda: len(first.partitions) == len(second.partitions) == 1, first, second)
            turn_quietly(first, second)
        answer.join()

    assert len(receiver.received) == 1
    assert [record.state for record in stage.records()] == [DeliveryState.DELIVERED]


def gated(receiver: WebhookReceiver) -> Callable[[], None]:
    """The receiver answers nothing until what is returned is called."""
    gate = threading.Event()

    def behave(_: Received) -> int:
        gate.wait(WAIT_S_MAX)
        return 204

    receiver.behave = behave
    return gate.set
