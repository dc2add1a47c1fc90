"""The service that delivers limit alerts."""

import os
import sys
from pathlib import Path
from typing import Final

import rich_click as click

from creditstream.cli.options import home_option, kafka_settings_of
from streams.settings import variable

endpoints_option: Final = click.option(
    "--endpoints",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    envvar=variable("webhook_endpoints"),
    show_envvar=True,
    help="TOML file of the endpoints that receive alerts.",
)
"""The file that says who is told."""


@click.command()
@endpoints_option
@home_option
def notifier(endpoints: Path, home: str | None) -> None:
    """Deliver limit alerts to webhooks and Slack: signed, retried for three days, each under one id.

    On SIGHUP it reads the endpoints file again. On SIGTERM it stops within 10 s with exit code 0. On exit code 75,
    start it again.

    Example: `creditstream notifier --endpoints endpoints.toml`
    """
    from creditstream.webhooks.service import run_notifier

    exit_code = run_notifier(kafka_settings_of(home), endpoints)
    sys.stderr.flush()
    # A thread that waits for a receiver, or for the resolver, must not hold up the end.
    os._exit(exit_code)
