"""From a listening socket to sessions: accept, read the true age, queue, admit, refuse.

One `Acceptor` serves one configured listener in one worker. It owns the accept queue; the sockets it takes
from are its own and, while a sibling cannot, the sibling's.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from tidegate import logs
from tidegate.accept.admission import Admission, Deadline
from tidegate.accept.queue import AcceptQueue
from tidegate.cluster.balance import ClusterState
from tidegate.config.model import Listener, WhenQueueFull
from tidegate.kernel.queue_age import GONE, HALF_CLOSED, QueueAge
from tidegate.kernel.records import NO_SLOT
from tidegate.loop.reactor import EPOLLEXCLUSIVE, EPOLLIN
from tidegate.loop.timers import Timer
from tidegate.metrics.names import LISTENER, DropReason, EndReason
from tidegate.metrics.segment import observe
from tidegate.session.context import Context, Session, has_unread_bytes, reset
from tidegate.session.plain_sockets import accepted

# accept(2): the connection died or a signal came; the next one may be fine
TRANSIENT: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.EPROTO,
        errno.EINTR,
        errno.ENETDOWN,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.EPERM,  # a firewall rule forbids it
    }
)
# overload of this process or host, not a fault of the listener
EXHAUSTED: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})

# Taken from the kernel in one go. Newest first needs the whole queue; this bounds what a flood that
# never ends may hold the loop for (about 30 ms).
ACCEPT_BATCH: Final = 4096
# Sessions made in one go; the rest waits for the next turn so that running sessions get theirs.
SESSION_BATCH: Final = 64
# With no fd left even to refuse, look again this often.
PAUSE_NS: Final = 100_000_000

_ACCEPTED: Final = LISTENER.index("accepted_total")
_ERRORS: Final = LISTENER.index("accept_errors_total", "transient")
_EXHAUSTED: Final = LISTENER.index("accept_errors_total", "fd_exhausted")
_AGE: Final = LISTENER.index("queue_age_ns")
_WAIT: Final = LISTENER.index("accept_queue_wait_ns")
_QUEUED: Final = LISTENER.index("queued")
_SESSIONS: Final = LISTENER.index("sessions")
_SESSIONS_TOTAL: Final = LISTENER.index("sessions_total")
_STOLEN: Final = LISTENER.index("thefts_total")
_DROPPED: Final = {reason: LISTENER.index("dropped_total", reason.value) for reason in DropReason}
_ENDED: Final = {reason: LISTENER.index("ended_total", reason.value) for reason in EndReason}

_log = logging.getLogger("tidegate.accept")
_limited = logs.RateLimited(_log, per_second=1)

_LEFT: Final = HALF_CLOSED | GONE
# What came in this turn of the loop, this short a while ago, is not asked again whether it is still there.
# It is more than a batch of sessions takes to make.
_JUST_NOW_NS: Final = 5_000_000

ReadAge = Callable[[socket.socket], QueueAge]
MakeSession = Callable[[Context, socket.socket, Any, int], Session]


@dataclass(slots=True)
class Waiting:
    """Accepted, aged, without a session."""

    sock: socket.socket
    peer: Any
    established_ns: int
    accepted_ns: int


class SpareFd:
    """One fd held back: with it closed, a connection can be accepted and refused when none is left."""

    __slots__ = ("_fd",)

    def __init__(self) -> None:
        self._fd = -1
        self.fill()

    def spend(self) -> bool:
        """Free it; False when it was spent already."""
        fd, self._fd = self._fd, -1
        if fd < 0:
            return False
        os.close(fd)
        return True

    def fill(self) -> bool:
        if self._fd < 0:
            try:
                self._fd = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return False
        return True


def _nowhere(active: int) -> None:
    """Where a retired worker publishes its load."""


def _unknown(slot: int) -> int:
    """How many wait in the kernel, for all that we know: go on until it says that none does."""
    return 1


class Acceptor:
    """The accept path of one listener in one worker."""

    def __init__(
        self,
        ctx: Context,
        sock: socket.socket,
        read_age: ReadAge,
        make_session: MakeSession,
        max_connections: int,
        spare: SpareFd,
        store_active: Callable[[int], None],
        shared: bool = False,
        waiting: Callable[[int], int] = _unknown,
    ) -> None:
        """`store_active` publishes how many connections are accepted and not yet ended.

        `shared`: every worker waits on the same `sock`. `waiting`: how many the kernel's queue of a slot
        holds, by its own count.
        """
        self.ctx = ctx
        self.sock = sock
        self.queue: AcceptQueue[Waiting] = AcceptQueue(ctx.listener.accept_queue)
        self.max_connections = max_connections
        self.draining = False
        self._read_age = read_age
        self._make_session = make_session
        self._spare = spare
        self._store_active = store_active
        self._waiting = waiting
        # Of every accepted socket, a sibling's too. Asked once: each of these makes an enum of a number.
        self._kind = int(sock.family), int(sock.type), sock.proto
        self._interest = EPOLLIN | EPOLLEXCLUSIVE if shared else EPOLLIN
        self._foreign: dict[int, socket.socket] = {}
        self._make_scheduled = False
        self._paused: list[tuple[socket.socket, bool]] = []
        self._sweep_timer = Timer(self._on_sweep)
        self._pause_timer = Timer(self._on_pause_over)
        self.admission: Admission = Deadline(ctx.listener.stale_after_ns)

    def apply(
        self, listener: Listener, cluster: ClusterState | None, words: memoryview, max_connections: int
    ) -> None:
        """Take over what a reload may change without a new socket; sessions under way keep their backends."""
        self.ctx.listener = listener
        self.ctx.cluster = cluster
        if words is not self.ctx.words:
            self._move_counts(words)
        self.ctx.words = words
        self.max_connections = max_connections
        self.admission = Deadline(listener.stale_after_ns)
        self.queue.capacity = listener.accept_queue
        self._schedule_make()

    def _move_counts(self, words: memoryview) -> None:
        """The listener has another name: what is under way will end there, so it counts as begun there."""
        old, active, queued = self.ctx.words, self.ctx.active, len(self.queue)
        for index, count in ((_ACCEPTED, active + queued), (_SESSIONS_TOTAL, active)):
            old[index] -= count
            words[index] += count
        old[_SESSIONS] = old[_QUEUED] = 0
        words[_SESSIONS], words[_QUEUED] = active, queued

    def disown(self) -> None:
        """The slot is a successor's now: publish nothing there any more."""
        self._store_active = _nowhere

    # which sockets are watched

    def start(self) -> None:
        self.ctx.reactor.add(self.sock.fileno(), self._interest, self._on_own)

    def take_over(self, sock: socket.socket) -> None:
        """Accept from a sibling's listener too, while the sibling cannot."""
        fd = sock.fileno()
        if fd not in self._foreign and not self.draining:
            self._foreign[fd] = sock
            self.ctx.reactor.add(fd, EPOLLIN | EPOLLEXCLUSIVE, lambda mask: self._on_foreign(sock))

    def give_back(self, sock: socket.socket) -> None:
        fd = sock.fileno()
        if self._foreign.pop(fd, None) is not None:
            self.ctx.reactor.remove(fd)

    def taking_over(self, sock: socket.socket) -> bool:
        return sock.fileno() in self._foreign

    @property
    def idle(self) -> bool:
        """Nothing waits here and there is room: able to help a sibling."""
        return not self.queue and not self.draining and self._room()

    # taking from the kernel

    def _on_own(self, mask: int) -> None:
        self._take(self.sock, False, ACCEPT_BATCH, True)

    def _on_foreign(self, sock: socket.socket) -> None:
        self._take(sock, True, ACCEPT_BATCH, True)

    def accept_waiting(self, sock: socket.socket | None = None, limit: int = ACCEPT_BATCH) -> int:
        """Take what waits now, asked for by somebody other than epoll; returns how many came."""
        if sock is None:
            sock = self.sock
        return self._take(sock, sock is not self.sock, limit, False)

    def _take(self, sock: socket.socket, stolen: bool, limit: int, told_again: bool) -> int:
        """`told_again`: epoll will, should more be there than the kernel's count says."""
        ctx = self.ctx
        words = ctx.words
        # Not accept(): see session/plain_sockets.py; it also asks the listener for its kind anew.
        accept: Callable[[], tuple[int, Any]] = sock._accept  # type: ignore[attr-defined]
        family, kind, proto = self._kind
        taken = 0
        for taken in range(limit):
            try:
                fd, peer = accept()
                conn = accepted(fd, family, kind, proto)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno in EXHAUSTED:
                    words[_EXHAUSTED] += 1
                    if not self._refuse_for_want_of_fds(sock, stolen):
                        break
                    continue
                if error.errno in TRANSIENT:
                    words[_ERRORS] += 1
                    continue
                if error.errno == errno.EINVAL:  # shut down: it listens no more
                    ctx.reactor.remove(sock.fileno())
                    self._foreign.pop(sock.fileno(), None)
                    break
                raise
            words[_ACCEPTED] += 1
            if stolen:
                words[_STOLEN] += 1
            try:
                slot = self._arrived(conn, peer)
            except Exception:  # costs this connection, not the listener: the reactor would unwatch it
                self._faulty(conn)
                continue
            if taken & 63 == 63 and ctx.reactor.each_batch is not None:
                ctx.reactor.each_batch(time.monotonic_ns())
            if told_again and slot != NO_SLOT and not self._waiting(slot):
                taken += 1
                break  # the kernel need not be asked in vain
        else:
            taken = limit
        if self.queue.entries:
            self._make_sessions()
        return taken

    def _arrived(self, conn: socket.socket, peer: Any) -> int:
        """Read its age, once, and queue or drop it; returns its listener's slot."""
        conn.setblocking(False)
        age = self._read_age(conn)
        established_ns, age_ns = age.established_ns, age.age_ns
        now = established_ns + age_ns
        observe(self.ctx.words, _AGE, age_ns)
        if age.flags & _LEFT and self._client_left(conn, age):
            self._drop(conn, DropReason.CLIENT_GONE)
        elif self.admission.stale(established_ns, now):
            self._drop_stale(conn, peer, established_ns)
        else:
            entry = Waiting(conn, peer, established_ns, now)
            if not self.queue.offer(entry):
                self._find_place(entry)
        return age.slot

    def _find_place(self, entry: Waiting) -> None:
        """The queue is full: make sessions of what is in it, or drop somebody."""
        queue = self.queue
        self._make_sessions()
        if queue.full:
            drop_oldest = self.ctx.listener.when_queue_full is WhenQueueFull.DROP_OLDEST
            oldest = queue.pop_oldest() if drop_oldest else None
            self._drop(oldest.sock if oldest is not None else entry.sock, DropReason.QUEUE_FULL)
            if oldest is None:
                return
        queue.push(entry)

    def _client_left(self, conn: socket.socket, age: QueueAge) -> bool:
        """A reset, or a FIN with no byte sent; a FIN after data only where `abort_on_close` says so."""
        if age.gone:
            return True
        return age.half_closed and (self.ctx.listener.abort_on_close or not has_unread_bytes(conn))

    def _refuse_for_want_of_fds(self, sock: socket.socket, stolen: bool) -> bool:
        """Answer one connection with a reset through the spare fd; False: not even that, so pause."""
        _limited.event(logging.WARNING, "fd_exhausted", listener=self.ctx.listener.name)
        if not self._spare.spend():
            self._pause(sock, stolen)
            return False
        try:
            conn, _ = sock.accept()
        except OSError as error:
            refused = error.errno not in EXHAUSTED and error.errno != errno.EAGAIN
        else:
            self.ctx.words[_ACCEPTED] += 1
            self._read_age(conn)  # so that the kernel's count of the waiting stays true
            self._drop(conn, DropReason.FD_EXHAUSTED)
            refused = True
        if not self._spare.fill() or not refused:
            self._pause(sock, stolen)
            return False
        return True

    def _pause(self, sock: socket.socket, stolen: bool) -> None:
        self.ctx.reactor.remove(sock.fileno())
        self._paused.append((sock, stolen))
        if not self._pause_timer.armed:
            self.ctx.reactor.timers.arm(self._pause_timer, time.monotonic_ns() + PAUSE_NS)

    def _on_pause_over(self, now: int) -> None:
        self._spare.fill()
        paused, self._paused = self._paused, []
        for sock, stolen in paused:
            fd = sock.fileno()
            if self.ctx.reactor.watches(fd):
                continue  # given back and taken over again meanwhile
            if stolen:
                if self._foreign.pop(fd, None) is not None:  # else: given back
                    self.take_over(sock)
            elif not self.draining:
                self.start()

    # from the queue to sessions

    def _room(self) -> bool:
        return self.ctx.active < self.max_connections and not self.ctx.slab.full

    def _make_sessions(self) -> None:
        self._make_scheduled = False
        ctx, entries = self.ctx, self.queue.entries
        words, slab, monotonic_ns = ctx.words, ctx.slab, time.monotonic_ns
        turn_ns = ctx.reactor.now
        made = 0
        while entries and ctx.active < self.max_connections and not slab.full:
            if made == SESSION_BATCH:
                self._schedule_make()
                break
            entry = entries.pop()
            sock, established_ns = entry.sock, entry.established_ns
            now = monotonic_ns()  # not the batch's: the process may have been stopped within it
            waited_ns = now - entry.accepted_ns
            if self.admission.stale(established_ns, now):
                self._drop_stale(sock, entry.peer, established_ns)
                continue
            # It waited here for a place: the client may have left meanwhile.
            waited = entry.accepted_ns < turn_ns or waited_ns > _JUST_NOW_NS
            if waited and self._client_left(sock, self._read_age(sock)):
                self._drop(sock, DropReason.CLIENT_GONE)
                continue
            observe(words, _WAIT, waited_ns)
            made += 1
            try:
                session = self._make_session(ctx, sock, entry.peer, established_ns)
            except Exception:
                self._faulty(sock)
                continue
            ctx.active += 1
            words[_SESSIONS_TOTAL] += 1
            try:
                session.start()
            except Exception:
                _log.error("session_failed", exc_info=True, extra={"kv": {"listener": ctx.listener.name}})
                session.end(EndReason.INTERNAL_ERROR)
        words[_SESSIONS] = ctx.active
        words[_QUEUED] = waiting = len(entries)
        self._store_active(ctx.active + waiting)
        if waiting:
            self._arm_sweep()

    def _schedule_make(self) -> None:
        if not self._make_scheduled:
            self._make_scheduled = True
            self.ctx.reactor.call_after_batch(self._make_sessions)

    def session_ended(self, session: Session, reason: EndReason) -> None:
        """The context's `on_end`: frees the place, and gives it to the newest who waits."""
        ctx = self.ctx
        ctx.active -= 1
        ctx.words[_ENDED[reason]] += 1
        self._schedule_make()  # which publishes the load too: once for all that end in a batch

    # from the queue to the bin

    def _arm_sweep(self) -> None:
        expiry = self.queue.next_expiry_ns(self.admission)
        if expiry is not None:
            self.ctx.reactor.timers.arm(self._sweep_timer, expiry)

    def _on_sweep(self, now: int) -> None:
        for entry in self.queue.sweep(self.admission, time.monotonic_ns()):
            self._drop_stale(entry.sock, entry.peer, entry.established_ns)
        self._make_sessions()

    def _faulty(self, sock: socket.socket) -> None:
        """An exception on the way to a session; it counts as one that ended at once."""
        _log.error("connection_failed", exc_info=True, extra={"kv": {"listener": self.ctx.listener.name}})
        self.ctx.words[_SESSIONS_TOTAL] += 1
        self.ctx.words[_ENDED[EndReason.INTERNAL_ERROR]] += 1
        reset(sock)
        sock.close()

    def _drop(self, sock: socket.socket, reason: DropReason) -> None:
        self._count_drop(reason)
        reset(sock)
        sock.close()

    def _drop_stale(self, sock: socket.socket, peer: Any, established_ns: int) -> None:
        self._count_drop(DropReason.STALE)
        answer = self.ctx.answer_stale
        if answer is None or not answer(self.ctx.words, sock, peer, established_ns):
            reset(sock)
        sock.close()

    def _count_drop(self, reason: DropReason) -> None:
        self.ctx.words[_QUEUED] = len(self.queue)  # first: who sees the drop must not still see it wait
        self.ctx.words[_DROPPED[reason]] += 1

    # leaving

    def stop_accepting(self) -> None:
        """Unwatch every listener; what is queued here is still served."""
        self.draining = self.ctx.draining = True
        self.ctx.reactor.remove(self.sock.fileno())
        for fd in list(self._foreign):
            self.ctx.reactor.remove(fd)
        self._foreign.clear()
        self._paused.clear()

    def drop_queue(self, reason: DropReason = DropReason.SHUTDOWN) -> int:
        dropped = 0
        while (entry := self.queue.pop_oldest()) is not None:
            self._drop(entry.sock, reason)
            dropped += 1
        self.ctx.words[_QUEUED] = 0
        return dropped
