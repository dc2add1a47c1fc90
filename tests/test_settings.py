"""Settings: a variable, a bound and a default each; a wrong value is named, a secret is never shown."""

import json
import os
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from creditstream.cli.commands import cli
from creditstream.cli.options import kafka_settings_of
from creditstream.home import Endpoints, Home
from schemas.problem import Problem
from streams.settings import SECRETS, Settings, origins, read_settings, unknown_variables, variable


def test_defaults_work_without_any_variable() -> None:
    """Nobody has to set anything."""
    assert read_settings({}) == Settings()


def test_a_flag_wins_over_the_environment_and_that_over_the_default() -> None:
    """A flag that was not given changes nothing."""
    environ = {"CREDITSTREAM_LINGER_MS": "500", "CREDITSTREAM_API_PORT": "9000"}
    settings = read_settings(environ, api_port=0, home=None)
    assert (settings.linger_ms, settings.api_port, settings.home) == (500, 0, ".creditstream")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CREDITSTREAM_LINGER_MS", "49"),
        ("CREDITSTREAM_LINGER_MS", "soon"),
        ("CREDITSTREAM_PARTITIONS", "0"),
        ("CREDITSTREAM_API_PORT", "65536"),
        ("CREDITSTREAM_RETENTION_GAP", "maybe"),
        ("CREDITSTREAM_TOPIC_PREFIX", "a topic"),
        ("CREDITSTREAM_KAFKA_BOOTSTRAP", ""),
    ],
)
def test_a_value_out_of_its_bounds_is_refused_by_name(name: str, value: str) -> None:
    """The line says which variable and why."""
    with pytest.raises(Problem) as refused:
        read_settings({name: value})
    assert str(refused.value).startswith(f"the settings are wrong: {name}: ")


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("CREDITSTREAM_LINGER_MS", "soon", "Expected `int`, got `str`; it takes 50 to 60000"),
        ("CREDITSTREAM_EPOCH", "-1", "Expected `int` >= 0; it takes 0 or more"),
        ("CREDITSTREAM_LOG_FORMAT", "yaml", "Invalid enum value 'yaml'; it takes auto, json, text"),
        ("CREDITSTREAM_KAFKA_BOOTSTRAP", "", "Expected `str` of length >= 1"),
    ],
)
def test_a_value_out_of_its_bounds_is_told_them(name: str, value: str, why: str) -> None:
    """`config` cannot say them: it reads the settings, too."""
    with pytest.raises(Problem) as refused:
        read_settings({name: value})
    assert str(refused.value) == f"the settings are wrong: {name}: {why}. Correct or unset it."


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    """Without the line break that editors add; a file that is missing, or no text, is named."""
    secret = tmp_path / "password"
    secret.write_text("chosen\n")
    assert read_settings({"CREDITSTREAM_LEDGER_PASSWORD_FILE": str(secret)}).ledger_password == "chosen"
    with pytest.raises(Problem, match="CREDITSTREAM_LEDGER_PASSWORD_FILE"):
        read_settings({"CREDITSTREAM_LEDGER_PASSWORD_FILE": str(tmp_path / "none")})
    secret.write_bytes(b"\xff\xfe")
    with pytest.raises(Problem, match=r"CREDITSTREAM_LEDGER_PASSWORD_FILE=.*it is not UTF-8"):
        read_settings({"CREDITSTREAM_LEDGER_PASSWORD_FILE": str(secret)})


def test_a_secret_that_is_given_itself_wins_over_its_file(tmp_path: Path) -> None:
    """In whatever order the environment has them: `config` names the same one as the origin."""
    secret = tmp_path / "password"
    secret.write_text("of the file")
    both = {"CREDITSTREAM_KAFKA_PASSWORD": "given", "CREDITSTREAM_KAFKA_PASSWORD_FILE": str(secret)}
    for environ in (both, dict(reversed(both.items()))):
        assert read_settings(environ).kafka_password == "given"


def test_config_shows_value_origin_bounds_and_meaning_and_no_secret() -> None:
    """One row for every setting."""
    environ = {variable(secret): "chosen" for secret in SECRETS} | {"CREDITSTREAM_EPOCH": "3"}
    rows = {row.setting: row for row in origins(read_settings(environ, linger_ms=70), environ)}
    assert set(rows) == {variable(field.name) for field in msgspec.structs.fields(Settings)}
    assert all(row.meaning and row.bounds for row in rows.values())
    assert rows["CREDITSTREAM_EPOCH"].origin == "CREDITSTREAM_EPOCH"
    assert rows["CREDITSTREAM_LINGER_MS"].origin == "flag"
    assert rows["CREDITSTREAM_LINGER_MS"].bounds == "50 to 60000"
    assert rows["CREDITSTREAM_LOG_FORMAT"].bounds == "auto, json, text"
    assert {rows[variable(secret)].value for secret in SECRETS} == {"********"}


def test_a_mistyped_variable_is_found() -> None:
    """It is told and ignored: an orchestrator's service links begin like ours."""
    environ = {
        "CREDITSTREAM_LINGERMS": "5",
        "CREDITSTREAM_DEBUG": "1",
        "CREDITSTREAM_LEDGER_PASSWORD_FILE": "x",
        "HOME": "y",
    }
    assert unknown_variables(environ) == ["CREDITSTREAM_LINGERMS"]


def test_commands_go_to_the_kafka_that_the_variable_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wins over that of the home's worker, as for a client: billing's event must not go elsewhere."""
    monkeypatch.setenv("CREDITSTREAM_KAFKA_BOOTSTRAP", "kafka:9")
    home = Home.at(tmp_path)
    with home.hold():
        home.publish(Endpoints("127.0.0.1:5", "http://127.0.0.1:6", os.getpid()))

        assert kafka_settings_of(str(tmp_path)).kafka_bootstrap == "kafka:9"
        (shown,) = [
            row
            for row in json.loads(
                CliRunner().invoke(cli, ["config", "--home", str(tmp_path), "--format", "json"]).stdout
            )
            if row["setting"] == "CREDITSTREAM_KAFKA_BOOTSTRAP"
        ]
        assert (shown["value"], shown["origin"]) == ("kafka:9", "CREDITSTREAM_KAFKA_BOOTSTRAP")
        monkeypatch.delenv("CREDITSTREAM_KAFKA_BOOTSTRAP")
        assert kafka_settings_of(str(tmp_path)).kafka_bootstrap == "127.0.0.1:5"


def test_a_home_that_cannot_be_read_is_a_problem_for_those_who_need_its_kafka(tmp_path: Path) -> None:
    """As it is for those who ask its ledger: what is wrong with the directory."""
    with pytest.raises(Problem, match=r"cannot be read: File name too long\. Choose a directory"):
        kafka_settings_of(str(tmp_path / ("long" * 100)))
