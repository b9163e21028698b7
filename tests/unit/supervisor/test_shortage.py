"""The supervisor when something runs out: slots, processes."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from harness.ports import free_port

from tidegate import config
from tidegate.errors import OperatorError
from tidegate.kernel.records import MAX_SLOTS, SlotState
from tidegate.kernel.slots import Slots
from tidegate.loop.reactor import Reactor
from tidegate.supervisor import workers
from tidegate.supervisor.groups import ListenerGroups

CONFIG = (
    f'[[listener]]\naddress = "127.0.0.1:{free_port("127.0.0.1")}"\nprotocol = "tcp"\ncluster = "app"\n'
    '[cluster.app]\nbackends = ["127.0.0.1:9"]\n'
)


def test_listeners_that_find_no_slot_give_back_what_they_took() -> None:
    fd = os.memfd_create("slots")
    os.ftruncate(fd, MAX_SLOTS * 128)
    slots = Slots(fd)
    free = set(range(7))
    for slot in set(range(MAX_SLOTS)) - free:
        slots.set_state(slot, SlotState.ACTIVE)
    parsed = config.parse(CONFIG)
    files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OperatorError, match="pairs of listener and worker"):
        ListenerGroups(None, slots, 8).open(parsed.listeners, parsed, {})
    assert {slot for slot in range(MAX_SLOTS) if slots.state(slot) is SlotState.FREE} == free
    assert len(os.listdir("/proc/self/fd")) == files
    (group,) = ListenerGroups(None, slots, 7).open(parsed.listeners, parsed, {})
    assert set(group.slots) == free
    group.close()
    os.close(fd)


def test_a_worker_that_cannot_be_forked_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fork(body: Callable[[], None]) -> int:
        tries.append(body)
        if len(tries) < 3:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        pid = os.fork()
        if not pid:
            os._exit(0)
        return pid

    monkeypatch.setattr(workers, "fork", fork)
    reactor = Reactor()
    files = len(os.listdir("/proc/self/fd"))
    ended = []
    one = workers.Workers(
        reactor,
        1,
        lambda process, channel: None,
        lambda process, message, fds: None,
        lambda process, cause: ended.append(cause),
        lambda: None,
    )
    one.start_all()
    assert not one.running
    assert len(os.listdir("/proc/self/fd")) == files
    for _ in range(100):
        reactor.run_once(20_000_000)
        if one.all[0].running:
            break
    assert len(tries) == 3
    one.stopping = True
    while not ended:
        reactor.run_once(20_000_000)
    reactor.close()
