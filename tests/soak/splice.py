"""Mixed spliced traffic for minutes: no byte wrong, and maps, files and memory back to where they were.

Slow readers and writers, half-closes either way round, resets and pauses, 40 sessions at a time, half of them
handed to the kernel at once. Ends with status 1 at the first stream that is not intact.

Run as root from tests/:  ../.venv/bin/python -m soak.splice [--minutes 10] [--size 8] [--loss 0]
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click
from harness.backends import Backend
from harness.kernel_sockets import in_netns
from harness.loss import losing
from harness.proc import Tidegate, tcp_config
from harness.streams import Exchange, assert_intact, mixed
from harness.waiting import wait_until

MIB = 1 << 20


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(minutes: float, size: int, sessions: int) -> str:
    """The summary; AssertionError at the first fault."""
    with Backend("exchange") as backend:
        config = tcp_config(
            [backend.address], splice="on", splice_after="64KiB", top={"zombie_interval": "1s"}
        )
        with Tidegate(config, stop_timeout_s=60) as gate:
            (worker,) = gate.worker_pids()
            files, until, rounds = open_files(worker), time.monotonic() + minutes * 60, 0
            while time.monotonic() < until:
                done = Exchange(("127.0.0.1", gate.port()), mixed(sessions, size, seed=rounds)).run(600)
                assert_intact(done, backend, patience_s=60)
                wait_until(lambda: gate.listener()["sessions"] == 0, 20, "every session to end")
                rounds += 1
                seen = gate.listener()
                click.echo(
                    f"round {rounds}: {seen['spliced']} of {seen['accepted']} sessions spliced, "
                    f"{seen['bytes_spliced'] / 1e9:.2f} of "
                    f"{(seen['bytes_in'] + seen['bytes_out']) / 1e9:.2f} GB, "
                    f"worker {resident(worker) / MIB:.0f} MiB"
                )
            assert gate.worker_pids() == [worker], "the worker died"
            assert seen["ended"]["internal_error"] == 0
            wait_until(lambda: open_files(worker) == files, 10, "the worker's files to be closed")
            assert "splice_strays" not in gate.child.output()
            return f"{rounds} rounds of {sessions} sessions, 0 damaged, {files} files open as at the start"


@click.command()
@click.option("--minutes", default=10.0, show_default=True)
@click.option("--size", default=8, show_default=True, help="MiB of a session, each way, at most.")
@click.option("--sessions", default=40, show_default=True, help="At once.")
@click.option("--loss", default=0, show_default=True, help="Per cent of packets dropped, in a namespace.")
def main(minutes: float, size: int, sessions: int, loss: int) -> None:
    """Soak the splicing."""

    def run() -> str:
        with losing(loss):
            return soak(minutes, size * MIB, sessions)

    try:
        click.echo(in_netns(run) if loss else run())
    except AssertionError as fault:
        click.echo(str(fault), err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
