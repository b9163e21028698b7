"""What a TCP session is made of, its states, and its end."""

from __future__ import annotations

import logging
import socket
from typing import TYPE_CHECKING, Any, Final

from tidegate import logs
from tidegate.cluster.retry import RetryPlan
from tidegate.config.model import Balance
from tidegate.loop.timers import Timer, nothing
from tidegate.metrics.names import LISTENER, EndReason
from tidegate.session.context import Context, reset, show_token

if TYPE_CHECKING:
    from tidegate.cluster.backend import BackendState
    from tidegate.cluster.balance import ClusterState
    from tidegate.session.spliced import Spliced

CONNECTING, RELAYING, DRAINING, CLOSED = range(4)
STATE_NAMES = ("connecting", "relaying", "draining", "closed")

NEVER = 1 << 62  # bytes: no session moves so many

_BYTES_IN: Final = LISTENER.index("received_bytes_total")
_BYTES_OUT: Final = LISTENER.index("sent_bytes_total")

_CLIENTS_CHOICE = frozenset({EndReason.CLIENT_GONE, EndReason.CLIENT_RESET, EndReason.FRONT_TIMEOUT})

_log = logging.getLogger("tidegate.session")
_abnormal = logs.RateLimited(_log, per_second=10)


class Flow:
    """One direction: what was read from its source and not yet taken by its destination."""

    __slots__ = ("bytes", "eof", "finished", "pending", "sent_word")

    def __init__(self, sent_word: int) -> None:
        self.pending: memoryview | None = None  # reading is paused while there is some
        self.eof = False  # the source sent FIN
        self.finished = False  # and the destination was told, or nothing more can be delivered
        self.bytes = 0  # read from the source
        self.sent_word = sent_word


class TcpState:
    """Fields, and the one place where a session ends; see `tidegate.session.tcp`."""

    __slots__ = (
        "_back_broken",
        "_back_interest",
        "_back_timeout_ns",
        "_backend",
        "_cluster",
        "_connect_deadline_ns",
        "_connect_started_ns",
        "_down",
        "_front_interest",
        "_last_back_ns",
        "_last_down_ns",
        "_last_front_ns",
        "_last_up_ns",
        "_retry",
        "_splice_at",
        "_state",
        "_timer",
        "_up",
        "_wait_until_ns",
        "back",
        "ctx",
        "established_ns",
        "front",
        "peer",
        "splice",
        "started_ns",
        "token",
    )

    def __init__(
        self,
        ctx: Context,
        front: socket.socket,
        peer: Any,
        established_ns: int,
        cluster: ClusterState | None = None,
    ) -> None:
        """`cluster`: other than the listener's."""
        self.ctx = ctx
        cluster = cluster or ctx.cluster
        assert cluster is not None
        self._cluster = cluster  # a reload may give the listener another
        self.front = front
        self.peer = peer
        self.established_ns = established_ns
        now = ctx.reactor.now
        self.started_ns = now
        self.back: socket.socket | None = None
        self.token = ctx.slab.insert(self)
        self._state = CONNECTING
        self._up: Flow = Flow(_BYTES_IN)
        self._down: Flow = Flow(_BYTES_OUT)
        self._front_interest = -1  # -1: not watched
        self._back_interest = -1
        self._back_broken = False
        self._backend: BackendState | None = None
        hashed = self._cluster.config.balance is Balance.HASH
        self._retry = RetryPlan(self._cluster, client_key(peer) if hashed else None)
        self._wait_until_ns = 0  # CONNECTING: the next attempt; DRAINING: the limit
        self._connect_started_ns = 0
        self._connect_deadline_ns = 0
        self._back_timeout_ns = self._cluster.config.back_timeout_ns
        self._last_front_ns = self._last_back_ns = self._last_up_ns = self._last_down_ns = now
        self._timer = Timer(self._on_timer)
        self.splice: Spliced | None = None  # while the kernel moves the bytes
        self._splice_at = NEVER if ctx.splicer is None else ctx.splicer.threshold(ctx)

    @property
    def last_progress_ns(self) -> int:
        if self.splice is not None:
            self._note_moves(self.splice)
        return max(self._last_front_ns, self._last_back_ns)

    def describe(self) -> dict[str, Any]:
        now = self.ctx.reactor.now
        up, down = self._up, self._down
        if self.splice is not None:
            self.splice.sync()
        return {
            "token": show_token(self.token),
            "protocol": "tcp",
            "listener": self.ctx.listener.name,
            "state": STATE_NAMES[self._state],
            "client": format_peer(self.peer),
            "cluster": self._cluster.config.name,
            "backend": self._backend.name if self._backend else "",
            "age_ms": (now - self.established_ns) // 1_000_000,
            "idle_ms": (now - self.last_progress_ns) // 1_000_000,
            "bytes_in": up.bytes,
            "bytes_out": down.bytes,
            "pending_in": len(up.pending) if up.pending is not None else 0,
            "pending_out": len(down.pending) if down.pending is not None else 0,
            "client_fin": up.eof,
            "backend_fin": down.eof,
            "spliced": self.splice is not None,
        }

    def drain(self) -> None:
        """A TCP session has no point of its own to stop at: it may finish within the drain timeout."""

    def end(self, reason: EndReason) -> None:
        self._end(reason, reset_front=True, reset_back=True)

    def _note_moves(self, splice: Spliced) -> None:
        """What the kernel moved counts as what we move does."""
        front_in, back_out, back_in, front_out = splice.last_moves(self.ctx.reactor.now)
        self._last_front_ns = max(self._last_front_ns, front_in, front_out)
        self._last_back_ns = max(self._last_back_ns, back_in, back_out)
        self._last_up_ns = max(self._last_up_ns, back_out)
        self._last_down_ns = max(self._last_down_ns, back_in)

    def start(self) -> None:
        raise NotImplementedError

    def _on_timer(self, now: int) -> None:
        raise NotImplementedError

    # the one place where a session ends

    def _end(self, reason: EndReason, *, reset_front: bool = False, reset_back: bool = False) -> None:
        state, self._state = self._state, CLOSED
        if state == CLOSED:
            return
        ctx = self.ctx
        ctx.reactor.timers.abandon(self._timer)
        self._timer.callback = nothing
        if self.splice is not None:
            self.splice.close()
            self.splice = None
        if reset_front:
            reset(self.front)
        ctx.reactor.forget(self.front.fileno())
        ctx.reactor.close_after_batch(self.front)
        if reset_back and self.back is not None:
            reset(self.back)
        self._drop_back()
        if self._backend is not None:
            if state == CONNECTING:
                self._cluster.connect_ended(self._backend, established=False)
            self._cluster.released(self._backend)
        ctx.slab.remove(self.token)
        if reason is not EndReason.DONE:
            # what clients do of their own accord is no news to the operator
            level = logging.DEBUG if reason in _CLIENTS_CHOICE else logging.INFO
            _abnormal.event(level, "session_ended", reason=reason.value, **self.describe())
        ctx.on_end(self, reason)

    def _drop_back(self) -> None:
        back, self.back = self.back, None
        if back is not None:
            self.ctx.reactor.forget(back.fileno())
            self.ctx.reactor.close_after_batch(back)
        self._back_interest = -1


def client_key(peer: Any) -> bytes | None:
    """What keeps a client on its backend: its address without the port."""
    return None if not peer or isinstance(peer, (str, bytes)) else peer[0].encode()


def format_peer(peer: Any) -> str:
    """A client address as `host:port`, `[v6]:port`, or "unix"."""
    if not peer or isinstance(peer, (str, bytes)):
        return "unix"
    return f"[{peer[0]}]:{peer[1]}" if ":" in peer[0] else f"{peer[0]}:{peer[1]}"
