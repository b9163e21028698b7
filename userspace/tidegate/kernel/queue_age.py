"""How long a connection has waited since the kernel finished its handshake: one record, two sources.

`bpf`: the kernel's own stamp, exact. `tcp_info`: a lower bound in steps of the kernel's tick, because
the kernel then tells only when the last data and the last ACK came; later data makes it look younger.
Ages are true while the listener's backlog is not full: beyond it the kernel drops SYNs, and a client's
retry starts a new age.
"""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

from tidegate.config.model import QueueAgeSource
from tidegate.errors import OperatorError
from tidegate.kernel import tcp_info
from tidegate.kernel.records import NO_SLOT, QUEUE_AGE, QUEUE_AGE_SIZE, SOL_TIDEGATE, StampFlag

BPF = "bpf"
TCP_INFO = "tcp_info"
ACCEPT = "accept"

TAKEN = int(StampFlag.TAKEN)
HALF_CLOSED = int(StampFlag.HALF_CLOSED)
GONE = int(StampFlag.GONE)

_CLOCK_MONOTONIC_COARSE = 6
_TICK_NS = max(1_000_000, int(time.clock_getres(_CLOCK_MONOTONIC_COARSE) * 1e9))
_unpack = struct.Struct("=QQQII").unpack
_new = tuple.__new__
_NOT_OURS = frozenset({errno.EOPNOTSUPP, errno.ENOPROTOOPT})


class QueueAge(NamedTuple):
    """Times are CLOCK_MONOTONIC ns. `age_ns` is the age at the time of reading."""

    established_ns: int
    cookie: int  # the kernel's number of this socket; 0 where the source does not tell
    age_ns: int
    flags: int  # of TAKEN, HALF_CLOSED, GONE; TAKEN: somebody had read it before
    slot: int  # index of the listener's slot; NO_SLOT from TCP_INFO

    @property
    def source(self) -> str:
        """BPF or TCP_INFO."""
        return TCP_INFO if self.slot == NO_SLOT else BPF

    @property
    def half_closed(self) -> bool:
        """The client has sent FIN."""
        return bool(self.flags & HALF_CLOSED)

    @property
    def gone(self) -> bool:
        """The connection was reset."""
        return bool(self.flags & GONE)

    @property
    def taken(self) -> bool:
        return bool(self.flags & TAKEN)


Reader = Callable[[socket.socket], QueueAge]


def read_bpf(sock: socket.socket) -> QueueAge:
    """The age by our socket option, one system call; the first read counts as the acceptance.

    A socket from a listener that was opened outside our cgroup is answered by TCP_INFO, and says so.
    """
    try:
        # past the named tuple's own constructor: this runs once per connection
        return _new(QueueAge, _unpack(sock.getsockopt(SOL_TIDEGATE, QUEUE_AGE, QUEUE_AGE_SIZE)))
    except OSError as error:
        if error.errno not in _NOT_OURS:
            raise
        return read_tcp_info(sock)


def read_tcp_info(sock: socket.socket) -> QueueAge:
    """The age's lower bound, from TCP_INFO: works everywhere, needs nothing."""
    now = time.monotonic_ns()
    state, data_ms, ack_ms = tcp_info.receive_times(sock)
    # differences of ticks: the true time may be one tick less
    age = max(0, max(data_ms, ack_ms) * 1_000_000 - _TICK_NS)
    flags = HALF_CLOSED if state == tcp_info.TCP_CLOSE_WAIT else GONE if state == tcp_info.TCP_CLOSE else 0
    return QueueAge(now - age, 0, age, flags, NO_SLOT)


def _from_accept(read: Reader) -> Reader:
    """The age as a proxy sees it that starts its clock at accept(); all else as `read` tells it."""

    def read_at_accept(sock: socket.socket) -> QueueAge:
        age = read(sock)
        return age._replace(established_ns=age.established_ns + age.age_ns, age_ns=0)

    return read_at_accept


def client_left(sock: socket.socket, age: QueueAge) -> bool:
    """Whether nobody is there to answer: reset, or FIN with not a byte sent before it.

    A client that sent data and then FIN has half-closed: it may be waiting for its answer.
    """
    if not age.flags & (HALF_CLOSED | GONE):
        return False
    if age.flags & GONE:
        return True
    try:
        return not sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


class AgeSource(NamedTuple):
    """Which reader is in use, its name, and why it is not the better one ("" when it is)."""

    read: Reader
    source: str
    reason: str


def choose(setting: QueueAgeSource, failure: OperatorError | None) -> AgeSource:
    """The reader for a configuration's `queue_age`; `failure` is why the kernel half did not start.

    Raises that failure when the setting is "bpf".
    """
    if setting is QueueAgeSource.TCP_INFO:
        return AgeSource(read_tcp_info, TCP_INFO, 'queue_age = "tcp_info" is configured')
    if setting is QueueAgeSource.ACCEPT:
        reader = read_bpf if failure is None else read_tcp_info
        reason = 'queue_age = "accept" is configured: for comparison only'
        return AgeSource(_from_accept(reader), ACCEPT, reason)
    if failure is None:
        return AgeSource(read_bpf, BPF, "")
    if setting is QueueAgeSource.BPF:
        raise failure
    return AgeSource(read_tcp_info, TCP_INFO, failure.message)
