"""sd_notify(3): telling systemd, when it started us, what state we are in."""

from __future__ import annotations

import os
import socket
import time


class Notifier:
    """Sends to $NOTIFY_SOCKET; without one every call does nothing."""

    def __init__(self, address: str | None = None) -> None:
        path = os.environ.get("NOTIFY_SOCKET", "") if address is None else address
        self._path = "\0" + path[1:] if path.startswith("@") else path
        usec = os.environ.get("WATCHDOG_USEC", "")
        for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        # half the limit, as sd_watchdog_enabled(3) advises
        self.watchdog_ns = int(usec) * 500 if usec.isdigit() and for_us and self._path else 0

    def ready(self, status: str) -> None:
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """Type=notify-reload wants the time of it, in CLOCK_MONOTONIC microseconds."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, status: str) -> None:
        self._send(f"STOPPING=1\nSTATUS={status}")

    def status(self, status: str) -> None:
        self._send(f"STATUS={status}")

    def watchdog(self) -> None:
        self._send("WATCHDOG=1")

    def main_pid(self, pid: int) -> None:
        """After an upgrade: the process to watch is another one."""
        self._send(f"MAINPID={pid}")

    def _send(self, message: str) -> None:
        if not self._path:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.connect(self._path)
                sock.send(message.encode())
        except OSError:  # systemd is away or restarting: nothing we do depends on its hearing us
            return
