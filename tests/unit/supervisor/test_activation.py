"""Sockets given by systemd: matched by name, then by address; one that fits nothing is an error."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

import pytest

from tidegate import config
from tidegate.config.model import Listener
from tidegate.errors import OperatorError
from tidegate.supervisor import activation
from tidegate.supervisor.activation import given_sockets


def listeners(*addresses: str) -> tuple[Listener, ...]:
    text = "".join(
        f'[[listener]]\nname = "l{number}"\naddress = "{address}"\nprotocol = "tcp"\ncluster = "app"\n'
        for number, address in enumerate(addresses)
    )
    return config.parse(text + '[cluster.app]\nbackends = ["127.0.0.1:9000"]\n').listeners


Give = Callable[..., dict[str, str]]


@pytest.fixture
def give(monkeypatch: pytest.MonkeyPatch) -> Iterator[Give]:
    """Puts listening sockets at consecutive fds from a free one on, as systemd does from 3 on."""
    taken: list[int] = []

    def put(*socks: socket.socket, names: str = "", pid: int | None = None) -> dict[str, str]:
        first = 200
        for offset, sock in enumerate(socks):
            os.dup2(sock.fileno(), first + offset, inheritable=True)
            sock.close()
            taken.append(first + offset)
        monkeypatch.setattr(activation, "FIRST_FD", first)
        environment = {"LISTEN_PID": str(pid or os.getpid()), "LISTEN_FDS": str(len(socks)), "OTHER": "x"}
        return environment | ({"LISTEN_FDNAMES": names} if names else {})

    yield put
    for fd in taken:
        try:
            os.close(fd)
        except OSError:
            continue


def listening(host: str = "127.0.0.1") -> tuple[socket.socket, str]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.create_server((host, 0), family=family)
    port = sock.getsockname()[1]
    return sock, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def test_matched_by_address_when_no_name_fits(give: Give) -> None:
    (a, at_a), (b, at_b) = listening(), listening()
    environment = give(b, a)
    found = given_sockets(listeners(at_a, at_b), environment)
    assert {name: f"127.0.0.1:{sock.getsockname()[1]}" for name, sock in found.items()} == {
        "l0": at_a,
        "l1": at_b,
    }
    assert environment == {"OTHER": "x"}, "no child is to take them for its own"
    for sock in found.values():
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        sock.close()


def test_a_name_counts_before_the_address(give: Give) -> None:
    (a, at_a), (b, at_b) = listening(), listening()
    found = given_sockets(listeners(at_a, at_b), give(b, a, names="l0:l1"))
    assert f"127.0.0.1:{found['l0'].getsockname()[1]}" == at_b
    for sock in found.values():
        sock.close()


def test_ipv6_by_address(give: Give) -> None:
    sock, at = listening("::1")
    found = given_sockets(listeners(at), give(sock, names="unknown"))
    assert list(found) == ["l0"]
    found["l0"].close()


def test_one_that_fits_nothing_is_an_error(give: Give) -> None:
    sock, at = listening()
    with pytest.raises(OperatorError, match=f"handed over a socket on {at}") as error:
        given_sockets(listeners("127.0.0.1:1"), give(sock, names="web"))
    assert "'web'" in error.value.fix


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": str(os.getpid())},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "-1"},
        {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "0"},
    ],
)
def test_what_is_not_for_us_is_left_alone(environment: dict[str, str]) -> None:
    given = dict(environment)
    assert given_sockets(listeners("127.0.0.1:1"), given) == {}
    assert given == {}
