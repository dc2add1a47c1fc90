"""The options that commands share, and the types of what is typed."""

import os
import shlex
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
import rich_click as click

from creditstream.cli.terminal import keep
from creditstream.home import Home, settings_of
from schemas import account
from schemas.answers import LIST_MAX
from schemas.problem import Unreachable
from streams.settings import Settings, variable

F = TypeVar("F", bound=Callable[..., Any])
DAY = click.DateTime(formats=["%Y-%m-%d"])


def kafka_settings_of(home: str | None) -> Settings:
    """`settings_of`, for a command that needs Kafka. Unreachable when that is the home's own, which does not run."""
    place = Home.at(home)
    if variable("kafka_bootstrap") not in os.environ and not place.worker() and place.kafka.exists():
        if pid := place.starting():
            why = f"process {pid} holds {place.path}: a worker that is starting, or another command"
            raise Unreachable("Kafka is not running yet", why, "Try again in a few seconds.")
        fix = f"`creditstream worker --embedded` starts it again; for another one, set {variable('kafka_bootstrap')}."
        raise Unreachable("Kafka is not running", f"the one in {place.path} ends with its worker", fix)
    return settings_of(home)


class Instant(click.ParamType):
    """A time from 2020 to 2099 as people type it: ``2026-01-15T14:00:00Z``, or a UTC day; without an offset in UTC."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Aware, in UTC."""
        if isinstance(value, datetime):
            return value
        try:
            typed = datetime.fromisoformat(value)
            instant = typed.astimezone(UTC) if typed.tzinfo else typed.replace(tzinfo=UTC)
        except (ValueError, OverflowError):  # an offset may lead out of the years that there are
            self.fail(f"{value!r} is not a time; write 2026-01-15T14:00:00Z or 2026-01-15.", param, ctx)
        if not account.is_in_range(instant):
            self.fail(f"{value!r} is before 2020 or after 2099.", param, ctx)
        return instant


class Url(click.ParamType):
    """Where a worker's read API is: ``http://127.0.0.1:8620``. Empty: not given."""

    name = "URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, where it is one."""
        from urllib.parse import urlsplit  # a tenth of the time that `--help` may take

        try:
            parts = urlsplit(value)
            is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            if is_url and "@" in parts.netloc:
                self.fail("a user and a password stand in it; the read API takes none.", param, ctx)
        except ValueError:
            is_url = False
        if value and not is_url:
            self.fail(f"{value!r} is not a URL; write it like http://127.0.0.1:8620.", param, ctx)
        return str(value)


class Credits(click.ParamType):
    """Credits as people type them: ``500`` or ``0.5``; passed on as text, exact."""

    name = "CREDITS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, where it is an amount that an event can carry."""
        try:
            return msgspec.convert(value, account.Credits)
        except msgspec.ValidationError:
            self.fail(f"{value!r} is not an amount; write 500 or 0.5, at most 12 digits and 3 decimals.", param, ctx)


def _keep_home(_: click.Context, __: click.Parameter, home: str | None) -> str | None:
    keep("home", f"--home {shlex.quote(home)}" if home and Home.at(home) != Home.at(None) else "")
    return home


def _keep_url(_: click.Context, __: click.Parameter, url: str) -> str:
    keep("url", f"--url {shlex.quote(url)}" if url else "")
    return url


home_option: Final = click.option(
    "--home",
    type=click.Path(file_okay=False),
    metavar="DIR",
    envvar=variable("home"),
    callback=_keep_home,
    help=f"Directory of all embedded state [{variable('home')}].",
)
"""Which installation."""
_url_option: Final = click.option(
    "--url", type=Url(), default="", callback=_keep_url, help="Ask this worker's read API instead of the home's."
)


def source_options(command: F) -> F:
    """``--home`` and ``--url``: whom to ask."""
    return home_option(_url_option(command))


def _format_of(*forms: str) -> Callable[[F], F]:
    return click.option(
        "--format", "form", type=click.Choice(forms), default="text", show_default=True, help="Output format."
    )


format_option: Final = _format_of("text", "json", "csv")
"""Of a table: text for people, json and csv for programs."""
record_format_option: Final = _format_of("text", "json")
"""Of one object, which makes no table."""
as_of_option: Final = click.option("--as-of", type=Instant(), help="Answer as the ledger knew it then. Default: now.")
"""What the ledger knew at an instant."""
day_of_option: Final = click.option("--as-of", type=Instant(), help="On that UTC day, as the ledger knows it now.")
"""``--as-of`` of what is asked of all workspaces at once: see `creditstream.spending.top`."""


def limit_option(default: int, of_what: str = "At most this many, newest first.") -> Callable[[F], F]:
    """``--limit`` of a list."""
    return click.option("--limit", type=click.IntRange(1, LIST_MAX), default=default, show_default=True, help=of_what)
