"""What producers in other languages build against: never stale, and of one mind with the decoder."""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Final

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker

from schemas.cell_run import CellRun
from schemas.codec import decode_run, encode_run
from schemas.generate import GENERATED, MESSAGES, asyncapi, json_schemas, to_yaml
from streams.kafka.topics import CELL_RUNS, TOPICS, WEBHOOK_DELIVERIES
from tests.test_cell_run import EVENT, IDENTIFIERS, REQUIRED, RUNS

FORMATS: Final = FormatChecker(["uuid"])
ASYNCAPI: Final = yaml.safe_load(asyncapi())
SCHEMA: Final = json.loads(json_schemas()["cell_run.schema.json"])
VALIDATOR: Final = Draft202012Validator(SCHEMA, format_checker=FORMATS)


@FORMATS.checks("date-time", raises=ValueError)
def is_rfc_3339(value: Any) -> bool:
    """Of texts; JSON Schema's formats say nothing of other types."""
    shape = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)"
    return not isinstance(value, str) or bool(re.fullmatch(shape, value) and datetime.fromisoformat(value))


def decodes(event: Any) -> bool:
    try:
        decode_run(json.dumps(event).encode())
    except msgspec.DecodeError:
        return False
    return True


@pytest.mark.parametrize(("file", "content"), [*json_schemas().items(), ("asyncapi.yaml", asyncapi())])
def test_generated_files_are_not_stale(file: str, content: bytes) -> None:
    assert GENERATED.joinpath(file).read_bytes() == content, "run `python -m schemas.generate`"


def test_nothing_else_lies_among_the_generated_files() -> None:
    assert {file.name for file in GENERATED.iterdir()} == {*json_schemas(), "asyncapi.yaml"}


def test_the_schema_is_valid_draft_2020_12() -> None:
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]
    Draft202012Validator.check_schema(SCHEMA)


@given(RUNS)
def test_whatever_is_encoded_is_valid_by_the_schema(run: CellRun) -> None:
    VALIDATOR.validate(json.loads(encode_run(run)))


SAMPLES: Final[dict[str, tuple[Any, bool]]] = {
    "plain": (EVENT, True),
    "all_fields": ({**EVENT, "own_api_key": True, "triggered_by": "manual", "actor": ""}, True),
    "null_optionals": ({**EVENT, "triggered_by": None, "actor": None}, True),
    "unknown_field": ({**EVENT, "model": "large"}, True),
    "128_astral_characters": ({**EVENT, "row_id": "😀" * 128}, True),
    "nanoseconds": ({**EVENT, "ran_at": "2026-01-01T00:00:00.123456789Z"}, True),
    "array": ([], False),
    "null": (None, False),
    "empty": ({}, False),
    "naive_time": ({**EVENT, "ran_at": "2026-01-01T00:00:00"}, False),
    "date_only": ({**EVENT, "ran_at": "2026-01-01"}, False),
    "no_such_day": ({**EVENT, "ran_at": "2026-02-30T00:00:00Z"}, False),
    "unix_time": ({**EVENT, "ran_at": 1_767_225_600}, False),
    "no_uuid": ({**EVENT, "run_id": "17"}, False),
    "unknown_outcome": ({**EVENT, "outcome": "found"}, False),
    "number_as_flag": ({**EVENT, "own_api_key": 1}, False),
    "null_flag": ({**EVENT, "own_api_key": None}, False),
    "long_actor": ({**EVENT, "actor": "x" * 129}, False),
    **{f"no_{field}": ({name: EVENT[name] for name in REQUIRED if name != field}, False) for field in REQUIRED},
    **{f"empty_{field}": ({**EVENT, field: ""}, False) for field in IDENTIFIERS},
    **{f"long_{field}": ({**EVENT, field: "x" * 129}, False) for field in IDENTIFIERS},
    **{f"number_{field}": ({**EVENT, field: 7}, False) for field in IDENTIFIERS},
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_schema_and_decoder_give_the_same_verdict(sample: str) -> None:
    event, valid = SAMPLES[sample]
    assert (VALIDATOR.is_valid(event), decodes(event)) == (valid, valid)


ODD_VALUES: Final = st.sampled_from(
    [None, True, 0, 1.5, "", " ", "data", "x" * 128, "x" * 129, [], {}, EVENT["run_id"]]
)


@given(st.dictionaries(st.sampled_from(list(CellRun.__struct_fields__)), ODD_VALUES))
def test_schema_and_decoder_agree_on_odd_values(odd: dict[str, Any]) -> None:
    event = {**EVENT, **odd}
    assert VALIDATOR.is_valid(event) == decodes(event)


def test_only_the_decoder_knows_that_a_run_is_of_2020_or_later() -> None:
    """The one rule that JSON Schema cannot say; the description says it."""
    event = {**EVENT, "ran_at": "2019-12-31T23:59:59Z"}
    assert VALIDATOR.is_valid(event)
    assert not decodes(event)
    assert "2020 or later" in SCHEMA["$defs"]["CellRun"]["properties"]["ran_at"]["description"]


def references(node: Any) -> Iterator[str]:
    for entry in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from references(entry)
    if isinstance(node, dict) and "$ref" in node:
        yield node["$ref"]


def test_every_reference_of_the_asyncapi_document_leads_somewhere() -> None:
    for reference in references(ASYNCAPI):
        node = ASYNCAPI
        for step in reference.removeprefix("#/").split("/"):
            node = node[step]


def test_the_asyncapi_document_names_topic_key_and_partitioner() -> None:
    channel, message = ASYNCAPI["channels"]["cellRuns"], ASYNCAPI["components"]["messages"]["cellRun"]
    assert ASYNCAPI["asyncapi"] == "3.0.0"
    assert channel["address"] == CELL_RUNS
    assert channel["x-partitioner"] == "murmur2"
    assert message["payload"] == {"$ref": "#/components/schemas/CellRun"}
    assert message["bindings"]["kafka"]["key"]["description"] == "the workspace_id"


def test_the_asyncapi_document_names_every_topic_that_is_ours_to_tell_of() -> None:
    """The outbox of the notifier is nobody else's."""
    told = {channel["address"] for channel in ASYNCAPI["channels"].values()}
    assert told == set(TOPICS) - {WEBHOOK_DELIVERIES}


def test_the_asyncapi_document_and_the_json_schema_say_the_same() -> None:
    components = json.dumps(ASYNCAPI["components"]["schemas"]).replace("#/components/schemas/", "#/$defs/")
    defined: dict[str, Any] = {}
    for content in json_schemas().values():
        defined |= json.loads(content)["$defs"]
    assert json.loads(components) == defined


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message.name)
def test_the_example_of_a_message_is_a_message(message: Any) -> None:
    schema = json.loads(json_schemas()[message.schema_file])
    for example in message.examples:
        encoded = msgspec.json.encode(example)
        assert msgspec.json.decode(encoded, type=message.payload) == example
        Draft202012Validator(schema).validate(json.loads(encoded))


TEXTS: Final = st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=200)
WORDS: Final = st.lists(
    st.sampled_from(["the", "key: is", "#1", "- a", "yes", "null", "~", "'", "\x7f"]), max_size=60
).map(" ".join)
LEAVES: Final = st.none() | st.booleans() | st.integers() | TEXTS | WORDS
DOCUMENTS: Final = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS | WORDS, inner, max_size=4)
)


@given(st.dictionaries(st.text(st.characters(codec="ascii"), max_size=20), DOCUMENTS))
def test_a_yaml_reader_sees_the_document_that_was_written(document: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml(document)) == document
