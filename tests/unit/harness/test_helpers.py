"""Small parts of the harness: configuration text, log lines, waiting, processes."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import time
import tomllib
from pathlib import Path

import pytest
from harness import toml
from harness.kernel_objects import _SYS_BPF, _libc, exists, held_by
from harness.ports import free_port, listening
from harness.proc import _fields, tcp_config
from harness.processes import Child, alive, cpu_seconds, session_pids, stat, stopped
from harness.waiting import DeadlineError, wait_until


def test_toml_reads_back_as_it_was_given() -> None:
    config = {
        "workers": 2,
        "log": {"level": "info", "format": "text"},
        "listener": [
            {"name": "a b", "address": "[::1]:80", "answers": {"503": "/x"}, "trusted": [], "on": True},
            {"name": 'quote " and \\', "limits": {"burst": 0}},
        ],
        "cluster": {"back end": {"backends": ["127.0.0.1:1", {"address": "unix:/a", "weight": 2}]}},
    }
    assert tomllib.loads(toml.dumps(config)) == config
    config = tcp_config(["127.0.0.1:9"], stale_after="500ms")
    assert tomllib.loads(toml.dumps(config)) == config


def test_log_fields() -> None:
    line = '2026-11-23T22:13:00.123Z level=info event=ready workers=2 note="two \\" words" last=x'
    fields = _fields(line)
    assert fields["event"] == "ready"
    assert fields["workers"] == "2"
    assert fields["last"] == "x"
    assert fields["note"].endswith("words")


def test_wait_until_has_a_deadline_and_says_what_it_waited_for() -> None:
    assert wait_until(lambda: 3, 1, "three") == 3
    with pytest.raises(DeadlineError, match="for the impossible"):
        wait_until(lambda: False, 0.05, "the impossible")


def test_free_ports_lie_below_the_ephemeral_range_and_are_seen_listening() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    port = free_port()
    assert port < low
    assert not listening(port)
    with socket.create_server(("127.0.0.1", port)):
        assert listening(port)


def test_children_die_with_all_of_their_session(tmp_path: Path) -> None:
    child = Child(["sh", "-c", "sleep 1000 & sleep 1000 & wait"], tmp_path / "log")
    wait_until(lambda: len(session_pids(child.pid)) == 3, 5, "three processes")
    child.kill()
    assert not alive(child.pid)
    assert session_pids(child.pid) == []


def test_stopped_holds_a_process(tmp_path: Path) -> None:
    child = Child(["sh", "-c", "while :; do :; done"], tmp_path / "log")
    try:
        wait_until(lambda: cpu_seconds([child.pid]) > 0, 5, "some work")
        with stopped(child.pid) as span:
            before = cpu_seconds([child.pid])
            time.sleep(0.1)
            assert cpu_seconds([child.pid]) == before
            seen = stat(child.pid)
            assert seen is not None
            assert seen.state == "T"
        assert span.signalled_ns <= span.since_ns < span.until_ns
        wait_until(lambda: cpu_seconds([child.pid]) > before, 5, "work again")
    finally:
        child.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="opening BPF objects by id needs root")
def test_bpf_objects_are_found_and_missed() -> None:
    assert not exists("prog", 2**31 - 1)
    assert not exists("link", 2**31 - 1)
    assert not held_by([os.getpid()])
    # BPF_MAP_CREATE of an array: type 2, keys and values of 4 bytes, 1 entry
    attributes = ctypes.create_string_buffer(struct.pack("IIII", 2, 4, 4, 1), 128)
    fd = _libc.syscall(_SYS_BPF, 0, attributes, ctypes.c_uint(128))
    assert fd >= 0, os.strerror(ctypes.get_errno())
    held = held_by([os.getpid()])
    assert len(held.ids["map"]) == 1
    assert str(held.remaining()) == str(held)
    os.close(fd)
    wait_until(lambda: not held.remaining(), 2, "the map to go")
