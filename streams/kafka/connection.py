"""How every client of Kafka connects: librdkafka's properties and Faust's credentials, from the same settings."""

import ssl
from typing import TYPE_CHECKING, Any

from schemas.problem import Problem
from streams.settings import Settings, variable

if TYPE_CHECKING:
    from faust.types.auth import CredentialsT


def librdkafka(settings: Settings) -> dict[str, Any]:
    """Brokers, and how to log in. Problem when the settings contradict each other, or the CA file cannot be read."""
    properties = {"bootstrap.servers": settings.kafka_bootstrap, "security.protocol": settings.kafka_security_protocol}
    if settings.kafka_ca_file and _is_encrypted(settings):
        _tls(settings)  # librdkafka would name neither the file nor the setting
        properties["ssl.ca.location"] = settings.kafka_ca_file
    if _logs_in(settings):
        properties |= {
            "sasl.mechanism": settings.kafka_sasl_mechanism,
            "sasl.username": settings.kafka_username,
            "sasl.password": settings.kafka_password,
        }
    return properties


def faust_credentials(settings: Settings) -> "CredentialsT | None":
    """The same for Faust; None for plain text. Problem likewise."""
    from faust.auth import SASLCredentials, SSLCredentials

    context = _tls(settings) if _is_encrypted(settings) else None
    if _logs_in(settings):
        return SASLCredentials(
            username=settings.kafka_username,
            password=settings.kafka_password,
            mechanism=settings.kafka_sasl_mechanism,
            ssl_context=context,
        )
    return SSLCredentials(context=context) if context else None


def _is_encrypted(settings: Settings) -> bool:
    return settings.kafka_security_protocol.endswith("SSL")


def _logs_in(settings: Settings) -> bool:
    wanted = settings.kafka_security_protocol.startswith("SASL_")
    if wanted != bool(settings.kafka_username):
        name, protocol = variable("kafka_username"), variable("kafka_security_protocol")
        why = f"{protocol} is {settings.kafka_security_protocol}, {name} is {settings.kafka_username or 'empty'}"
        raise Problem("the settings are wrong", why, "Set both a SASL protocol and a user, or neither.")
    return wanted


def _tls(settings: Settings) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=settings.kafka_ca_file or None)
    except OSError as error:
        why = f"{variable('kafka_ca_file')}={settings.kafka_ca_file}: {error.strerror or error}"
        raise Problem("Kafka's certificates cannot be read", why, "Give a PEM file.") from error
