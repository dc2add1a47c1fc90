"""``python -m schemas.generate`` writes ``schemas/generated``: what a producer in any language builds against.

Everything is derived from the types, so there is one source of truth; a test fails when a file is stale.
"""

import json
import re
import textwrap
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec

from schemas.account import AccountEvent, LimitsChanged, PlanChanged, PremiumGranted, RunReversed
from schemas.cell_run import MAX_EVENT_BYTES, CellRun, Outcome
from schemas.ledger import Pool
from schemas.limits import AlertKind, AsOf, Cause, LimitAlert, LimitState, State

GENERATED: Final = Path(__file__).parent / "generated"
CONTRACT_VERSION: Final = "1.0.0"
"""Of the messages, not of the program: the major number changes when a producer has to."""

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_KAFKA_BINDING: Final = "0.5.0"
_COMPONENTS: Final = "#/components/schemas/"


class Message(NamedTuple):
    """What is said on one topic: a type, or a tagged union of types."""

    name: str
    payload: Any
    schema_file: str
    topic: str
    channel: str
    key: str
    """What the Kafka key is."""
    action: str
    """``receive``: the meter reads it. ``send``: the meter writes it."""
    operation: str
    summary: str
    examples: tuple[msgspec.Struct, ...]


_NOW: Final = datetime(2026, 11, 22, 11, 59, 58, tzinfo=UTC)
_RUN_ID: Final = UUID("01938d0e-7c00-7000-8000-000000000001")
_EVENT_ID: Final = UUID("01938d0e-7c00-7000-8000-000000000002")
_STANDING: Final[dict[str, Any]] = {
    "workspace_id": "ws_acme",
    "pool": Pool.ENRICHMENT,
    "state": State.WARNING,
    "used": "16001",
    "allowance": "20000",
    "remaining": "3999",
    "overage": "0",
    "period_start": date(2026, 11, 15),
    "period_end": date(2026, 12, 15),
    "plan": "20k",
}

MESSAGES: Final = (
    Message(
        name="cellRun",
        payload=CellRun,
        schema_file="cell_run.schema.json",
        topic="cell-runs",
        channel="cellRuns",
        key="the workspace_id",
        action="receive",
        operation="meterCellRuns",
        summary="Debits every cell run once, by the charge rules.",
        examples=(
            CellRun(
                run_id=_RUN_ID,
                workspace_id="ws_acme",
                table_id="tbl_leads",
                column_id="col_work_email",
                row_id="row_17",
                action="find_work_email",
                outcome=Outcome.DATA,
                ran_at=_NOW,
                triggered_by="auto_update",
            ),
        ),
    ),
    Message(
        name="accountEvent",
        payload=AccountEvent,
        schema_file="account_event.schema.json",
        topic="account-events",
        channel="accountEvents",
        key="the workspace_id",
        action="receive",
        operation="keepAccounts",
        summary="Plans, premium grants, reversals and thresholds. Only billing may write it.",
        examples=(
            PlanChanged(event_id=_EVENT_ID, workspace_id="ws_acme", plan="20k", effective_at=_NOW, actor="billing"),
            PremiumGranted(event_id=_EVENT_ID, workspace_id="ws_acme", credits="500", effective_at=_NOW),
            RunReversed(event_id=_EVENT_ID, workspace_id="ws_acme", run_id=_RUN_ID, actor="support"),
            LimitsChanged(event_id=_EVENT_ID, workspace_id="ws_acme", thresholds=(80, 95), remaining_below="500"),
        ),
    ),
    Message(
        name="limitAlert",
        payload=LimitAlert,
        schema_file="limit_alert.schema.json",
        topic="limit-alerts",
        channel="limitAlerts",
        key="the workspace_id",
        action="send",
        operation="alert",
        summary="One message for one crossing. A replay repeats the alert_id: drop ids that you have seen.",
        examples=(
            LimitAlert(
                alert_id=_EVENT_ID,
                kind=AlertKind.CROSSED,
                at=_NOW,
                cause=Cause.RUN,
                thresholds=(80,),
                position="cell-runs[3]@88123",
                run_id=_RUN_ID,
                table_id="tbl_leads",
                column_id="col_work_email",
                action="find_work_email",
                **_STANDING,
            ),
        ),
    ),
    Message(
        name="limitState",
        payload=LimitState,
        schema_file="limit_state.schema.json",
        topic="limit-states",
        channel="limitStates",
        key="pool/workspace_id",
        action="send",
        operation="tellStates",
        summary="The newest state of every workspace and pool; the topic is compacted. What gates follow.",
        examples=(
            LimitState(
                next_allowance="20000",
                thresholds=(50, 80),
                as_of=AsOf(log="topic ids", cell_runs=88123, account_events=17, at=_NOW),
                **_STANDING,
            ),
        ),
    ),
)


def json_schemas() -> dict[str, bytes]:
    """File name → JSON Schema (Draft 2020-12) of each message.

    What it accepts, the meter accepts, given a validator that asserts ``format``, but for what JSON Schema cannot say:
    the years that ``ran_at`` and ``effective_at`` may lie in, and that a grant is more than 0. The meter also reads
    looser spellings of times and UUIDs.
    """
    return {
        message.schema_file: _pretty(
            {"$schema": _DIALECT, "$id": f"urn:creditstream:{message.schema_file.removesuffix('.schema.json')}"}
            | _plain(msgspec.json.schema(message.payload))
        )
        for message in MESSAGES
    }


def asyncapi() -> bytes:
    """The topics, their keys and messages, as an AsyncAPI 3.0 document in YAML."""
    types = [message.payload for message in MESSAGES]
    payloads, schemas = _plain(list(msgspec.json.schema_components(types, ref_template=_COMPONENTS + "{name}")))
    document = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "creditstream",
            "version": CONTRACT_VERSION,
            "description": "Meters cell runs into an exactly-once credit ledger.",
        },
        "defaultContentType": "application/json",
        "channels": {message.channel: _channel(message) for message in MESSAGES},
        "operations": {message.operation: _operation(message) for message in MESSAGES},
        "components": {
            "messages": {
                message.name: _message(message, payload) for message, payload in zip(MESSAGES, payloads, strict=True)
            },
            "schemas": schemas,
        },
    }
    return f"# Generated by `python -m schemas.generate`; do not edit.{to_yaml(document)}\n".encode()


def to_yaml(node: Any, depth: int = 0) -> str:
    """YAML of JSON's types, in blocks, beginning with the line break or space that follows a ``:``."""
    pad = "  " * depth
    match node:
        case dict() if node:
            return "".join(f"\n{pad}{_scalar(key)}:{to_yaml(entry, depth + 1)}" for key, entry in node.items())
        case list() if node:
            return "".join(f"\n{pad}- {to_yaml(entry, depth + 1).lstrip()}" for entry in node)
        case str() if len(node) > _LONG_TEXT and node.isprintable() and node == " ".join(node.split()):
            lines = textwrap.wrap(node, _LONG_TEXT, break_long_words=False, break_on_hyphens=False)
            return " >-" + "".join(f"\n{pad}{line}" for line in lines)
        case _:
            return f" {_scalar(node)}"


_LONG_TEXT: Final = 90
_PLAIN_TEXT: Final = re.compile(r"[A-Za-z$][\w$ .,;()/-]*(?<! )", re.ASCII)
_NOT_TEXT: Final = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


def _scalar(value: Any) -> str:
    """JSON is YAML; a text that can only be read as itself goes without quotes."""
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and value.lower() not in _NOT_TEXT:
        return value
    return json.dumps(value)


def _channel(message: Message) -> dict[str, Any]:
    return {
        "address": message.topic,
        "description": (
            f"The key is {message.key}. The partition is the murmur2 hash of the workspace_id, on every topic, as the "
            "Java client's default partitioner gives it: order, and one debit per run, hold within a partition. Other "
            "clients must be told (librdkafka: partitioner=murmur2_random). Times of arrival are the broker's "
            f"(LogAppendTime). A value of more than {MAX_EVENT_BYTES} bytes is refused."
        ),
        "messages": {message.name: {"$ref": f"#/components/messages/{message.name}"}},
        "bindings": {"kafka": {"topic": message.topic, "bindingVersion": _KAFKA_BINDING}},
        "x-partitioner": "murmur2",
    }


def _operation(message: Message) -> dict[str, Any]:
    return {
        "action": message.action,
        "summary": message.summary,
        "channel": {"$ref": f"#/channels/{message.channel}"},
        "messages": [{"$ref": f"#/channels/{message.channel}/messages/{message.name}"}],
    }


def _message(message: Message, payload: dict[str, Any]) -> dict[str, Any]:
    key = {"type": "string", "description": message.key}
    return {
        "contentType": "application/json",
        "payload": payload,
        "bindings": {"kafka": {"key": key, "bindingVersion": _KAFKA_BINDING}},
        "examples": [{"payload": json.loads(msgspec.json.encode(example))} for example in message.examples],
    }


def _plain(schema: Any) -> Any:
    """The same schema, its descriptions as Markdown on one line instead of as docstrings."""
    match schema:
        case dict():
            return {
                key: " ".join(entry.replace("``", "`").split())
                if key == "description" and isinstance(entry, str)
                else _plain(entry)
                for key, entry in schema.items()
            }
        case list():
            return [_plain(entry) for entry in schema]
        case _:
            return schema


def _pretty(document: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document)) + b"\n"


if __name__ == "__main__":
    for file, content in (json_schemas() | {"asyncapi.yaml": asyncapi()}).items():
        GENERATED.joinpath(file).write_bytes(content)
