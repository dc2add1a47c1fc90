"""The front door: what a person types. Data goes to standard output, everything else to standard error.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 the answer is no or a difference was found, 4 unknown id, 5 Kafka,
ClickHouse or the worker does not answer, 75 start me again, 130 interrupted.
"""

import os
import sys

import rich_click as click

from creditstream import __version__
from creditstream.cli import account, alerts, ask, balance, demo, notifier, operate, rules, send, worker
from schemas.problem import Problem
from streams.settings import DEBUG_VARIABLE

click.rich_click.TEXT_MARKUP = "rich"
click.rich_click.MAX_WIDTH = 110
click.rich_click.COMMAND_GROUPS = {
    "creditstream": [
        {"name": "Start here", "commands": ["demo"]},
        {"name": "Ask", "commands": ["balance", "usage", "explain", "statement", "rules", "dead-letters"]},
        {"name": "Before it runs", "commands": ["check", "estimate", "top"]},
        {"name": "Be told", "commands": ["alerts", "notifier", "listen"]},
        {"name": "Bill", "commands": ["plan", "grant", "reverse", "limits"]},
        {"name": "Send", "commands": ["send"]},
        {"name": "Operate", "commands": ["worker", "reconcile", "topics", "migrate", "config"]},
    ]
}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="creditstream")
def cli() -> None:
    """Meters cell runs into an exactly-once credit ledger, and explains any charge in one sentence.

    Try `creditstream demo`.
    """


for command in (
    demo.demo, worker.worker, send.send, ask.usage, ask.explain, ask.dead_letters, rules.rules,
    balance.balance, balance.statement, balance.check, balance.estimate, balance.top,
    account.plan, account.grant, account.reverse, account.limits,
    alerts.alerts, notifier.notifier, alerts.listen,
    operate.reconcile, operate.topics, operate.migrate, operate.config,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run the command line; every failure is one line and an exit code, ``CREDITSTREAM_DEBUG=1`` adds the trace."""
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="creditstream") or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except Problem as problem:
        _fail(f"creditstream: {problem}", problem.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("creditstream: interrupted", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except ModuleNotFoundError as error:
        _fail(
            f"creditstream: {error.name} is not installed. Install creditstream[embedded], or [worker] for a server.", 1
        )
    except Exception as error:
        _fail(f"creditstream: unexpected {type(error).__name__}: {error}. Set {DEBUG_VARIABLE}=1 to see where.", 1)


def _fail(line: str, exit_code: int) -> None:
    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        traceback.print_exc()
    click.echo(line, err=True)
    sys.exit(exit_code)
