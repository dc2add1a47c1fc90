"""The service: meters cell runs until it is told to stop."""

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack

import rich_click as click

from creditstream.cli import report
from creditstream.cli.options import home_option, kafka_settings_of
from creditstream.cli.terminal import say
from creditstream.home import Home
from schemas.problem import Problem
from streams.settings import Settings, read_settings


@click.command()
@click.option("--embedded", is_flag=True, help="Also start Apache Kafka, in the home.")
@click.option("--end-with-input", is_flag=True, hidden=True, help="Stop when standard input ends.")
@home_option
def worker(embedded: bool, end_with_input: bool, home: str | None) -> None:
    """Meter cell runs from Kafka into an exactly-once ledger, and serve the read API.

    On SIGTERM it stops within 10 s with exit code 0. On exit code 75, start it again.
    """
    place = Home.at(home)
    with ExitStack() as held:
        held.enter_context(place.hold())
        poll_kafka = None
        if not embedded:
            settings = kafka_settings_of(home)
        else:
            from creditstream.embedded import EmbeddedKafka

            kafka = held.enter_context(EmbeddedKafka(place, lambda line: say(line, err=True)))
            poll_kafka = kafka.poll
            settings = _embedded_settings(kafka.settings, place.path.as_posix())
        exit_code = _run(settings, place, poll_kafka, end_with_input)
    sys.stdout.flush()
    # chDB's threads outlive the interpreter's shutdown badly; everything that matters is closed by now.
    os._exit(exit_code)


def _embedded_settings(kafka: dict[str, str], home: str) -> Settings:
    from creditstream.embedded import INSTANCE
    from streams.kafka.topics import Broker

    settings = read_settings(os.environ, home=home, instance=INSTANCE, **kafka)
    Broker(settings).ensure_all()
    return settings


def _run(settings: Settings, place: Home, poll_kafka: Callable[[], int | None] | None, end_with_input: bool) -> int:
    from creditstream.service import run_service

    try:
        return run_service(settings, place, poll_kafka, end_with_input)
    except Problem as problem:
        report(str(problem))
        return problem.exit_code
