"""One HTTP request to an endpoint: bounded in time, never to an address that it may not have, never redirected.

The name is resolved once; the addresses are checked, and the connection goes to one that was checked, so a name that
changes its address in between gains nothing. Proxies of the environment are not used.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from http import HTTPStatus
from typing import Final

from creditstream import __version__
from creditstream.webhooks.endpoints import Address, Endpoint
from creditstream.webhooks.messages import body_of
from creditstream.webhooks.schedule import RETRY_AFTER_S_MAX, Answer
from creditstream.webhooks.signing import signed_headers
from schemas.limits import LimitAlert
from schemas.webhook import Format

ANSWER_S_MAX: Final = 15
"""From the first packet to the last header of the answer. Only the system's resolver is not bounded by it."""

Resolve = Callable[[str, int], list[str]]
"""Host and port → IP addresses, best first. OSError when there are none."""

NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

FIXES: Final[Mapping[int, str]] = {
    HTTPStatus.UNAUTHORIZED: "Give both sides the same secret; sign and verify the body's exact bytes.",
    HTTPStatus.FORBIDDEN: "Give both sides the same secret; a firewall may refuse the sender, too.",
    HTTPStatus.NOT_FOUND: "Check the path of the URL.",
    HTTPStatus.METHOD_NOT_ALLOWED: "The receiver must accept POST at this path.",
    HTTPStatus.GONE: "The receiver wants no more: remove the endpoint, or correct its URL and send SIGHUP.",
    HTTPStatus.TOO_MANY_REQUESTS: "The receiver is overloaded; deliveries wait for it.",
}


def send(
    endpoint: Endpoint,
    alert: LimitAlert,
    at_s: int,
    *,
    resolve: Resolve | None = None,
    answer_s_max: float = ANSWER_S_MAX,
    tls: ssl.SSLContext | None = None,
) -> Answer:
    """Make one attempt, at ``at_s`` (Unix seconds) by the sender's clock. Never raises for what a receiver does."""
    body = body_of(alert, endpoint.format)
    headers = {"content-type": "application/json", "user-agent": f"creditstream/{__version__}"}
    if endpoint.format is Format.STANDARD:
        headers |= signed_headers(endpoint.keys, str(alert.alert_id), at_s, body)
    started = time.monotonic()
    answer = _post(endpoint, headers, body, resolve or resolve_host, answer_s_max, tls)
    return answer._replace(took_ms=int((time.monotonic() - started) * 1000))


def _post(
    endpoint: Endpoint,
    headers: Mapping[str, str],
    body: bytes,
    resolve: Resolve,
    answer_s_max: float,
    tls: ssl.SSLContext | None,
) -> Answer:
    address = endpoint.address
    try:
        found = resolve(address.host, address.port)
    except OSError as error:
        return Answer(0, f"the name {address.host} is not known: {error.strerror}", "Check the URL and the DNS.")
    allowed = [ip for ip in found if endpoint.allow_private or is_public(ip)]
    if not allowed:
        where = f"{address.host} has no public address ({', '.join(found) or 'none'})"
        return Answer(0, f"refused: {where}", "Set allow_private if it is meant to lie in your own network.")
    connection = _Connection(address, allowed, answer_s_max, tls)
    guard = threading.Timer(answer_s_max, connection.abort)
    guard.daemon = True
    guard.start()
    try:
        connection.request("POST", address.path, body, headers)
        # The status is the answer: a body that breaks off, or never ends, changes nothing.
        answer = _read(_final(connection.getresponse()))
        # Headers that never end are cut by `abort`, and look complete.
        return answer if not connection.is_aborted else _failure(TimeoutError(), True, answer_s_max)
    except (OSError, http.client.HTTPException) as error:
        return _failure(error, connection.is_aborted, answer_s_max)
    finally:
        guard.cancel()
        connection.close()


class _Connection(http.client.HTTPConnection):
    """To one of these IP addresses, under the name of the URL: in the Host header, in TLS and in the certificate."""

    def __init__(self, address: Address, ips: list[str], answer_s_max: float, tls: ssl.SSLContext | None) -> None:
        super().__init__(address.host, address.port, timeout=answer_s_max)
        if address.is_tls:
            self.default_port = 443
        self._is_tls, self._ips, self._tls = address.is_tls, ips, tls
        self._deadline = time.monotonic() + answer_s_max
        self.is_aborted = False

    def connect(self) -> None:
        """Connect to the first address that answers. OSError: none did."""
        failure: OSError = TimeoutError()
        for ip in self._ips:
            left = self._deadline - time.monotonic()
            if left <= 0 or self.is_aborted:
                break
            try:
                self.sock = socket.create_connection((ip, self.port), timeout=left)
            except OSError as error:
                failure = error
                continue
            if self._is_tls:
                # The handshake comes after the socket is known here, where `abort` finds it.
                self.sock = (self._tls or _trusted()).wrap_socket(
                    self.sock, server_hostname=self.host, do_handshake_on_connect=False
                )
                self.sock.do_handshake()
            if not self.is_aborted:
                return
        raise failure

    def abort(self) -> None:
        """End it from another thread: whoever waits for the receiver wakes up."""
        self.is_aborted = True
        if (waited_for := self.sock) is not None:
            with suppress(OSError):
                # Not SSLSocket's own, which would take the TLS state away under the other thread.
                socket.socket.shutdown(waited_for, socket.SHUT_RDWR)


@cache
def _trusted() -> ssl.SSLContext:
    return ssl.create_default_context()


def resolve_host(host: str, port: int) -> list[str]:
    """By the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(ip: str) -> bool:
    """Whether anybody's machine may have this address: not private, loopback, link-local, multicast or reserved.

    IPv6 forms that stand for an IPv4 address (mapped, 6to4, NAT64) are judged by that one.
    """
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


def _final(response: http.client.HTTPResponse) -> http.client.HTTPResponse:
    """The answer behind those that only announce it (103, say): http.client passes over 100 alone."""
    while HTTPStatus.SWITCHING_PROTOCOLS < response.status < HTTPStatus.OK and not response.will_close:
        response.headers = None  # type: ignore[assignment]  # then it reads the next one
        response.begin()
    return response


def _read(response: http.client.HTTPResponse) -> Answer:
    status = response.status
    said = f"{status} {http.client.responses.get(status, '')}".rstrip()
    retry_after_s = _retry_after_s(response.getheader("retry-after"), datetime.now(UTC))
    if 300 <= status < 400:
        return Answer(status, f"{said}: redirects are not followed", "Give the final URL.", retry_after_s)
    if 200 <= status < 300:
        return Answer(status, said)
    return Answer(status, said, FIXES.get(status, "See the receiver's log; it must answer 2xx."), retry_after_s)


def _failure(error: Exception, timed_out: bool, answer_s_max: float) -> Answer:
    if timed_out or isinstance(error, TimeoutError):
        return Answer(0, f"no answer within {answer_s_max:g} s", "Answer first and work afterwards.")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Answer(0, f"the certificate is not valid: {error.verify_message}", "Renew it, with the whole chain.")
    if isinstance(error, ssl.SSLError):
        return Answer(0, f"TLS failed: {error.reason}", "Check that the port speaks TLS.")
    if isinstance(error, ConnectionRefusedError):
        return Answer(0, "the connection was refused", "Start the receiver, or check host and port.")
    if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | http.client.IncompleteRead):
        return Answer(0, "the receiver closed the connection without an answer", "See the receiver's log.")
    if isinstance(error, http.client.HTTPException):
        return Answer(0, f"the answer is not HTTP ({type(error).__name__})", "Check host and port.")
    return Answer(0, f"no connection: {getattr(error, 'strerror', '') or type(error).__name__}", "Check the network.")


def _retry_after_s(text: str | None, now: datetime) -> int | None:
    """Seconds, from a number or a date; None without one, or when it says nothing that can be used."""
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return min(int(text[:9]), RETRY_AFTER_S_MAX)
    try:
        until = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # a year of twenty digits, say
        return None
    seconds = int((until.replace(tzinfo=until.tzinfo or UTC) - now).total_seconds())
    return min(max(0, seconds), RETRY_AFTER_S_MAX)
