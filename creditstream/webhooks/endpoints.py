"""Who is told: the endpoints of a TOML file, checked, with their secrets in hand."""

import os
import re
import tomllib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, Self
from urllib.parse import urlsplit

import msgspec

from creditstream.webhooks.signing import parse_secret
from schemas.codec import name_field
from schemas.limits import AlertKind, LimitAlert
from schemas.problem import Problem
from schemas.webhook import ENDPOINT_NAME_PATTERN, EndpointEntry, EndpointFile, Format

ENDPOINT_NAME: Final = re.compile(ENDPOINT_NAME_PATTERN)
PORT_OF: Final = {"https": 443, "http": 80}


class Address(NamedTuple):
    """Where requests go. ``path`` with the query; ``host`` in ASCII."""

    is_tls: bool
    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str, allow_private: bool) -> Self:
        """The address of a URL; ValueError when it is none, or is not https and may not be."""
        parts = urlsplit(url)
        if parts.scheme not in PORT_OF:
            raise ValueError("a URL starts with https://")
        if parts.scheme != "https" and not allow_private:
            raise ValueError("plain http is only for a private network: allow_private")
        if not parts.hostname or parts.username is not None or parts.fragment:
            raise ValueError("a URL has a host, and neither user, password nor fragment")
        if parts.port == 0:
            raise ValueError("port 0 cannot be reached")
        try:
            host = parts.hostname.encode("idna").decode()
        except UnicodeError as error:
            raise ValueError("the host is not a valid name") from error
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if not all("!" <= character <= "~" for character in path):
            raise ValueError("the path has characters that must be percent-encoded")
        return cls(parts.scheme == "https", host, PORT_OF[parts.scheme] if parts.port is None else parts.port, path)


class Endpoint(NamedTuple):
    """One receiver. ``keys`` sign, the newest first; ``workspaces`` and ``kinds`` None: all of them."""

    name: str
    address: Address
    keys: tuple[bytes, ...]
    workspaces: frozenset[str] | None = None
    kinds: frozenset[AlertKind] | None = None
    since: datetime | None = None
    format: Format = Format.STANDARD
    allow_private: bool = False

    def wants(self, alert: LimitAlert) -> bool:
        """Whether this alert is for it. A ``seeded`` one, which only tells what stands, is for nobody."""
        return (
            not alert.seeded
            and (self.workspaces is None or alert.workspace_id in self.workspaces)
            and (self.kinds is None or alert.kind in self.kinds)
            and (self.since is None or alert.at >= self.since)
        )


def load_endpoints(path: Path, environ: Mapping[str, str] = os.environ) -> dict[str, Endpoint]:
    """The file's endpoints by name; Problem when it, or a secret that it names, cannot be used."""
    try:
        document = tomllib.loads(path.read_text())
        entries = _convert(document)
        return {name: _endpoint(name, entry, environ) for name, entry in entries.items()}
    except OSError as error:
        raise Problem("the endpoints cannot be read", f"{path}: {error.strerror}", "Check the file.") from error
    except (ValueError, RecursionError) as error:
        raise Problem("endpoints refused", f"{path}: {error}", "Correct the file, or the secret.") from error


def _convert(document: dict[str, object]) -> dict[str, EndpointEntry]:
    try:
        return msgspec.convert(document, EndpointFile).endpoints
    except msgspec.ValidationError as error:
        # msgspec does not say under which name: each is converted by itself to find out.
        entries = document.get("endpoints")
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if not ENDPOINT_NAME.fullmatch(name):
                said = "a name has 1 to 64 characters of a-z, 0-9, _ and -, and begins with a letter or digit"
                raise ValueError(f"endpoint `{name}`: {said}") from error
            try:
                msgspec.convert(entry, EndpointEntry)
            except msgspec.ValidationError as wrong:
                raise ValueError(f"endpoint `{name}`: {name_field(str(wrong))}") from error
        raise ValueError(name_field(str(error))) from error


def _endpoint(name: str, entry: EndpointEntry, environ: Mapping[str, str]) -> Endpoint:
    try:
        address = _address(entry, environ)
        keys = (*_key("secret", entry.secret, environ), *_key("previous_secret", entry.previous_secret, environ))
        if entry.format is Format.STANDARD and entry.secret is None:
            raise ValueError("field `secret`: a standard endpoint is signed; give env:NAME or file:PATH")
        if entry.format is Format.SLACK and keys:
            raise ValueError("field `secret`: a Slack message is not signed")
    except ValueError as error:
        raise ValueError(f"endpoint `{name}`: {error}") from error
    return Endpoint(
        name=name,
        address=address,
        keys=keys,
        workspaces=None if entry.workspaces is None else frozenset(entry.workspaces),
        kinds=None if entry.kinds is None else frozenset(entry.kinds),
        since=entry.since,
        format=entry.format,
        allow_private=entry.allow_private,
    )


def _address(entry: EndpointEntry, environ: Mapping[str, str]) -> Address:
    try:
        # A Slack URL is a secret itself.
        url = _resolve(entry.url, environ) if entry.url.startswith(("env:", "file:")) else entry.url
        return Address.parse(url, entry.allow_private)
    except ValueError as error:
        raise ValueError(f"field `url`: {error}") from error


def _key(field: str, reference: str | None, environ: Mapping[str, str]) -> tuple[bytes, ...]:
    try:
        return () if reference is None else (parse_secret(_resolve(reference, environ)),)
    except ValueError as error:
        raise ValueError(f"field `{field}`: {error}") from error


def _resolve(reference: str, environ: Mapping[str, str]) -> str:
    """What a reference stands for; ValueError, without the value in it, when there is nothing."""
    kind, _, place = reference.partition(":")
    if kind == "env":
        if not (value := environ.get(place, "").strip()):
            raise ValueError(f"the environment has no {place}")
        return value
    if kind == "file":
        try:
            return Path(place).expanduser().read_text().strip()
        except (OSError, RuntimeError) as error:  # RuntimeError: the home of a user whom nobody knows
            raise ValueError(f"{place}: {getattr(error, 'strerror', error)}") from error
    raise ValueError("write env:NAME or file:PATH; the secret itself does not belong here")
