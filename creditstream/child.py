"""A worker as a process of its own, which ends with this one: for the demo and the benchmarks."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from creditstream.asking import WorkerAnswers
from creditstream.home import Home
from schemas.problem import Problem, Unreachable
from streams.settings import PREFIX, variable

READY_S_MAX: Final = 60.0
STOP_S_MAX: Final = 15.0
POLL_S: Final = 0.02


@contextmanager
def child_worker(home: Home, **settings: str) -> Iterator[WorkerAnswers]:
    """`creditstream worker` on this home, with these settings and none of the environment's (which may name a real
    ledger), until the block ends; ready when it begins.

    Problem when it ends before, or is not ready within `READY_S_MAX`; its log lies in the home.
    """
    home.logs.mkdir(parents=True, exist_ok=True)
    log = home.logs / "worker.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environment |= {variable(name): value for name, value in ({"api_port": "0"} | settings).items()}
    command = [sys.executable, "-m", "creditstream", "worker", "--end-with-input", "--home", str(home.path)]
    with log.open("wb") as lines:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=lines, stderr=lines, env=environment, start_new_session=True
        )
    try:
        yield _await_ready(home, process, log)
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(STOP_S_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_ready(home: Home, process: "subprocess.Popen[bytes]", log: Path) -> WorkerAnswers:
    deadline = time.monotonic() + READY_S_MAX
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Problem("the worker ended", " ".join(last) or f"exit code {process.returncode}", f"See {log}.")
        if endpoints := home.worker():
            answers = WorkerAnswers(endpoints.api_url)
            try:
                if answers.status().ready:
                    return answers
            except Unreachable:
                pass
        time.sleep(POLL_S)
    raise Problem("the worker is not ready", f"{READY_S_MAX:.0f} s are over", f"See {log}.")
