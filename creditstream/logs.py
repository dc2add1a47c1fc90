"""The log of a worker or notifier: one line for each event of interest, JSON unless somebody watches a terminal.

Faust, aiokafka and uvicorn say much that interests nobody; of them only warnings pass, in the same form.
"""

import logging
import sys
import time
from typing import Any

import structlog

REPEAT_S = 10.0

_SHARED: list[Any] = [
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
]


def configure_logs(log_format: str) -> None:
    """Set up structlog: ``json``, ``text``, or ``auto`` (text on a terminal). Lines go to standard error."""
    structlog.configure(
        processors=[*_SHARED, structlog.processors.format_exc_info, _renderer(log_format)],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def logging_config(log_format: str) -> dict[str, Any]:
    """The standard library's configuration for the libraries' own loggers, in the dictConfig form."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {
            "lines": {
                "()": structlog.stdlib.ProcessorFormatter,
                "foreign_pre_chain": _SHARED,
                "processors": [
                    structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                    structlog.processors.format_exc_info,
                    _renderer(log_format),
                ],
            }
        },
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "lines", "filters": ["quiet"]}},
        "filters": {"quiet": {"()": _Quiet}},
        "root": {"level": "WARNING", "handlers": ["stderr"]},
    }


class _Quiet(logging.Filter):
    """Drops the libraries' noise: what is below a warning, what they say at every ordinary start or stop, and what
    they have said within the last `REPEAT_S`: while Kafka is away aiokafka would write dozens of lines a second.
    Also what Faust suspects of a partition that was silent for five minutes when its next records come: that nothing
    is processed or committed any more. Whether it is, `/readyz` and `lag_offsets` say.
    """

    _NOISE = (
        "Group Coordinator Request failed",
        "Timer Monitor.sampler",
        "Heartbeat failed",
        "Topic creation disabled",
        "Has not committed TP(",
        "Stream stopped processing, or is slow for TP(",
        "Stream has not started processing TP(",
    )

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """True for lines that somebody may need."""
        if record.levelno < logging.WARNING or any(noise in record.getMessage() for noise in self._NOISE):
            return False
        said, now = (record.name, str(record.msg)), time.monotonic()
        if now - self._said_at.get(said, -REPEAT_S) < REPEAT_S:
            return False
        self._said_at[said] = now
        return True


def _renderer(log_format: str) -> Any:
    if log_format == "text" or (log_format == "auto" and sys.stderr.isatty()):
        return structlog.dev.ConsoleRenderer(pad_event_to=24, colors=sys.stderr.isatty())
    return structlog.processors.JSONRenderer()
