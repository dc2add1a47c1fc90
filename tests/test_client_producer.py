"""The producer on a real Kafka: order and completeness through outages, kills, forks and full disks."""

import gc
import itertools
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from enum import StrEnum
from functools import reduce
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec
import pytest
from aiokafka.partitioner import murmur2
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource

from creditstream.client import CellRunProducer, InvalidRun, RunRefused, outbox
from creditstream.client import producer as producers
from creditstream.client import spool as spools
from creditstream.client.forking import STUCK
from creditstream.client.outbox import Outbox
from creditstream.client.spool import Entry, Spool, prepare_root
from schemas.cell_run import MAX_EVENT_BYTES, CellRun
from schemas.codec import decode_run, encode_run
from schemas.problem import Problem, Unreachable
from streams.kafka.topics import CELL_RUNS, LIMIT_STATES
from streams.settings import Settings, read_settings
from tests.client_kafka import Door, a_run, complaints, first_copies, fresh_settings, make_topics, recorded, wait_until

ROOT: Final = Path(__file__).parent.parent
WORKSPACES: Final = ("ws_1", "ws_2", "ws_3")


@pytest.fixture
def settings(kafka: str, tmp_path: Path) -> Settings:
    """A topic and a home of its own."""
    return fresh_settings(kafka, CELL_RUNS, home=str(tmp_path))


@pytest.fixture
def door(kafka: str) -> Iterator[Door]:
    """A broker that is not there yet."""
    made = Door(kafka)
    yield made
    made.close()


def behind(door: Door, settings: Settings) -> Settings:
    """The settings of somebody who can come to Kafka only through the door."""
    return msgspec.structs.replace(settings, kafka_bootstrap=door.address)


def record(producer: CellRunProducer, *numbers: int) -> None:
    """Each number as one run of one of the workspaces, in turn."""
    for number in numbers:
        producer.record(a_run(number, WORKSPACES[number % 3]))


def in_turn(*numbers: int) -> dict[str, list[int]]:
    """What `first_copies` must say of them."""
    return {WORKSPACES[start]: [n for n in numbers if n % 3 == start] for start in range(3)}


def spool_files(settings: Settings) -> list[Path]:
    """The segments on disk."""
    return sorted((Path(settings.home) / "spool").rglob("*.ndjson"))


def run_program(program: str, settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A worker in a process of its own; ``settings`` is in its hands."""
    head = (
        "import os, signal, socket, sys, threading, time\n"
        "import msgspec\n"
        "from creditstream.client import CellRunProducer, Gate, RunRefused\n"
        "from schemas.problem import Unreachable\n"
        "from streams.settings import Settings\n"
        "from tests.client_kafka import a_run\n"
        "settings = msgspec.json.decode(sys.argv[1], type=Settings)\n"
    )
    command = [sys.executable, "-c", head + program, msgspec.json.encode(settings).decode(), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


def test_a_run_arrives_under_its_workspace_on_its_partition(settings: Settings) -> None:
    """Every run that was recorded is in Kafka once, where the meter expects it, and the counts say so."""
    with CellRunProducer(settings, memory_s_max=60) as producer:
        record(producer, *range(300))
        assert producer.flush(60) == 0
        counts = producer.counts()
    assert (counts.accepted, counts.delivered, counts.refused, counts.waiting_in_memory) == (300, 300, 0, 0)
    for partition, runs in recorded(settings).items():
        for run in runs:
            assert (murmur2(run.workspace_id.encode()) & 0x7FFFFFFF) % settings.partitions == partition
    assert sum(len(runs) for runs in recorded(settings).values()) == 300
    assert first_copies(settings) == in_turn(*range(300))
    assert not (Path(settings.home) / "spool").exists() or spool_files(settings) == []


def test_threads_may_share_it(settings: Settings) -> None:
    """Each thread's runs arrive completely and in its order."""
    with CellRunProducer(settings) as producer:

        def work(thread: int) -> None:
            for number in range(thread * 1000, thread * 1000 + 400):
                producer.record(a_run(number, f"ws_{thread}"))

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert first_copies(settings) == {f"ws_{t}": list(range(t * 1000, t * 1000 + 400)) for t in range(4)}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"workspace_id": ""}, "field `workspace_id`: Expected `str` of length >= 1"),
        ({"row_id": "x" * 129}, "field `row_id`: Expected `str` of length <= 128"),
        ({"table_id": 7}, "field `table_id`: Expected `str`, got `int`"),
        ({"outcome": "maybe"}, "field `outcome`: Invalid enum value 'maybe'; it takes data, no_data, error"),
        ({"run_id": "no-uuid"}, "field `run_id`: Invalid UUID"),
        ({"actor": "\ud800"}, "surrogates not allowed"),
        (
            {"row_id": reduce(lambda inner, _: [inner], range(10_000), [])},
            "field `row_id`: Expected `str`, got `array`",
        ),
        ({"row_id": object()}, "field `row_id`: Expected `str`, got `object`"),
        ({"row_id": b"row_1"}, "field `row_id`: Expected `str`, got `bytes`"),
        ({"workspace_id": UUID(int=1)}, "field `workspace_id`: Expected `str`, got `uuid`"),
    ],
)
def test_a_run_that_would_be_a_dead_letter_is_refused_at_once(
    settings: Settings, fields: dict[str, Any], message: str
) -> None:
    """The worker's author learns it from the call that was wrong, with the field, not from the ledger."""
    with CellRunProducer(settings) as producer:
        with pytest.raises(InvalidRun, match=message):
            producer.record(a_run(1, **fields))
        assert (producer.counts().refused, producer.counts().accepted) == (1, 0)


def test_what_is_no_run_is_refused_too(settings: Settings) -> None:
    """Also where it would look like one in Kafka: an author who hands over a dict learns it in a sentence."""
    with CellRunProducer(settings) as producer:
        with pytest.raises(InvalidRun, match=r"it is not a CellRun but \{'run_id'"):
            producer.record(msgspec.to_builtins(a_run(1)))
        assert (producer.counts().refused, producer.counts().accepted) == (1, 0)


def test_names_that_are_members_of_an_enum_are_text(settings: Settings) -> None:
    """An author may keep actions and workspaces in a StrEnum."""
    name = StrEnum("Names", {"WS": "ws_1"})
    with CellRunProducer(settings) as producer:
        producer.record(a_run(1, name["WS"], action=name["WS"]))
        assert producer.flush(60) == 0
    assert first_copies(settings) == {"ws_1": [1]}


def test_no_valid_run_is_too_large() -> None:
    """With every text at its longest, and escaped, a run is far below the limit."""
    longest = {name: "\x01" * 128 for name in CellRun.__struct_fields__ if name not in ("run_id", "outcome", "ran_at")}
    run = a_run(1, **{**longest, "own_api_key": True})
    assert len(encode_run(run)) < MAX_EVENT_BYTES / 5


def test_an_outage_at_the_start_is_survived_in_order(settings: Settings, door: Door) -> None:
    """Runs go to memory, then to disk; once Kafka is there all of them arrive, each workspace's in order."""
    with CellRunProducer(behind(door, settings), memory_s_max=1) as producer:
        record(producer, *range(100))
        wait_until(lambda: producer.counts().waiting_in_spool == 100, "in the spool")
        assert producer.counts().waiting_in_memory == 0
        assert producer.trouble
        record(producer, *range(100, 200))
        assert producer.flush(0) == 200
        door.open()
        record(producer, *range(200, 300))
        assert producer.flush(60) == 0
        record(producer, *range(300, 400))
        assert producer.flush(60) == 0
        counts = producer.counts()
        assert (counts.accepted, counts.waiting_in_spool, counts.spool_bytes, producer.trouble) == (400, 0, 0, "")
        assert counts.spooled >= 200
    assert first_copies(settings) == in_turn(*range(400))


def test_a_full_memory_spills_in_order(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A burst that memory has no room for takes the way over the disk, and nothing overtakes it."""
    monkeypatch.setattr(outbox, "QUEUE_RUNS_MAX", 20)
    with CellRunProducer(settings) as producer:
        record(producer, *range(300))
        assert producer.flush(60) == 0
        assert producer.counts().spooled > 0
    assert first_copies(settings) == in_turn(*range(300))
    assert spool_files(settings) == []


def test_a_topic_that_does_not_exist_yet_is_waited_for(kafka: str, tmp_path: Path) -> None:
    """Nothing is lost before the topic is made."""
    settings = fresh_settings(kafka, home=str(tmp_path))
    with CellRunProducer(settings, memory_s_max=1) as producer:
        record(producer, *range(30))
        wait_until(lambda: "Unknown topic" in producer.trouble, "told")
        make_topics(settings, CELL_RUNS)
        assert producer.flush(60) == 0
    assert first_copies(settings) == in_turn(*range(30))


def test_a_topic_that_takes_only_what_the_rules_ask_of_it_takes_all(settings: Settings) -> None:
    """Runs travel in batches, and none of these is too large for a topic that takes the largest event."""
    topic = ConfigResource(ConfigResource.Type.TOPIC, settings.topic(CELL_RUNS))
    topic.add_incremental_config(
        ConfigEntry("max.message.bytes", str(MAX_EVENT_BYTES), incremental_operation=AlterConfigOpType.SET)
    )
    admin = AdminClient({"bootstrap.servers": settings.kafka_bootstrap})
    admin.incremental_alter_configs([topic])[topic].result(60)
    with CellRunProducer(settings, memory_s_max=60) as producer:
        for number in range(2000):  # which cannot be compressed to a fraction
            producer.record(a_run(number, column_id=secrets.token_hex(64), row_id=secrets.token_hex(64)))
        assert producer.flush(60) == 0
        assert producer.counts().spooled == 0


FILLS_AND_DIES = """
from creditstream.client import producer as producers
producers.MB = 200_000
producer = CellRunProducer(settings, spool_mb_max=1, memory_s_max=1, write_ahead=sys.argv[2] == "ahead")
accepted = 0
while True:
    try:
        producer.record(a_run(accepted, f"ws_{accepted % 3 + 1}"))
        accepted += 1
        if accepted == 10 and sys.argv[2] != "ahead":
            while producer.counts().waiting_in_memory:
                time.sleep(0.01)
    except RunRefused as refusal:
        assert "the spool is full" in str(refusal), refusal
        break
print(accepted, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("way", ["spool", "ahead"])
def test_kill_9_with_a_full_spool_loses_nothing(settings: Settings, door: Door, way: str) -> None:
    """What a killed process had accepted into its spool is adopted, and sent in order, by the next one."""
    died = run_program(FILLS_AND_DIES, behind(door, settings), way)
    assert died.returncode == -9, died.stderr
    accepted = int(died.stdout)
    assert accepted > 500
    with CellRunProducer(settings) as producer:
        assert producer.counts().adopted == accepted
        record(producer, accepted)
        assert producer.flush(60) == 0
    assert first_copies(settings) == in_turn(*range(accepted + 1))
    assert list((Path(settings.home) / "spool").iterdir()) == []


DIES_AT_WORK = """
producer = CellRunProducer(settings, write_ahead=True)
for number in range(10**6):
    producer.record(a_run(number, f"ws_{number % 3 + 1}"))
    os.write(1, b"%d\\n" % number)
    if producer.counts().delivered > 200:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_with_write_ahead_kill_9_loses_nothing_at_all(settings: Settings) -> None:
    """Killed in full flight, every run for which `record` had returned reaches Kafka in the end."""
    died = run_program(DIES_AT_WORK, settings)
    assert died.returncode == -9
    last = int(died.stdout.split()[-1])
    with CellRunProducer(settings) as producer:
        assert producer.flush(60) == 0
    found = first_copies(settings)
    assert {ws: [n for n in ns if n <= last] for ws, ns in found.items()} == in_turn(*range(last + 1))


def test_a_living_process_adopts_what_a_dead_one_left(
    settings: Settings, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has to be restarted for the runs of a process that does not come back."""
    monkeypatch.setattr(producers, "ADOPT_EVERY_S", 0.1)
    with CellRunProducer(settings) as living:
        died = run_program(FILLS_AND_DIES, behind(door, settings), "spool")
        wait_until(lambda: living.counts().adopted == int(died.stdout), "adopted")
        assert living.flush(60) == 0
    assert first_copies(settings) == in_turn(*range(int(died.stdout)))


FORKS = """
is_up = sys.argv[2] == "True"
producer = CellRunProducer(settings, memory_s_max=30 if is_up else 1)
for number in range(0, 50):
    producer.record(a_run(number))
idle = os.fork()
if not idle:
    producer.close(0)
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(idle, 0)[1]) == 0
child = os.fork()
mine = range(50, 100) if child else range(1000, 1050)
for number in mine:
    producer.record(a_run(number, "ws_1" if child else "ws_2"))
counts = producer.counts()
assert counts.accepted == (100 if child else 50), counts
if is_up:
    producer.flush(60)
else:
    producer.close(0)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
sys.exit(0)
"""


@pytest.mark.parametrize("is_up", [True, False], ids=["up", "down"])
def test_a_forked_child_has_its_own_connection_and_spool(settings: Settings, door: Door, is_up: bool) -> None:
    """Runs of before and after a fork arrive once each, or lie in two spools; both processes end in an orderly way, and
    so does a child that records nothing.
    """
    done = run_program(FORKS, settings if is_up else behind(door, settings), str(is_up))
    assert done.returncode == 0, done.stderr
    if is_up:
        assert sum(len(runs) for runs in recorded(settings).values()) == 150
    else:
        assert len({path.parent for path in spool_files(settings)}) == 2
        with CellRunProducer(settings) as heir:
            assert heir.flush(60) == 0
    assert first_copies(settings) == {"ws_1": list(range(100)), "ws_2": list(range(1000, 1050))}


FORKS_IN_AN_OUTAGE = """
producer = CellRunProducer(settings, memory_s_max=1)
producer.record(a_run(0))
while not producer._candidate:
    time.sleep(0.01)
if child := os.fork():
    producer.close(0)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
producer.record(a_run(1))
while producer._outbox.producer:
    time.sleep(0.01)
open(settings.home + "/waits", "w").close()
os._exit(producer.flush(60))
"""


def test_a_child_of_an_outage_tries_by_a_connection_of_its_own(settings: Settings, door: Door) -> None:
    """Not by the one that its parent tried, which leads nowhere in it: its runs arrive once Kafka is there."""

    def open_once_it_waits() -> None:
        wait_until((Path(settings.home) / "waits").exists, "waiting")
        door.open()

    threading.Thread(target=open_once_it_waits, daemon=True).start()
    done = run_program(FORKS_IN_AN_OUTAGE, behind(door, settings))
    assert (done.returncode, done.stderr.count("Traceback")) == (0, 0)
    assert 1 in first_copies(settings)["ws_1"]  # and its parent's, if it has adopted that


FORKS_AMID_A_RESOLUTION = """
def resolve():
    while True:
        socket.getaddrinfo(b"127.0.0.1", 0, flags=socket.AI_ADDRCONFIG)

for _ in range(2):
    threading.Thread(target=resolve, daemon=True).start()
producer, gate = CellRunProducer(settings), Gate(settings, on_unknown="deny", on_stale="deny")
for number in range(300):
    if child := os.fork():
        if ended := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            os._exit(ended)
        continue
    signal.alarm(30)  # its end, should it wait for ever
    producer.record(a_run(number))
    while not producer.trouble:
        if not producer.flush(0.2):
            os._exit(0)
    producer.record(a_run(1000))
    try:
        gate.wait_ready(4)
    except Unreachable as unreachable:
        print(number, producer.counts().waiting_in_spool, producer.trouble, unreachable, sep=";")
        sys.exit(7)
    os._exit(3)
"""


def test_a_child_that_cannot_resolve_names_says_so_and_spools(settings: Settings) -> None:
    """The parent was in glibc's resolver at the fork, whose lock stays taken: no run waits in memory for nothing."""
    make_topics(settings, LIMIT_STATES)
    done = run_program(FORKS_AMID_A_RESOLUTION, settings)
    if done.returncode == 0:
        pytest.skip("this C library resolves names in every forked child")
    assert done.returncode == 7, done.stderr
    number, spooled, *troubles = done.stdout.split(";")
    assert spooled == "2"
    assert all(STUCK in trouble for trouble in troubles)
    with CellRunProducer(settings) as heir:
        assert heir.flush(60) == 0
    assert first_copies(settings) == {"ws_1": [*range(int(number) + 1), 1000]}


SIGNALLED_AT_ITS_START = """
producer = CellRunProducer(settings)
child = os.fork()
if not child:
    signal.alarm(100)  # its end, should it wait for ever
    plain = producer._open

    def interrupted():
        producer._open = plain
        producer.record(a_run(2))
        return plain()

    producer._open = interrupted
    producer.record(a_run(1))
    producer.close(60)
    os._exit(0)
sys.exit(-os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_handler_that_records_while_a_child_starts_waits_for_nobody(settings: Settings) -> None:
    """A signal that comes while the first run of a forked child opens its connection: both runs arrive."""
    done = run_program(SIGNALLED_AT_ITS_START, settings)
    assert (done.returncode, complaints(done)) == (0, [])
    assert {workspace_id: sorted(numbers) for workspace_id, numbers in first_copies(settings).items()} == {
        "ws_1": [1, 2]
    }


SIGNALLED_AT_WORK = """
class TimeIsUp(BaseException):
    pass

def interrupt(*_):
    if at_work and sys.argv[2] == "raises":
        raise TimeIsUp
    if at_work:
        producer.record(a_run(1000))

at_work = False
producer = CellRunProducer(settings)
signal.signal(signal.SIGALRM, interrupt)
for number in range(1000):
    run = a_run(number)
    try:
        at_work = True
        signal.setitimer(signal.ITIMER_REAL, (1 + number % 40) * 1e-6)
        producer.record(run)
        at_work = False
        print(number)
    except TimeIsUp:
        at_work = False
    producer._wake.clear()  # as the thread does when it falls asleep
signal.setitimer(signal.ITIMER_REAL, 0)
one = threading.Thread(target=producer.record, args=[a_run(2000)], daemon=True)
one.start()
one.join(30)
assert not one.is_alive(), "it waits for ever"
assert producer.flush(60) == 0
"""


@pytest.mark.parametrize("does", ["records", "raises"])
def test_a_signal_in_the_middle_of_a_record_stops_nothing(settings: Settings, does: str) -> None:
    """Whenever it comes, and whether its handler records, too, or raises, as time limits do: nobody waits for ever, and
    what was accepted arrives.
    """
    done = run_program(SIGNALLED_AT_WORK, settings, does)
    assert (done.returncode, complaints(done)) == (0, [])
    assert {int(number) for number in done.stdout.split()} | {2000} <= set(first_copies(settings)["ws_1"])


NO_MORE_THREADS = """
from confluent_kafka import KafkaError, KafkaException
from creditstream.client import producer as producers
producer = CellRunProducer(settings)
child = os.fork()
if not child:
    signal.alarm(100)  # its end, should it wait for ever
    refused = KafkaException(KafkaError(KafkaError._CRIT_SYS_RESOURCE)), RuntimeError("can't start new thread")

    def refuses(_):
        raise refused[sys.argv[2] == "python"]

    place, name = (threading.Thread, "start") if sys.argv[2] == "python" else (producers, "Producer")
    plain = getattr(place, name)
    setattr(place, name, refuses)
    producer.record(a_run(1))
    producer.record(a_run(2))
    print(producer.counts().waiting_in_spool, producer.trouble, flush=True)
    setattr(place, name, plain)
    producer.record(a_run(3))
    os._exit(producer.flush(60))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize(("whose", "said"), [("kafka", "resource"), ("python", "can't start new thread")])
def test_a_child_that_gets_no_thread_spools(settings: Settings, whose: str, said: str) -> None:
    """Where the system gives neither librdkafka nor Python a thread: runs are taken, and go once it gives some."""
    done = run_program(NO_MORE_THREADS, settings, whose)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout.lower()
    assert done.stdout.startswith("2 ")
    assert first_copies(settings) == {"ws_1": [1, 2, 3]}


LEAVES_A_CHILD = """
producer = CellRunProducer(settings, write_ahead=True)
for number in range(10):
    producer.record(a_run(number))
child = os.fork()
if not child:
    os.close(1)
    os.close(2)
    time.sleep(60)
    os._exit(0)
print(child, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_does_not_keep_the_spool_of_its_dead_parent(settings: Settings, door: Door) -> None:
    """The lock of a spool goes with the process that wrote it, whoever was forked from it and lives on."""
    died = run_program(LEAVES_A_CHILD, behind(door, settings))
    try:
        assert died.returncode == -9, died.stderr
        with CellRunProducer(settings) as heir:
            assert heir.counts().adopted == 10
            assert heir.flush(60) == 0
    finally:
        os.kill(int(died.stdout), signal.SIGKILL)
    assert first_copies(settings) == {"ws_1": list(range(10))}


FULL_DISK = """
import resource
producer = CellRunProducer(settings, memory_s_max=1)
producer.record(a_run(0))
while not producer.counts().waiting_in_spool:
    time.sleep(0.01)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
accepted = [0]
for number in range(1, 50):
    try:
        producer.record(a_run(number))
        accepted.append(number)
    except RunRefused as refusal:
        said = str(refusal)
assert producer.counts().refused == 50 - len(accepted) > 0
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
producer.record(a_run(99))
producer.close(0)
print(said)
print(*accepted, 99)
"""


def test_a_full_disk_is_said_and_counted(settings: Settings, door: Door) -> None:
    """While the disk takes nothing runs are refused, in one line; those before and after it are safe."""
    done = run_program(FULL_DISK, behind(door, settings))
    assert done.returncode == 0, done.stderr
    said, accepted = done.stdout.splitlines()
    assert said.startswith("the run was not recorded: the spool cannot be written: File too large. Free space")
    with CellRunProducer(settings) as heir:
        assert heir.flush(60) == 0
    assert first_copies(settings) == {"ws_1": [int(number) for number in accepted.split()]}


def test_a_run_that_is_not_known_to_be_on_disk_is_refused(
    settings: Settings, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk does not confirm, the caller hears it, although the run may arrive: a copy is not charged twice."""

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with CellRunProducer(behind(door, settings), write_ahead=True) as producer:
        record(producer, 0)
        monkeypatch.setattr(spools.os, "fsync", fail)
        with pytest.raises(RunRefused, match="the spool cannot be written: Input/output error"):
            record(producer, 1)
        monkeypatch.undo()
        assert (producer.counts().accepted, producer.counts().refused) == (1, 1)
        record(producer, 1)
        door.open()
        assert producer.flush(60) == 0
    assert first_copies(settings) == {"ws_1": [0], "ws_2": [1]}


ENDS_WITHOUT_CLOSING = """
producer = CellRunProducer(settings, on_full=sys.argv[2])
for number in range(30):
    producer.record(a_run(number))
"""


def test_a_program_that_just_ends_sends_everything(settings: Settings) -> None:
    """Forgetting to close loses nothing."""
    done = run_program(ENDS_WITHOUT_CLOSING, settings, "spool")
    assert (done.returncode, complaints(done)) == (0, [])
    assert first_copies(settings) == {"ws_1": list(range(30))}


def test_a_program_that_just_ends_says_what_it_loses(tmp_path: Path) -> None:
    """Without a spool, and without Kafka: how many runs, on standard error."""
    nobody = read_settings({}, kafka_bootstrap="127.0.0.1:1", home=str(tmp_path))
    hurries = "from creditstream.client import producer as producers\nproducers.FLUSH_S_MAX = 0\n"
    done = run_program(hurries + ENDS_WITHOUT_CLOSING, nobody, "raise")
    assert "30 accepted runs are lost" in done.stderr


def test_a_close_in_an_outage_leaves_all_to_the_spool(settings: Settings, door: Door) -> None:
    """What Kafka does not take by then is on disk, also what was only in memory."""
    producer = CellRunProducer(behind(door, settings))
    record(producer, *range(30))
    producer.close(0)
    producer.close()
    assert len(spool_files(settings)) == 1
    with pytest.raises(RunRefused, match="the producer is closed"):
        record(producer, 30)
    with CellRunProducer(settings) as heir:
        assert heir.flush(60) == 0
    assert first_copies(settings) == in_turn(*range(30))


def test_who_changes_its_directory_keeps_its_spool(
    settings: Settings, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a daemon does: where the spool lies is settled when the producer is made, and all of it is sent from there."""
    monkeypatch.chdir(tmp_path)
    with CellRunProducer(behind(door, settings), write_ahead=True, spool="spool") as producer:
        record(producer, *range(5))
        monkeypatch.chdir("/")
        record(producer, *range(5, 10))
        door.open()
        assert producer.flush(60) == 0
    assert first_copies(settings) == in_turn(*range(10))
    assert not spool_files(settings)


def test_a_close_waits_only_for_what_would_be_lost(settings: Settings, door: Door) -> None:
    """Where all is on disk, and Kafka gone, nothing is waited for; runs without a spool are, until Kafka is there."""
    spooled = CellRunProducer(behind(door, settings), memory_s_max=1)
    in_memory = CellRunProducer(behind(door, settings), memory_s_max=1, on_full="block")
    record(spooled, *range(30))
    record(in_memory, *range(300, 330))
    for producer in (spooled, in_memory):
        wait_until(lambda producer=producer: producer._outbox.producer is None, "taken back")
    started_s = time.monotonic()
    spooled.close(60)
    assert time.monotonic() - started_s < 30
    threading.Timer(0.2, door.open).start()
    in_memory.close(60)
    assert first_copies(settings) == in_turn(*range(300, 330))


def test_an_idle_producer_sleeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing to do its thread takes no processor from the enrichment, also once it was woken."""
    turns, plain = itertools.count(), Outbox.hand_over

    def counted(outbox: Outbox) -> bool:
        next(turns)
        return plain(outbox)

    monkeypatch.setattr(Outbox, "hand_over", counted)
    nobody = read_settings({}, kafka_bootstrap="127.0.0.1:1", home=str(tmp_path))
    with CellRunProducer(nobody) as producer:
        producer.flush(0)
        time.sleep(1)
    assert next(turns) < 10


def test_a_closed_producer_is_forgotten(tmp_path: Path) -> None:
    """Whoever makes many keeps none of them; nor is a loss that was told told again at the end of the program. What a
    child would record by it nobody would send: it is refused there, too.
    """
    producer = CellRunProducer(read_settings({}, kafka_bootstrap="127.0.0.1:1", home=str(tmp_path)))
    producer.close(0)
    producer.after_fork()  # which a child does with its copy
    with pytest.raises(RunRefused, match="the producer is closed"):
        producer.record(a_run(1))
    forgotten = weakref.ref(producer)
    del producer
    gc.collect()
    assert forgotten() is None


CLOSES_FOR_LONG = """
producer = CellRunProducer(settings, memory_s_max=600)
for number in range(30):
    producer.record(a_run(number))
signal.signal(signal.SIGALRM, signal.default_int_handler)
signal.setitimer(signal.ITIMER_REAL, 0.5)
producer.close(600)
"""


def test_who_interrupts_a_close_loses_nothing(settings: Settings, door: Door) -> None:
    """Ctrl-C while the last runs are being sent leaves them to the spool."""
    done = run_program(CLOSES_FOR_LONG, behind(door, settings))
    assert done.stderr.endswith("KeyboardInterrupt\n")
    with CellRunProducer(settings) as heir:
        assert heir.counts().adopted == 30
        assert heir.flush(60) == 0
    assert first_copies(settings) == {"ws_1": list(range(30))}


CLOSES_IN_A_DAEMON = """
import threading
from creditstream.client import producer as producers
producers.FLUSH_S_MAX = 1
producer = CellRunProducer(settings, memory_s_max=600)
for number in range(30):
    producer.record(a_run(number))
threading.Thread(target=producer.close, args=[600], daemon=True).start()
time.sleep(0.5)
"""


def test_a_program_that_ends_while_a_daemon_closes_loses_nothing(settings: Settings, door: Door) -> None:
    """The thread is gone before its close is over: the program's end leaves the runs to the spool."""
    done = run_program(CLOSES_IN_A_DAEMON, behind(door, settings))
    assert (done.returncode, complaints(done)) == (0, [])
    with CellRunProducer(settings) as heir:
        assert heir.counts().adopted == 30
        assert heir.flush(60) == 0
    assert first_copies(settings) == {"ws_1": list(range(30))}


def test_who_is_impatient_twice_loses_nothing(settings: Settings, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C, while the thread is waited for, still leaves the runs to the spool."""
    producer = CellRunProducer(behind(door, settings), memory_s_max=1000)
    record(producer, *range(30))
    thread = producer._thread
    assert thread

    def interrupted(timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(thread, "join", interrupted)
    with pytest.raises(KeyboardInterrupt):
        producer.close(0)
    with CellRunProducer(settings) as heir:
        assert heir.counts().adopted == 30


def test_a_producer_that_cannot_be_made_holds_no_orphans(settings: Settings) -> None:
    """With wrong options of Kafka it has adopted nothing: the next one does."""
    root = Path(settings.home) / "spool"
    prepare_root(root)
    dead = Spool(root, settings.topic(CELL_RUNS), 1_000_000)
    dead.append(encode_run(a_run(0)))
    dead.close()
    with pytest.raises(Problem, match="Kafka options refused"):
        CellRunProducer(settings, kafka={"no.such.option": 1})
    with CellRunProducer(settings) as producer:
        assert producer.counts().adopted == 1


TOO_FEW_DESCRIPTORS = """
import resource
from pathlib import Path
from creditstream.client.spool import Spool
from schemas.codec import encode_run
from schemas.problem import Problem

def open_spool():
    return Spool(Path(settings.home) / "spool", settings.topic_prefix + "cell-runs", 10**6)

dead = open_spool()
dead.append(encode_run(a_run(0)))
dead.close()
used = len(os.listdir("/proc/self/fd")) - 1
for more in range(4):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, 4096))
    try:
        CellRunProducer(settings).close(0)
        said = "made"
    except Problem as problem:
        said = problem.why
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (4096, 4096))
    heir = open_spool()
    print(said, heir.adopt(heir.find_orphans()), sep=": ")
    heir.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts its descriptors in /proc")
def test_a_failed_adoption_gives_its_locks_up(settings: Settings, door: Door) -> None:
    """Wherever the descriptors end while orphans are taken over: a Problem says so, and others can adopt them."""
    done = run_program(TOO_FEW_DESCRIPTORS, behind(door, settings))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == ["Too many open files: 1"] * 2
    assert {line.rpartition(": ")[2] for line in done.stdout.splitlines()} == {"1"}


CLOSES_ON_A_FULL_DISK = """
import resource
from pathlib import Path
from creditstream.client.spool import Spool
from schemas.codec import encode_run
from schemas.problem import Unreachable
producer = CellRunProducer(settings, memory_s_max=1000)
dead = Spool(Path(settings.home) / "spool", settings.topic_prefix + "cell-runs", 10**6)
dead.append(encode_run(a_run(0)))
dead.close()
for number in range(1, 31):
    producer.record(a_run(number))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
try:
    producer.close(0)
except Unreachable as problem:
    print(problem)
"""


def test_who_closes_over_a_full_disk_hears_what_is_lost(settings: Settings, door: Door) -> None:
    """How many runs, why, and what to do; what lay on disk before is safe, and nothing half written stays there."""
    done = run_program(CLOSES_ON_A_FULL_DISK, behind(door, settings))
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "30 accepted runs are lost: the spool cannot be written: File too large. "
        "Record them again, under the same run ids.\n"
    )
    with CellRunProducer(settings) as heir:
        assert heir.counts().adopted == 1
        assert heir.flush(60) == 0
    assert first_copies(settings) == {"ws_1": [0]}


def test_without_a_spool_a_loss_is_told(settings: Settings, door: Door) -> None:
    """Whoever chose no spool hears at the end how many runs were lost."""
    producer = CellRunProducer(behind(door, settings), on_full="raise", memory_s_max=1)
    record(producer, *range(30))
    wait_until(lambda: producer.trouble, "stuck")
    with pytest.raises(Unreachable, match="30 accepted runs are lost"):
        producer.close(0)
    assert not (Path(settings.home) / "spool").exists()


def test_raise_and_block_bound_the_memory(settings: Settings, door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room "raise" refuses at once and "block" after its time; with room again both go on in order."""
    monkeypatch.setattr(outbox, "QUEUE_RUNS_MAX", 30)
    impatient = CellRunProducer(behind(door, settings), on_full="raise", memory_s_max=1)
    patient = CellRunProducer(behind(door, settings), on_full="block", block_s_max=1, memory_s_max=1)
    for producer, start in ((impatient, 0), (patient, 300)):
        record(producer, *range(start, start + 30))
        with pytest.raises(RunRefused, match="30 runs wait in memory"):
            record(producer, start + 30)
        assert producer.counts().refused == 1
    door.open()
    wait_until(lambda: impatient.counts().delivered, "room")
    monkeypatch.undo()
    record(impatient, *range(30, 60))
    record(patient, *range(330, 360))
    for producer in (impatient, patient):
        producer.close(60)
    found = first_copies(settings)
    assert {ws: [n for n in ns if n < 300] for ws, ns in found.items()} == in_turn(*range(60))
    assert {ws: [n for n in ns if n >= 300] for ws, ns in found.items()} == in_turn(*range(300, 360))


def test_who_waits_for_room_is_refused_when_it_is_closed(
    settings: Settings, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under "block", `close` wakes every thread that waits, and they hear what any caller hears after it."""
    monkeypatch.setattr(outbox, "QUEUE_RUNS_MAX", 3)
    producer = CellRunProducer(behind(door, settings), on_full="block", block_s_max=600)
    record(producer, *range(3))
    heard: list[str] = []

    def work(number: int) -> None:
        with pytest.raises(RunRefused) as refusal:
            record(producer, number)
        heard.append(str(refusal.value))

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in (3, 4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(producer._outbox._changed._waiters) == 2, "waiting")  # type: ignore[attr-defined]
    with pytest.raises(Unreachable, match="3 accepted runs are lost"):
        producer.close(0)
    for thread in threads:
        thread.join(10)
    assert heard == ["the run was not recorded: the producer is closed. Record before closing it."] * 2
    assert (producer.counts().accepted, producer.counts().refused) == (3, 2)


def test_a_defect_does_not_end_the_thread(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw is logged once, with its traceback, can be seen meanwhile, and holds up nothing for ever."""
    read = Spool.read
    is_told = threading.Event()

    def read_badly(spool: Spool, runs_max: int) -> list[Entry]:
        if not is_told.is_set():
            raise ZeroDivisionError("a defect")
        return read(spool, runs_max)

    monkeypatch.setattr(Spool, "read", read_badly)
    with CellRunProducer(settings, write_ahead=True) as producer:
        record(producer, *range(30))
        wait_until(lambda: producer.trouble == "ZeroDivisionError('a defect')", "in trouble")
        assert producer.counts().waiting_in_spool > 0
        is_told.set()
        assert producer.flush(60) == 0
        assert producer.trouble == ""
    assert first_copies(settings) == in_turn(*range(30))
    [said] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert said.exc_info
    assert said.exc_info[0] is ZeroDivisionError


def test_damage_in_the_spool_holds_up_no_run(
    settings: Settings, door: Door, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a line that is no run, and a segment that the disk does not give, all runs reach Kafka; both are kept, and
    said, and counted.
    """
    monkeypatch.setattr(spools, "SEGMENT_BYTES", 3000)
    dead = CellRunProducer(behind(door, settings), write_ahead=True)
    record(dead, *range(60))
    dead.close(0)
    deep, hidden, *_ = spool_files(settings)
    lost = [decode_run(line).run_id.int - (1 << 64) for line in hidden.read_bytes().splitlines()]
    lines = deep.read_bytes().splitlines()
    deep.write_bytes(b"\n".join([lines[0], b'{"x":' + b"[" * 100_000, *lines[1:], b""]))
    hidden.unlink()
    hidden.mkdir()
    with CellRunProducer(settings) as producer:
        assert producer.flush(60) == 0
        record(producer, 60)
        assert producer.flush(60) == 0
        assert producer.counts().unreadable_segments == 1
    assert first_copies(settings) == in_turn(*(number for number in range(61) if number not in lost))
    left = [path.name for path in (Path(settings.home) / "spool").rglob("*") if path.suffix != ""]
    assert left == [f"{deep.parent.name}-{deep.name}.unreadable", hidden.name]
    assert f"{deep}, byte {len(lines[0]) + 1}: not a cell run" in caplog.text
    assert f"{hidden} cannot be read: Is a directory" in caplog.text


def test_options_that_contradict_each_other_are_refused(settings: Settings) -> None:
    """Nothing can be written ahead without a spool, and what makes the producer right cannot be changed."""
    with pytest.raises(ValueError, match="write_ahead needs a spool"):
        CellRunProducer(settings, on_full="raise", write_ahead=True)
    with pytest.raises(ValueError, match="on_full='drop'"):
        CellRunProducer(settings, on_full="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 or more"):
        CellRunProducer(settings, memory_s_max=0)
    for option in ("partitioner", "message.max.bytes"):
        with pytest.raises(Problem, match=f"{option} may not be changed"):
            CellRunProducer(settings, kafka={option: "1000"})
    with pytest.raises(Problem, match=r"Kafka options refused: .*no\.such\.property"):
        CellRunProducer(settings, kafka={"no.such.property": "x"})
