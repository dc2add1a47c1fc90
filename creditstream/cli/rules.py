"""The catalogue: what an action costs, before it is run."""

from pathlib import Path

import rich_click as click

from creditstream.cli.options import format_option, record_format_option
from creditstream.cli.tables import show_record, show_rows
from creditstream.cli.terminal import say
from creditstream.clock import now_ms
from creditstream.home import settings_of
from schemas.answers import Price
from schemas.catalogue import Catalogue, read_version
from schemas.prices import price_of, prices

COLUMNS = ("action", "name", "category", "provider", "credits", "pool", "charges_no_data")


@click.group()
def rules() -> None:
    """The catalogue: actions and their prices."""


def _catalogue() -> Catalogue:
    return Catalogue.load(Path(settings_of().catalogue_dir))


@rules.command("list")
@format_option
def list_rules(form: str) -> None:
    """List every action of the version in force."""
    nothing = "The catalogue lists no action."
    show_rows(prices(_catalogue(), now_ms()), form, Price.__struct_fields__, nothing, read=COLUMNS)


@rules.command()
@click.argument("action")
@click.option("--own-api-key", is_flag=True, help="The run uses the workspace's own API key.")
@record_format_option
def show(action: str, own_api_key: bool, form: str) -> None:
    """Show what a run of an action costs now.

    Example: `creditstream rules show find_work_email`
    """
    price = price_of(_catalogue(), action, now_ms(), own_api_key)
    show_record(
        price,
        form,
        f"{price.name}: {_cost(price, own_api_key)}.",
        "",
        f"  action     {price.action} ({price.category}, provider {price.provider})",
        f"  priced by  catalogue version {price.catalogue}, in force since {price.effective_from:%Y-%m-%d}",
    )


def _cost(price: Price, own_api_key: bool) -> str:
    if price.pool == "none":
        return "free, however often it runs (R04)"
    if own_api_key:
        return "free with the workspace's own API key (R05)"
    unit = "credit" if price.credits == "1" else "credits"
    nothing = "also when it finds nothing" if price.charges_no_data else "free when it finds nothing"
    charged = f"{price.credits} {unit} of the {price.pool} pool when it returns data (R02)"
    return f"{charged}, {nothing} (R09), free on an error (R08)"


@rules.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def check(file: Path) -> None:
    """Check a catalogue file by itself. Exit 1, naming file, action and field, if it is wrong."""
    version = read_version(file)
    since = f"{version.effective_from:%Y-%m-%d %H:%M} UTC"
    say(f"{file.name}: version {version.number}, {len(version.actions)} actions, from {since}")
