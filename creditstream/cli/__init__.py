"""The front door: what a person types. Data goes to standard output, everything else to standard error.

Exit codes: 0 done, 1 failed or set aside, 2 wrong usage, 3 the answer is no or a difference was found, 4 unknown id,
5 Kafka, ClickHouse or the worker does not answer, 75 start me again, 130 interrupted.
"""

import errno
import os
import sys
from pathlib import Path

from creditstream.cli.terminal import say
from schemas.problem import Problem


def main() -> None:
    """Run the command line; every failure is one line and an exit code, ``CREDITSTREAM_DEBUG=1`` adds the trace."""
    # Where they were closed from the start: nothing is read, and what belongs to standard error is not written among
    # the answers instead.
    sys.stdin = sys.stdin or Path(os.devnull).open()  # noqa: SIM115  # until the end
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    try:
        # Loaded here: Ctrl-C while modules load is one line, too.
        from creditstream.cli.commands import run

        sys.exit(run())
    except Problem as problem:
        _fail(str(problem), problem.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed. Install creditstream[embedded], or [worker] for a server.", 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of the help, for instance
            _fail(f"{error.filename or 'the output'} cannot be written: {error.strerror}. Make room for it.", 1)
        if isinstance(error.__cause__, KeyboardInterrupt):  # Python 3.11, where it came while a class was made
            _fail("interrupted", 130)
        _fail(f"unexpected {type(error).__name__}: {error}. Set CREDITSTREAM_DEBUG=1 to see where.", 1)


def _fail(line: str, exit_code: int) -> None:
    report(line)
    sys.exit(exit_code)


def report(line: str) -> None:
    """Say what failed, while it is handled."""
    from streams.settings import DEBUG_VARIABLE

    if os.environ.get(DEBUG_VARIABLE):
        import traceback

        traceback.print_exc()
    say(*f"creditstream: {line}".split("\n"), err=True)
