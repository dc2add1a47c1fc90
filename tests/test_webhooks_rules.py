"""What is decided about webhooks without any I/O: endpoint files, messages, signatures, times, what is due."""

import base64
import json
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from standardwebhooks import Webhook

from creditstream.webhooks import deliveries
from creditstream.webhooks.deliveries import IN_FLIGHT_MAX, KNOWN_MS, Deliveries
from creditstream.webhooks.endpoints import Endpoint, load_endpoints
from creditstream.webhooks.messages import body_of, escape, sentence_of
from creditstream.webhooks.resending import example_alert
from creditstream.webhooks.schedule import DELAYS_S, Answer, after
from creditstream.webhooks.signing import BadSignature, new_secret, parse_secret, signed_headers, verify
from schemas.ledger import Pool
from schemas.limits import AlertKind, LimitAlert, TopColumn
from schemas.problem import Problem
from schemas.webhook import BODY_BYTES_MAX, Delivery, DeliveryState, Format
from schemas.webhook import Webhook as Body

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
NOW_MS = int(NOW.timestamp() * 1000)
SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()  # the same in every process of a run
ENVIRON = {"SECRET": SECRET, "OLD": new_secret(), "SLACK": "https://hooks.slack.com/services/T0/B0/xyz", "SHORT": "a"}
ALERT = example_alert(NOW)
OK = Answer(204, "204 No Content")
DOWN = Answer(500, "500 Internal Server Error")


def changed(**fields: Any) -> LimitAlert:
    return msgspec.structs.replace(ALERT, **fields)


# Endpoint files


def load(tmp_path: Path, text: str) -> dict[str, Endpoint]:
    file = tmp_path / "endpoints.toml"
    file.write_text(text)
    return load_endpoints(file, ENVIRON)


def test_an_endpoint_file(tmp_path: Path) -> None:
    """Every field, secrets by variable and by file, and what is left out."""
    (tmp_path / "old").write_text(ENVIRON["OLD"] + "\n")
    found = load(
        tmp_path,
        f"""
        [endpoints.billing]
        url = "https://example.com/hooks?of=credits"
        secret = "env:SECRET"
        previous_secret = "file:{tmp_path}/old"
        workspaces = ["ws_1"]
        kinds = ["exhausted", "recovered"]
        since = 2026-11-22T12:00:00Z
        [endpoints.inside]
        url = "http://10.0.0.1:8080"
        secret = "env:SECRET"
        allow_private = true
        [endpoints.team]
        url = "env:SLACK"
        format = "slack"
        """,
    )
    billing, inside, team = found.values()

    assert billing.keys == (parse_secret(SECRET), parse_secret(ENVIRON["OLD"]))
    assert billing.address == (True, "example.com", 443, "/hooks?of=credits")
    assert inside.address == (False, "10.0.0.1", 8080, "/")
    assert (team.address.host, team.address.path, team.keys) == ("hooks.slack.com", "/services/T0/B0/xyz", ())
    exhausted = changed(kind=AlertKind.EXHAUSTED, workspace_id="ws_1")
    assert billing.wants(exhausted)
    assert not billing.wants(msgspec.structs.replace(exhausted, workspace_id="ws_2"))
    assert not billing.wants(msgspec.structs.replace(exhausted, kind=AlertKind.CROSSED))
    assert not billing.wants(msgspec.structs.replace(exhausted, at=datetime(2026, 11, 22, 11, tzinfo=UTC)))
    assert inside.wants(ALERT)
    assert not inside.wants(changed(seeded=True))


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ('url = "https://a.example"', "field `secret`: a standard endpoint is signed"),
        (f'url = "https://a.example"\nsecret = "{SECRET}"', "field `secret`: write env:NAME or file:PATH"),
        ('url = "https://a.example"\nsecret = "env:NONE"', "field `secret`: the environment has no NONE"),
        ('url = "https://a.example"\nsecret = "env:SHORT"', "field `secret`: a secret starts with whsec_"),
        ('url = "https://a.example"\nsecret = "file:/no/such"', "field `secret`: /no/such: No such file"),
        ('url = "https://a.example"\nsecret = "env:SECRET"\nprevious_secret = "env:NONE"', "field `previous_secret`"),
        ('url = "http://a.example"\nsecret = "env:SECRET"', "field `url`: plain http is only for a private network"),
        ('url = "ftp://a.example"\nsecret = "env:SECRET"', "field `url`: a URL starts with https://"),
        ('url = "https://me:pw@a.example"\nsecret = "env:SECRET"', "field `url`: a URL has a host"),
        ('url = "https://a.example:99999"\nsecret = "env:SECRET"', "field `url`: Port out of range"),
        ('url = "https://a.example:0"\nsecret = "env:SECRET"', "field `url`: port 0 cannot be reached"),
        ('url = "https://a.example/a b"\nsecret = "env:SECRET"', "field `url`: the path has characters"),
        ('url = "https://a.example"\nsecret = "env:SECRET"\nformat = "slack"', "a Slack message is not signed"),
        (
            'url = "https://a.example"\nkinds = ["crosed"]',
            "field `kinds[0]`: Invalid enum value 'crosed'; it takes crossed",
        ),
        ('url = "https://a.example"\ncolour = "red"', "unknown field `colour`"),
        ("url = 7", "field `url`: Expected `str`"),
        ('secret = "env:SECRET"', "missing required field `url`"),
        ('url = "https://a.example"\nsince = 2026-11-22T12:00:00', "field `since`"),
    ],
)
def test_a_refused_file_names_file_endpoint_and_field(tmp_path: Path, entry: str, why: str) -> None:
    """Whoever made the mistake finds it by the message alone, and no secret is in it."""
    with pytest.raises(Problem) as refused:
        load(tmp_path, f"[endpoints.good]\nurl = 'env:SLACK'\nformat = 'slack'\n[endpoints.bad]\n{entry}")

    assert f"{tmp_path}/endpoints.toml: endpoint `bad`" in refused.value.why
    assert why in refused.value.why
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("name", ["Billing", "-x", "", "a" * 65])
def test_an_endpoint_whose_name_is_none_is_named(tmp_path: Path, name: str) -> None:
    """Among several, that one is to be found by the message, and what a name may be."""
    text = f"[endpoints.good]\nurl = 'env:SLACK'\nformat = 'slack'\n[endpoints.'{name}']\nurl = 'a'"
    with pytest.raises(Problem, match=f"endpoint `{name}`: a name has 1 to 64 characters of a-z, 0-9, _ and -"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["", "endpoints = 3", "[endpoints]\nx = 3", "[endpoints.'Not A Name']\nurl = 'a'", "["]
)
def test_a_file_that_is_none(tmp_path: Path, text: str) -> None:
    """A file of another kind is refused, naming it; so is one that is not there."""
    with pytest.raises(Problem, match=r"endpoints\.toml: "):
        load(tmp_path, text)
    with pytest.raises(Problem, match=r"cannot be read: .*No such file"):
        load_endpoints(tmp_path / "none.toml")


# Messages


def test_a_body_has_a_type_a_time_and_the_alert() -> None:
    """Standard Webhooks' three fields; the types are those that are documented."""
    for kind in AlertKind:
        body = msgspec.json.decode(body_of(changed(kind=kind), Format.STANDARD), type=Body)
        assert (body.type, body.timestamp, body.data.kind) == (f"credits.limit.{kind}", NOW, kind)


def test_a_body_stays_below_20_kb() -> None:
    """The columns are a courtesy that is left out where it would be too long."""
    column = TopColumn(table_id="t" * 128, column_id="c" * 128, action="a" * 128, credits="1")
    long = changed(top_columns=(column,) * 100, workspace_id="\x00" * 128, column_id="é" * 128)
    body = body_of(long, Format.STANDARD)

    assert len(body) < BODY_BYTES_MAX
    assert json.loads(body)["data"]["workspace_id"] == long.workspace_id


def test_an_alert_that_is_long_by_itself_goes_as_it_is() -> None:
    """Whatever somebody wrote to the topic: the receiver may refuse it, and the sender does not break."""
    long = changed(plan="x" * BODY_BYTES_MAX)

    assert json.loads(body_of(long, Format.STANDARD))["data"]["plan"] == long.plan


def test_slack_escapes_its_three_characters() -> None:
    """A column or workspace that is named like a command does not call the whole channel."""
    alert = changed(workspace_id="<!channel> & <@U1>", column_id="<!here>")
    said = json.loads(body_of(alert, Format.SLACK))

    assert escape("<!channel> & co") == "&lt;!channel&gt; &amp; co"
    assert "&lt;!channel&gt; &amp; &lt;@U1&gt;" in said["text"]
    assert "<" not in json.dumps(said)
    assert "&lt;!here&gt;" in said["blocks"][1]["elements"][0]["text"]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (
            {},
            "TEST: ws_example passed 80 % of its enrichment credits: 16,001 of 20,000 used, 3,999 left.",
        ),
        ({"test": False, "thresholds": (50, 80)}, "ws_example passed 50 % and 80 % of its enrichment credits: "),
        ({"test": False, "thresholds": ()}, "ws_example has a new warning for its enrichment credits: "),
        (
            {"test": False, "kind": AlertKind.EXHAUSTED, "used": "20001", "overage": "1"},
            "ws_example has no enrichment credits left: 20,001 of 20,000 used, 1 over.",
        ),
        ({"test": False, "kind": AlertKind.RECOVERED}, "ws_example has enrichment credits again: "),
        ({"test": False, "kind": AlertKind.RECOVERED, "pool": Pool.PREMIUM}, "ws_example has premium credits: "),
        ({"test": False, "kind": AlertKind.PERIOD_STARTED}, "ws_example started a new period of enrichment credits: "),
    ],
)
def test_each_kind_is_one_sentence(fields: dict[str, Any], sentence: str) -> None:
    """What people read; a test says so first."""
    assert sentence_of(changed(**fields)).startswith(sentence)


# Signatures


@given(body=st.binary(max_size=200).map(lambda body: body.hex().encode()), webhook_id=st.uuids().map(str))
def test_what_is_signed_verifies_here_and_there(body: bytes, webhook_id: str) -> None:
    """Our verifier and the reference library agree, for any body and id."""
    now_s = int(datetime.now(UTC).timestamp())
    headers = signed_headers([parse_secret(SECRET)], webhook_id, now_s, body)

    assert verify(parse_secret(SECRET), headers, body, now_s) == webhook_id
    Webhook(SECRET).verify(body, headers, json_parse=False)
    signature = Webhook(SECRET).sign(webhook_id, datetime.fromtimestamp(now_s, UTC), body.decode())
    assert headers["webhook-signature"] == signature


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"webhook-id": ""}, "no header webhook-id"),
        ({"webhook-id": "another"}, "the signature is not that of this secret"),
        ({"webhook-timestamp": str(NOW_MS // 1000 - 301)}, "301 s away"),
        ({"webhook-timestamp": str(NOW_MS // 1000 + 301)}, "301 s away"),
        ({"webhook-timestamp": "soon"}, "not a number"),
        ({"webhook-signature": "v1,AAAA v2,xyz"}, "the signature is not that of this secret"),
        ({"webhook-signature": "v1,é"}, "the signature is not that of this secret"),
    ],
)
def test_what_does_not_verify(change: dict[str, str], why: str) -> None:
    """Another id, time or signature is refused, with the reason."""
    headers = signed_headers([parse_secret(SECRET)], "id", NOW_MS // 1000, b"{}")

    with pytest.raises(BadSignature, match=why):
        verify(parse_secret(SECRET), headers | change, b"{}", NOW_MS // 1000)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_AAAA", "whsec_!" + "A" * 32, "A" * 32, "whsec_" + "A" * 88])
def test_secrets_have_a_form(secret: str) -> None:
    """whsec_ and base64 of 24 to 64 bytes; the refusal does not repeat it."""
    with pytest.raises(ValueError, match=r"secret|base64") as refused:
        parse_secret(secret)
    assert len(secret) < 8 or secret not in str(refused.value)


# Times


def waiting(endpoint: str = "a", at_ms: int = 0) -> Delivery:
    return Delivery(
        endpoint=endpoint,
        alert_id=uuid4(),
        state=DeliveryState.WAITING,
        next_at_ms=at_ms,
        alert=msgspec.Raw(b"{}"),
    )


@given(chance=st.integers(0, 2**31))
def test_ten_attempts_over_three_days(chance: int) -> None:
    """The published schedule: each delay as long, or up to a fifth longer; then it is given up, with its alert."""
    delivery, at_ms, delays = waiting(at_ms=NOW_MS), NOW_MS, []
    while delivery.state is DeliveryState.WAITING:
        at_ms = delivery.next_at_ms
        delivery = after(delivery, DOWN, at_ms, chance)
        delays.append(delivery.next_at_ms - at_ms)

    assert (delivery.state, delivery.attempts, delivery.ended_at_ms) == (DeliveryState.FAILED, 10, at_ms)
    assert isinstance(delivery.alert, msgspec.Raw)
    for delay, published in zip(delays[:-1], DELAYS_S[1:], strict=True):
        assert published * 1000 <= delay <= published * 1200
    assert all(earlier < later for earlier, later in pairwise(delays[:-1]))


def test_retry_after_only_lengthens() -> None:
    """A receiver may ask for more time than the schedule gives, never for less."""
    first = after(waiting(), DOWN._replace(retry_after_s=60), NOW_MS, 0)
    assert first.next_at_ms == NOW_MS + 60_000
    assert after(waiting(), DOWN._replace(retry_after_s=1), NOW_MS, 0).next_at_ms == NOW_MS + 5_000


def test_chance_spreads_a_delay_over_a_fifth_of_it() -> None:
    """Receivers that were down are not all asked at once."""
    delays = {after(waiting(), DOWN, NOW_MS, chance).next_at_ms - NOW_MS for chance in range(2000)}
    assert delays == set(range(5_000, 6_001))


def test_only_2xx_is_a_success() -> None:
    """A receiver that sends elsewhere has not taken it."""
    assert [status for status in range(100, 600) if Answer(status, "").is_success] == list(range(200, 300))


def test_410_ends_a_delivery() -> None:
    """Gone is gone; any other answer is tried again."""
    assert after(waiting(), Answer(410, "410 Gone"), NOW_MS, 0).state is DeliveryState.FAILED
    assert after(waiting(), Answer(404, "404 Not Found"), NOW_MS, 0).state is DeliveryState.WAITING


def test_what_was_delivered_needs_its_alert_no_longer() -> None:
    """The record that stays for 40 days is small."""
    done = after(waiting(), OK, NOW_MS, 0)

    assert (done.state, done.attempts, done.ended_at_ms) == (DeliveryState.DELIVERED, 1, NOW_MS)
    assert len(msgspec.json.encode(done)) < 200
    assert msgspec.json.decode(msgspec.json.encode(done), type=Delivery) == done


# What is due


def owned(*records: Delivery) -> Deliveries:
    found = Deliveries()
    found.own(0, records)
    return found


def test_one_endpoint_has_few_attempts_at_once_and_takes_none_from_another() -> None:
    """A dead endpoint with a long queue leaves every other one its own places."""
    found = owned(*(waiting("dead") for _ in range(100)), waiting("alive"))
    attempts = found.take_due(NOW_MS)

    assert [attempt.delivery.endpoint for attempt in attempts] == ["dead"] * IN_FLIGHT_MAX + ["alive"]
    assert found.take_due(NOW_MS) == []
    assert found.landed(attempts[0])
    assert len(found.take_due(NOW_MS)) == 1


def test_earlier_ones_come_first_and_none_before_its_time() -> None:
    """By the time they are due, then in the order in which they came."""
    late, first, second = waiting(at_ms=20), waiting(at_ms=10), waiting(at_ms=10)
    found = owned(late, first, second)

    assert found.take_due(9) == []
    assert [attempt.delivery for attempt in found.take_due(20)] == [first, second, late]


def test_an_endpoint_that_is_left_alone_waits() -> None:
    """Nothing goes there until the last time that was said, and others go on; or until the file is read again."""
    found = owned(waiting("busy"), waiting("idle"))
    found.leave_alone("busy", 1000)
    found.leave_alone("busy", 500)

    assert [attempt.delivery.endpoint for attempt in found.take_due(999)] == ["idle"]
    assert [attempt.delivery.endpoint for attempt in found.take_due(1000)] == ["busy"]
    found.put(0, waiting("busy"))
    found.leave_alone("busy", 2000)
    assert found.take_due(1000) == []
    found.wake()
    assert [attempt.delivery.endpoint for attempt in found.take_due(1000)] == ["busy"]


def test_a_slow_endpoint_is_waited_for_once() -> None:
    """Some room now and then begins no new pause: only when half of its share is free it may hold up others again."""
    share, found = 2 * deliveries.ROOM + 2, owned()

    def fill() -> None:
        while found.waiting < share:
            found.put(0, waiting("slow"))

    def deliver(number: int, now_ms: int) -> None:
        for _ in range(number):
            attempt = found.take_due(now_ms)[0]
            assert found.landed(attempt)
            found.put(0, after(attempt.delivery, OK, now_ms, 0))
            found.landed(attempt)

    for _ in range(share - 1):
        found.put(0, waiting("slow"))
    assert not found.is_crowded(share, NOW_MS), "it has not been full yet"
    fill()
    assert found.is_crowded(share, NOW_MS)
    for second in range(1, 10):
        deliver(deliveries.ROOM, NOW_MS + second * 1000)
        assert not found.is_crowded(share, NOW_MS + second * 1000), "it has room"
        fill()
        assert found.is_crowded(share, NOW_MS + second * 1000)
    for second in range(10, 100):
        assert not found.is_crowded(share, NOW_MS + second * 1000), "it has had its time"
        deliver(deliveries.ROOM, NOW_MS + second * 1000)
        assert not found.is_crowded(share, NOW_MS + second * 1000)
        fill()
    deliver(share // 2, NOW_MS + 100_000)
    assert not found.is_crowded(share, NOW_MS + 100_000)
    fill()
    assert found.is_crowded(share, NOW_MS + 101_000)


def test_what_gives_way_is_the_oldest_where_most_waits() -> None:
    """Not before reading has waited in vain, no more than is too much, and nothing that is in flight."""
    found = owned(waiting("slow", NOW_MS + 1))
    most = [waiting("slow") for _ in range(IN_FLIGHT_MAX + 3)]
    found.own(1, most)
    share = found.waiting - 2
    assert len(found.take_due(NOW_MS)) == IN_FLIGHT_MAX
    found.is_crowded(share, NOW_MS)

    assert found.giving_way(share, NOW_MS + deliveries.PATIENCE_MS - 1) == []
    in_vain_ms = NOW_MS + deliveries.PATIENCE_MS
    assert found.giving_way(share, in_vain_ms) == [(1, each) for each in most[IN_FLIGHT_MAX:-1]]
    assert found.giving_way(share + 1, in_vain_ms) == [(1, most[IN_FLIGHT_MAX])]
    assert found.giving_way(share + 2, in_vain_ms) == []


def test_a_clock_that_is_set_back_lengthens_no_wait() -> None:
    """Patience with a full endpoint begins anew, and ends after its time."""
    share, found = 2, owned(waiting("slow"), waiting("slow"))
    hour = 3600 * 1000

    assert found.is_crowded(share, NOW_MS)
    assert found.is_crowded(share, NOW_MS - hour)
    assert not found.is_crowded(share, NOW_MS - hour + deliveries.PATIENCE_MS)


def test_a_clock_that_is_set_back_lengthens_no_wait_for_an_endpoint_with_some_room() -> None:
    """It was full, and a little of it has been delivered since."""
    share, hour = 2 * deliveries.ROOM + 2, 3600 * 1000
    found = owned(*(waiting("slow") for _ in range(share)))
    assert found.is_crowded(share, NOW_MS)
    (attempt, *_) = found.take_due(NOW_MS)
    found.put(0, after(attempt.delivery, OK, NOW_MS, 0))
    found.landed(attempt)

    assert found.is_crowded(share, NOW_MS - hour)
    assert not found.is_crowded(share, NOW_MS - hour + deliveries.PATIENCE_MS)


def test_a_lost_partition_leaves_nothing_in_the_queues() -> None:
    """What was due there is not sent; what is in flight of it takes its places until it has landed, and counts no more;
    the endpoint's deliveries of another partition follow in their order.
    """
    lost, kept = [waiting(at_ms=number) for number in range(8)], [waiting(at_ms=number) for number in range(3)]
    found = owned(*lost)
    found.own(1, kept)
    in_flight = found.take_due(1)
    assert {attempt.partition for attempt in in_flight} == {0, 1}
    found.disown(0)

    assert (found.partitions, found.waiting, found.in_flight) == ({1}, 3, IN_FLIGHT_MAX)
    assert found.take_due(100) == []
    assert [found.landed(attempt) for attempt in in_flight] == [attempt.partition == 1 for attempt in in_flight]
    assert [attempt.delivery for attempt in found.take_due(100)] == kept[2:]
    assert (found.take_due(100), found.is_crowded(3, NOW_MS)) == ([], True)
    found.disown(1)
    assert (found.waiting, found.take_due(100), found.is_crowded(3, NOW_MS)) == (0, [], False)


def test_what_stays_when_a_partition_is_lost_keeps_its_order() -> None:
    """Wherever in the queue the lost ones were: what is due first is sent first."""
    found = owned(waiting(at_ms=0))
    found.own(1, [waiting(at_ms=5)])
    found.put(0, waiting(at_ms=1))
    for at_ms in (6, 7, 2):
        found.put(1, waiting(at_ms=at_ms))
    found.disown(0)

    assert [attempt.delivery.next_at_ms for attempt in found.take_due(2)] == [2]


def test_a_partition_that_came_back_is_sent_once() -> None:
    """What waited before the partition was lost is out of date: only what was loaded afterwards counts."""
    delivery = waiting()
    found = owned(delivery)
    (old,) = found.take_due(0)
    found.disown(0)
    found.own(0, [delivery])
    (new,) = found.take_due(0)

    assert not found.landed(old)
    assert found.landed(new)
    assert found.in_flight == 0
    found.own(0, [delivery])
    found.own(0, [delivery])
    assert len(found.take_due(0)) == 1


def test_what_ended_is_known_longer_than_limit_alerts_keep_it() -> None:
    """A replay of limit-alerts, 40 days and an open segment of 7, finds it; after that nobody needs it."""
    done = after(waiting(), OK, NOW_MS, 0)
    found = owned(done)

    assert KNOWN_MS > (40 + 7) * 24 * 3600 * 1000
    assert found.knows(0, done.endpoint, done.key)
    assert found.forget_old(NOW_MS + KNOWN_MS - 1) == []
    assert found.forget_old(NOW_MS + KNOWN_MS) == [(0, done.key)]
    assert not found.knows(0, done.endpoint, done.key)


def test_memory_of_what_ended_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound the eldest are forgotten."""
    monkeypatch.setattr(deliveries, "OVER_MAX", 3)
    done = [after(waiting(), OK, NOW_MS + number, 0) for number in range(5)]

    found = owned(*done[:4])
    found.own(1, done[4:])
    assert found.forget_old(NOW_MS) == [(0, done[0].key), (0, done[1].key)]
