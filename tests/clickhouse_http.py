"""ClickHouse's HTTP interface over chDB, with faults on request: the ledger's HTTP path is tested against it.

``python -m tests.clickhouse_http --path DIR [--port 0] [--password WORD]`` prints ``{"port": N, "pid": N}``
in one line when it listens on 127.0.0.1. SIGTERM ends it, and so does the end of its standard input (its
parent has died).

Every request runs on a chDB connection of its own, so settings, parameters and the database of one request
never reach another. Not here: state of sessions (but two requests at once in one session are refused, as a
server does), external tables, response compression, users other than one password, replicated tables.

``POST /_faults`` takes a JSON list of `Fault`; each is applied once, in order, to the next one that matches.
``POST /_release`` lets every held request go on, ``POST /_forget`` empties the log and drops the faults still
to come, ``GET /_log`` lists the requests seen, as `Seen`.
"""

import argparse
import base64
import io
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

import chdb
import lz4.frame  # type: ignore[import-untyped]  # it has no stubs
import msgspec
from backports import zstd
from chdb._exceptions import ChdbError

NOT_SETTINGS: Final = frozenset(
    (
        *("query", "database", "default_format", "user", "password", "role", "quota_key", "query_id"),
        *(
            "session_id",
            "session_timeout",
            "session_check",
            "close_session",
            "stacktrace",
            "wait_end_of_query",
        ),
        *("compress", "decompress", "buffer_size", "client_protocol_version", "enable_http_compression"),
        *("send_progress_in_http_headers", "http_headers_progress_interval_ms"),
    )
)
"""URL parameters that the HTTP interface takes for itself; all others are settings, or ``param_`` values."""

INSERT_WITH_DATA: Final = re.compile(
    rb"\s*(INSERT\s+INTO\s+(?:TABLE\s+)?[^\s(]+\s*(?:\([^)]*\))?)"
    rb"(\s+SETTINGS\s.*?)?\s+FORMAT\s+(?!VALUES\b)(\w+)[ \t]*\r?\n?",
    re.IGNORECASE | re.DOTALL,
)
READING: Final = re.compile(r"[\s(]*(SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK)\b", re.IGNORECASE)
FORMAT_AT_END: Final = re.compile(r"\bFORMAT\s+(\w+)\s*;?\s*$", re.IGNORECASE)

FIELD_BYTES_MAX: Final = 131_072
"""ClickHouse's ``http_max_field_value_size``: of a parameter, in the URL or in a form."""

STATUS_BY_CODE: Final = {
    **dict.fromkeys((6, 26, 27, 36, 38, 41, 43, 53, 62, 69, 72, 117, 321), 400),
    **dict.fromkeys((46, 47, 50, 56, 60, 63, 73, 78, 81, 115), 404),
    **dict.fromkeys((192, 193, 497, 516), 403),
    48: 501,
    76: 503,
    159: 408,
    209: 503,
}
"""HTTP status of an exception as ClickHouse chooses it; 500 for every other code."""

FaultKind = Literal[
    "pass",
    "close_before",
    "close_after",
    "status_503",
    "late_before",
    "late_after",
    "hold",
    "exception",
    "exception_after",
    "kill_before",
    "kill_after",
]


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What goes wrong with one request: the next one of kind `on` whose statement contains `containing`.

    ``pass``: nothing (leaves one request alone). ``close_before``: connection closed, not executed;
    ``close_after``: executed, closed without an answer. ``status_503``: not executed.
    ``late_before``: executed and answered after `amount` seconds; ``late_after``: executed at once, answered
    after `amount` seconds. ``hold``: executed and answered only after ``POST /_release``.
    ``exception``: not executed, answered with ClickHouse's error code `amount`; ``exception_after``:
    executed, then answered so. ``kill_before``, ``kill_after``: the server kills itself (SIGKILL), not
    executed or executed.
    """

    fault: FaultKind
    amount: float = 0
    on: Literal["insert", "select", "other", "any"] = "insert"
    containing: str = ""


class Seen(msgspec.Struct):
    """One request in the log.

    `state`: waiting (or under way), refused (by a fault, not executed), failed (in the engine, with its
    `code`), executed (answered or not).
    """

    kind: str
    query: str
    token: str
    settings: dict[str, str]
    fault: str = ""
    state: str = "waiting"
    code: int = 0


class Statement(msgspec.Struct, frozen=True):
    """One request, parsed. Of an insert with data, `text` ends before SETTINGS (`clause`) and FORMAT."""

    text: str
    clause: str
    data: bytes | None
    data_format: str
    database: str
    settings: dict[str, str]
    parameters: dict[str, str]
    default_format: str
    session: str

    @property
    def kind(self) -> Literal["insert", "select", "other"]:
        if self.text.lstrip()[:6].upper() == "INSERT":
            return "insert"
        return "select" if READING.match(self.text) else "other"


class Answer(msgspec.Struct, frozen=True):
    """What a client gets: an HTTP status, headers and a body."""

    status: int
    headers: dict[str, str]
    body: bytes


class EngineError(Exception):
    """An exception as ClickHouse words it, with its code."""

    def __init__(self, message: str, code: int = 0) -> None:
        worded = re.search(r"Code: (\d+)\. DB::Exception.*", message, re.DOTALL)
        self.code = int(worded[1]) if worded else code or 1002
        super().__init__(worded[0] if worded else f"Code: {self.code}. DB::Exception: {message}")

    def answer(self) -> Answer:
        headers = {"X-ClickHouse-Exception-Code": str(self.code), "Content-Type": "text/plain; charset=UTF-8"}
        return Answer(STATUS_BY_CODE.get(self.code, 500), headers, f"{self}\n".encode())


def parse(url: str, headers: dict[str, str], body: bytes) -> Statement:
    """The statement of a request: in the body, in the URL, or in the URL with its data in the body."""
    fields = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
    body = decompress(body, headers.get("content-encoding", ""))
    if headers.get("content-type", "").startswith("multipart/form-data"):
        fields |= form_fields(headers["content-type"], body)
        body = b""
    if any(len(value.encode(errors="surrogateescape")) > FIELD_BYTES_MAX for value in fields.values()):
        raise EngineError("HTML Form Exception: Field value too long (POCO_EXCEPTION)", 1000)
    query = fields.get("query", "").encode()
    whole = query + b"\n" + body if query and body else query + body
    head = INSERT_WITH_DATA.match(whole)
    return Statement(
        text=(head[1] if head else whole).decode(errors="surrogateescape"),
        clause=(head[2] or b"").decode() if head else "",
        data=whole[head.end() :] if head else None,
        data_format=head[3].decode() if head else "",
        database=fields.get("database", ""),
        settings={name: value for name, value in fields.items() if is_setting(name)},
        parameters={name[6:]: value for name, value in fields.items() if name.startswith("param_")},
        default_format=fields.get("default_format") or headers.get("x-clickhouse-format", ""),
        session=fields.get("session_id", ""),
    )


def is_setting(name: str) -> bool:
    """Whether a URL parameter is meant for the engine."""
    return name not in NOT_SETTINGS and not name.startswith("param_")


def form_fields(content_type: str, body: bytes) -> dict[str, str]:
    """The plain fields of a multipart form: how the client sends parameters too long for a URL."""
    message = BytesParser(policy=HTTP).parsebytes(f"Content-Type: {content_type}\r\n\r\n".encode() + body)
    fields = {}
    for part in message.iter_parts():
        name, content = part.get_param("name", header="content-disposition"), part.get_payload(decode=True)
        if isinstance(name, str) and isinstance(content, bytes):
            fields[name] = content.decode()
    return fields


def decompress(body: bytes, encoding: str) -> bytes:
    """EngineError for an encoding that no client of ours speaks."""
    match encoding:
        case "" | "identity":
            return body
        case "lz4":
            with lz4.frame.open(io.BytesIO(body)) as frames:
                return bytes(frames.read())
        case "zstd":
            return zstd.decompress(body)
        case "gzip" | "deflate":
            return zlib.decompress(body, wbits=47)
    raise EngineError(f"Unknown compression method: {encoding}", 89)


def quoted(value: str) -> str:
    """A string literal of ClickHouse's SQL."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def connect(path: str) -> Any:
    """A connection to chDB, which has no types."""
    return chdb.connect(path)  # type: ignore[no-untyped-call]


class Engine:
    """chDB on one directory. The first connection stays open: the engine stops with its last one."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._anchor = connect(self._path)
        self._sessions: set[str] = set()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._anchor.close()

    @contextmanager
    def session(self, session: str) -> Iterator[None]:
        """EngineError when another request of this session is under way; an empty name is no session."""
        with self._lock:
            if session and session in self._sessions:
                raise EngineError("Session is locked by a concurrent client. (SESSION_IS_LOCKED)", 373)
            self._sessions.add(session)
        try:
            yield
        finally:
            with self._lock:
                self._sessions.discard(session)

    def execute(self, statement: Statement, *, read_only: bool) -> Answer:
        """EngineError with ClickHouse's code when it fails; read_only: what a GET may do."""
        settings = statement.settings | ({"readonly": "2"} if read_only else {})
        connection = connect(self._path)
        try:
            if statement.database:
                connection.query(f"USE `{statement.database}`")
            if settings:
                pairs = (f"`{name}` = {quoted(value)}" for name, value in settings.items())
                connection.query(f"SET {', '.join(pairs)}")
            if statement.data is None:
                return self._run(connection, statement)
            return self._insert(connection, statement, statement.data)
        except (RuntimeError, chdb.ChdbError, ChdbError) as error:
            raise EngineError(str(error)) from error
        finally:
            connection.close()

    def _insert(self, connection: Any, statement: Statement, data: bytes) -> Answer:
        """The data goes through a file: chDB reads no other stream."""
        with tempfile.NamedTemporaryFile(prefix="insert-", suffix=".data") as file:
            file.write(data)
            file.flush()
            source = f"FROM INFILE {quoted(file.name)} COMPRESSION 'none'"
            sql = f"{statement.text} {source} {statement.clause} FORMAT {statement.data_format}"
            result = connection.query(sql, params=statement.parameters)
        written = {"written_rows": str(result.rows_read()), "written_bytes": str(result.bytes_read())}
        return Answer(200, self._headers("", written), b"")

    def _run(self, connection: Any, statement: Statement) -> Answer:
        """Without a format of its own it runs with a line of names, to tell no rows from no result."""
        named = FORMAT_AT_END.search(statement.text)
        shape = named[1] if named else statement.default_format
        shape_run = shape or "TabSeparatedWithNames"
        result = connection.query(statement.text, shape_run, params=statement.parameters)
        body = bytes(result.bytes() or b"")
        if not shape and body:
            shape, body = "TabSeparated", body.partition(b"\n")[2]
        read = {"read_rows": str(result.rows_read()), "read_bytes": str(result.bytes_read())}
        return Answer(200, self._headers(shape, read), body)

    def _headers(self, shape: str, counts: dict[str, str]) -> dict[str, str]:
        headers = {"X-ClickHouse-Timezone": "UTC", "X-ClickHouse-Summary": json.dumps(counts)}
        return headers | ({"X-ClickHouse-Format": shape} if shape else {})


class Faults:
    """The faults still to come, the log of requests, and the gate that holds some of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._planned: list[Fault] = []
        self._log: list[Seen] = []
        self._gate = threading.Event()

    def plan(self, faults: list[Fault]) -> None:
        with self._lock:
            self._planned.extend(faults)

    def meet(self, statement: Statement) -> tuple[Fault, Seen, threading.Event]:
        """Takes the first planned fault that matches, and opens the request's line in the log.

        The event is the next release: whoever sees the line may release the request, even before it waits.
        """
        seen = Seen(
            kind=statement.kind,
            query=statement.text.encode(errors="replace").decode()[:200],
            token=statement.settings.get("insert_deduplication_token", ""),
            settings=statement.settings,
        )
        with self._lock:
            found = next((fault for fault in self._planned if matches(fault, statement)), None)
            if found:
                self._planned.remove(found)
                seen.fault = found.fault
            self._log.append(seen)
            return found or Fault("pass"), seen, self._gate

    def release(self) -> None:
        """Lets the requests held so far go on, not those to come."""
        with self._lock:
            self._gate.set()
            self._gate = threading.Event()

    def log(self) -> bytes:
        with self._lock:
            return msgspec.json.encode(self._log)

    def forget(self) -> None:
        """Empties the log and drops the faults still to come."""
        with self._lock:
            self._log.clear()
            self._planned.clear()


def matches(fault: Fault, statement: Statement) -> bool:
    """Whether a fault is meant for this statement."""
    return fault.on in ("any", statement.kind) and fault.containing in statement.text


class Interface(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: "ClickHouse"
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        match urlsplit(self.path).path:
            case "/ping":
                self._send(Answer(200, {}, b"Ok.\n"))
            case "/_log":
                self._send(Answer(200, {"Content-Type": "application/json"}, self.server.faults.log()))
            case _:
                self._statement(b"", read_only=True)

    def do_POST(self) -> None:
        body = self._body()
        match urlsplit(self.path).path:
            case "/_faults":
                self.server.faults.plan(msgspec.json.decode(body, type=list[Fault]))
                self._send(Answer(200, {}, b""))
            case "/_release":
                self.server.faults.release()
                self._send(Answer(200, {}, b""))
            case "/_forget":
                self.server.faults.forget()
                self._send(Answer(200, {}, b""))
            case _:
                self._statement(body, read_only=False)

    def _statement(self, body: bytes, *, read_only: bool) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            self._authenticate(headers)
            statement = parse(self.path, headers, body)
            with self.server.engine.session(statement.session):
                answer = self._meet_fault(statement, read_only=read_only)
        except EngineError as error:
            self._send(error.answer())
            return
        if answer is None:
            self.close_connection = True
            return
        self._send(answer)

    def _meet_fault(self, statement: Statement, *, read_only: bool) -> Answer | None:
        """The answer, or None: close the connection without one."""
        fault, seen, released = self.server.faults.meet(statement)
        match fault.fault:
            case "close_before" | "status_503" | "exception":
                seen.state = "refused"
                if fault.fault == "close_before":
                    return None
                return Answer(503, {}, b"busy\n") if fault.fault == "status_503" else injected(fault)
            case "late_before":
                time.sleep(fault.amount)
            case "hold":
                released.wait()
            case "kill_before":
                os.kill(os.getpid(), signal.SIGKILL)
        answer = self._execute(seen, statement, read_only=read_only)
        match fault.fault:
            case "close_after":
                return None
            case "late_after":
                time.sleep(fault.amount)
            case "exception_after":
                return injected(fault)
            case "kill_after":
                os.kill(os.getpid(), signal.SIGKILL)
        return answer

    def _execute(self, seen: Seen, statement: Statement, *, read_only: bool) -> Answer:
        try:
            answer = self.server.engine.execute(statement, read_only=read_only)
        except EngineError as error:
            seen.state, seen.code = "failed", error.code
            return error.answer()
        seen.state = "executed"
        return answer

    def _authenticate(self, headers: dict[str, str]) -> None:
        """EngineError unless the password is right; any user name will do."""
        if not self.server.password:
            return
        fields = dict(parse_qsl(urlsplit(self.path).query))
        basic = base64.b64decode(headers.get("authorization", "").removeprefix("Basic ")).decode()
        given = basic.partition(":")[2] or headers.get("x-clickhouse-key") or fields.get("password", "")
        if given != self.server.password:
            raise EngineError("default: Authentication failed. (AUTHENTICATION_FAILED)", 516)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            continue
        return bytes(body)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {"X-ClickHouse-Server-Display-Name": "chdb", **answer.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the log is at /_log."""


def injected(fault: Fault) -> Answer:
    """The exception that a fault asks for."""
    return EngineError("injected by a test", int(fault.amount)).answer()


class ClickHouse(ThreadingHTTPServer):
    """The listening server; a thread for each connection."""

    daemon_threads = True

    def __init__(self, port: int, engine: Engine, password: str) -> None:
        super().__init__(("127.0.0.1", port), Interface)
        self.engine, self.password, self.faults = engine, password, Faults()

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone away is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description="ClickHouse's HTTP interface over chDB")
    parser.add_argument("--path", type=Path, required=True, help="directory of the data")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--password", default="", help="empty: none is asked for")
    given = parser.parse_args()
    server = ClickHouse(given.port, Engine(given.path), given.password)
    for stop in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stop, lambda *_: end(server))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"port": server.server_address[1], "pid": os.getpid()}), flush=True)  # noqa: T201
    sys.stdin.buffer.read()
    end(server)


def end(server: ClickHouse) -> None:
    """Held requests are dropped, unexecuted. Python's own exit would wait for chDB's threads."""
    server.engine.close()
    os._exit(0)


if __name__ == "__main__":
    main()
