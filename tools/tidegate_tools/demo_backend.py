"""A small HTTP server for `tidegate demo`, in a process of its own.

Run as `python -m tidegate_tools.demo_backend NAME`: prints the port it listens on (127.0.0.1) and ends when
its standard input does, so it never outlives whoever started it.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

_LONGEST_S = 60.0


class Handler(BaseHTTPRequestHandler):
    """Answers any path with the backend's name; ?sleep=SECONDS makes it think for so long first."""

    protocol_version = "HTTP/1.1"
    backend = ""

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        try:
            pause = float(query.get("sleep", ["0"])[0])
        except ValueError:
            pause = 0.0
        time.sleep(min(max(pause, 0.0), _LONGEST_S))
        body = f"hello from backend {self.backend}: {self.command} {self.path}\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815  # the name that http.server looks for

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the proxy is what the demo shows."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def main() -> None:
    # Ctrl-C is the demo's: it closes our standard input when the proxy has drained
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Handler.backend = sys.argv[1]
    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.buffer.read()


if __name__ == "__main__":
    main()
