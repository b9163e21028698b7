"""What `tidegate top` knows: the last looks, and the rates between them. No I/O."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tidegate_tools.histogram import bucket_percentile
from tidegate_tools.owners import Owner
from tidegate_tools.queues import Queue

HISTORY = 120  # looks kept for the sparklines
SOON_NS = 80_000_000  # a key may ask for a look just after another
_SPARK = "▁▂▃▄▅▆▇█"
_SPARK_ASCII = "_.:-=+*#"
_SPARK_LOW_NS, _SPARK_HIGH_NS = 1e5, 1e10  # a flat line up to 0.1 ms, a full block from 10 s


@dataclass(frozen=True, slots=True)
class Look:
    """One moment. `status` is None without a running tidegate."""

    at_ns: int  # CLOCK_MONOTONIC
    queues: Sequence[Queue]
    owners: dict[int, Owner]
    status: dict[str, Any] | None
    sessions: Sequence[dict[str, Any]] | None = None
    note: str = ""  # why there is no status
    left_out: bool = False  # tidegate was not asked, as the command line wants


@dataclass(slots=True, eq=False)
class ListenerRow:
    """A listener in the last look; rates are per second since the one before, None without tidegate."""

    key: str
    name: str
    address: str
    owner: str
    waiting: int
    gone: int
    backlog: int
    oldest_ns: int | None
    accepted_rate: float | None = None
    drop_rates: dict[str, float] = field(default_factory=dict)
    p99_ns: int | None = None
    buckets: Sequence[int] = ()
    queue: Queue | None = None
    served: dict[str, Any] | None = None

    @property
    def dropped_rate(self) -> float:
        return sum(self.drop_rates.values())


class History:
    """The last looks, and each listener's ages over them."""

    def __init__(self) -> None:
        self.looks: deque[Look] = deque(maxlen=2)
        self.ages: dict[str, deque[int]] = {}

    def add(self, look: Look) -> None:
        """Takes in a look; figures are between it and the one before."""
        again = len(self.looks) == 2 and look.at_ns - self.looks[-1].at_ns < SOON_NS
        if again:
            self.looks.pop()  # rates over so short a time would be noise: it takes the last one's place
        self.looks.append(look)
        for row in self.listeners():
            series = self.ages.setdefault(row.key, deque(maxlen=HISTORY))
            if again and series:
                series.pop()
            series.append(max(row.oldest_ns or 0, row.p99_ns or 0))
        for key in [key for key in self.ages if key not in {row.key for row in self.listeners()}]:
            del self.ages[key]

    @property
    def last(self) -> Look:
        return self.looks[-1]

    @property
    def seconds(self) -> float:
        """Between the last two looks; 0 with only one."""
        return (self.looks[-1].at_ns - self.looks[0].at_ns) / 1e9 if len(self.looks) == 2 else 0.0

    def listeners(self) -> list[ListenerRow]:
        """Tidegate's own when it runs, else every listener of the host."""
        look = self.last
        by_address = {queue.address: queue for queue in look.queues if not queue.netns}
        if look.status is not None:
            return [self._served_row(one, by_address.get(one["address"])) for one in look.status["listeners"]]
        return [_host_row(queue, look) for queue in look.queues]

    def _served_row(self, served: dict[str, Any], queue: Queue | None) -> ListenerRow:
        earlier = self._earlier(served["name"])
        seconds = self.seconds
        row = ListenerRow(
            key=served["name"],
            name=served["name"],
            address=served["address"],
            owner="tidegate",
            waiting=queue.waiting if queue else served["waiting"],
            gone=queue.gone if queue else 0,
            backlog=queue.backlog if queue else served["backlog"],
            oldest_ns=queue.oldest_ns if queue else None,
            buckets=served["age_histogram"]["buckets"],
            queue=queue,
            served=served,
        )
        if earlier is None or not seconds:
            return row
        row.accepted_rate = _rate(served["accepted"], earlier["accepted"], seconds)
        row.drop_rates = {
            reason: rate
            for reason, number in served["dropped"].items()
            if (rate := _rate(number, earlier["dropped"].get(reason, 0), seconds))
        }
        before = earlier["age_histogram"]["buckets"]
        fresh = [max(0, now - then) for now, then in zip(row.buckets, before, strict=True)]
        row.p99_ns = bucket_percentile(fresh, 0.99, served["age_histogram"]["max_ns"])
        return row

    def _earlier(self, name: str) -> dict[str, Any] | None:
        first = self.looks[0].status
        if len(self.looks) < 2 or first is None:
            return None
        return next((one for one in first["listeners"] if one["name"] == name), None)

    def sparkline(self, key: str, width: int, *, ascii_only: bool = False) -> str:
        """The oldest age of each of the last looks, on a log scale from 0.1 ms to 10 s."""
        marks = _SPARK_ASCII if ascii_only else _SPARK
        series = list(self.ages.get(key, ()))[-width:]
        return "".join(marks[_level(ns, len(marks))] for ns in series).rjust(width)


def _level(ns: int, levels: int) -> int:
    if ns <= _SPARK_LOW_NS:
        return 0
    share = math.log(ns / _SPARK_LOW_NS) / math.log(_SPARK_HIGH_NS / _SPARK_LOW_NS)
    return min(levels - 1, int(share * levels))


def _rate(now: int, before: int, seconds: float) -> float:
    # a restarted tidegate counts from zero again
    return (now - before if now >= before else now) / seconds


def _host_row(queue: Queue, look: Look) -> ListenerRow:
    owner = next((look.owners[one.inode] for one in queue.sockets if one.inode in look.owners), None)
    return ListenerRow(
        key=f"{queue.netns}|{queue.address}|{queue.ifindex}",
        name="",
        address=queue.address,
        owner=str(owner) if owner else "-",
        waiting=queue.waiting,
        gone=queue.gone,
        backlog=queue.backlog,
        oldest_ns=queue.oldest_ns,
        queue=queue,
    )


SORTS = ("oldest", "waiting", "accepted", "dropped", "name")


def ordered(rows: Sequence[ListenerRow], sort: str) -> list[ListenerRow]:
    """By one of SORTS, the greatest first, names in their own order."""
    figure: Callable[[ListenerRow], tuple[float, ...]] = {
        "oldest": lambda row: (-(row.oldest_ns or 0), -row.waiting),
        "waiting": lambda row: (-row.waiting,),
        "accepted": lambda row: (-(row.accepted_rate or 0),),
        "dropped": lambda row: (-row.dropped_rate,),
        "name": lambda row: (),
    }[sort]
    return sorted(rows, key=lambda row: (*figure(row), row.name, row.address))
