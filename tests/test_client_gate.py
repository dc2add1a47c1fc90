"""The gate on a real Kafka: when it is ready, what it follows, what it says when it cannot know."""

import gc
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import pytest
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from creditstream.client import Because, Gate
from creditstream.client.states import StateMirror
from creditstream.home import Endpoints, Home, settings_of
from schemas.ledger import Pool
from schemas.limits import state_key
from schemas.problem import Problem, Unreachable
from streams.kafka.topics import CELL_RUNS, LIMIT_STATES
from streams.settings import Settings, read_settings
from tests.client_kafka import as_of, fresh_settings, limit_state, make_topics, publish, record_of, wait_until

ROOT: Final = Path(__file__).parent.parent
NOWHERE: Final = read_settings({}, kafka_bootstrap="127.0.0.1:1")

FORKS = """
import os, sys, threading
import msgspec
from creditstream.client import Because, Gate
from streams.settings import Settings
gate = Gate(msgspec.json.decode(sys.argv[1], type=Settings), on_unknown="deny", on_stale="deny", stale_after_s=600)
gate.wait_ready(60)
assert gate.check("ws_1", "enrich_person"), gate.check("ws_1", "enrich_person")

def asks():
    answer = gate.check("ws_1", "enrich_person")
    assert answer.reason == Because.STALE, answer
    gate.wait_ready(60)
    assert gate.check("ws_1", "enrich_person").reason == Because.ENOUGH
    print("child", flush=True)

def waits_in_many_threads():
    ready, together = [], threading.Barrier(8)

    def work():
        together.wait()
        gate.wait_ready(60)
        ready.append(gate.is_ready)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ready == [True] * 8, ready

for does in (asks, waits_in_many_threads):
    child = os.fork()
    if child == 0:
        does()
        sys.exit(0)
    assert gate.check("ws_1", "enrich_person")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert gate.check("ws_1", "enrich_person")
gate.close()
print("parent")
"""


def open_gate(settings: Settings, stale_after_s: int = 600) -> Gate:
    """A gate that denies whatever it does not know."""
    return Gate(settings, on_unknown="deny", on_stale="deny", stale_after_s=stale_after_s)


def test_it_is_ready_once_it_holds_all_partitions(kafka: str) -> None:
    """After `wait_ready` every state that was there is held, of every partition, the newest of each workspace."""
    settings = fresh_settings(kafka, LIMIT_STATES, partitions=4)
    old = (record_of(limit_state(f"ws_{number}", "7", 1)) for number in range(300))
    new = (record_of(limit_state(f"ws_{number}", str(number), 2)) for number in range(300))
    publish(settings, [*old, *new, (state_key("ws_5", Pool.ENRICHMENT), None)])
    with open_gate(settings) as gate:
        gate.wait_ready()
        assert gate.is_ready
        left = [gate.check(f"ws_{number}", "enrich_person").remaining for number in range(300)]
        assert left == [None if number == 5 else str(number) for number in range(300)]


def test_an_empty_topic_is_ready_too(kafka: str) -> None:
    """Where there is no state yet, nothing is stale: every workspace is unknown."""
    with open_gate(fresh_settings(kafka, LIMIT_STATES)) as gate:
        gate.wait_ready()
        assert gate.check("ws_1", "enrich_person").reason == Because.UNKNOWN_WORKSPACE


def test_what_took_long_to_read_is_not_stale_when_it_is_ready(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that reads for longer than `stale_after_s` is ready only once it has asked again."""
    settings = fresh_settings(kafka, LIMIT_STATES, partitions=1)
    publish(settings, [record_of(limit_state(f"ws_{number}")) for number in range(300)])
    apply = StateMirror.apply

    def apply_slowly(mirror: StateMirror, key: bytes | None, value: bytes | None) -> None:
        time.sleep(0.02)
        apply(mirror, key, value)

    monkeypatch.setattr(StateMirror, "apply", apply_slowly)
    with open_gate(settings, stale_after_s=4) as gate:
        gate.wait_ready(60)
        assert gate.check("ws_299", "enrich_person").reason == Because.ENOUGH


def test_it_follows_while_others_ask(kafka: str) -> None:
    """Threads that check without end see each workspace's balance only fall, as it was published."""
    settings = fresh_settings(kafka, LIMIT_STATES)
    wrong: list[int] = []
    enough = threading.Event()
    with open_gate(settings) as gate:
        gate.wait_ready()
        publish(settings, [record_of(limit_state(remaining="500", seen=0))])
        wait_until(lambda: gate.check("ws_1", "enrich_person"), "followed")

        def ask() -> None:
            last = 500_000
            while not enough.is_set():
                found = gate.check("ws_1", "enrich_person").remaining_millicredits
                if not 0 <= found <= last:
                    wrong.append(found)
                last = found

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        publish(settings, [record_of(limit_state(remaining=str(500 - n), seen=n)) for n in range(501)])
        wait_until(lambda: gate.check("ws_1", "enrich_person").reason == Because.EXHAUSTED, "exhausted")
        enough.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_without_kafka_it_answers_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    """On a dead address checks are stale at once, and waiting ends with one line that a person can act on."""
    with open_gate(NOWHERE) as gate:
        assert gate.check("ws_1", "enrich_person").reason == Because.STALE
        assert gate.check("ws_1", "hubspot_send")
        with pytest.raises(Unreachable, match=r"the gate is not ready after 1 s: .*127\.0\.0\.1:1.*CREDITSTREAM_KAFKA"):
            gate.wait_ready(1)
        wait_until(lambda: "the gate has trouble" in caplog.text, "told")


def test_an_answer_ends_no_trouble_that_came_after_its_question(kafka: str) -> None:
    """It knows nothing of it, and the log would tell of one trouble twice; the next answer does."""
    with open_gate(fresh_settings(kafka, LIMIT_STATES)) as gate:
        gate.wait_ready()
    follower = gate._follower
    assert follower
    admin = AdminClient({"bootstrap.servers": kafka})  # the thread has ended: its turns are taken here
    for reason in ("gone", ""):
        ends = follower._confirm(None, admin, 2)
        assert ends
        if reason:
            follower.trouble.note(reason)
        wait_until(ends.is_answered, "answered")
        follower._confirm(ends, admin, 2)
        assert follower.trouble.reason == reason


def test_a_question_that_fails_leaves_no_handle_to_the_garbage_collector(kafka: str) -> None:
    """A forked child that collects what its parent left would destroy the parent's handle, and end or hang by it."""
    with open_gate(fresh_settings(kafka)) as gate:
        follower = gate._follower
    assert follower

    def ask() -> weakref.ref[AdminClient]:
        admin = AdminClient({"bootstrap.servers": kafka})
        ends = follower._confirm(None, admin, 2)
        assert ends
        wait_until(ends.is_answered, "answered")
        with suppress(KafkaException):  # there is no topic
            follower._confirm(ends, admin, 2)
        return weakref.ref(admin)

    gc.disable()
    try:
        assert ask()() is None
    finally:
        gc.enable()


def test_a_topic_that_does_not_exist_yet_is_waited_for(kafka: str) -> None:
    """A gate may start before the meter has ever run, says so, and is ready once the topic is there."""
    settings = fresh_settings(kafka)
    with open_gate(settings) as gate:
        assert gate._follower
        trouble = gate._follower.trouble
        wait_until(lambda: "Unknown topic" in trouble.reason, "told that there is no topic")
        with pytest.raises(Unreachable, match=r"Unknown topic or partition \(.*limit-states"):
            gate.wait_ready(0)
        make_topics(settings, LIMIT_STATES)
        gate.wait_ready(60)


def test_a_topic_that_is_made_anew_is_read_from_its_beginning(kafka: str) -> None:
    """Offsets of the old topic mean nothing in the new one, however long that already is."""
    settings = fresh_settings(kafka, LIMIT_STATES, partitions=1)
    publish(settings, [record_of(limit_state("ws_1", "1", n)) for n in range(20)])
    topic = settings.topic(LIMIT_STATES)
    with open_gate(settings) as gate:
        gate.wait_ready()
        admin = AdminClient({"bootstrap.servers": kafka})
        admin.delete_topics([topic])[topic].result(60)
        wait_until(lambda: not gate._positions, "told that the topic is gone")
        make_topics(settings, LIMIT_STATES)
        first = record_of(limit_state("ws_1", "2", 0, as_of=as_of(0, "new")))
        publish(settings, [first, *(record_of(limit_state("ws_2", "3", n)) for n in range(40))])
        wait_until(lambda: gate.check("ws_1", "enrich_person").remaining == "2", "read anew")


def test_a_gate_that_no_longer_hears_is_stale(kafka: str) -> None:
    """A closed gate answers with what it holds until that is older than `stale_after_s`; its thread is gone."""
    settings = fresh_settings(kafka, LIMIT_STATES)
    publish(settings, [record_of(limit_state())])
    gate = open_gate(settings, stale_after_s=2)
    gate.wait_ready()
    wait_until(lambda: gate.check("ws_1", "enrich_person"), "fresh")
    gate.close()
    wait_until(lambda: gate.check("ws_1", "enrich_person").reason == Because.STALE, "stale")
    answer = gate.check("ws_1", "enrich_person")
    assert answer.age_ms is not None
    assert answer.age_ms >= 2000  # whole milliseconds, truncated
    assert gate._follower
    assert not gate._follower.is_alive()


def test_a_clock_that_is_set_back_makes_nothing_fresh(kafka: str) -> None:
    """How long nothing was heard of Kafka does not depend on the machine's wall clock."""
    settings = fresh_settings(kafka, LIMIT_STATES)
    publish(settings, [record_of(limit_state())])
    back_ns = 0
    with Gate(
        settings, on_unknown="deny", on_stale="deny", stale_after_s=2, clock=lambda: time.time_ns() - back_ns
    ) as gate:
        gate.wait_ready()
        back_ns = 3600 * 10**9
        wait_until(lambda: gate.check("ws_1", "enrich_person"), "fresh, with the clock set back")
    wait_until(lambda: gate.check("ws_1", "enrich_person").reason == Because.STALE, "stale")


def test_a_defect_does_not_end_the_gate(
    kafka: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What nobody foresaw makes the gate stale, is logged once with its traceback, and when it is over the gate goes on
    where it was.
    """
    settings = fresh_settings(kafka, LIMIT_STATES)
    publish(settings, [record_of(limit_state())])
    apply = StateMirror.apply

    def apply_badly(mirror: StateMirror, key: bytes | None, value: bytes | None) -> None:
        if value and b"ws_2" in value:
            raise ZeroDivisionError("a defect")
        apply(mirror, key, value)

    with open_gate(settings, stale_after_s=2) as gate:
        gate.wait_ready()
        with monkeypatch.context() as broken:
            broken.setattr(StateMirror, "apply", apply_badly)
            publish(settings, [record_of(limit_state("ws_2", "5"))])
            wait_until(lambda: gate.check("ws_1", "enrich_person").reason == Because.STALE, "stale")
        wait_until(lambda: gate.check("ws_2", "enrich_person").remaining == "5", "followed")
    [said] = [record for record in caplog.records if record.levelname == "ERROR"]
    assert said.exc_info
    assert said.exc_info[0] is ZeroDivisionError


def test_a_forked_child_follows_by_itself(kafka: str) -> None:
    """In a child the answers are stale until its own follower has caught up, for which any number of threads may wait;
    both processes end in an orderly way.
    """
    settings = fresh_settings(kafka, LIMIT_STATES)
    publish(settings, [record_of(limit_state())])
    done = subprocess.run(
        [sys.executable, "-c", FORKS, msgspec.json.encode(settings).decode()],
        capture_output=True, text=True, timeout=120, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "child\nparent\n", "")


def test_a_gate_that_finds_no_thread_tries_again(kafka: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a child of a process with a bound of threads: a check is stale meanwhile, and raises nothing."""
    settings = fresh_settings(kafka, LIMIT_STATES)
    publish(settings, [record_of(limit_state())])

    def refuses(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with Gate(settings, on_unknown="deny", on_stale="deny") as gate:
        gate.wait_ready()
        assert gate._follower
        gate._follower.stop()  # a child has none
        gate.after_fork()
        with monkeypatch.context() as bounded:
            bounded.setattr(threading.Thread, "start", refuses)
            assert gate.check("ws_1", "enrich_person").reason == Because.STALE
        assert gate.check("ws_1", "enrich_person").reason == Because.STALE
        gate.wait_ready()
        assert gate.check("ws_1", "enrich_person")
    with pytest.raises(Unreachable, match="the gate is closed"):
        gate.wait_ready()


def test_options_that_are_the_contract_cannot_be_changed() -> None:
    """TLS and the like are the caller's; what makes the gate right is not."""
    with pytest.raises(Problem, match=r"Kafka options refused: auto\.offset\.reset may not be changed"):
        Gate(NOWHERE, on_unknown="deny", on_stale="deny", kafka={"auto.offset.reset": "latest"})


def test_what_would_never_be_ready_is_refused_at_once() -> None:
    """Options that are none, and a time that no answer of Kafka's can be younger than: with ``on_stale`` "allow" such a
    gate says yes to everybody for ever.
    """
    for options in ({"no.such.property": 1}, {"ssl.key.pem": "x", "retry.backoff.ms": "soon"}):
        with pytest.raises(Problem, match=r"Kafka options refused: .*(no\.such\.property|retry\.backoff\.ms)"):
            Gate(NOWHERE, on_unknown="deny", on_stale="allow", kafka=options)
    for seconds in (0, -1, 1):
        with pytest.raises(ValueError, match=f"stale_after_s={seconds} is not 2 or more"):
            Gate(NOWHERE, on_unknown="deny", on_stale="allow", stale_after_s=seconds)


def test_kafka_is_found_by_environment_or_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable wins; without it, the process that holds the home says where its Kafka is; else the default."""
    for name in ("CREDITSTREAM_KAFKA_BOOTSTRAP", "CREDITSTREAM_TOPIC_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CREDITSTREAM_HOME", str(tmp_path))
    assert settings_of().kafka_bootstrap == "127.0.0.1:9092"
    home = Home.at(None)
    with home.hold():
        import os

        home.publish(Endpoints("127.0.0.1:5", "http://127.0.0.1:6", os.getpid()))
        assert settings_of().kafka_bootstrap == "127.0.0.1:5"
        monkeypatch.setenv("CREDITSTREAM_KAFKA_BOOTSTRAP", "kafka:9")
        assert settings_of().kafka_bootstrap == "kafka:9"
    assert settings_of().topic_prefix + CELL_RUNS == "cell-runs"
