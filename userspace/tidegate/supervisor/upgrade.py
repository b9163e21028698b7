"""SIGUSR2: a new tidegate takes over listeners, kernel half and control path; this one finishes and ends.

The two talk over a SOCK_SEQPACKET pair. Until the successor says "ready" nothing of the old is given up: a
successor that fails leaves everything as it was.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tidegate import __version__, logs
from tidegate.control.server import ControlServer, Reply, is_served
from tidegate.errors import OperatorError
from tidegate.kernel.half import KernelHalf
from tidegate.loop.reactor import EPOLLIN
from tidegate.loop.timers import Timer
from tidegate.metrics.recovery import carry_over
from tidegate.metrics.segment import Segment, SegmentMismatch
from tidegate.supervisor.channel import MAX_FDS, Channel, ChannelClosed
from tidegate.supervisor.workers import ACTIVE

if TYPE_CHECKING:
    from tidegate.supervisor.supervisor import Supervisor

_log = logging.getLogger("tidegate.supervisor")

ENVIRONMENT = "TIDEGATE_HANDOVER"
# Compiling the programs and starting workers takes about two seconds; a loaded host a few times that.
READY_LIMIT_NS = 60_000_000_000
# Room for the messages of some thousand listeners; the default holds about 250 of them.
SEND_BUFFER = 4 << 20
_SO_SNDBUFFORCE = 32


def successor_environment(fd: int) -> dict[str, str]:
    """What the successor starts with; `fd` is its end of the channel."""
    environment = os.environ | {ENVIRONMENT: str(fd)}
    # It names us. Without it systemd's watchdog is for whoever is the main process: sd_watchdog_enabled(3).
    environment.pop("WATCHDOG_PID", None)
    return environment


class Upgrade:
    """The predecessor's side."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._channel: Channel | None = None
        self._reply: Reply | None = None
        self._reason = ""
        self._timer = Timer(self._on_limit)
        self.handed_over = False

    @property
    def under_way(self) -> bool:
        return self._child is not None

    def start(self, reply: Reply | None) -> None:
        supervisor = self._supervisor
        if self.under_way or supervisor.draining or supervisor.reloads.under_way or not supervisor.ready:
            logs.event(_log, logging.ERROR, "upgrade_refused", reason="something else is under way")
            if reply is not None:
                reply.error("busy", "a start, a reload, an upgrade or the end is under way")
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        fd = theirs.fileno()
        command = [sys.executable, "-m", "tidegate_tools.main", "run", supervisor.path]
        self._reply = reply
        self._reason = ""
        self._child = subprocess.Popen(command, env=successor_environment(fd), pass_fds=[fd])
        theirs.close()
        with contextlib.suppress(OSError):  # needs root; what is given waits here until the successor reads
            ours.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, SEND_BUFFER)
        self._channel = Channel(ours)
        self._pidfd = os.pidfd_open(self._child.pid)
        logs.event(_log, logging.INFO, "upgrading", successor=self._child.pid)
        supervisor.reactor.add(self._pidfd, EPOLLIN, lambda mask: self._on_child_end())
        supervisor.reactor.add(ours.fileno(), EPOLLIN, lambda mask: self._on_message())
        supervisor.reactor.timers.arm(self._timer, time.monotonic_ns() + READY_LIMIT_NS)
        self._give()

    def _give(self) -> None:
        supervisor = self._supervisor
        if supervisor.predecessor is not None and supervisor.handover is not None:
            # still draining from the upgrade before: what it has counted so far goes along with ours
            supervisor.handover.take_counters(supervisor)
        channel = self._channel
        assert channel is not None
        half = supervisor.half
        manifest, fds = half.export() if half is not None else (None, [])
        _send_all(channel, {"type": "kernel", "version": __version__, "manifest": manifest}, fds)
        _send_all(channel, {"type": "memory"}, [supervisor.segment.fd, supervisor.slots_fd])
        if supervisor.exporter.sock is not None:
            _send_all(channel, {"type": "metrics"}, [supervisor.exporter.sock.fileno()])
        for group in supervisor.groups.groups:
            message = {
                "type": "group",
                "address": str(group.listener.address),
                "index": group.index,
                "slots": group.slots,
                "shared": group.shared,
            }
            _send_all(channel, message, [sock.fileno() for sock in group.socks])
        _send_all(channel, {"type": "end"}, [])

    def _on_message(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            received = channel.receive()
        except ChannelClosed:
            self._supervisor.reactor.remove(channel.fileno())
            return
        if received is None:
            return
        message, _ = received
        if message.get("type") == "ready":
            if self._supervisor.draining:
                self._kill("the end had begun before it was ready")
            else:
                self._hand_over()
        elif message.get("type") == "failed":
            self._reason = str(message.get("reason", ""))

    def _hand_over(self) -> None:
        supervisor, child = self._supervisor, self._child
        assert child is not None
        self.handed_over = True
        supervisor.draining = True
        supervisor.reactor.timers.cancel(self._timer)
        logs.event(_log, logging.INFO, "handed_over", successor=child.pid)
        supervisor.events.end()
        supervisor.notifier.main_pid(child.pid)
        limit = supervisor.config.drain_timeout_ns
        if self._reply is not None:
            self._reply.ok({"message": f"handed over to process {child.pid}", "pid": child.pid})
            self._reply = None
        supervisor.limit_end(limit)
        # only one of the two answers scrapes at any time, or counters would be seen to go backwards
        supervisor.exporter.stop(self._exporter_stopped)
        supervisor.workers.drain_all(limit, "retire")

    def _exporter_stopped(self) -> None:
        if self._channel is not None:
            self._channel.send({"type": "metrics_yours"})

    def workers_gone(self) -> None:
        """The last worker ended: the successor may add our counters to its own."""
        if self.handed_over and self._channel is not None:
            self._supervisor.exporter.end()
            self._channel.send({"type": "done"})
        elif self._child is not None:  # told to end, we take it along: its listeners are shut already
            self._kill("the predecessor was told to end")
            self._child.wait()

    def _on_child_end(self) -> None:
        supervisor, child = self._supervisor, self._child
        assert child is not None
        self._on_message()  # its last words
        status = child.wait()
        supervisor.reactor.remove(self._pidfd)
        os.close(self._pidfd)
        self._child = None
        if self._channel is not None:
            supervisor.reactor.remove(self._channel.fileno())
            self._channel.close()
            self._channel = None
        if self.handed_over:
            return
        supervisor.reactor.timers.cancel(self._timer)
        reason = self._reason or f"it ended with status {status}: its log says why"
        reply, self._reply = self._reply, None
        if reply is not None:
            reply.error("upgrade_failed", f"the successor did not start, this tidegate serves on: {reason}")
        if not supervisor.draining:
            self._reclaim()
        logs.event(_log, logging.ERROR, "upgrade_failed", reason=reason)

    def _reclaim(self) -> None:
        """Undo what a successor that failed late may have done to what both share."""
        supervisor = self._supervisor
        alive = {one.index for one in supervisor.workers.all if one.state == ACTIVE}
        supervisor.groups.reclaim(supervisor.config, alive)
        supervisor.reloads.tell_workers(supervisor.config, [])  # each publishes its load and capacity again
        control = supervisor.control
        if control is not None and not is_served(control.path):  # the path leads to the successor's socket
            control.close()
            supervisor.control = ControlServer(
                supervisor.reactor, control.path, supervisor.verbs.table(), supervisor.config.control_users
            )

    def _kill(self, reason: str) -> None:
        self._reason = reason
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _on_limit(self, now: int) -> None:
        if self._child is not None and not self.handed_over:
            self._kill(f"it was not ready after {READY_LIMIT_NS // 1_000_000_000} s")

    def abandon(self) -> None:
        """In a forked worker."""
        if self._channel is not None:
            self._channel.close()
        if self._pidfd >= 0 and self._child is not None:
            os.close(self._pidfd)


class Handover:
    """The successor's side: everything that came over the pair."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._manifest: dict[str, Any] | None = None
        self._kernel_fds: list[int] = []
        self._groups: dict[str, tuple[dict[str, Any], list[socket.socket]]] = {}
        self._segment: Segment | None = None
        self._metrics: socket.socket | None = None
        self.slots_fd = -1
        self._adopted: KernelHalf | None = None

    @classmethod
    def from_environment(cls) -> Handover | None:
        text = os.environ.pop(ENVIRONMENT, "")
        if not text:
            return None
        sock = socket.socket(fileno=int(text))
        os.set_inheritable(sock.fileno(), False)
        sock.settimeout(30)
        handover = cls(Channel(sock))
        handover._receive(sock)
        return handover

    def _receive(self, sock: socket.socket) -> None:
        while True:
            sock.settimeout(30)
            try:
                message, fds = _receive_all(self._channel, sock)
            except (ChannelClosed, TimeoutError):
                raise OperatorError(
                    "the predecessor ended during the hand-over", "start tidegate anew"
                ) from None
            match message["type"]:
                case "kernel":
                    self._manifest, self._kernel_fds = message["manifest"], fds
                case "memory":
                    with contextlib.suppress(SegmentMismatch):  # other metrics: theirs end with them
                        self._segment = Segment.attach(fds[0], read_only=True)
                    os.close(fds[0])
                    self.slots_fd = fds[1]
                case "metrics":
                    self._metrics = socket.socket(fileno=fds[0])
                    self._metrics.setblocking(False)
                case "group":
                    socks = [socket.socket(fileno=fd) for fd in fds]
                    for one in socks:
                        one.setblocking(False)
                    self._groups[message["address"]] = (message, socks)
                case "end":
                    sock.setblocking(False)
                    return

    def half(self) -> KernelHalf | None:
        """The predecessor's kernel half under this version's programs; None where it had none."""
        if self._manifest is None:
            return None
        half = KernelHalf.adopt(self._manifest, self._kernel_fds)
        try:
            half.refresh_programs()
        except OperatorError as error:
            logs.event(_log, logging.WARNING, "old_programs_serve_on", reason=error.message)
        self._adopted = half
        return half

    def adopt_listeners(self, supervisor: Supervisor) -> None:
        """Take the listeners that are still configured; open those that are new."""
        if self._adopted is None:  # configured without the kernel half: no worker is to inherit these
            for fd in self._kernel_fds:
                os.close(fd)
            self._kernel_fds = []
        new = []
        for listener in supervisor.config.listeners:
            given = self._groups.pop(str(listener.address), None)
            if given is None:
                new.append(listener)
                continue
            message, socks = given
            supervisor.groups.adopt(
                supervisor.config, listener, message["index"], socks, message["slots"], message["shared"]
            )
        for message, socks in self._groups.values():  # configured no more
            if supervisor.half is not None:
                for sock in socks:
                    supervisor.half.unmark_listener(sock)
                supervisor.half.unsteer_listener(message["index"])
            for sock in socks:
                sock.close()
        for group in supervisor.groups.open(new, supervisor.config, {}):
            supervisor.groups.activate(group, supervisor.config)
        supervisor.predecessor = supervisor.exporter.predecessor = self._segment
        supervisor.exporter.fresh = self._segment is None
        supervisor.exporter.open(supervisor.config.metrics, self._metrics)
        supervisor.reactor.add(self._channel.fileno(), EPOLLIN, lambda mask: self._on_message(supervisor))

    def ready(self) -> None:
        self._channel.send({"type": "ready"})

    def failed(self, reason: str) -> None:
        self._channel.send({"type": "failed", "reason": reason})

    def abandon(self) -> None:
        """In a forked worker."""
        self._channel.close()

    def _on_message(self, supervisor: Supervisor) -> None:
        try:
            received = self._channel.receive()
        except ChannelClosed:
            self._on_done(supervisor)
            return
        if received is None:
            return
        if received[0].get("type") == "metrics_yours":
            supervisor.exporter.start()
        elif received[0].get("type") == "done":
            self._on_done(supervisor)

    def _on_done(self, supervisor: Supervisor) -> None:
        """The predecessor's last worker ended, or the predecessor itself: its counters are final."""
        supervisor.reactor.remove(self._channel.fileno())
        self._channel.close()
        self.take_counters(supervisor)
        supervisor.exporter.start()
        logs.event(_log, logging.INFO, "predecessor_ended")

    def take_counters(self, supervisor: Supervisor) -> None:
        """Make the predecessor's counters ours; what it counts after that is lost."""
        if supervisor.predecessor is None:
            return
        with supervisor.exporter.gate.moving():
            carry_over(supervisor.segment, supervisor.predecessor.snapshot())
        supervisor.predecessor.close()
        supervisor.predecessor = supervisor.exporter.predecessor = None


def _send_all(channel: Channel, message: dict[str, Any], fds: Sequence[int]) -> None:
    """One message with any number of fds: the rest follows in messages of its own."""
    parts = [fds[at : at + MAX_FDS] for at in range(0, len(fds), MAX_FDS)] or [[]]
    sent = channel.send(message | {"parts": len(parts)}, parts[0])
    for part in parts[1:]:
        sent = sent and channel.send({"type": "fds"}, part)
    if not sent:
        raise OperatorError("the successor does not take what it is given", "see its log")


def _receive_all(channel: Channel, sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    received = channel.receive()
    assert received is not None  # the socket blocks, with a time limit
    message, fds = received
    for _ in range(message.get("parts", 1) - 1):
        more = channel.receive()
        assert more is not None
        fds += more[1]
    return message, fds
