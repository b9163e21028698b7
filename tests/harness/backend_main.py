"""The backends' side of `harness.backends`: `python -m harness.backend_main KIND OPTIONS`.

Prints one JSON line with its address, then answers commands, one a line on stdin, with one JSON line each.
It ends when its stdin does.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from harness.pattern import CHUNK, Pattern, new_digest

Options = dict[str, Any]


class Server:
    """Accepts in its own thread and serves each connection in another."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.lock = threading.Lock()
        self.accepted = 0
        self.ended = 0
        if path := options.get("path"):
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.listener.bind(path)
            os.chmod(path, 0o666)  # a worker without privileges has to reach it
            self.address = f"unix:{path}"
        else:
            host = options.get("host", "127.0.0.1")
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self.listener = socket.socket(family, socket.SOCK_STREAM)
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if size := options.get("rcvbuf"):
                self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            self.listener.bind((host, options.get("port", 0)))
            port = self.listener.getsockname()[1]
            self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.listener.listen(options.get("backlog", 4096))

    def accept_for_ever(self) -> None:
        while True:
            client, _peer = self.listener.accept()
            accepted_ns = time.monotonic_ns()
            with self.lock:
                self.accepted += 1
            threading.Thread(target=self._one, args=(client, accepted_ns), daemon=True).start()

    def _one(self, client: socket.socket, accepted_ns: int) -> None:
        try:
            if client.family != socket.AF_UNIX:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.serve(client, accepted_ns)
        except OSError:
            pass  # the other side left: the records say how far it came
        finally:
            client.close()
            with self.lock:
                self.ended += 1

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        raise NotImplementedError

    def command(self, name: str) -> Any:
        if name == "stats":
            return self.stats()
        raise KeyError(name)

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {"accepted": self.accepted, "ended": self.ended}


class Echo(Server):
    """Sends back what comes; after the client's FIN, its own. `banner` is sent first, unasked."""

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        if banner := self.options.get("banner"):
            client.sendall(banner.encode())
        while data := client.recv(CHUNK):
            client.sendall(data)


class Counting(Server):
    """Records the first line of every request, with the time it was seen, and sends it back.

    A head that looks like HTTP is answered as HTTP; the line recorded is then the path. One epoll loop, so
    that hundreds of connections that come at once are seen at once.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.records: list[tuple[str, int, int]] = []  # line, accepted_ns, seen_ns
        self.open: dict[int, tuple[socket.socket, int, bytes]] = {}

    def accept_for_ever(self) -> None:
        epoll = select.epoll()
        self.listener.setblocking(False)
        epoll.register(self.listener, select.EPOLLIN)
        while True:
            for fd, _mask in epoll.poll():
                if fd == self.listener.fileno():
                    self._accept(epoll)
                elif not self._read(fd):
                    epoll.unregister(fd)
                    self.open.pop(fd)[0].close()
                    with self.lock:
                        self.ended += 1

    def _accept(self, epoll: select.epoll) -> None:
        while True:
            try:
                client, _peer = self.listener.accept()
            except BlockingIOError:
                return
            client.setblocking(False)
            if client.family != socket.AF_UNIX:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                self.accepted += 1
            self.open[client.fileno()] = (client, time.monotonic_ns(), b"")
            epoll.register(client.fileno(), select.EPOLLIN)

    def _read(self, fd: int) -> bool:
        """Answers every whole request; False at the end of the connection."""
        client, accepted_ns, buffer = self.open[fd]
        try:
            data = client.recv(CHUNK)
            buffer += data
            while (parted := self._part(buffer)) is not None:
                line, answer, buffer = parted
                with self.lock:
                    self.records.append((line, accepted_ns, time.monotonic_ns()))
                client.send(answer)  # a line: it fits
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.open[fd] = (client, accepted_ns, buffer)
        return bool(data)

    @staticmethod
    def _part(buffer: bytes) -> tuple[str, bytes, bytes] | None:
        """The first request's line, its answer, and what follows; None while it is not whole."""
        if buffer.startswith(b"GET "):
            head, found, rest = buffer.partition(b"\r\n\r\n")
            if not found:
                return None
            line = head.split(b" ", 2)[1].lstrip(b"/")
            answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s\n" % (len(line) + 1, line)
            return line.decode("latin-1"), answer, rest
        line, found, rest = buffer.partition(b"\n")
        return (line.decode("latin-1"), line + b"\n", rest) if found else None

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {"accepted": self.accepted, "ended": self.ended, "records": list(self.records)}


class Slow(Server):
    """`threads` servers that each take `service_ms` for a line: a capacity of threads / service_ms."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.records: list[tuple[str, int, int]] = []

    def accept_for_ever(self) -> None:
        for _ in range(self.options["threads"] - 1):
            threading.Thread(target=self._serve_for_ever, daemon=True).start()
        self._serve_for_ever()

    def _serve_for_ever(self) -> None:
        while True:
            client, _peer = self.listener.accept()
            with self.lock:
                self.accepted += 1
            self._one(client, time.monotonic_ns())

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        with client.makefile("rb") as lines:
            line = lines.readline()
            if not line:
                return
            with self.lock:
                self.records.append((line.rstrip(b"\n").decode("latin-1"), accepted_ns, time.monotonic_ns()))
            time.sleep(self.options["service_ms"] / 1000)
            client.sendall(line)

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {"accepted": self.accepted, "ended": self.ended, "records": list(self.records)}


class Gate(Server):
    """Records a line, holds the answer back until the command `open` lets one through, closes after it.

    The earliest line in hand is let through first.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.records: list[tuple[str, int, int]] = []
        self.permits = threading.Semaphore(0)

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        with client.makefile("rb") as lines:
            line = lines.readline()
            if not line:
                return
            with self.lock:
                self.records.append((line.rstrip(b"\n").decode("latin-1"), accepted_ns, time.monotonic_ns()))
            self.permits.acquire()
            client.sendall(line)

    def command(self, name: str) -> Any:
        if name == "open":
            self.permits.release()
            return {}
        return super().command(name)

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {"accepted": self.accepted, "ended": self.ended, "records": list(self.records)}


class Exchange(Server):
    """Digests both ways. The client's first line says what to do: {"id", "down", "seed", ...}.

    `down` bytes of the stream `seed` are sent while everything until the client's FIN is digested.
    `pause_every`/`pause_ms` make the sending slow, `read_pause_every`/`read_pause_ms` the reading;
    `fin_first` sends our FIN as soon as the last byte is out, else after the client's.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.done: dict[str, dict[str, Any]] = {}

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        line = b""
        while not line.endswith(b"\n"):
            byte = client.recv(1)
            if not byte:
                return
            line += byte
        order = json.loads(line)
        record: dict[str, Any] = {"up": 0, "digest": "", "down": 0, "eof": False, "error": ""}
        with self.lock:
            self.done[order["id"]] = record
        sender = threading.Thread(target=self._send, args=(client, order, record), daemon=True)
        sender.start()
        running = new_digest()
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        since_pause = 0
        try:
            while size := client.recv_into(buffer):
                running.update(view[:size])
                record["up"] += size
                since_pause += size
                if order.get("read_pause_ms") and since_pause >= order["read_pause_every"]:
                    since_pause = 0
                    time.sleep(order["read_pause_ms"] / 1000)
            record["eof"] = True
        except OSError as error:
            record["error"] = error.__class__.__name__
        record["digest"] = running.hexdigest()
        sender.join()
        if record["eof"] and not order.get("fin_first"):
            client.shutdown(socket.SHUT_WR)

    def _send(self, client: socket.socket, order: dict[str, Any], record: dict[str, Any]) -> None:
        since_pause = 0
        try:
            for chunk in Pattern(order["seed"]).chunks(order["down"]):
                client.sendall(chunk)
                record["down"] += len(chunk)
                since_pause += len(chunk)
                if order.get("pause_ms") and since_pause >= order["pause_every"]:
                    since_pause = 0
                    time.sleep(order["pause_ms"] / 1000)
            if order.get("fin_first"):
                client.shutdown(socket.SHUT_WR)
        except OSError as error:
            record["error"] = record["error"] or error.__class__.__name__

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {"accepted": self.accepted, "ended": self.ended, "done": dict(self.done)}


class NeverReads(Server):
    """Accepts and reads nothing until the command `read`; then digests what comes until FIN."""

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.go = threading.Event()
        self.read = 0
        self.running = new_digest()

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        self.go.wait()
        while data := client.recv(CHUNK):
            with self.lock:
                self.read += len(data)
                self.running.update(data)

    def command(self, name: str) -> Any:
        if name == "read":
            self.go.set()
            return {}
        return super().command(name)

    def stats(self) -> dict[str, Any]:
        with self.lock:
            digest = self.running.hexdigest()
            return {"accepted": self.accepted, "ended": self.ended, "read": self.read, "digest": digest}


class Discard(Server):
    """Reads and forgets."""

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        while client.recv(CHUNK):
            continue


class Source(Server):
    """Sends the stream `seed`, `length` bytes of it (0: for ever), then FIN; reads nothing."""

    def serve(self, client: socket.socket, accepted_ns: int) -> None:
        length = self.options.get("length", 0) or 1 << 62
        pause_s = self.options.get("pause_ms", 0) / 1000
        for chunk in Pattern(self.options["seed"]).chunks(length):
            client.sendall(chunk)
            if pause_s:
                time.sleep(pause_s)
        client.shutdown(socket.SHUT_WR)
        while client.recv(CHUNK):
            continue


KINDS: dict[str, Callable[[Options], Server]] = {
    "echo": Echo,
    "counting": Counting,
    "slow": Slow,
    "gate": Gate,
    "exchange": Exchange,
    "never_reads": NeverReads,
    "discard": Discard,
    "source": Source,
}


def main() -> None:
    server = KINDS[sys.argv[1]](json.loads(sys.argv[2]))
    threading.Thread(target=server.accept_for_ever, daemon=True).start()
    print(json.dumps({"address": server.address}), flush=True)
    for line in sys.stdin:
        print(json.dumps(server.command(line.strip())), flush=True)
    os._exit(0)  # connection threads may sit in recv for ever


if __name__ == "__main__":
    main()
