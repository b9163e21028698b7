"""What an HTTP session begins with."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tidegate.session.http_state import HttpState


def began(established_ns: int, now_ns: int) -> HttpState:
    request_parser = SimpleNamespace(request=None)
    context: Any = SimpleNamespace(
        http=SimpleNamespace(site=SimpleNamespace(request_parser=lambda: request_parser)),
        reactor=SimpleNamespace(now=now_ns),
        slab=SimpleNamespace(insert=lambda session: 1),
    )
    return HttpState(context, cast(socket.socket, None), ("127.0.0.1", 1), established_ns)


@pytest.mark.parametrize(("established_ns", "waited_ns"), [(400, 600), (1000, 0), (1007, 0)])
def test_nobody_has_waited_for_less_than_no_time(established_ns: int, waited_ns: int) -> None:
    """The kernel stamps connections while a batch is under way, whose time is that of its beginning."""
    session = began(established_ns, now_ns=1000)
    assert session.started_ns - session.established_ns == waited_ns
