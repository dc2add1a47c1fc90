"""Limit alerts by hand: try a receiver, see what was delivered, send one again."""

import os
import signal
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from uuid import UUID

import msgspec
import rich_click as click

from creditstream.asking import ask
from creditstream.cli.notifier import endpoints_option
from creditstream.cli.options import (
    as_of_option,
    format_option,
    home_option,
    kafka_settings_of,
    limit_option,
    source_options,
)
from creditstream.cli.tables import show_rows
from creditstream.cli.terminal import say
from creditstream.home import settings_of
from schemas.answers import PublishedAlert
from schemas.cell_run import from_milliseconds
from schemas.limits import AlertKind
from schemas.problem import Problem
from schemas.webhook import DeliveryState, Format

PORT = 8630
ALERT_COLUMNS = (
    "at", "workspace_id", "pool", "kind", "thresholds", "remaining_below", "used", "allowance", "cause", "position",
    "alert_id",
)  # fmt: skip


class DeliveryRow(msgspec.Struct, frozen=True):
    """What became of an alert at an endpoint. ``when``: of the next attempt while it waits, else of its end."""

    state: str
    endpoint: str
    alert_id: UUID
    attempts: int
    when: datetime
    said: str


@click.group()
def alerts() -> None:
    """Limit alerts: list them and their deliveries, test a receiver, send one again."""


@alerts.command()
@click.argument("url")
@click.option("--secret-env", metavar="NAME", help="Variable that holds the secret. Default: a new secret, shown.")
@click.option(
    "--format",
    "form",
    type=click.Choice([str(form) for form in Format]),
    default="standard",
    show_default=True,
    help="Format of the body.",
)
@click.option("--allow-private", is_flag=True, help="Allow plain http and private addresses.")
def test(url: str, secret_env: str | None, form: str, allow_private: bool) -> None:
    """Send one signed test alert to a receiver, and say what to fix.

    Example: `creditstream alerts test http://127.0.0.1:8630/ --secret-env HOOK_SECRET --allow-private`
    """
    from creditstream.webhooks.endpoints import Address, Endpoint
    from creditstream.webhooks.resending import send_test

    try:
        address = Address.parse(url, allow_private)
    except ValueError as error:
        raise click.UsageError(f"{url}: {_as_option(error)}.") from error
    keys = () if form == Format.SLACK else (_key(secret_env),)
    answer = send_test(Endpoint("test", address, keys, format=Format(form), allow_private=allow_private))
    if not answer.is_success:
        raise Problem(
            "the test alert was not accepted", f"{answer.said}, after {answer.took_ms} ms", _as_option(answer.fix)
        )
    say(f"{answer.said} in {answer.took_ms} ms")


def _as_option(said: object) -> str:
    """A text about an endpoints file, with its ``allow_private`` as the option that it is here."""
    return str(said).replace("allow_private", "--allow-private")


def _key(variable: str | None) -> bytes:
    """The key of the secret that the variable holds; without a variable that of a fresh one, shown."""
    from creditstream.webhooks.signing import new_secret, parse_secret

    if variable is None:
        secret = new_secret()
        say(f"new secret: {secret}", err=True)
        return parse_secret(secret)
    secret = os.environ.get(variable, "").strip()
    try:
        return parse_secret(secret)
    except ValueError as error:
        why = str(error) if secret else "it is not set"
        raise Problem(f"the secret in {variable} cannot be used", why, "Set it to whsec_<base64>.") from error


@alerts.command()
@click.argument("alert_id", type=click.UUID)
@endpoints_option
@click.option("--endpoint", metavar="NAME", help="Only this endpoint, even if it does not want the alert.")
@home_option
def resend(alert_id: UUID, endpoints: Path, endpoint: str | None, home: str | None) -> None:
    """Send an alert again, under the same id. Exit 1 if a receiver does not accept it.

    Example: `creditstream alerts resend 0199b2c4-7d1e-5a30-9f00-5c2f6e0a1b22 --endpoints endpoints.toml`
    """
    from creditstream.webhooks.endpoints import load_endpoints
    from creditstream.webhooks.resending import resend as send_again

    known = load_endpoints(endpoints)
    if endpoint is not None and endpoint not in known:
        raise click.UsageError(f"{endpoints} has no endpoint {endpoint!r}; it has {', '.join(known) or 'none'}.")
    refused = []
    for name, answer in send_again(kafka_settings_of(home), known, alert_id, endpoint):
        say(f"{name}: {answer.said} in {answer.took_ms} ms{'' if answer.is_success else f'. {answer.fix}'}")
        refused += [] if answer.is_success else [name]
    if refused:
        raise Problem("the alert was not accepted", f"by {', '.join(refused)}", "See above.")


@alerts.command("list")
@click.option("--workspace", metavar="WORKSPACE", help="Only alerts of this workspace.")
@click.option("--kind", type=click.Choice([str(kind) for kind in AlertKind]), help="Only alerts of this kind.")
@limit_option(50)
@as_of_option
@source_options
@format_option
def list_alerts(
    workspace: str | None, kind: str | None, limit: int, as_of: datetime | None, home: str, url: str, form: str
) -> None:
    """List the newest limit alerts that were sent.

    Example: `creditstream alerts list --kind exhausted`
    """
    with ask(settings_of(home), url) as answers:
        found = answers.alerts(workspace or "", kind or "", limit, as_of)
    show_rows(found, form, PublishedAlert.__struct_fields__, "No alerts.", read=ALERT_COLUMNS, limit=limit)


@alerts.command("deliveries")
@click.option(
    "--state", type=click.Choice([str(state) for state in DeliveryState]), help="Only deliveries in this state."
)
@limit_option(50, "At most this many; failed ones first.")
@home_option
@format_option
def list_deliveries(state: str | None, limit: int, home: str | None, form: str) -> None:
    """List what became of the last 48 days' alerts at each endpoint.

    Example: `creditstream alerts deliveries --state failed`
    """
    from creditstream.webhooks.resending import deliveries

    found = [delivery for delivery in deliveries(kafka_settings_of(home)) if state in (None, delivery.state)]
    rows = [
        DeliveryRow(
            each.state,
            each.endpoint,
            each.alert_id,
            each.attempts,
            from_milliseconds(each.next_at_ms or each.ended_at_ms),
            each.said,
        )
        for each in found[:limit]
    ]
    show_rows(rows, form, DeliveryRow.__struct_fields__, "No deliveries.", limit=limit)


@click.command()
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=PORT,
    show_default=True,
    help="Port on 127.0.0.1; 0: any free port.",
)
@click.option("--secret-env", metavar="NAME", help="Variable that holds the secret. Default: a new secret, shown.")
def listen(port: int, secret_env: str | None) -> None:
    """Receive alerts on this machine, check each signature, and print one line per alert. Stop with Ctrl-C.

    Example: `creditstream listen --secret-env HOOK_SECRET`
    """
    from creditstream.webhooks.receiver import Receiver

    complain = partial(say, err=True)
    receiver = Receiver(_key(secret_env), port, _tell, complain)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    complain(f"listening on {receiver.url} (an endpoint there needs allow_private = true); Ctrl-C ends it")
    try:
        receiver.serve()
    except KeyboardInterrupt:
        complain(f"stopped: {receiver.accepted} accepted, {receiver.refused} refused")
    finally:
        receiver.close()


def _tell(line: str) -> None:
    if not say(line):
        sys.exit()  # without an answer: an alert that nobody reads is not received, and its sender tries again
