"""For whoever runs it: topics, migrations, settings, and the proof that the books close."""

import rich_click as click

from creditstream.asking import ask
from creditstream.cli.options import FORMATS, home_option, settings_of, show_record, show_rows, source_options
from schemas.problem import Difference
from streams.settings import Origin, origins, read_settings, unknown_variables

BOOK_COLUMNS = (
    "topic", "partition", "events", "rows", "missing", "doubled", "different", "behind", "offsets_without_event",
    "credits", "credits_reference",
)  # fmt: skip


@click.command()
@source_options
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", help="How to print it.")
def reconcile(home: str, url: str, form: str) -> None:
    """Prove that every event is accounted for: Kafka's logs against the ledger, offset by offset.

    Reads cell runs and account events, rates them a second time by other code, and compares. Exit 3 on a difference.
    """
    from creditstream.reconcile import PartitionBooks
    from creditstream.reconcile import reconcile as compare

    settings = settings_of(home)
    with ask(settings, url) as answers:
        books = compare(answers, settings, say=lambda line: click.echo(line, err=True))
    if form == "json":
        show_record(books)
    else:
        columns = BOOK_COLUMNS if form == "text" else PartitionBooks.__struct_fields__
        show_rows(books.partitions, form, columns, "The topic has no partitions.")
    if form == "text":
        sums = books.sums
        click.echo(
            f"\nsums through projections: {sums.credits_projected} credits, {sums.rows_projected:,} rows; "
            f"over raw rows: {sums.credits_raw} credits, {sums.rows_raw:,} rows"
        )
        click.echo(books.sentence)
    for example in (example for book in books.partitions for example in book.examples):
        click.echo(f"  {example}", err=True)
    if not books.closes:
        raise Difference(
            "the books do not close",
            books.sentence,
            "Keep Kafka's log and the ledger as they are, and look at the offsets above.",
        )


@click.command()
@home_option
@click.option("--check", is_flag=True, help="Create nothing; fail when a topic is missing or does not fit.")
def topics(home: str, check: bool) -> None:
    """Create the topics that are missing, and check those that exist."""
    from streams.topics import Broker, ensure_topic, require_topic, topic_names

    settings = settings_of(home)
    broker = Broker(settings)
    for name in topic_names(settings):
        found, created = (
            (require_topic(broker, name, settings), False) if check else ensure_topic(broker, name, settings)
        )
        done = "created" if created else "fits"
        click.echo(f"{found.name}: {done}, {found.partitions} partitions, id {found.id}")


@click.command()
@home_option
def migrate(home: str) -> None:
    """Bring the ledger's tables and views up to date."""
    from creditstream.home import Home
    from sinks.clickhouse import connect
    from sinks.migrate import create_database
    from sinks.migrate import migrate as apply

    settings = settings_of(home)
    if settings.ledger_url:
        create_database(settings.ledger_url, settings.ledger_password)
        applied = apply(connect(settings.ledger_url, settings.ledger_password))
    else:
        place = Home.at(settings.home)
        with place.hold():
            client = connect(f"chdb://{place.ledger}")
            applied = apply(client)
            client.close()
    for migration in applied:
        click.echo(f"applied {migration.number:04d} {migration.name}")
    if not applied:
        click.echo("nothing to do")


@click.command()
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", help="How to print it.")
def config(form: str) -> None:
    """Every setting: its value, where it comes from, its bounds and its meaning."""
    rows = origins(read_settings())
    rows += [Origin(name, "", "environment", "", "unknown: ignored") for name in unknown_variables()]
    show_rows(rows, form, Origin.__struct_fields__, "")
