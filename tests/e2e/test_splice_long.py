"""The long forms of splicing's end-to-end tests: thousands of sessions and gigabytes. By name, or -m soak."""

from __future__ import annotations

import time

import pytest
from harness.backends import Backend
from harness.kernel_sockets import in_netns
from harness.loss import losing
from harness.proc import Tidegate, tcp_config
from harness.splicing import MIB, address, flows, spliced, spliced_maps
from harness.streams import Exchange, Stream, assert_intact, mixed
from harness.waiting import wait_until

pytestmark = [
    pytest.mark.bpf,
    pytest.mark.feature("splice"),
    pytest.mark.soak,
    pytest.mark.timeout(1800),
]

GIB = 1024 * MIB
# too small for the kernel to be asked: then it is copied
SMALL = {"net.ipv4.tcp_rmem": "4096 16384 262144", "net.ipv4.tcp_wmem": "4096 16384 262144"}


def ends(count: int, size: int, rest_ms: int, seed: int) -> list[Stream]:
    """Sessions that end every way: the client first, the backend first, both at once, one long after."""
    return [
        Stream(
            f"e{seed}-{n}",
            up=(n * 37_123) % size,
            down=(n * 91_331) % size if n % 4 else (n * 37_123) % size,
            seed=1000 * seed + 2 * n,
            fin_first=("client", "backend")[n % 2],
            rest_ms=rest_ms if n % 8 == 0 else 0,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize("timestamps", [1, 0])
@pytest.mark.parametrize("percent", [0, 1, 5])
def test_a_thousand_two_way_sessions(percent: int, timestamps: int) -> None:
    size = 700_000 if percent < 5 else 200_000

    def run() -> None:
        with Backend("exchange") as backend, spliced(backend) as gate, losing(percent):
            for batch in range(20):
                done = Exchange(address(gate), ends(50, size, 3000, batch)).run(300)
                assert_intact(done, backend, patience_s=60)

    in_netns(run, {"net.ipv4.tcp_timestamps": str(timestamps)})


@pytest.mark.parametrize("buffers", ["default", "small"])
@pytest.mark.parametrize("sessions", [1, 200])
@pytest.mark.parametrize("ways", ["up", "down", "both"])
def test_a_gigabyte(ways: str, sessions: int, buffers: str) -> None:
    each = GIB // sessions

    def run() -> None:
        # a client that only reads sends its FIN at once, and may be too late for the kernel to take it
        surely = buffers == "default" and ways != "down"
        with Backend("exchange") as backend, spliced(backend, surely=surely) as gate:
            orders = [
                Stream(
                    f"g{n}",
                    up=each if ways != "down" else 0,
                    down=each if ways != "up" else 0,
                    seed=2 * n,
                    fin_first=("client", "backend")[n % 2],
                )
                for n in range(sessions)
            ]
            assert_intact(Exchange(address(gate), orders).run(600), backend, patience_s=60)

    in_netns(run, SMALL if buffers == "small" else {})


@pytest.mark.parametrize("buffers", ["default", "small"])
def test_every_bad_habit(buffers: str) -> None:
    """Slow readers and writers, half-closes either way, resets, and pauses of five seconds."""

    def run() -> None:
        surely = buffers == "default"
        with Backend("exchange") as backend, spliced(backend, surely=surely, splice_after="64KiB") as gate:
            for seed in range(5):
                orders = mixed(40, 8 * MIB, seed=seed)
                for order in orders[::10]:
                    order.read_pause_ms, order.pause_every = 5000, 3 * MIB
                for order in orders[1::10]:
                    order.backend_read_pause_ms, order.pause_every = 5000, 3 * MIB
                assert_intact(Exchange(address(gate), orders).run(600), backend, patience_s=60)

    in_netns(run, SMALL if buffers == "small" else {})


def test_a_hundred_backends_that_never_read_stay_under_the_total() -> None:
    total, strangers = 32 * MIB, spliced_maps()
    config = {"splice_limit": "1MiB", "splice_total": f"{total // MIB}MiB", "drain_timeout": "1s"}
    with (
        Backend("never_reads") as backend,
        Tidegate(tcp_config([backend.address], splice="on", splice_after="0", top=config)) as gate,
    ):
        Exchange(address(gate), [Stream(f"n{n}", up=64 * MIB, down=0) for n in range(100)]).start()
        wait_until(lambda: gate.listener()["sessions"] == 100, 20, "every session")
        moved, still = -1, 0
        while still < 20:
            time.sleep(0.1)
            now = gate.listener()["bytes_in"]
            still = still + 1 if now == moved else 0
            moved = now
            assert sum(one["held"] for one in flows(strangers)) <= total
        assert gate.listener()["spliced"] > 0
