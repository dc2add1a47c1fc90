"""A receiver for trying things: verifies each request and tells of it in one line. For one machine, not for production.

It serves one request at a time, so that a sender that stalls is bounded by `REQUEST_S_MAX` and nothing piles up.
"""

import time
from collections import deque
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Final

import msgspec

from creditstream.webhooks.messages import sentence_of
from creditstream.webhooks.signing import BadSignature, verify
from schemas.problem import Problem
from schemas.webhook import BODY_BYTES_MAX, Webhook

REQUEST_S_MAX: Final = 5
REMEMBERED: Final = 1000

Say = Callable[[str], object]

_decode: Final = msgspec.json.Decoder(Webhook).decode


class Receiver:
    """Listens on 127.0.0.1. ``say`` is told each alert that was accepted, ``complain`` each request that was not."""

    def __init__(self, key: bytes, port: int, say: Say, complain: Say) -> None:
        self.accepted = 0
        self.refused = 0
        self._key, self._say, self._complain = key, say, complain
        self._seen: deque[str] = deque(maxlen=REMEMBERED)
        receiver = self

        class Request(BaseHTTPRequestHandler):
            timeout = REQUEST_S_MAX

            def do_POST(self) -> None:
                length = self.headers.get("content-length", "")
                body = b""
                if length.isascii() and length.isdigit() and int(length) <= BODY_BYTES_MAX:
                    body = self.rfile.read(int(length))
                headers = {name.lower(): value for name, value in self.headers.items()}
                self.send_response(receiver.receive(headers, body))
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """The receiver tells what matters."""

        class Server(HTTPServer):
            def handle_error(self, *_: object) -> None:
                complain("a request broke off")

        try:
            self._server = Server(("127.0.0.1", port), Request)
        except OSError as error:
            why = error.strerror or str(error)
            raise Problem(f"port {port} cannot be opened", why, "Choose another with --port.") from error

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}/"

    def serve(self) -> None:
        """Answer requests until the thread is interrupted."""
        self._server.serve_forever()

    def close(self) -> None:
        """Free the port; `serve` must have ended, or run in another thread."""
        self._server.server_close()

    def receive(self, headers: dict[str, str], body: bytes) -> HTTPStatus:
        """Check one request, tell of it, and say how to answer. Header names in small letters."""
        try:
            webhook_id = verify(self._key, headers, body, time.time_ns() // 1_000_000_000)
            webhook = _decode(body)
        except BadSignature as error:
            return self._refuse(HTTPStatus.UNAUTHORIZED, str(error))
        except (ValueError, RecursionError) as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, f"the body is not an alert: {error}")
        again = "  (again)" if webhook_id in self._seen else ""
        self._seen.append(webhook_id)
        self.accepted += 1
        stamp = webhook.timestamp.strftime("%Y-%m-%d %H:%M:%S UTC")
        self._say(f"{stamp}  {webhook.type}  {sentence_of(webhook.data)}  id {webhook_id}{again}")
        return HTTPStatus.NO_CONTENT

    def _refuse(self, status: HTTPStatus, why: str) -> HTTPStatus:
        self.refused += 1
        self._complain(f"refused with {status.value}: {why}")
        return status
