"""The notifier as a process, and the commands around it."""

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import msgspec
import pytest

from creditstream.producing import open_producer
from creditstream.webhooks.resending import deliveries
from creditstream.webhooks.signing import new_secret
from schemas.limits import LimitAlert
from schemas.webhook import DeliveryState
from streams.kafka.topics import LIMIT_ALERTS, Broker
from streams.settings import Settings
from tests.test_webhooks_notifier import some_alert
from tests.webhook_receiver import STALL, WebhookReceiver
from tests.worker_process import ROOT, Finished, environment

WAIT_S_MAX: Final = 60.0
STOP_S_MAX: Final = 30.0
PREFIX: Final = "hookscli-"
SECRET: Final = new_secret()


@pytest.fixture(scope="module")
def settings(kafka: str) -> Settings:
    settings = Settings(kafka_bootstrap=kafka, topic_prefix=PREFIX, partitions=2)
    Broker(settings).ensure_all()
    return settings


def environ(home: Path, kafka: str = "127.0.0.1:1") -> dict[str, str]:
    mine = {"HOOK_SECRET": SECRET, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}
    found = environment(
        kafka_bootstrap=kafka, topic_prefix=PREFIX, partitions=2, home=str(home), log_format="json", instance="one"
    )
    return found | mine


def run(home: Path, *words: str, kafka: str = "127.0.0.1:1", **extra: str) -> Finished:
    done = subprocess.run(
        [sys.executable, "-m", "creditstream", *words],
        capture_output=True, text=True, cwd=ROOT, env=environ(home, kafka) | extra, timeout=WAIT_S_MAX,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr)


class Running:
    """A command that runs until a test ends it, and what it has written so far."""

    def __init__(self, process: "subprocess.Popen[bytes]", output: Path) -> None:
        self.process, self._output = process, output

    @property
    def text(self) -> str:
        return self._output.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        whole, _, _ = self.text.rpartition("\n")  # the last line may still be being written
        lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
        return [line for line in lines if line["event"] == name]

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S_MAX
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(STOP_S_MAX)


@contextmanager
def running(home: Path, *words: str, kafka: str = "127.0.0.1:1") -> Iterator[Running]:
    output = home / f"{uuid4()}.out"
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "creditstream", *words],
            stdout=file, stderr=file, stdin=subprocess.DEVNULL, cwd=ROOT, env=environ(home, kafka),
        )  # fmt: skip
    try:
        yield Running(process, output)
    finally:
        process.kill()
        process.wait()


def endpoints(home: Path, **urls: str) -> Path:
    file = home / "endpoints.toml"
    file.write_text(
        "\n".join(
            f'[endpoints.{name}]\nurl = "{url}"\nsecret = "env:HOOK_SECRET"\nallow_private = true'
            for name, url in urls.items()
        )
    )
    return file


def produce(settings: Settings, value: bytes) -> None:
    producer = open_producer(settings)
    producer.produce(settings.topic(LIMIT_ALERTS), value, partition=0)
    assert producer.flush(WAIT_S_MAX) == 0


def fixes(notifier: Running, alert: LimitAlert) -> list[str]:
    """What the log says to do about an alert that was given up."""
    return [line["fix"] for line in notifier.events("alert_given_up") if line["alert_id"] == str(alert.alert_id)]


def test_the_process_from_start_to_end(settings: Settings, receiver: WebhookReceiver, tmp_path: Path) -> None:
    """Delivers; SIGHUP takes a good file and refuses a bad one; SIGTERM ends it though a receiver stalls."""
    file = endpoints(tmp_path, first=receiver.url)
    with (
        WebhookReceiver() as other,
        running(tmp_path, "notifier", "--endpoints", str(file), kafka=settings.kafka_bootstrap) as notifier,
    ):
        produce(settings, msgspec.json.encode(some_alert()))
        notifier.wait_for(lambda: receiver.received)

        file.write_text("[endpoints.first]\nurl = 'nonsense'")
        notifier.process.send_signal(signal.SIGHUP)
        notifier.wait_for(lambda: notifier.events("endpoints_refused"))
        (refused,) = notifier.events("endpoints_refused")
        assert f"{file}: endpoint `first`: field `url`" in refused["why"]
        assert refused["kept"] == ["first"]
        produce(settings, msgspec.json.encode(some_alert()))
        notifier.wait_for(lambda: len(receiver.received) == 2)

        endpoints(tmp_path, first=receiver.url, second=other.url)
        notifier.process.send_signal(signal.SIGHUP)
        notifier.wait_for(lambda: notifier.events("endpoints_loaded"))
        produce(settings, msgspec.json.encode(some_alert()))
        notifier.wait_for(lambda: len(notifier.events("alert_delivered")) == 4)
        assert (len(receiver.received), len(other.received)) == (3, 1)

        other.behave = lambda _: STALL
        produce(settings, msgspec.json.encode(some_alert()))
        notifier.wait_for(lambda: len(other.received) == 2)
        assert notifier.end() == 0
        (ended,) = notifier.events("notifier_stopped")
        assert (ended["delivered"], ended["in_flight"]) == (5, 1)
        assert {"endpoint", "alert_id", "attempts", "answer", "took_ms"} <= notifier.events("alert_delivered")[0].keys()
        assert SECRET not in notifier.text
        assert "/hook" not in notifier.text
    assert [record.endpoint for record in deliveries(settings) if record.state is DeliveryState.WAITING] == ["second"]


def test_a_refused_file_does_not_bring_back_an_endpoint_that_is_gone(
    settings: Settings, receiver: WebhookReceiver, tmp_path: Path
) -> None:
    """It said 410, and nobody has corrected it."""
    file = endpoints(tmp_path, closed=receiver.url)
    receiver.behave = lambda _: 410
    with running(tmp_path, "notifier", "--endpoints", str(file), kafka=settings.kafka_bootstrap) as notifier:
        produce(settings, msgspec.json.encode(some_alert()))
        notifier.wait_for(lambda: notifier.events("alert_given_up"))
        file.write_text("[endpoints.closed]\nurl = 'nonsense'")
        notifier.process.send_signal(signal.SIGHUP)
        notifier.wait_for(lambda: notifier.events("endpoints_refused"))
        produce(settings, msgspec.json.encode(some_alert()))
        notifier.wait_for(lambda: len(notifier.events("alert_given_up")) == 2)

    assert len(receiver.received) == 1


def test_what_was_given_up_is_resent_as_the_log_says(
    settings: Settings, receiver: WebhookReceiver, tmp_path: Path
) -> None:
    """The command in the log can be typed as it stands, and sends the alert to nobody who has it already."""
    alert = some_alert()
    receiver.behave = lambda _: 410
    with WebhookReceiver() as other:
        file = endpoints(tmp_path, closed=receiver.url, good=other.url)
        with running(tmp_path, "notifier", "--endpoints", str(file), kafka=settings.kafka_bootstrap) as notifier:
            produce(settings, msgspec.json.encode(alert))
            notifier.wait_for(lambda: str(alert.alert_id) in other.ids and fixes(notifier, alert))
            [fix] = fixes(notifier, alert)
        receiver.behave = lambda _: 204
        called, *words = shlex.split(fix)
        sent = run(tmp_path, *words, kafka=settings.kafka_bootstrap)

        assert (called, sent.code, sent.err) == ("creditstream", 0, "")
        assert sent.out.startswith("closed: 204 No Content in ")
        assert other.ids.count(str(alert.alert_id)) == 1


def test_a_killed_process_leaves_what_the_next_one_finishes(
    settings: Settings, receiver: WebhookReceiver, tmp_path: Path
) -> None:
    """SIGKILL in the middle of an attempt: the next process makes it again, under the same id."""
    file = endpoints(tmp_path, killed=receiver.url)
    receiver.behave = lambda _: STALL
    alert = some_alert()
    command = ("notifier", "--endpoints", str(file))
    with running(tmp_path, *command, kafka=settings.kafka_bootstrap) as notifier:
        produce(settings, msgspec.json.encode(alert))
        notifier.wait_for(lambda: str(alert.alert_id) in receiver.ids)
        notifier.process.kill()
    receiver.behave = lambda _: 204
    with running(tmp_path, *command, kafka=settings.kafka_bootstrap) as notifier:
        notifier.wait_for(lambda: notifier.events("alert_delivered"))
        assert notifier.end(signal.SIGINT) == 0

    assert receiver.ids.count(str(alert.alert_id)) == 2


def test_what_keeps_the_notifier_from_starting(settings: Settings, tmp_path: Path) -> None:
    """One line that names the cause: no file, a bad one, no topics, no Kafka."""
    good = str(endpoints(tmp_path, one="http://127.0.0.1:1/"))
    (tmp_path / "bad.toml").write_text("[endpoints.x]\nurl = 3")

    def line(*words: str, kafka: str = settings.kafka_bootstrap, **extra: str) -> tuple[int, str]:
        done = run(tmp_path, "notifier", *words, kafka=kafka, **extra)
        (last,) = [line for line in done.err.splitlines() if line.startswith("creditstream: ")]
        return done.code, last

    assert line("--endpoints", str(tmp_path / "none.toml")) == (
        1,
        f"creditstream: the endpoints cannot be read: {tmp_path}/none.toml: No such file or directory. Check the file.",
    )
    assert line("--endpoints", str(tmp_path / "bad.toml"))[1].startswith(
        f"creditstream: endpoints refused: {tmp_path}/bad.toml: endpoint `x`: field `url`: Expected `str`"
    )
    assert "topic no-limit-alerts does not exist" in line("--endpoints", good, CREDITSTREAM_TOPIC_PREFIX="no-")[1]
    assert run(tmp_path, "notifier").code == 2


def test_an_alert_is_tested_and_received_on_one_machine(tmp_path: Path) -> None:
    """`listen` makes up a secret, `alerts test` signs with it; a wrong secret is refused on both sides."""
    with running(tmp_path, "listen", "--port", "0") as listener:
        listener.wait_for(lambda: "Ctrl-C ends it" in listener.text)
        secret = listener.text.split("new secret: ")[1].splitlines()[0]
        url = listener.text.split("listening on ")[1].split(" ")[0]
        words = ("alerts", "test", url, "--allow-private", "--secret-env", "MADE_UP")
        good = run(tmp_path, *words, MADE_UP=secret)
        wrong = run(tmp_path, *words, MADE_UP=new_secret())

        assert (good.code, good.err) == (0, "")
        assert good.out.startswith("204 No Content in ")
        assert (wrong.code, wrong.out) == (1, "")
        assert "the test alert was not accepted: 401 Unauthorized" in wrong.err
        assert "Give both sides the same secret" in wrong.err
        listener.wait_for(lambda: "refused with 401" in listener.text)
        assert listener.end(signal.SIGINT) == 0
        (told,) = [line for line in listener.text.splitlines() if "credits.limit.crossed" in line]
        assert "TEST: ws_example passed 80 % of its enrichment credits: 16,001 of 20,000 used, 3,999 left." in told
        assert listener.text.splitlines()[-1] == "stopped: 1 accepted, 1 refused"


def test_what_a_test_alert_says_of_a_receiver(receiver: WebhookReceiver, tmp_path: Path) -> None:
    """Status and what to fix; plain http and private addresses only on request; Slack unsigned."""
    tls = receiver.url.replace("http://", "https://")
    private = run(tmp_path, "alerts", "test", tls)
    plain = run(tmp_path, "alerts", "test", receiver.url)
    assert (private.code, plain.code) == (1, 2)
    assert "refused: 127.0.0.1 has no public address" in private.err
    assert "Set --allow-private" in private.err
    assert receiver.received == []

    slack = run(tmp_path, "alerts", "test", receiver.url, "--allow-private", "--format", "slack")
    assert (slack.code, slack.err) == (0, "")
    assert json.loads(receiver.received[0].body)["text"].startswith("TEST: ")
    unset = run(tmp_path, "alerts", "test", receiver.url, "--allow-private", "--secret-env", "NOT_SET")
    assert (unset.code, len(receiver.received)) == (1, 1)
    assert "the secret in NOT_SET cannot be used: it is not set. Set" in unset.err


def test_an_alert_is_resent_by_hand(settings: Settings, receiver: WebhookReceiver, tmp_path: Path) -> None:
    """To whom it belongs, under its id; 4 for an unknown id, 2 for an unknown endpoint, 1 when it is refused."""
    file = str(endpoints(tmp_path, one=receiver.url))
    alert = some_alert()
    produce(settings, msgspec.json.encode(alert))

    def resend(*words: str) -> Finished:
        return run(tmp_path, "alerts", "resend", *words, "--endpoints", file, kafka=settings.kafka_bootstrap)

    sent = resend(str(alert.alert_id))
    assert (sent.code, sent.err) == (0, "")
    assert sent.out.startswith("one: 204 No Content in ")
    assert receiver.ids == [str(alert.alert_id)]
    assert resend(str(uuid4())).code == 4
    assert resend(str(alert.alert_id), "--endpoint", "two").code == 2
    receiver.behave = lambda _: 500
    refused = resend(str(alert.alert_id), "--endpoint", "one")
    assert refused.code == 1
    assert "See the receiver's log" in refused.out


def test_deliveries_are_listed(settings: Settings, tmp_path: Path) -> None:
    """What became of each alert, as text and as JSON."""
    text = run(tmp_path, "alerts", "deliveries", kafka=settings.kafka_bootstrap)
    assert (text.code, text.err) == (0, "")
    listed = run(tmp_path, "alerts", "deliveries", "--format", "json", kafka=settings.kafka_bootstrap)
    assert len(json.loads(listed.out)) == len(deliveries(settings))
    assert all(datetime.fromisoformat(row["when"]).tzinfo for row in json.loads(listed.out))  # as in every answer
    assert "delivered" in text.out
