"""What is not built yet is refused by name; taking a line out of the table lets it through."""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from tidegate import config
from tidegate.config import ConfigErrors, pending
from tidegate.config.errors import show_path, show_value
from tidegate.config.pending import PENDING, Pending


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    certificate = trustme.CA().issue_cert("example.org")
    (tmp_path / "site.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    certificate.private_key_pem.write_to_path(tmp_path / "site.key")
    (tmp_path / "503.html").write_text("busy")
    return tmp_path


def protocol_for(entry: Pending) -> str:
    """A protocol on which the example is good."""
    if entry.path[-1] == "protocol":
        return str(entry.example)
    if entry.path[-1] in ("certificate", "tls") and entry.path[0] == "listener":
        return "https"
    return "http"


def document(entry: Pending) -> str:
    """A file that is good but for the example of the entry."""
    protocol = protocol_for(entry)
    top, listener, cluster = "", "", 'backends = ["127.0.0.1:9000"]\n'
    line = f"{entry.path[-1]} = {show_value(entry.example, 1000)}\n"
    if entry.path[-1] == "*":
        cluster = f"backends = [{show_value(entry.example)}]\n"
    elif len(entry.path) == 1:
        top = line
    elif entry.path[0] == "cluster":
        cluster += line
    elif entry.path[-1] != "protocol":
        listener = line
    if protocol == "https" and entry.path[-1] != "certificate":
        listener += 'certificate = [{ cert = "site.pem", key = "site.key" }]\n'
    return (
        f'{top}[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "{protocol}"\ncluster = "app"\n{listener}'
        f"[cluster.app]\n{cluster}"
    )


def name(entry: Pending) -> str:
    return f"{show_path(entry.path)}-{show_value(entry.example)}"


@pytest.mark.parametrize("entry", PENDING, ids=name)
def test_refused_by_name(entry: Pending, directory: Path) -> None:
    text, source = document(entry), str(directory / "web.toml")
    config.parse(text, source, allow_pending=True)  # nothing else is wrong with it
    with pytest.raises(ConfigErrors) as caught:
        config.parse(text, source)
    what = show_value(entry.example) if entry.path[-1] == "*" else entry.path[-1]
    mine = [error for error in caught.value.errors if what in error.message]
    assert mine, caught.value
    assert all(
        "is not built yet" in error.message and error.fix and error.line for error in caught.value.errors
    )


@pytest.mark.parametrize("entry", PENDING, ids=name)
def test_built_once_its_line_is_gone(
    entry: Pending, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, source = document(entry), str(directory / "web.toml")
    with pytest.raises(ConfigErrors) as before:
        config.parse(text, source)
    monkeypatch.setattr(pending, "PENDING", tuple(other for other in PENDING if other is not entry))
    try:
        config.parse(text, source)
        after = 0
    except ConfigErrors as errors:
        after = len(errors.errors)
    assert after == len(before.value.errors) - 1


def test_off_is_always_built() -> None:
    config.parse(
        'metrics = "off"\n[[listener]]\naddress = "127.0.0.1:8080"\nprotocol = "tcp"\ncluster = "app"\n'
        'proxy_protocol = "off"\nsplice = "off"\npolicy = "deadline"\non_stale = "reset"\n'
        '[cluster.app]\nbackends = ["127.0.0.1:9000", "unix:/run/app.sock"]\nbalance = "round_robin"\n'
        'max_in_flight = "off"\nsticky = "off"\neject = "off"\nhealth = "off"\ntls = "off"\n'
        'send_proxy = "off"\n'
    )
