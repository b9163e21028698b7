"""The wrk HTTP load generator, from Python."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


@dataclass(frozen=True, slots=True)
class Wrk:
    """What wrk counted. Latencies in us."""

    requests: int
    rate: float
    p50_us: float
    p99_us: float
    errors: int  # connect, read, write, timeout, and answers other than 2xx and 3xx


def run(url: str, *, connections: int, seconds: float, close: bool = False) -> Wrk:
    """One thread of wrk; `close` asks for a new connection per request."""
    whole = max(1, round(seconds))
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{whole}s", "--latency"]
    if close:
        argv += ["-H", "Connection: close"]
    done = subprocess.run([*argv, url], capture_output=True, text=True, check=True, timeout=whole + 30)
    return parse(done.stdout)


def parse(text: str) -> Wrk:
    """Raises ValueError when that is not wrk's report."""
    requests = re.search(r"(\d+) requests in", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    if not requests or not rate:
        raise ValueError(text)
    errors = sum(int(number) for number in re.findall(r"(?:connect|read|write|timeout) (\d+)", text))
    other = re.search(r"Non-2xx or 3xx responses: (\d+)", text)
    return Wrk(
        requests=int(requests.group(1)),
        rate=float(rate.group(1)),
        p50_us=_time(text, "50%"),
        p99_us=_time(text, "99%"),
        errors=errors + (int(other.group(1)) if other else 0),
    )


def _time(text: str, which: str) -> float:
    found = re.search(rf"\s{re.escape(which)}\s+([\d.]+)(us|ms|s|m)", text)
    return float(found.group(1)) * _UNITS[found.group(2)] if found else 0.0
