"""The README's command: a real Kafka, a real Faust worker, a real ClickHouse engine, and books that close."""

import rich_click as click

from creditstream.cli.options import home_option


@click.command()
@click.option(
    "--for",
    "seconds",
    default="30s",
    show_default=True,
    metavar="SECONDS",
    help="How long to produce runs: 30 or 30s.",
)
@click.option("--rate", type=click.IntRange(1, 50_000), default=500, show_default=True, help="Cell runs a second.")
@home_option
def demo(seconds: str, rate: int, home: str | None) -> None:
    """Start everything, charge simulated cell runs, and prove that the books close.

    All state is in the home; `rm -r .creditstream` removes it. Exit 1 if the books do not close.
    """
    text = seconds.removesuffix("s")
    if not text.isdecimal() or not 1 <= int(text) <= 3600:
        raise click.UsageError(f"--for {seconds!r} is not a number of seconds from 1 to 3600.")
    from creditstream.demonstrate import demonstrate

    demonstrate(home, int(text), rate)
