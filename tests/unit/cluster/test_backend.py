from __future__ import annotations

import socket

import pytest
from unit.cluster.building import address

from tidegate.cluster.backend import BackendState, is_name, socket_address


@pytest.mark.parametrize(
    ("text", "family", "sockaddr"),
    [
        ("127.0.0.1:80", socket.AF_INET, ("127.0.0.1", 80)),
        ("[::1]:8080", socket.AF_INET6, ("::1", 8080, 0, 0)),
        ("[fe80::1%3]:80", socket.AF_INET6, ("fe80::1", 80, 0, 3)),
        ("[fe80::1%lo]:80", socket.AF_INET6, ("fe80::1", 80, 0, socket.if_nametoindex("lo"))),
        ("unix:/run/app.sock", socket.AF_UNIX, "/run/app.sock"),
        ("unix:@app", socket.AF_UNIX, b"\0app"),
    ],
)
def test_an_address_becomes_what_connect_takes(text: str, family: int, sockaddr: object) -> None:
    assert socket_address(address(text)) == (family, sockaddr)


@pytest.mark.parametrize("path", ["{tmp}/app.sock", "@tidegate-test-{pid}"])
def test_the_unix_address_connects(path: str, tmp_path: object) -> None:
    import os

    where = path.format(tmp=tmp_path, pid=os.getpid())
    backend = BackendState(address(f"unix:{where}"))
    with socket.socket(socket.AF_UNIX) as server, socket.socket(backend.family) as client:
        server.bind("\0" + where[1:] if where.startswith("@") else where)
        server.listen(1)
        client.connect(backend.sockaddr)


def test_ipv6_connects() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        backend = BackendState(address(f"[::1]:{server.getsockname()[1]}"))
        with socket.socket(backend.family) as client:
            client.connect(backend.sockaddr)


@pytest.mark.parametrize(
    ("text", "name"),
    [("app.internal:80", True), ("10.0.0.1:80", False), ("[2001:db8::1]:80", False), ("unix:/a", False)],
)
def test_names_are_told_from_numbers(text: str, name: bool) -> None:
    assert is_name(address(text)) is name


def test_a_name_is_refused_where_a_socket_address_is_needed() -> None:
    with pytest.raises(ValueError):
        BackendState(address("app.internal:80"))
