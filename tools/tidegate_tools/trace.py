"""`tidegate trace`: the accept queue of any service, by programs on its cgroup."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import click

from tidegate.errors import EXIT_USAGE, OperatorError
from tidegate.kernel import bpf, tracing
from tidegate.kernel.tracing import Accepts, Counts
from tidegate_tools import client, namespaces, trace_view
from tidegate_tools.arrivals import Arrivals, Look
from tidegate_tools.queues import Queue
from tidegate_tools.snapshot import Reader
from tidegate_tools.trace_view import Sample

_HEADER_EVERY = 20
_EAGER_S = 0.005


class WhereError(OperatorError):
    """The command line names no cgroup, or one that is better left alone."""

    exit_code = EXIT_USAGE


@click.command(
    epilog="""\b
Examples:
  tidegate trace --pid $(pidof -s nginx)
  tidegate trace --cgroup /sys/fs/cgroup/system.slice/gunicorn.service
  tidegate trace --pid 1234 --duration 60 --json
"""
)
@click.option("--cgroup", type=click.Path(path_type=Path), help="Directory of the service's cgroup.")
@click.option("--pid", type=click.IntRange(1), help="Any process of the service; its cgroup is traced.")
@click.option("--root-cgroup", is_flag=True,
              help="Allow the root of the hierarchy: every socket of the host.")  # fmt: skip
@click.option("--interval", type=click.FloatRange(0.05, 3600), default=1.0, show_default=True,
              metavar="SECONDS", help="Time between looks.")  # fmt: skip
@click.option("--duration", type=click.FloatRange(0.05), metavar="SECONDS",
              help="Stop after this time (default: until interrupted).")  # fmt: skip
@click.option("--cost", is_flag=True, help="Measure what the programs cost, and say it at the end.")
@client.json_option
def command(
    cgroup: Path | None,
    pid: int | None,
    root_cgroup: bool,
    interval: float,
    duration: float | None,
    cost: bool,
    as_json: bool,
) -> None:
    """Watch the accept queue of any service, without touching it.

    Attaches a small BPF program to the service's cgroup that sees accept() itself and times it, and, until it
    is known that the service accepts in a way that this sees, one that counts what is established. Shows for
    each interval the connections established, accepted, and found reset at accept; how many wait at its end,
    and the ages at accept. On exit totals and a histogram; the programs are gone then, however the command
    ended. Meanwhile `tidegate ages` shows exact ages for the service, too.

    Who waits is sampled once per interval: a queue that fills and drains between two looks shows in the ages
    at accept, not under WAITING. Needs root.
    """
    target = _where(cgroup, pid, root_cgroup)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        if cost:
            stack.callback(os.close, bpf.enable_stats())
        tracer = stack.enter_context(tracing.Tracer(target))
        reader = Reader(namespaces.every())
        stack.callback(reader.close)
        watch = _Watch(target, tracer, reader, as_json)
        try:
            watch.run(interval, duration)
        except KeyboardInterrupt:
            pass
        watch.finish(cost)


class _Watch:
    def __init__(self, cgroup: Path, tracer: tracing.Tracer, reader: Reader, as_json: bool) -> None:
        self._cgroup = cgroup
        self._tracer = tracer
        self._reader = reader
        self._as_json = as_json
        self._high_water_ns = 0
        self._arrivals: Arrivals | None = None
        self._netns: set[str] = set()  # where the service was seen to listen
        self._opens = reader.passive_opens()
        self._first = self._last = self._look()

    def run(self, interval_s: float, duration_s: float | None) -> None:
        start = time.monotonic()
        shown = 0
        while True:
            # from the start, not from the last look: intervals do not drift
            wake = start + (shown + 1) * interval_s
            end = start + duration_s if duration_s is not None else wake
            self._sleep_until(min(wake, end))
            sample = self._look()
            self._show(sample, shown)
            self._last = sample
            shown += 1
            if duration_s is not None and time.monotonic() >= end:
                return

    def finish(self, cost: bool) -> None:
        last = self._look()
        costs = self._tracer.cost() if cost else None
        summary = trace_view.summarize(str(self._cgroup), self._first, last, self._high_water_ns, costs)
        if self._as_json:
            client.show_json(trace_view.summary_json(summary), indent=None)
        else:
            click.echo("\n" + trace_view.summary_text(summary))

    def _sleep_until(self, wake: float) -> None:
        """Meanwhile lets the costlier program go as soon as that can be known."""
        arrivals, tracer = self._arrivals, self._tracer
        assert arrivals is not None
        while (left := wake - time.monotonic()) > 0:
            if arrivals.counting:
                taken = tracer.accepted()[0].taken
                if arrivals.settle(taken, tracer.arrived()):
                    self._apply(tracer.accepted()[0])
            time.sleep(min(left, _EAGER_S) if arrivals.counting else left)

    def _apply(self, accepts: Accepts) -> None:
        """Attaches what is needed now, and no more."""
        assert self._arrivals is not None
        self._tracer.counts_arrivals = self._arrivals.counting
        self._tracer.check_all(self._arrivals.counting or accepts.asked_again > 0)

    def _look(self) -> Sample:
        tracer = self._tracer
        opens = self._reader.passive_opens()
        counted, (before, _) = tracer.arrived(), tracer.accepted()
        snapshot = self._reader.read()
        queues = self._traced(snapshot.queues)
        waiting = sum(queue.waiting for queue in queues)
        (accepts, ages), counted_after = tracer.accepted(), tracer.arrived()
        now = snapshot.taken_ns
        self._netns |= {queue.netns for queue in queues}
        opened = sum(
            opens[name] - self._opens[name] for name in self._netns & opens.keys() & self._opens.keys()
        )
        look = Look(now, opened, counted, before.taken, waiting, accepts.taken, counted_after)
        if self._arrivals is None:
            self._arrivals = Arrivals(look)
        else:
            self._arrivals.look(look)
        self._apply(accepts)
        oldest_ns = trace_view.oldest_ns(queues)
        self._high_water_ns = max(self._high_water_ns, oldest_ns or 0)
        return Sample(
            at_ns=now,
            counts=Counts(self._arrivals.arrived, accepts.taken, accepts.half_closed, accepts.gone),
            ages=ages,
            waiting=waiting,
            untimed=self._arrivals.untimed,
            waiting_gone=sum(queue.gone for queue in queues),
            oldest_ns=oldest_ns,
        )

    def _traced(self, queues: list[Queue]) -> list[Queue]:
        """Those whose listener was opened in the cgroup or below it: that decides what the programs see."""
        inside = {entry.stat().st_ino for entry in _directories(self._cgroup)}
        return [queue for queue in queues if any(one.cgroup_id in inside for one in queue.sockets)]

    def _show(self, sample: Sample, shown: int) -> None:
        interval = trace_view.between(self._last, sample)
        if self._as_json:
            client.show_json(trace_view.interval_json(interval), indent=None)
            return
        if shown % _HEADER_EVERY == 0:
            click.echo(trace_view.header())
        click.echo(trace_view.line(interval, time.strftime("%H:%M:%S")))


def _directories(top: Path) -> list[Path]:
    return [top, *(Path(directory) / name for directory, names, _ in os.walk(top) for name in names)]


def _where(cgroup: Path | None, pid: int | None, root_cgroup: bool) -> Path:
    if (cgroup is None) == (pid is None):
        raise WhereError("name the service", "--cgroup PATH or --pid PID, one of them")
    target = cgroup if cgroup is not None else tracing.cgroup_of(pid or 0)
    if tracing.is_root(target):
        if not root_cgroup:
            raise WhereError(
                f"{target} is the root cgroup: the programs would run for every socket of the host",
                "run the service in a cgroup of its own (systemd does), or give --root-cgroup",
            )
        click.echo("warning: tracing the root cgroup, every TCP connection of this host", err=True)
    return target
