"""Every command, and how the command line is run."""

import contextlib
import sys
from pathlib import Path

import rich_click as click

from creditstream import __version__
from creditstream.cli import alerts, balance, billing, demo, letters, notifier, operate, rules, runs, send, worker
from creditstream.cli.terminal import NAME, as_called, program

click.rich_click.TEXT_MARKUP = "rich"
click.rich_click.MAX_WIDTH = 110
click.rich_click.COMMAND_GROUPS = {
    "creditstream": [
        {"name": "Start here", "commands": ["demo"]},
        {"name": "Ask", "commands": ["balance", "usage", "runs", "explain", "statement", "rules", "dead-letters"]},
        {"name": "Check before running", "commands": ["check", "estimate", "top"]},
        {"name": "Get alerts", "commands": ["alerts", "notifier", "listen"]},
        {"name": "Plans and credits", "commands": ["plan", "grant", "grants", "reverse", "limits"]},
        {"name": "Send", "commands": ["send"]},
        {"name": "Operate", "commands": ["worker", "reconcile", "topics", "migrate", "config"]},
    ]
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=NAME)
def cli() -> None:
    """Meter cell runs into an exactly-once credit ledger, and explain any charge in one sentence.

    Start with `creditstream demo`.
    """


for command in (
    demo.demo, worker.worker, send.send, runs.usage, runs.runs, runs.explain, letters.dead_letters, rules.rules,
    balance.balance, balance.statement, balance.check, balance.estimate, balance.top,
    billing.plan, billing.grant, billing.grants, billing.reverse, billing.limits,
    alerts.alerts, notifier.notifier, alerts.listen,
    operate.reconcile, operate.topics, operate.migrate, operate.config,
):  # fmt: skip
    cli.add_command(command)


def run() -> int:
    """Run what was typed; the exit code. Problem and KeyboardInterrupt are for the caller."""
    _name_as_called(cli)
    called, groups = program(), click.rich_click.COMMAND_GROUPS
    groups[called] = groups[NAME]
    if odd := [word for word in sys.argv[1:] if not _is_utf8(word) and not Path(word).exists()]:
        # No event can carry it; a file may have any name.
        return _refused(click.UsageError(f"{odd[0]!a} is not UTF-8."))
    try:
        return cli.main(standalone_mode=False, prog_name=called) or 0
    except click.ClickException as error:
        return _refused(error)
    except click.Abort as end:
        raise KeyboardInterrupt from end
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # nobody reads the help any more
            return 0
        raise


def _refused(error: click.ClickException) -> int:
    """The exit code, which is told also where nobody can be told why."""
    with contextlib.suppress(OSError):
        error.show()
    return error.exit_code


def _is_utf8(word: str) -> bool:
    """Whether a word was typed in UTF-8: Python keeps the bytes of any other as surrogates."""
    return word.isascii() or word == word.encode(errors="ignore").decode()


def _name_as_called(command: click.Command) -> None:
    """Let the examples of a command's help be typed as they stand, and those of the commands below it."""
    command.help = as_called(command.help or "")
    for below in getattr(command, "commands", {}).values():
        _name_as_called(below)
