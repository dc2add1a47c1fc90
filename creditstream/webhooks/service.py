"""The notifier as a process: its signals, its log, its end."""

import os
import signal
from pathlib import Path
from typing import Final

import structlog
from confluent_kafka import KafkaException
from msgspec.structs import replace

from creditstream.logs import configure_logs
from creditstream.webhooks.endpoints import Endpoint, load_endpoints
from creditstream.webhooks.notifier import Notifier
from schemas.problem import Problem
from streams.kafka.topics import LIMIT_ALERTS, WEBHOOK_DELIVERIES, Broker
from streams.settings import Settings

STOP_S_MAX: Final = 9.0
"""After this long a stop that hangs, since Kafka is gone, is ended by force; what was not recorded is done again."""

log: Final = structlog.get_logger()


class Signals:
    """What the operating system wants: an end (SIGTERM, SIGINT), the file read again (SIGHUP)."""

    def __init__(self) -> None:
        self.stop = False
        self.reload = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGHUP, self._on_reload)
        signal.signal(signal.SIGALRM, lambda *_: os._exit(os.EX_TEMPFAIL))

    def _on_stop(self, *_: object) -> None:
        self.stop = True
        signal.setitimer(signal.ITIMER_REAL, STOP_S_MAX)

    def _on_reload(self, *_: object) -> None:
        self.reload = True


def run_notifier(settings: Settings, path: Path) -> int:
    """Deliver until SIGTERM or SIGINT (exit code 0), or until Kafka is lost: 75 to be started again.

    Problem when it cannot start. SIGHUP reads the file of endpoints again; a bad one is refused and the old one stays.
    """
    configure_logs(settings.log_format)
    signals = Signals()
    endpoints = load_endpoints(path)
    broker = Broker(settings)
    for name in (LIMIT_ALERTS, WEBHOOK_DELIVERIES):
        broker.require(name)
    notifier = Notifier(replace(settings, webhook_endpoints=str(path.absolute())), endpoints)
    log.info("notifier_started", kafka=settings.kafka_bootstrap, endpoints=sorted(endpoints), pid=os.getpid())
    try:
        while not signals.stop:
            if signals.reload:
                signals.reload = False
                endpoints = _reload(notifier, path, endpoints)
            notifier.turn()
        notifier.stop()
        return 0
    except (Problem, KafkaException) as lost:
        return _ended_by(lost)
    finally:
        signal.setitimer(signal.ITIMER_REAL, STOP_S_MAX)
        notifier.close()
        signal.setitimer(signal.ITIMER_REAL, 0)


def _ended_by(lost: Problem | KafkaException) -> int:
    log.error("notifier_ended", why=str(lost) if isinstance(lost, Problem) else lost.args[0].str())
    return os.EX_TEMPFAIL


def _reload(notifier: Notifier, path: Path, old: dict[str, Endpoint]) -> dict[str, Endpoint]:
    """Go on with the file's endpoints; when it cannot be used, with the old ones: of those, what is gone stays so."""
    try:
        endpoints = load_endpoints(path)
    except Problem as problem:
        log.warning("endpoints_refused", why=str(problem), kept=sorted(old))
        return old
    notifier.reload(endpoints)
    log.info("endpoints_loaded", endpoints=sorted(endpoints))
    return endpoints
