"""Send cell runs by hand: for trying things, for tests of a producer, for repairs."""

import time
from typing import IO, Any

import rich_click as click

from creditstream.asking import Answers, ask
from creditstream.cli.options import settings_of, source_options
from schemas.answers import Explanation
from schemas.cell_run import CellRun
from schemas.problem import Problem, UnknownId, Unreachable

DELIVERY_S_MAX = 30.0
WAIT_S_MAX = 30.0
POLL_S = 0.1


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--wait", is_flag=True, help="Wait for each debit and print it.")
@source_options
def send(file: IO[bytes], wait: bool, home: str, url: str) -> None:
    """Send cell runs from a file of JSON lines (`-`: standard input).

    A bad line is reported with its number and field; the good ones are sent, and the exit code is 1.

    Example: `creditstream send --wait runs.ndjson`
    """
    settings = settings_of(home)
    runs, bad = _read(file)
    if runs:
        places = _produce(settings, runs)
        click.echo(f"sent {len(places):,} cell run{'s' * (len(places) != 1)} to {settings.kafka_bootstrap}", err=True)
        if wait:
            with ask(settings, url) as answers:
                for run, place in zip(runs, places, strict=True):
                    click.echo(_line(_await(answers, run, place), place))
    if bad:
        raise Problem(
            f"{bad:,} line{'s were' if bad > 1 else ' was'} not sent", "see above", "Correct and send them again."
        )
    if not runs:
        raise Problem("nothing was sent", "the input holds no line", "Give one JSON object a line.")


def _read(file: IO[bytes]) -> tuple[list[CellRun], int]:
    import msgspec

    from schemas.codec import decode_run, name_field

    runs, bad = [], 0
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            runs.append(decode_run(line))
        except (msgspec.MsgspecError, UnicodeError) as error:
            bad += 1
            click.echo(f"line {number}: {name_field(str(error))}", err=True)
    return runs, bad


def _produce(settings: Any, runs: list[CellRun]) -> list[str]:
    from confluent_kafka import KafkaException

    from creditstream.producing import open_producer
    from schemas.codec import encode_run
    from streams.topics import Broker, cell_runs_topic, position_of, require_topic

    topic = cell_runs_topic(settings)
    require_topic(Broker(settings), topic, settings)
    producer = open_producer(settings)
    places: dict[int, str] = {}

    def remember(index: int) -> Any:
        def delivered(error: Any, message: Any) -> None:
            if error:
                raise KafkaException(error)
            places[index] = str(position_of(message))

        return delivered

    for index, run in enumerate(runs):
        while True:
            try:
                producer.produce(topic, encode_run(run), run.workspace_id, on_delivery=remember(index))
                break
            except BufferError:
                producer.poll(POLL_S)
        producer.poll(0)
    if left := producer.flush(DELIVERY_S_MAX):
        raise Unreachable(
            f"{left:,} runs were not delivered",
            f"no answer from {settings.kafka_bootstrap}",
            "Send the file again: a copy is never charged twice.",
        )
    return [places[index] for index in range(len(runs))]


def _await(answers: Answers, run: CellRun, place: str) -> Explanation:
    """The explanation, once the ledger has a row for the event at this place."""
    deadline = time.monotonic() + WAIT_S_MAX
    while True:
        try:
            found = answers.explanation(run.run_id)
            if any(delivery.position == place for delivery in found.deliveries):
                return found
        except UnknownId:
            pass
        if time.monotonic() > deadline:
            raise Unreachable(
                f"run {run.run_id} has no debit after {WAIT_S_MAX:.0f} s", "the worker is not metering", "See its log."
            )
        time.sleep(POLL_S)


def _line(found: Explanation, place: str) -> str:
    mine = next(delivery for delivery in found.deliveries if delivery.position == place)
    said = found.sentence if mine.position == found.position else f"{mine.kind}: {mine.detail}."
    return f"{found.run_id}  {mine.credits} credits  {mine.reason}  {said}"
