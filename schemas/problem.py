"""The one exception that a person may see.

A problem says what happened, why, and what to do, in one line; the CLI prints it and exits with its code,
the API answers it as JSON, the worker logs it. Anything else that reaches the top is a defect.
"""

from typing import ClassVar


class Problem(Exception):
    """Something that a person can act on.

    ``what`` is the fact ("the catalogue cannot be read"), ``why`` the cause ("prices.toml: action `x`: ..."),
    ``fix`` the next step, as an imperative. The text is ``what: why. fix.``
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        cause = f"{self.what}: {self.why}" if self.why else self.what
        return f"{cause.rstrip('.')}. {self.fix}".rstrip()


class Difference(Problem):
    """The answer is no, or two things that must be equal are not."""

    exit_code = 3


class UnknownId(Problem):
    """Nothing is known under this id."""

    exit_code = 4


class Unreachable(Problem):
    """Kafka, ClickHouse or the worker does not answer."""

    exit_code = 5
