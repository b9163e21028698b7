"""What an HTTP session begins with."""

from __future__ import annotations

import socket
from typing import cast

import pytest

from tidegate import config
from tidegate.cluster.balance import ClusterState
from tidegate.loop.reactor import Reactor
from tidegate.loop.slab import Slab
from tidegate.metrics.names import LISTENER
from tidegate.session.context import Context
from tidegate.session.http_shared import HttpCluster, HttpSide
from tidegate.session.http_state import HttpState

CONFIG = (
    '[[listener]]\naddress = "127.0.0.1:1"\nprotocol = "http"\ncluster = "app"\n'
    '[cluster.app]\nbackends = ["127.0.0.1:9"]\n'
)


def began(established_ns: int, now_ns: int) -> HttpState:
    """Of real parts: the compiled form takes no others."""
    read = config.parse(CONFIG)
    reactor = Reactor()
    reactor.now = now_ns
    state = ClusterState(read.clusters[0])
    buffer = bytearray(1)
    context = Context(
        reactor=reactor,
        slab=Slab(1),
        buffer=buffer,
        view=memoryview(buffer),
        listener=read.listeners[0],
        cluster=state,
        words=memoryview(bytearray(LISTENER.words * 8)).cast("Q"),
        on_end=lambda session, reason: None,
        http=HttpSide(read.listeners[0], {"app": HttpCluster(state, reactor)}),
    )
    session = HttpState(context, cast(socket.socket, None), ("127.0.0.1", 1), established_ns)
    reactor.close()
    return session


@pytest.mark.parametrize(("established_ns", "waited_ns"), [(400, 600), (1000, 0), (1007, 0)])
def test_nobody_has_waited_for_less_than_no_time(established_ns: int, waited_ns: int) -> None:
    """The kernel stamps connections while a batch is under way, whose time is that of its beginning."""
    session = began(established_ns, now_ns=1000)
    assert session.started_ns - session.established_ns == waited_ns
