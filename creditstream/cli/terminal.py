"""What a person reads: commands as they are called here, and text that cannot command the terminal.

Ids and details come from events, so anybody may have written them. JSON and CSV, which programs read, stay exact.
"""

import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any, Final, TextIO

from schemas.problem import Problem

NAME: Final = "creditstream"

_kept: Final[dict[str, str]] = {}
"""Parameter → its option, as the command that runs was given it: without it, a suggested one would ask elsewhere."""


def program() -> str:
    """How this program is called again: by its name where the PATH leads to it, else as it was called now."""
    import shutil  # slow to load

    called, found = Path(sys.argv[0]), shutil.which(NAME)
    if called.name != NAME:
        return f"{shlex.quote(sys.executable)} -m {NAME}"
    return NAME if found and called.exists() and called.samefile(found) else shlex.quote(sys.argv[0])


def keep(parameter: str, option: str) -> None:
    """Commands that are suggested from now on have this option, where they take it; empty: not any more."""
    _kept[parameter] = option


def suggested(words: str) -> str:
    """A command of this program, ``usage ws_1 --by day``, so that it can be typed as it stands."""
    from creditstream.cli.commands import cli  # needs this module

    command: Any = cli
    named, rest = program(), words.split(" ")
    while rest and (below := getattr(command, "commands", {}).get(rest[0])):
        command, named, rest = below, f"{named} {rest[0]}", rest[1:]
    taken = [each.name for each in command.params if each.param_type_name == "option"]  # `alerts test` has a URL, too
    options = [_kept[name] for name in taken if _kept.get(name)]
    return " ".join([named, *options, *rest])


def argument(text: str) -> str:
    """A text as the last word of a suggested command, which would take ``-x`` for an option."""
    return f"-- {quoted(text)}" if text.startswith("-") else quoted(text)


def quoted(text: str) -> str:
    """A text as one word of a suggested command. What `printable` would change is written as bash and zsh read it."""
    if text.isprintable():
        return shlex.quote(text)
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + "".join(each if each.isprintable() else f"\\U{ord(each):08x}" for each in plain) + "'"


def as_called(text: str) -> str:
    """A text whose commands in backticks, `creditstream ...`, can be typed as they stand."""
    return re.sub(f"`{NAME} ([^`]*)", lambda found: f"`{suggested(found[1])}", text)


def printable(text: str) -> str:
    """A text in which control characters, and others that cannot be seen, are written as escapes."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def say(*lines: str, err: bool = False) -> bool:
    """Print lines for a person; whatever stands in one, it stays one line. As `write`."""
    text = "".join(f"{printable(as_called(line))}\n" for line in lines)
    return write(text, sys.stderr if err else sys.stdout)


def write(text: str, stream: TextIO | None = None) -> bool:
    """Write to standard output, or to another stream, exactly; False when nobody reads it any more, or when standard
    error cannot be written. What a command has begun it does all the same, and its exit code stays its answer. Problem
    when standard output cannot be written.
    """
    chosen = stream or sys.stdout
    if chosen is None:  # standard output was closed before the start
        return True
    try:
        chosen.write(text.encode(chosen.encoding, "backslashreplace").decode(chosen.encoding))
        chosen.flush()
    except BrokenPipeError:
        # What is left in its buffer would be complained about at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), chosen.fileno())
        return False
    except OSError as error:
        if chosen is sys.stderr:
            return False
        raise Problem("the output cannot be written", error.strerror or "", "Write it elsewhere.") from error
    return True
