"""Signatures of Standard Webhooks 1.0: HMAC-SHA256 over ``id.timestamp.body``. Pure, but for `new_secret`."""

import base64
import binascii
import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

PREFIX: Final = "whsec_"
KEY_BYTES: Final = range(24, 65)
TOLERANCE_S: Final = 5 * 60
"""How far a receiver lets the timestamp be from its own clock."""

ID: Final = "webhook-id"
TIMESTAMP: Final = "webhook-timestamp"
SIGNATURE: Final = "webhook-signature"


class BadSignature(ValueError):
    """The request is not, or not now, from who holds the secret; the text says why."""


def parse_secret(text: str) -> bytes:
    """The key of ``whsec_<base64 of 24 to 64 bytes>``; ValueError for anything else, without the text in it."""
    if not text.startswith(PREFIX):
        raise ValueError(f"a secret starts with {PREFIX}")
    try:
        key = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError(f"what follows {PREFIX} is not base64") from error
    if len(key) not in KEY_BYTES:
        raise ValueError(f"a secret has {KEY_BYTES.start} to {KEY_BYTES.stop - 1} bytes, this one has {len(key)}")
    return key


def new_secret() -> str:
    """A fresh secret, as it is written."""
    return PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def signed_headers(keys: Sequence[bytes], webhook_id: str, at_s: int, body: bytes) -> dict[str, str]:
    """The three headers of one attempt at ``at_s`` (Unix seconds). Several keys while a secret is rotated: the receiver
    takes the signature that it can check.
    """
    signatures = (f"v1,{_sign(key, webhook_id, at_s, body)}" for key in keys)
    return {ID: webhook_id, TIMESTAMP: str(at_s), SIGNATURE: " ".join(signatures)}


def verify(key: bytes, headers: Mapping[str, str], body: bytes, now_s: int) -> str:
    """The ``webhook-id`` of a request whose headers are named in small letters; BadSignature when it does not hold."""
    missing = [name for name in (ID, TIMESTAMP, SIGNATURE) if not headers.get(name)]
    if missing:
        raise BadSignature(f"no header {missing[0]}")
    stamp = headers[TIMESTAMP]
    if not (stamp.isascii() and stamp.isdigit() and len(stamp) <= 12):
        raise BadSignature(f"{TIMESTAMP} is not a number of seconds")
    if abs(now_s - int(stamp)) > TOLERANCE_S:
        raise BadSignature(f"{TIMESTAMP} is {abs(now_s - int(stamp))} s away from the clock here")
    expected = _sign(key, headers[ID], int(stamp), body).encode()
    given = [part.removeprefix("v1,").encode() for part in headers[SIGNATURE].split(" ") if part.startswith("v1,")]
    if not any(hmac.compare_digest(expected, each) for each in given):
        raise BadSignature("the signature is not that of this secret")
    return headers[ID]


def _sign(key: bytes, webhook_id: str, at_s: int, body: bytes) -> str:
    return base64.b64encode(hmac.digest(key, f"{webhook_id}.{at_s}.".encode() + body, hashlib.sha256)).decode()
