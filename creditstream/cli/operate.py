"""For operators: topics, migrations, settings, and the proof that the books close."""

from contextlib import nullcontext

import msgspec
import rich_click as click

from creditstream.asking import ask, ledger_failed
from creditstream.cli.options import format_option, home_option, kafka_settings_of, source_options
from creditstream.cli.tables import show_record, show_rows
from creditstream.cli.terminal import say
from creditstream.home import Home, settings_of, whose_kafka
from schemas.problem import Difference
from streams.settings import Origin, origins, read_settings, unknown_variables, variable

BOOK_COLUMNS = (
    "topic", "partition", "events", "rows", "missing", "doubled", "different", "behind", "offsets_without_event",
    "credits", "credits_reference",
)  # fmt: skip


@click.command()
@source_options
@format_option
def reconcile(home: str, url: str, form: str) -> None:
    """Prove that every event is accounted for: compare Kafka's logs with the ledger, offset by offset.

    It reads cell runs and account events, rates them again with other code, and compares. Exit 3 on a difference.
    """
    from creditstream.reconcile import PartitionBooks
    from creditstream.reconcile import reconcile as compare

    settings = kafka_settings_of(home)
    with ask(settings, url) as answers:
        books = compare(answers, settings, say=lambda line: say(line, err=True))
    if form == "json":
        show_record(books, form)
    else:
        nothing = "The topic has no partitions."
        show_rows(books.partitions, form, PartitionBooks.__struct_fields__, nothing, read=BOOK_COLUMNS)
        if form == "text":
            say("", books.sums_sentence, books.sentence)
    say(*(f"  {example}" for book in books.partitions for example in book.examples), err=True)
    if not books.closes:
        raise Difference(
            "the books do not close",
            books.sentence,
            "Keep Kafka's log and the ledger as they are, and look at the offsets above.",
        )


@click.command()
@home_option
@click.option("--check", is_flag=True, help="Create nothing; fail if a topic is missing or misconfigured.")
def topics(home: str, check: bool) -> None:
    """Create missing topics, and check existing ones."""
    from streams.kafka.topics import TOPICS, Broker

    broker = Broker(kafka_settings_of(home))
    for name in TOPICS:
        found, created = (broker.require(name), False) if check else broker.ensure(name)
        done = "created" if created else "fits"
        say(f"{found.name}: {done}, {found.partitions} partitions, id {found.id}")


@click.command()
@home_option
def migrate(home: str) -> None:
    """Bring the ledger's tables and views up to date."""
    from sinks.clickhouse import DatabaseError, connect
    from sinks.migrate import create_database
    from sinks.migrate import migrate as apply

    settings = settings_of(home)
    try:
        if settings.ledger_url:
            create_database(settings.ledger_url, settings.ledger_password)
        hold = nullcontext() if settings.ledger_url else Home.at(settings.home).hold()
        with hold, connect(settings.ledger, settings.ledger_password) as client:
            applied = apply(client)
    except DatabaseError as error:
        raise ledger_failed(error) from error
    for migration in applied:
        say(f"applied {migration.number:04d} {migration.name}")
    if not applied:
        say("nothing to do")


@click.command()
@home_option
@format_option
def config(home: str | None, form: str) -> None:
    """List every setting with its value, source, bounds and meaning."""
    rows, kafka = origins(read_settings(home=home)), variable("kafka_bootstrap")
    if owner := whose_kafka(Home.at(home)):
        taken = {"value": owner.kafka_bootstrap, "origin": f"the worker, process {owner.pid}"}
        rows = [msgspec.structs.replace(row, **taken) if row.setting == kafka else row for row in rows]
    rows += [Origin(name, "", "environment", "", "unknown: ignored") for name in unknown_variables()]
    show_rows(rows, form, Origin.__struct_fields__, "")
