"""The tables inside [[listener]], routes apart."""

from __future__ import annotations

from typing import Final

from tidegate.config import defaults
from tidegate.config.composite import Many, Sub
from tidegate.config.kinds import Choice, File, Number, WritablePath
from tidegate.config.model import AccessLog, Certificate, Limits, ListenerTls
from tidegate.config.schema import REQUIRED, Key, Section, Table

CERTIFICATE: Final = Table(
    "[[listener.certificate]]",
    "A certificate of an https listener. The client's SNI chooses among several; the first is the default.",
    (
        Key("cert", File(), REQUIRED, "The certificate and the chain above it, PEM."),
        Key("key", File(), REQUIRED, "Its private key, PEM, without passphrase."),
    ),
)
LIMITS: Final = Table(
    "listener.limits",
    "What one client address may take; 0 is no limit. Each worker counts for itself: a client whose "
    "connections are spread over N workers gets up to N times as much. A bound on the whole is the N-th part "
    "of it here, and all that one connection gets, for it stays with its worker.",
    (
        Key(
            "connections_per_client",
            Number(0, defaults.MAX_CONNECTIONS),
            defaults.LIMITS.connections_per_client,
            "Connections at a time, per worker.",
        ),
        Key(
            "requests_per_second",
            Number(0, 1_000_000),
            defaults.LIMITS.requests_per_second,
            "Requests in the long run, per worker; http only.",
        ),
        Key(
            "burst",
            Number(0, 1_000_000),
            defaults.LIMITS.burst,
            "Requests at once beyond `requests_per_second`, per worker; http only.",
        ),
    ),
)
ACCESS_LOG: Final = Table(
    "listener.access_log",
    "One line per request.",
    (
        Key("path", WritablePath(("stdout",)), REQUIRED, "Where it goes."),
        Key("format", Choice(("text", "json")), defaults.ACCESS_LOG_FORMAT, "Its form."),
    ),
)
TLS: Final = Table(
    "listener.tls",
    "TLS towards clients.",
    (
        Key("min_version", Choice(("1.2", "1.3")), defaults.TLS.min_version, "The oldest version spoken."),
        Key(
            "unknown_sni",
            Choice(("default", "reject")),
            defaults.TLS.unknown_sni,
            "A name that no certificate has: answer with the default certificate, or end the handshake.",
        ),
        Key(
            "client_ca",
            File(),
            defaults.TLS.client_ca,
            "Authorities whose certificates clients may show, PEM.",
            shown="not set",
        ),
        Key(
            "client_cert",
            Choice(("off", "optional", "required")),
            defaults.TLS.client_cert,
            "Whether clients must show one.",
        ),
    ),
)


def _check_tls(section: Section) -> None:
    wanted = section.get("client_cert") in ("optional", "required")
    if wanted and "client_ca" not in section.written:
        section.error(
            "client_cert", "client_cert needs client_ca", 'write client_ca = "/etc/tidegate/clients.pem"'
        )
    if section.has("client_ca") and section.get("client_cert") == "off":
        section.error(
            "client_ca", "client_ca has no effect without client_cert", 'write client_cert = "required"'
        )


def _check_limits(section: Section) -> None:
    if section.get("burst") and section.get("requests_per_second") == 0:
        section.error(
            "burst", "burst has no effect without requests_per_second", "write requests_per_second = 100"
        )


CERTIFICATES_KIND: Final = Many(Sub(CERTIFICATE, lambda s: Certificate(**s.attributes())))
LIMITS_KIND: Final = Sub(
    LIMITS, lambda s: Limits(**s.attributes()), "{ connections_per_client = 100 }", _check_limits
)
ACCESS_LOG_KIND: Final = Sub(
    ACCESS_LOG, lambda s: AccessLog(**s.attributes()), '{ path = "stdout" }', off=True
)
TLS_KIND: Final = Sub(TLS, lambda s: ListenerTls(**s.attributes()), '{ min_version = "1.2" }', _check_tls)
