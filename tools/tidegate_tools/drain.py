"""`tidegate drain`: let a worker, or everything, finish and stop."""

from __future__ import annotations

import contextlib
import os
import select

import click

from tidegate_tools import client


@click.command(
    epilog="""\b
Examples:
  tidegate drain --worker 1   its sessions finish, then it is replaced
  tidegate drain              all of it finishes and ends, as with SIGTERM
  tidegate drain --wait       the same, and return at the end
"""
)
@client.control_option
@client.json_option
@click.option("--worker", type=click.IntRange(0), help="Only this worker (its index in `tidegate workers`).")
@click.option("--wait", is_flag=True, help="Return only when it has ended.")
@click.option("--timeout", type=click.FloatRange(1), default=10.0, show_default=True, metavar="SECONDS",
              help="How long to wait for the answer; draining goes on after it.")  # fmt: skip
def command(control: str | None, as_json: bool, worker: int | None, wait: bool, timeout: float) -> None:
    """Let a worker, or all of tidegate, finish its sessions and stop.

    No new connection is given to it; what it has may finish within the configured drain_timeout.
    Asked again while all of it drains, it changes nothing and says how long remains.
    """
    args = {} if worker is None else {"worker": worker}
    with contextlib.ExitStack() as stack:
        # taken before it drains: afterwards its pid may be another's
        ending = _open(control, worker, timeout) if wait else None
        if ending is not None:
            stack.callback(os.close, ending)
        answer = client.call(control, "drain", args, timeout)
        client.show_answer(answer, as_json, "draining" if worker is None else f"worker {worker} is draining")
        if ending is not None:
            poll = select.poll()
            poll.register(ending, select.POLLIN)
            poll.poll()  # for as long as drain_timeout lets it


def _open(control: str | None, worker: int | None, timeout: float) -> int | None:
    """A pidfd of what is to end; None: there is no such worker, or it has ended."""
    status = client.call(control, "status", {}, timeout)
    if worker is None:
        pid = status["pid"]
    else:
        pid = next((each["pid"] for each in status["workers"] if each["index"] == worker), 0)
    try:
        return os.pidfd_open(pid) if pid else None
    except ProcessLookupError:
        return None
