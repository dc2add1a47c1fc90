"""Every setting there is: an environment variable with a unit in its name, a bound, and a default that works.

Secrets may also be given as ``<NAME>_FILE``, the path of a file that holds the value. Flags of the command line
write the same fields. ``creditstream config`` prints what is in force and where each value came from.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from schemas.catalogue import EXAMPLE_CATALOGUES
from schemas.codec import choices
from schemas.plan import EXAMPLE_PLANS
from schemas.problem import Problem

PREFIX: Final = "CREDITSTREAM_"
DEBUG_VARIABLE: Final = PREFIX + "DEBUG"
"""Set to anything: the command line shows the trace of a failure."""

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{0,64}$")]
"""What Kafka allows in a topic name, or nothing."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's settings; immutable once read."""

    home: Annotated[str, Meta(description="directory of all embedded state")] = ".creditstream"
    kafka_bootstrap: Annotated[str, Meta(min_length=1, description="host:port[,host:port] of the brokers")] = (
        "127.0.0.1:9092"
    )
    kafka_security_protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], Meta(description="as Kafka names it; SSL is TLS")
    ] = "PLAINTEXT"
    kafka_sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], Meta(description="how the user logs in")
    ] = "SCRAM-SHA-512"
    kafka_username: Annotated[str, Meta(description="user of the SASL protocols; empty: none")] = ""
    kafka_password: Annotated[str, Meta(description="its password (secret)")] = ""
    kafka_ca_file: Annotated[str, Meta(description="PEM file of the brokers' CA; empty: the system's")] = ""
    ledger_url: Annotated[str, Meta(description="http(s)://user@host:port/database, or empty for chDB in the home")] = (
        ""
    )
    ledger_password: Annotated[str, Meta(description="password of the ledger's user (secret)")] = ""
    catalogue_dir: Annotated[str, Meta(min_length=1, description="directory of the catalogue's TOML files")] = str(
        EXAMPLE_CATALOGUES
    )
    plans_dir: Annotated[str, Meta(min_length=1, description="directory of the plan lists' TOML files")] = str(
        EXAMPLE_PLANS
    )
    topic_prefix: Annotated[Name, Meta(description="prefix of topic names and the group id, for a shared broker")] = ""
    partitions: Annotated[int, Meta(ge=1, le=1024, description="partitions of a topic; fixed for its life")] = 4
    replication_factor: Annotated[int, Meta(ge=1, le=7, description="replicas of a topic at creation")] = 1
    instance: Annotated[Name, Meta(description="static group member id, one per replica; empty: dynamic")] = ""
    linger_ms: Annotated[int, Meta(ge=50, le=60_000, description="the longest that a row waits to be written")] = 1000
    batch_rows_max: Annotated[int, Meta(ge=1, le=500_000, description="cell runs that fill an insert")] = 40_000
    duplicate_filter_mb_max: Annotated[
        int, Meta(ge=8, le=65_536, description="memory of the filters that find duplicates, all partitions together")
    ] = 250
    balances_max: Annotated[
        int, Meta(ge=1_000, le=50_000_000, description="workspaces whose balance is kept in memory, at most")
    ] = 200_000
    epoch: Annotated[int, Meta(ge=0, description="raise it after a restore of the ledger")] = 0
    retention_gap: Annotated[
        Literal["stop", "continue"], Meta(description="what to do when Kafka dropped events before they were read")
    ] = "stop"
    webhook_endpoints: Annotated[
        str, Meta(description="TOML file of the endpoints to which the notifier delivers; only it reads this")
    ] = ""
    api_host: Annotated[str, Meta(min_length=1, description="address of the read API; it has no login")] = "127.0.0.1"
    api_port: Annotated[int, Meta(ge=0, le=65_535, description="port of the read API; 0: any free one")] = 8620
    log_format: Annotated[Literal["auto", "json", "text"], Meta(description="auto: text on a terminal")] = "auto"

    def topic(self, name: str) -> str:
        """One of `streams.kafka.topics` as the broker knows it, under the prefix."""
        return self.topic_prefix + name

    @property
    def ledger(self) -> str:
        """The URL of the ledger: ``ledger_url``, else chDB in the home."""
        return self.ledger_url or f"chdb://{Path(self.home).expanduser().resolve() / 'ledger'}"

    @property
    def is_ledger_in_process(self) -> bool:
        """Whether the ledger is chDB, which no other process shares, and not a server."""
        return self.ledger.startswith("chdb:")


TEXT: Final = "text"
SECRETS: Final = frozenset({"kafka_password", "ledger_password"})


class Origin(msgspec.Struct, frozen=True):
    """One setting as ``creditstream config`` shows it."""

    setting: str
    value: str
    origin: str
    bounds: str
    meaning: str


def variable(field: str) -> str:
    """The environment variable of a field."""
    return PREFIX + field.upper()


def read_settings(environ: Mapping[str, str] = os.environ, **flags: str | int | None) -> Settings:
    """Defaults, then the environment, then flags (None: not given).

    Problem naming the variable when a value is out of its bounds.
    """
    values = _from_environment(environ) | {key: value for key, value in flags.items() if value is not None}
    try:
        return msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        why, _, place = str(error).partition(" - at `$.")
        field = place.rstrip("`")
        name = variable(field) if place else "a setting"
        bounds = next((_bounds(each.type) for each in msgspec.structs.fields(Settings) if each.name == field), TEXT)
        takes = "" if bounds == TEXT else f"; it takes {bounds}"
        raise Problem("the settings are wrong", f"{name}: {why}{takes}", "Correct or unset it.") from error


def _from_environment(environ: Mapping[str, str]) -> dict[str, str | int]:
    known = {variable(field): field for field in Settings.__struct_fields__}
    values: dict[str, str | int] = {}
    for name, value in environ.items():
        stem = name.removesuffix("_FILE")
        if name in known:
            values[known[name]] = value
        elif known.get(stem) in SECRETS and stem not in environ:
            values[known[stem]] = _read_secret(name, value)
    return values


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """``CREDITSTREAM_`` names that mean nothing here: a typing error, or an orchestrator's service links."""
    known = {variable(field) for field in Settings.__struct_fields__}
    known |= {f"{variable(field)}_FILE" for field in SECRETS} | {DEBUG_VARIABLE}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def _read_secret(name: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise Problem("a secret cannot be read", f"{name}={path}: {why}", "Check the file.") from error


def origins(settings: Settings, environ: Mapping[str, str] = os.environ) -> list[Origin]:
    """Every setting with its value, origin, bounds and meaning; secrets are masked."""
    rows = []
    for field in msgspec.structs.fields(Settings):
        value, name = getattr(settings, field.name), variable(field.name)
        origin = next((source for source in (name, f"{name}_FILE") if source in environ), "")
        if not origin:
            origin = "default" if value == field.default else "flag"
        shown = "********" if field.name in SECRETS and value else str(value)
        rows.append(Origin(name, shown, origin, _bounds(field.type), _meta(field.type).description or ""))
    return rows


def _meta(annotation: object) -> Meta:
    """The outermost constraint: that of the field, not of the type alias inside it."""
    return next((extra for extra in reversed(getattr(annotation, "__metadata__", ()))), Meta())


def _bounds(annotation: object) -> str:
    meta = _meta(annotation)
    if meta.ge is not None:
        return f"{meta.ge} to {meta.le}" if meta.le is not None else f"{meta.ge} or more"
    return ", ".join(choices(annotation)) or TEXT
