"""One worker process: the Faust application, its read API, its log, its end."""

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

import faust
import mode
import structlog

from creditstream.api import ApiService, listen
from creditstream.asking import ledger_failed
from creditstream.home import Endpoints, Home
from creditstream.logs import configure_logs, logging_config
from schemas.problem import Unreachable
from sinks.clickhouse import DatabaseError
from streams.app import EXIT_RESTART, MeterApp, create_app
from streams.settings import Settings, unknown_variables

BROKER_LOOK_S: Final = 1.0
STOP_S_MAX: Final = 15.0
"""After this long a stop that hangs is ended by force; what was not written is read again."""

log: Final = structlog.get_logger()


class Watch(mode.Service):
    """Ends the worker when the Kafka that it embeds has ended."""

    def __init__(self, app: MeterApp, poll: Callable[[], int | None], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._app, self._poll = app, poll

    @mode.Service.timer(BROKER_LOOK_S)
    async def _look(self) -> None:
        if self._poll() is not None and not self._app.should_stop:
            await self._app.on_fatal(Unreachable("the embedded Kafka has ended", "see kafka.log in the home's logs"))


def run_service(
    settings: Settings, home: Home, poll_kafka: Callable[[], int | None] | None, end_with_input: bool
) -> int:
    """Run until SIGTERM or SIGINT (exit code 0), or until something ends it: 75 to be started again.

    Problem when it cannot start. Publishes its addresses in the home while it runs. ``poll_kafka`` gives the exit code
    of the Kafka that it embeds, None while that runs.
    """
    configure_logs(settings.log_format)
    for name in unknown_variables():
        log.warning("unknown_setting", name=name, fix="see `creditstream config`")
    app = create_app(settings)
    try:
        app.meter.open()
    except DatabaseError as error:
        raise ledger_failed(error) from error
    bound = listen(settings.api_host, settings.api_port)
    host, port = bound.getsockname()[:2]
    app.add_dependency(ApiService(app.meter, bound))
    if poll_kafka:
        app.add_dependency(Watch(app, poll_kafka))
    home.publish(Endpoints(settings.kafka_bootstrap, f"http://{host}:{port}", os.getpid()))
    log.info(
        "started",
        api=f"http://{host}:{port}",
        kafka=settings.kafka_bootstrap,
        topic=app.meter.topic.name,
        pid=os.getpid(),
    )
    if end_with_input:
        threading.Thread(target=_end_with_input, daemon=True).start()
    exit_code = _execute(app, settings)
    log.info("stopped", exit_code=exit_code, rows=sum(app.meter.written.values()))
    return exit_code


class _Worker(faust.Worker):
    """Faust's worker with a bound on its end, for a Kafka that is gone may keep aiokafka's from coming, and without a
    last second in which nothing is left to do.
    """

    async def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, STOP_S_MAX)
        await super().stop()

    async def _sentinel_task(self) -> None:
        """Faust's own runs the loop for one more second."""
        await asyncio.sleep(0)


def _execute(app: MeterApp, settings: Settings) -> int:
    worker = _Worker(
        app, loglevel="info", logging_config=logging_config(settings.log_format), redirect_stdouts=False, quiet=True
    )
    signal.signal(signal.SIGALRM, lambda *_: os._exit(EXIT_RESTART))
    try:
        worker.execute_from_commandline()
    except SystemExit as end:
        return EXIT_RESTART if app.fatal or end.code else 0
    except (Exception, asyncio.CancelledError) as error:
        # Whether mode raises again what crashed the application, or a cancelled agent's end, is chance.
        log.exception("crashed", error=f"{type(error).__name__}: {error}")
        return EXIT_RESTART
    return EXIT_RESTART if app.fatal else 0


def _end_with_input() -> None:
    """The process that started this one is gone, or said that it is enough."""
    while sys.stdin.buffer.read(4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
