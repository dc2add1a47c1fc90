"""Kafka with TLS, passwords and an authorizer: the access rules of docs/operations.md, as they stand there, are enough
for every role, and keep billing's topic from the others.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Final, NamedTuple
from uuid import uuid4

import pytest
import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from creditstream import embedded
from creditstream.client import CellRunProducer, Gate
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
from creditstream.webhooks.signing import new_secret
from schemas.cell_run import CellRun, Outcome
from streams.kafka.topics import Broker
from streams.settings import read_settings, variable
from tests.client_kafka import wait_until
from tests.webhook_receiver import WebhookReceiver
from tests.worker_process import ROOT, WAIT_S_MAX, Finished, WorkerProcess, creditstream, environment

USERS: Final = ("enrichment", "billing", "meter", "notifier")
CLIENTS: Final = """
listeners=BROKER://127.0.0.1:{{broker}},CONTROLLER://127.0.0.1:{{controller}},CLIENTS://127.0.0.1:{port}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT,CLIENTS:SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-512
listener.name.clients.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={keystore}
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=false
super.users=User:ANONYMOUS
"""
"""Its own listener stays open, for whoever administers it here."""


class Secured(NamedTuple):
    """A Kafka whose clients must log in."""

    bootstrap: str
    ca_file: str

    def settings(self, user: str, **others: str | int) -> dict[str, str | int]:
        """As which a role connects."""
        return {
            "kafka_bootstrap": self.bootstrap,
            "kafka_security_protocol": "SASL_SSL",
            "kafka_username": user,
            "kafka_password": password(user),
            "kafka_ca_file": self.ca_file,
            **others,
        }


def password(user: str) -> str:
    """A user's."""
    return f"the secret of {user}"


def recipe() -> list[AclBinding]:
    """The access rules of docs/operations.md: each line's bindings."""
    lines = re.findall(r"^acl (--allow-principal .+)$", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    assert len(lines) > 5
    bindings: list[AclBinding] = []
    for line in lines:
        words = shlex.split(line)
        options = list(zip(words[::2], words[1::2], strict=True))
        named = dict(options)
        kind, name = (
            (ResourceType.TOPIC, named["--topic"]) if "--topic" in named else (ResourceType.GROUP, named["--group"])
        )
        bindings += [
            AclBinding(
                kind, name, ResourcePatternType.LITERAL, named["--allow-principal"], "*",
                AclOperation[re.sub(r"(?<=[a-z])(?=[A-Z])", "_", operation).upper()], AclPermissionType.ALLOW,
            ) for option, operation in options if option == "--operation"
        ]  # fmt: skip
    return bindings


def key_and_certificate(issued: trustme.LeafCert) -> bytes:
    """As Java reads them: the key in PKCS 8."""
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    readable = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return readable + b"".join(chain.bytes() for chain in issued.cert_chain_pems)


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    """With the topics, the users, and the recipe's access rules."""
    directory = tmp_path_factory.mktemp("secured")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(directory / "ca.pem"))
    (directory / "server.pem").write_bytes(key_and_certificate(authority.issue_cert("127.0.0.1")))
    port, _ = embedded._choose_ports([])  # not one that any connection may take before Kafka does
    clients = CLIENTS.format(port=port, keystore=directory / "server.pem")
    home = Home.at(directory / "home")
    with pytest.MonkeyPatch.context() as patch, home.hold():
        # Of two lines for one property, Java takes the later.
        patch.setattr(embedded, "SERVER_PROPERTIES", embedded.SERVER_PROPERTIES + clients)
        with EmbeddedKafka(home, print) as broker:
            settings = read_settings({}, **broker.settings)
            Broker(settings).ensure_all()
            admin = AdminClient({"bootstrap.servers": broker.bootstrap})
            scram = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
            users = [UserScramCredentialUpsertion(user, scram, password(user).encode()) for user in USERS]
            for future in (*admin.alter_user_scram_credentials(users).values(), *admin.create_acls(recipe()).values()):
                future.result(WAIT_S_MAX)
            yield Secured(f"127.0.0.1:{port}", str(directory / "ca.pem"))


@pytest.fixture(scope="module")
def worker(kafka: Secured, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    """The meter, logged in as its user."""
    login = kafka.settings("meter")
    with WorkerProcess(tmp_path_factory.mktemp("metering"), str(login.pop("kafka_bootstrap")), "", **login) as process:
        process.start().wait_until_ready()
        yield process


def as_user(kafka: Secured, user: str, home: Path, *words: str) -> Finished:
    """A command of the program, by a role."""
    return creditstream(*words, settings=kafka.settings(user, home=str(home)))


@pytest.fixture
def notifier(kafka: Secured, worker: WorkerProcess, tmp_path: Path) -> Iterator[WebhookReceiver]:
    """A receiver, and the notifier that tells it."""
    with WebhookReceiver() as receiver:
        endpoints = tmp_path / "endpoints.toml"
        endpoints.write_text(f"[endpoints.one]\nurl = '{receiver.url}'\nsecret = 'env:HOOK'\nallow_private = true\n")
        process = subprocess.Popen(
            [sys.executable, "-m", "creditstream", "notifier", "--endpoints", str(endpoints)],
            cwd=ROOT,
            env=environment(**kafka.settings("notifier", home=str(worker.home.path))) | {"HOOK": new_secret()},
        )
        try:
            yield receiver
        finally:
            process.terminate()
            assert process.wait(WAIT_S_MAX) == 0


def test_every_role_does_its_work(
    kafka: Secured, worker: WorkerProcess, notifier: WebhookReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Billing sets a plan, an enrichment worker runs and its gate sees the balance, the notifier tells of a limit."""
    for words in (("plan", "set", "ws_0001", "20k"), ("limits", "set", "ws_0001", "--remaining-below", "19990")):
        billed = as_user(kafka, "billing", worker.home.path, *words)
        assert billed.code == 0, billed
    runs = [
        CellRun(
            run_id=uuid4(), workspace_id="ws_0001", table_id="tbl_1", column_id="col_1", row_id=f"row_{number}",
            action="find_work_email", outcome=Outcome.DATA, ran_at=datetime.now(UTC),
        ) for number in range(20)
    ]  # fmt: skip
    for name, value in kafka.settings("enrichment", home=str(worker.home.path)).items():
        monkeypatch.setenv(variable(name), str(value))
    with CellRunProducer() as producer, Gate(on_unknown="deny", on_stale="deny") as gate:
        for run in runs:
            producer.record(run)
        assert producer.flush(WAIT_S_MAX) == 0
        worker.wait_until_metered()
        gate.wait_ready()
        price = Decimal(gate.check("ws_0001", "find_work_email").price)
        left = str(20_000 - price * len(runs))
        wait_until(lambda: gate.check("ws_0001", "find_work_email").remaining == left, "seen by the gate")
    wait_until(lambda: notifier.received, "told")
    proof = as_user(kafka, "meter", worker.home.path, "reconcile")
    assert proof.code == 0, proof


def test_only_billing_bills(kafka: Secured, worker: WorkerProcess, tmp_path: Path) -> None:
    """An enrichment worker's attempt is refused by the broker; the command says by whom, and why."""
    tried = as_user(kafka, "enrichment", tmp_path, "plan", "set", "ws_0001", "100k")
    assert tried.code == 5
    assert "uthoriz" in tried.err
    assert len(tried.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changed", "code", "told"),
    [
        ({"kafka_password": "guessed"}, 5, "uthentication failed"),
        ({"kafka_ca_file": ""}, 5, "certificate"),
        ({"kafka_ca_file": "nowhere.pem"}, 1, "nowhere.pem"),
        ({"kafka_username": ""}, 1, "KAFKA_USERNAME is empty"),
        ({"kafka_security_protocol": "PLAINTEXT"}, 1, "KAFKA_SECURITY_PROTOCOL is PLAINTEXT"),
    ],
)
def test_what_is_wrong_is_named(kafka: Secured, tmp_path: Path, changed: dict[str, str], code: int, told: str) -> None:
    """One line, for a command as for the worker; and no secret in it."""
    settings = kafka.settings("meter", home=str(tmp_path)) | changed
    for words in (("topics", "--check"), ("worker",)):
        done = creditstream(*words, settings=settings)
        assert (done.code, done.out) == (code, ""), done
        last = done.err.splitlines()[-1]
        assert told in last
        assert password("meter") not in done.err
