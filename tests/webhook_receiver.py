"""A receiver of webhooks that behaves as it is told, request by request."""

import ssl
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Final, NamedTuple, Self

STALL: Final = "takes the request and never answers"
DRIP: Final = "sends a byte of a header now and then, for ever"
DIE: Final = "closes the connection in the middle of the status line"
HALF_BODY: Final = "answers 200 and closes the connection in the middle of the body"
GARBAGE: Final = "does not speak HTTP"
DRIP_EVERY_S: Final = 0.05


class Reply(NamedTuple):
    """A status with one header."""

    status: int
    header: tuple[str, str] = ("x-nothing", "")


Behaviour = int | str | Reply


class Received(NamedTuple):
    """One request."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


class WebhookReceiver:
    """Listens on 127.0.0.1. ``behave`` says how to answer a request; a context manager."""

    def __init__(
        self, behave: Callable[[Received], Behaviour] = lambda _: 204, tls: ssl.SSLContext | None = None
    ) -> None:
        self.behave = behave
        self.received: Final[list[Received]] = []
        self.ended: Final = threading.Event()
        receiver = self

        class Request(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                received = Received(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
                receiver.received.append(received)
                self.close_connection = True
                answer = receiver.behave(received)
                if isinstance(answer, str):
                    receiver._misbehave(answer, self.wfile.write)
                    return
                reply = Reply(answer) if isinstance(answer, int) else answer
                self.send_response(reply.status)
                self.send_header(*reply.header)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Request)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port: Final = self._server.server_port
        self.url: Final = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    @property
    def ids(self) -> list[str]:
        """The ids received, in order, repetitions included."""
        return [received.id for received in list(self.received)]

    def _misbehave(self, how: str, write: Callable[[bytes], object]) -> None:
        if how == STALL:
            self.ended.wait()
        elif how == DRIP:
            write(b"HTTP/1.1 200 OK\r\nx-slow: ")
            while not self.ended.wait(DRIP_EVERY_S):
                write(b"a")
        elif how == DIE:
            write(b"HTTP/1.1 2")
        elif how == HALF_BODY:
            write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhal")
        elif how == GARBAGE:
            write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
