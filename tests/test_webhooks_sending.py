"""One attempt: what is sent, what counts as an answer, and where nothing is ever sent."""

import base64
import socket
import ssl
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from creditstream.webhooks.endpoints import Address, Endpoint
from creditstream.webhooks.receiver import Receiver
from creditstream.webhooks.resending import example_alert
from creditstream.webhooks.schedule import RETRY_AFTER_S_MAX, Answer
from creditstream.webhooks.sending import is_public, send
from creditstream.webhooks.signing import new_secret, parse_secret, signed_headers
from schemas.webhook import Format
from tests.webhook_receiver import DIE, DRIP, GARBAGE, HALF_BODY, STALL, Behaviour, Reply, WebhookReceiver

NOW = datetime.now(UTC)
SECRET, OLD_SECRET = new_secret(), new_secret()
ALERT = example_alert(NOW)
SHORT_S = 0.4
LONG_S = 15.0
"""For a receiver that answers at once, on a machine that is busy."""


def endpoint(url: str, *secrets: str, allow_private: bool = True, form: Format = Format.STANDARD) -> Endpoint:
    keys = tuple(parse_secret(secret) for secret in secrets)
    return Endpoint("test", Address.parse(url, allow_private=True), keys, format=form, allow_private=allow_private)


def now_s() -> int:
    """Unix seconds, read anew for each attempt: a verifier refuses a time of more than five minutes ago, and this
    module may have been loaded before that.
    """
    return int(time.time())


def attempt(receiver: WebhookReceiver, behaviour: Behaviour = 204) -> Answer:
    receiver.behave = lambda _: behaviour
    patience_s = SHORT_S if behaviour in (STALL, DRIP) else LONG_S
    return send(endpoint(receiver.url, SECRET), ALERT, now_s(), answer_s_max=patience_s)


def test_the_reference_library_accepts_the_signature(receiver: WebhookReceiver) -> None:
    """Headers and body are those of Standard Webhooks: its own verifier takes them, and takes no changed byte."""
    assert attempt(receiver).is_success
    (got,) = receiver.received

    body = Webhook(SECRET).verify(got.body, got.headers)
    assert body["type"] == "credits.limit.crossed"
    assert body["data"]["alert_id"] == got.id == str(ALERT.alert_id)
    assert body["data"]["test"] is True
    assert datetime.fromisoformat(body["timestamp"]) == NOW
    assert got.headers["content-type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(got.body.replace(b"16001", b"16002"), got.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(OLD_SECRET).verify(got.body, got.headers)


def test_while_secrets_rotate_either_one_verifies(receiver: WebhookReceiver) -> None:
    """With a previous secret there are two signatures, the new one first."""
    send(endpoint(receiver.url, SECRET, OLD_SECRET), ALERT, now_s())
    (got,) = receiver.received

    assert len(got.headers["webhook-signature"].split(" ")) == 2
    for secret in (SECRET, OLD_SECRET):
        Webhook(secret).verify(got.body, got.headers)


def test_slack_gets_its_form_unsigned(receiver: WebhookReceiver) -> None:
    """A Slack message has text and blocks, and no headers of ours."""
    send(endpoint(receiver.url, form=Format.SLACK), ALERT, now_s())
    (got,) = receiver.received

    assert not [name for name in got.headers if name.startswith("webhook-")]
    assert got.body.startswith(b'{"text":"TEST: ws_example passed 80 %')


@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_2xx_is_success(receiver: WebhookReceiver, status: int) -> None:
    """Any 2xx, and the status alone decides; there is nothing to be mended."""
    answer = attempt(receiver, status)
    assert (answer.is_success, answer.fix) == (True, "")


def test_an_answer_that_breaks_off_in_its_body_is_an_answer(receiver: WebhookReceiver) -> None:
    """The receiver has said 200; that its connection died afterwards does not make the alert sent again."""
    assert attempt(receiver, HALF_BODY).is_success


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n", "204 No Content"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n" * 2 + b"HTTP/1.1 200 OK\r\n\r\n", "200 OK"),
        (b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 500 No\r\n\r\n", "500 Internal Server Error"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", "the receiver closed the connection without an answer"),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", "101 Switching Protocols"),
    ],
    ids=["100", "103", "102", "nothing_more", "101"],
)
def test_an_answer_that_is_only_announced_is_waited_for(raw: bytes, said: str) -> None:
    """What a proxy says before the answer (1xx) is none: an alert that was taken is not sent again."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(raw)

        thread = threading.Thread(target=serve)
        thread.start()
        answer = send(endpoint(f"http://127.0.0.1:{server.getsockname()[1]}/", SECRET), ALERT, now_s())
        thread.join()
    assert answer.said == said
    assert answer.is_success == said.startswith("20")


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (100 + 299, "399"),
        (400, "400 Bad Request"),
        (401, "401 Unauthorized"),
        (500, "500 Internal Server Error"),
        (599, "599"),
        (STALL, "no answer within 0.4 s"),
        (DRIP, "no answer within 0.4 s"),
        (DIE, "the answer is not HTTP"),
        (GARBAGE, "the answer is not HTTP"),
    ],
)
def test_anything_else_is_a_failure_that_says_why(receiver: WebhookReceiver, behaviour: Behaviour, said: str) -> None:
    """Every other answer, and none at all, fails in bounded time, with a reason and something to do."""
    answer = attempt(receiver, behaviour)

    assert not answer.is_success
    assert said in answer.said
    assert ("redirects" in answer.said) == (300 <= answer.status < 400)
    assert answer.fix


def test_redirects_are_refused(receiver: WebhookReceiver) -> None:
    """Nobody is sent where the operator did not send them."""
    answer = attempt(receiver, Reply(307, ("location", receiver.url)))

    assert (answer.is_success, answer.status, len(receiver.received)) == (False, 307, 1)
    assert "Give the final URL" in answer.fix


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120),
        ("0", 0),
        pytest.param(format_datetime(NOW - timedelta(hours=1), usegmt=True), 0, id="an hour ago"),
        pytest.param(format_datetime(NOW.replace(tzinfo=None) - timedelta(hours=1)), 0, id="an hour ago, -0000"),
        ("999999999999", RETRY_AFTER_S_MAX),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", None),
        ("soon", None),
        ("²", None),
        ("-5", None),
        ("", None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_bounded(
    receiver: WebhookReceiver, header: str, seconds: int | None
) -> None:
    """Seconds or a date; nonsense counts as nothing, and nobody can ask for more than a day."""
    assert attempt(receiver, Reply(429, ("retry-after", header))).retry_after_s == seconds


def test_retry_after_as_a_date_counts_from_now(receiver: WebhookReceiver) -> None:
    """A date in an hour is about an hour."""
    answer = attempt(
        receiver, Reply(503, ("retry-after", format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)))
    )

    assert 3000 < (answer.retry_after_s or 0) <= 3600


def test_nobody_listens() -> None:
    """A refused connection is a failure like any other."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        answer = send(endpoint(f"http://127.0.0.1:{bound.getsockname()[1]}/", SECRET), ALERT, now_s())

    assert answer.said == "the connection was refused"


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "240.0.0.1", "255.255.255.255", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fec0::1",
        "ff0e::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::", "2001:db8::1",
        "::127.0.0.1", "2001:0:4136:e378:8000:63bf:3fff:fdd2",
    ],
)  # fmt: skip
def test_addresses_that_are_not_for_everyone(address: str) -> None:
    """Private, loopback, link-local, multicast, reserved ones, and the IPv6 forms that stand for them."""
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::"]
)
def test_public_addresses(address: str) -> None:
    """What anybody may have is allowed, in each form."""
    assert is_public(address)


def test_a_private_address_is_refused_without_a_packet(receiver: WebhookReceiver) -> None:
    """Unless the endpoint allows it, no connection to a private address is made, whatever name leads there."""
    named = endpoint(f"http://hooks.example:{receiver.port}/", SECRET, allow_private=False)
    answer = send(named, ALERT, now_s(), resolve=lambda *_: ["127.0.0.1", "169.254.169.254"])

    assert answer.said == "refused: hooks.example has no public address (127.0.0.1, 169.254.169.254)"
    assert "allow_private" in answer.fix
    assert receiver.received == []


def test_a_name_is_resolved_once_and_the_checked_address_is_used(receiver: WebhookReceiver) -> None:
    """A name that points elsewhere a moment later gains nothing; the receiver still sees the name."""
    answers = iter([["127.0.0.1"]])
    named = endpoint(f"http://hooks.example:{receiver.port}/a?b=c", SECRET)

    assert send(named, ALERT, now_s(), resolve=lambda *_: next(answers)).is_success
    (got,) = receiver.received
    assert got.headers["host"] == f"hooks.example:{receiver.port}"
    assert got.path == "/a?b=c"


def test_an_address_that_does_not_answer_is_passed_over(receiver: WebhookReceiver) -> None:
    """Of several addresses the next one is tried, within the same time."""
    named = endpoint(f"http://hooks.example:{receiver.port}/", SECRET)

    assert send(named, ALERT, now_s(), resolve=lambda *_: ["127.0.0.2", "::1", "127.0.0.1"]).is_success


def test_its_time_is_for_all_addresses_together(receiver: WebhookReceiver) -> None:
    """One that swallows packets leaves nothing to the next."""
    named = endpoint(f"http://hooks.example:{receiver.port}/", SECRET)
    with (
        socket.create_server(("127.0.0.2", receiver.port), backlog=0) as full,
        socket.create_connection(full.getsockname()),
    ):
        answer = send(named, ALERT, now_s(), resolve=lambda *_: ["127.0.0.2", "127.0.0.1"], answer_s_max=SHORT_S)

    assert answer.said == f"no answer within {SHORT_S} s"
    assert receiver.received == []


def test_an_address_without_a_way() -> None:
    """What the network says is the reason."""
    named = endpoint("http://hooks.example/", SECRET)
    answer = send(named, ALERT, now_s(), resolve=lambda *_: ["255.255.255.255"], answer_s_max=LONG_S)

    assert answer.said == "no connection: Network is unreachable"


def test_a_name_that_is_not_known() -> None:
    """Without an address there is no attempt, and the reason names the host."""
    answer = send(endpoint("https://nowhere.invalid/", SECRET, allow_private=False), ALERT, now_s())

    assert answer.said.startswith("the name nowhere.invalid is not known")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate of hooks.example, in one file."""
    file = tmp_path_factory.mktemp("tls") / "hooks.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=hooks.example", "-addext", "subjectAltName=DNS:hooks.example", "-keyout", "-", "-out", "-"],
        capture_output=True, check=True,
    )  # fmt: skip
    file.write_bytes(made.stdout)
    return file


def test_tls_is_checked_against_the_name_of_the_url(certificate: Path) -> None:
    """The certificate must be valid for the URL's host, though the connection goes to an address."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=certificate)
    with WebhookReceiver(tls=serving) as receiver:
        right = endpoint(f"https://hooks.example:{receiver.port}/", SECRET)
        wrong = endpoint(f"https://other.example:{receiver.port}/", SECRET)

        def ask(whom: Endpoint, tls: ssl.SSLContext | None) -> Answer:
            return send(whom, ALERT, now_s(), resolve=lambda *_: ["127.0.0.1"], tls=tls)

        assert ask(right, trusting).is_success
        assert "the certificate is not valid: Hostname mismatch" in ask(wrong, trusting).said
        assert "the certificate is not valid: self-signed certificate" in ask(right, None).said
        assert len(receiver.received) == 1


def test_a_port_without_tls() -> None:
    """A plain port under an https URL fails with a reason."""
    with WebhookReceiver() as receiver:
        answer = send(
            endpoint(f"https://hooks.example:{receiver.port}/", SECRET),
            ALERT,
            now_s(),
            resolve=lambda *_: ["127.0.0.1"],
            answer_s_max=LONG_S,
        )

    assert answer.said.startswith("TLS failed")


def test_the_signature_has_the_published_example() -> None:
    """The example of the Standard Webhooks libraries."""
    key = base64.b64decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = signed_headers([key], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize(
    "body", [b"{}", b'{"type":"\xff"}', b'{"x":' + b"[" * 9_000], ids=["fields", "no_text", "deep"]
)
def test_what_is_signed_and_no_alert_is_refused(body: bytes) -> None:
    """The receiver for trying things says so, whatever the body is."""
    said: list[str] = []
    key = parse_secret(SECRET)
    tried = Receiver(key, 0, said.append, said.append)
    now_s = int(datetime.now(UTC).timestamp())
    assert tried.receive(signed_headers([key], "id", now_s, body), body) == 400
    assert said[0].startswith("refused with 400: the body is not an alert: ")
    tried.close()
