"""A ClickHouse for a test: `tests.clickhouse_http` as a process, started, killed and told what to break."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

ROOT: Final = Path(__file__).parents[1]
START_S_MAX: Final = 30.0
STOP_S_MAX: Final = 10.0


class ClickHouseServer:
    """One server on `directory`/data; a context manager. The port stays the same through every restart."""

    def __init__(self, directory: Path, *, password: str = "") -> None:
        self.directory, self.password = directory, password
        self.host, self.port = "127.0.0.1", 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """chDB's directory; another process may open it only while the server is down."""
        return self.directory / "data"

    @property
    def url(self) -> str:
        """For `CREDITSTREAM_LEDGER_URL`; without a database."""
        return f"http://default@{self.host}:{self.port}"

    @property
    def pid(self) -> int:
        """RuntimeError while it is down."""
        if self._process is None:
            raise RuntimeError("the server is down")
        return self._process.pid

    def start(self) -> Self:
        """Returns when it listens. RuntimeError, with what it wrote, when it does not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "tests.clickhouse_http",
            f"--path={self.data}",
            f"--port={self.port}",
        ]
        with (self.directory / "stderr.log").open("ab") as errors:
            self._process = subprocess.Popen(
                [*command, f"--password={self.password}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env=os.environ | {"TZ": "UTC"},
            )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], START_S_MAX)
        line = self._process.stdout.readline() if ready else b""
        if not line:
            self.kill()
            written = (self.directory / "stderr.log").read_text()
            raise RuntimeError(f"the server did not start: {written[-2000:]}")
        self.port = int(json.loads(line)["port"])
        return self

    def stop(self) -> None:
        """SIGTERM; held inserts never land. Does nothing while it is down."""
        if self._process is not None:
            self._process.terminate()
            self._reap()

    def kill(self) -> None:
        """SIGKILL, as if the power of its machine were cut, except that the page cache survives."""
        if self._process is not None:
            self._process.kill()
            self._reap()

    def restart(self) -> None:
        """SIGTERM and start, on the same directory and port."""
        self.stop()
        self.start()

    def wait_until_down(self) -> None:
        """After a ``kill_before`` or ``kill_after``: waits until the process is gone."""
        if self._process is not None:
            self._reap()

    def forget_tokens(self) -> int:
        """Deletes the deduplication logs, as a power cut may, and counts them. RuntimeError while it runs."""
        if self._process is not None:
            raise RuntimeError("stop the server first")
        logs = list(self.data.glob("store/*/*/deduplication_logs"))
        for log in logs:
            shutil.rmtree(log)
        return len(logs)

    def lose_newest_part(self) -> None:
        """Deletes the newest part, and keeps its token: as a death right before the part gets its name leaves them, or
        a power cut. RuntimeError while it runs.
        """
        if self._process is not None:
            raise RuntimeError("stop the server first")
        parts = [path for path in self.data.glob("store/*/*/*_*_*_0") if path.name.split("_")[0].isdecimal()]
        shutil.rmtree(max(parts, key=lambda path: path.stat().st_mtime))

    def fault(self, fault: str, amount: float = 0, *, on: str = "insert", containing: str = "") -> None:
        """Plans one fault, see `tests.clickhouse_http.Fault`; they are applied in the order of planning."""
        self._post("/_faults", [{"fault": fault, "amount": amount, "on": on, "containing": containing}])

    def release(self) -> None:
        """Every request held so far goes on."""
        self._post("/_release", [])

    def forget_log(self) -> None:
        """Empties the log and drops the faults that no request has met yet."""
        self._post("/_forget", [])

    def log(self, kind: str = "") -> list[dict[str, Any]]:
        """The requests seen, oldest first, of one kind (insert, select, other) or of all."""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/_log", timeout=STOP_S_MAX) as answer:
            lines: list[dict[str, Any]] = json.load(answer)
        return [line for line in lines if kind in ("", line["kind"])]

    def wait_for(self, *, fault: str, state: str = "waiting", seconds: float = 10) -> None:
        """Until a request that met `fault` is in `state`. TimeoutError after `seconds`."""
        deadline = time.monotonic() + seconds
        while not any(line["fault"] == fault and line["state"] == state for line in self.log()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no request with {fault} in state {state}: {self.log()}")
            time.sleep(0.01)

    def _post(self, path: str, content: object) -> None:
        url, body = f"http://{self.host}:{self.port}{path}", json.dumps(content).encode()
        with urllib.request.urlopen(urllib.request.Request(url, body), timeout=STOP_S_MAX):
            return

    def _reap(self) -> None:
        process, self._process = self._process, None
        assert process is not None
        with process:
            try:
                process.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                process.kill()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
