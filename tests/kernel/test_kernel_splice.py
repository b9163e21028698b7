"""splice.c and sockmap: each rule that data loss has taught, on real sockets."""

from __future__ import annotations

import errno
import random
import select
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from harness.kernel_sockets import in_netns
from harness.loss import losing
from harness.raw_tcp import RawClient, silence_resets
from harness.waiting import wait_until

from tidegate.kernel import kernel_types, maps, tcp_info
from tidegate.kernel.loader import SPLICE, Objects, compile_programs
from tidegate.kernel.records import SpliceFlow
from tidegate.kernel.splicing import CannotSplice, KernelFlow, Splicing
from tidegate.session import splice_check
from tidegate.session.splice import Direction, LostError, Wait
from tidegate.session.splice_ends import SocketEnds

pytestmark = [pytest.mark.bpf, pytest.mark.feature("splice")]

CREDIT = 256 * 1024
MIB = 1 << 20


@pytest.fixture(scope="module")
def objects() -> Objects:
    return compile_programs((SPLICE,))


@pytest.fixture
def splicing(objects: Objects) -> Iterator[Splicing]:
    made = Splicing.create(objects)
    yield made
    made.close()


class Lane:
    """client - front | back - server, with both directions joined, none entered."""

    def __init__(self, stack: ExitStack, splicing: Splicing, host: str, limit: int) -> None:
        self.splicing = splicing
        self.client, self.front = self._pair(stack, host)
        self.back, self.server = self._pair(stack, host)
        self.front.setblocking(False)
        self.back.setblocking(False)
        self.up, self.down = splicing.join(self.front, self.back, limit)
        stack.callback(splicing.release, (self.up, self.down))

    @staticmethod
    def _pair(stack: ExitStack, host: str) -> tuple[socket.socket, socket.socket]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener:
            active = stack.enter_context(socket.create_connection(listener.getsockname()[:2], 5))
            passive = stack.enter_context(listener.accept()[0])
        passive.settimeout(5)
        return active, passive

    def direction(self, flow: KernelFlow) -> Direction:
        buffer = bytearray(65536)
        return Direction(flow, SocketEnds(buffer, memoryview(buffer), self.splicing, flow))


@contextmanager
def lane(splicing: Splicing, host: str = "127.0.0.1", limit: int = CREDIT) -> Iterator[Lane]:
    with ExitStack() as stack:
        yield Lane(stack, splicing, host, limit)


def receive(sock: socket.socket, count: int) -> bytes:
    found = bytearray()
    while len(found) < count and (data := sock.recv(count - len(found))):
        found += data
    return bytes(found)


def at_end(sock: socket.socket) -> bool:
    try:
        return sock.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_what_arrives_goes_to_the_other_socket_and_is_counted(splicing: Splicing, host: str) -> None:
    with lane(splicing, host) as it:
        splicing.enter(it.up)
        splicing.enter(it.down)
        before = time.monotonic_ns()
        it.client.sendall(b"question")
        assert receive(it.server, 8) == b"question"
        it.server.sendall(b"answer")
        assert receive(it.client, 6) == b"answer"
        assert (it.up.redirected, it.up.passed) == (8, 0)
        assert (it.down.redirected, it.down.passed) == (6, 0)
        assert before <= it.up.received_ns == it.up.redirected_ns <= time.monotonic_ns()
        wait_until(lambda: it.up.written() == 8 and it.up.in_flight() == 0, 5, "the acknowledgement")


def test_bytes_before_the_entry_are_moved_by_it_once(splicing: Splicing) -> None:
    with lane(splicing) as it:
        it.client.sendall(b"early")
        wait_until(lambda: tcp_info.progress(it.front).received == 5, 5, "the bytes")
        splicing.enter(it.up)
        it.client.sendall(b" bird")
        assert receive(it.server, 10) == b"early bird"
        assert it.up.redirected == 10


@pytest.mark.parametrize("size", [5, 30_000])
def test_bytes_that_were_read_in_part_are_moved_once(splicing: Splicing, size: int) -> None:
    data = random.Random(5).randbytes(size)
    with lane(splicing, limit=MIB) as it:
        it.client.sendall(data)
        wait_until(lambda: tcp_info.progress(it.front).received == size, 5, "the bytes")
        first = it.front.recv(size * 2 // 3)
        it.back.sendall(first)
        it.up.begin(len(first), len(first))
        splicing.enter(it.up)
        it.client.sendall(b" and more")
        assert receive(it.server, size + 9) == data + b" and more"
        assert it.up.passed == len(first)
        assert it.up.redirected == size - len(first) + 9
        assert it.up.repeated == len(first)  # all of it was one skb


def test_what_was_read_before_the_session_was_joined_is_not_moved(splicing: Splicing) -> None:
    with ExitStack() as stack:
        client, front = Lane._pair(stack, "127.0.0.1")
        back, server = Lane._pair(stack, "127.0.0.1")
        client.sendall(b"head: ours\n\nbody")
        wait_until(lambda: tcp_info.progress(front).received == 16, 5, "the bytes")
        assert front.recv(12) == b"head: ours\n\n"
        up, down = splicing.join(front, back, CREDIT)
        stack.callback(splicing.release, (up, down))
        splicing.enter(up)
        client.sendall(b" of it")
        assert receive(server, 10) == b"body of it"
        assert (up.redirected, up.repeated, up.broken) == (10, 12, False)


@pytest.mark.parametrize("when", ["before", "copied", "spliced"])
def test_an_urgent_byte_is_one_of_the_stream(splicing: Splicing, when: str) -> None:
    """recv() skips one, and FIONREAD counts no further than to it, unless told otherwise."""

    def urgent() -> None:
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b"defghi")
        wait_until(lambda: tcp_info.progress(front).received == 10, 5, "the bytes")

    with ExitStack() as stack:
        client, front = Lane._pair(stack, "127.0.0.1")
        back, server = Lane._pair(stack, "127.0.0.1")
        front.setblocking(False)
        back.setblocking(False)
        client.sendall(b"abc")
        if when == "before":
            urgent()
        flows = splicing.join(front, back, CREDIT)
        stack.callback(splicing.release, flows)
        buffer = bytearray(65536)
        direction = Direction(flows[0], SocketEnds(buffer, memoryview(buffer), splicing, flows[0]))
        if when == "copied":
            urgent()
            direction.step()
        direction.enter()
        if when == "spliced":
            urgent()
        client.sendall(b" and more")
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: bool(direction.step() & Wait.END), 5, "the end")
        assert receive(server, 19) == b"abc!defghi and more"
        assert direction.moved == 19


def repeating(client: RawClient) -> bytes:
    """Sends the stream in segments that repeat one another; what it is."""
    data = random.Random(6).randbytes(60_000)
    client.send(0, data[:1000])
    client.acknowledged(1000)
    client.send(500, data[500:1500])  # a segment sent again, with more behind it
    client.acknowledged(1500)
    client.send(0, data[:20_000])  # all of it, and more than one cut takes off
    client.acknowledged(20_000)
    client.send(30_000, data[30_000:40_000])  # out of order, and then what is missing and more than that
    client.send(10_000, data[10_000:35_000])
    client.acknowledged(40_000)
    client.send(39_999, data[39_999:], fin=True)
    return data


@pytest.mark.parametrize("limit", [MIB, 0])
def test_what_arrives_twice_is_moved_once(objects: Objects, limit: int) -> None:
    """TCP keeps a segment whole that repeats bytes which it took in already, in its receive queue."""

    def run() -> None:
        silence_resets()
        splicing = Splicing.create(objects)
        with ExitStack() as stack:
            stack.callback(splicing.close)
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            client = stack.enter_context(RawClient(listener.getsockname()[1]))
            front = stack.enter_context(listener.accept()[0])
            back, server = Lane._pair(stack, "127.0.0.1")
            front.setblocking(False)
            back.setblocking(False)
            flows = splicing.join(front, back, limit)
            stack.callback(splicing.release, flows)
            buffer = bytearray(65536)
            direction = Direction(flows[0], SocketEnds(buffer, memoryview(buffer), splicing, flows[0]))
            direction.enter()
            data = repeating(client)
            wait_until(lambda: bool(direction.step() & Wait.END), 10, "the end")
            assert receive(server, len(data)) == data
            assert flows[0].repeated == 500 + 1500 + 10_000 + 5_000 + 1
            assert direction.moved == len(data)
            assert (flows[0].redirected == 0) is (limit == 0)

    in_netns(run)


@pytest.mark.parametrize(("percent", "timestamps"), [(1, 1), (5, 0)])
def test_credit_is_whole_after_loss(objects: Objects, percent: int, timestamps: int) -> None:
    data = random.Random(8).randbytes(4 * MIB)

    def run() -> None:
        splicing = Splicing.create(objects)
        with lane(splicing, limit=MIB) as it, losing(percent):
            direction = it.direction(it.up)
            direction.enter()
            it.client.setblocking(False)
            it.server.setblocking(False)
            view, got = memoryview(data), bytearray()

            def all_of_it() -> bool:
                nonlocal view, got
                with suppress(BlockingIOError):
                    view = view[it.client.send(view) :]
                with suppress(BlockingIOError):
                    got += it.server.recv(MIB)
                direction.step()
                return len(got) == len(data)

            wait_until(all_of_it, 60, "the stream", 0.0)
            assert bytes(got) == data
            assert it.up.redirected > 0
            wait_until(lambda: it.up.in_flight() == 0, 10, "the last acknowledgement")
            assert it.up.written() == it.up.redirected + direction.consumed
        splicing.close()

    in_netns(run, {"net.ipv4.tcp_timestamps": str(timestamps)})


def test_the_bell_rings_when_something_is_passed_that_nobody_waits_for(splicing: Splicing) -> None:
    with lane(splicing, limit=0) as it:
        splicing.enter(it.up)
        it.client.sendall(b"one")
        wait_until(lambda: it.up.passed == 3, 5, "the verdict")
        it.client.sendall(b"two")
        wait_until(lambda: it.up.passed == 6, 5, "the verdict")
        assert select.select([splicing.bell], [], [], 5)[0]
        assert splicing.bell.take() == [it.up.index]
        assert not select.select([splicing.bell], [], [], 0)[0]
        it.up.consume(6)
        it.client.sendall(b"three")
        assert select.select([splicing.bell], [], [], 5)[0]
        assert splicing.bell.take() == [it.up.index]
        it.up.consume(11)
        it.up.set_limit(CREDIT)
        it.client.sendall(b"redirected")
        assert receive(it.server, 10) == b"redirected"
        assert splicing.bell.take() == []


def test_the_bell_holds_more_than_fits_into_it_at_once(splicing: Splicing) -> None:
    """It is a ring: its end and its beginning are passed often."""
    with lane(splicing, limit=0) as it:
        splicing.enter(it.up)
        rings = maps.SPLICE_BELL_SIZE // 16 + 100
        for number in range(1, rings + 1):
            it.client.send(b"x")
            deadline = time.monotonic() + 5
            while not (heard := splicing.bell.take()) and time.monotonic() < deadline:
                pass
            assert heard == [it.up.index]
            assert it.front.recv(10) == b"x"
            it.up.consume(number)


def test_bytes_that_are_missing_break_the_stream(splicing: Splicing) -> None:
    with lane(splicing) as it:
        direction = it.direction(it.up)
        direction.enter()
        it.up.begin(0, 0)
        it.up._words[it.up._at + SpliceFlow.begin.offset // 8] = -5 & (1 << 64) - 1
        it.client.sendall(b"five bytes were lost")
        assert select.select([splicing.bell], [], [], 5)[0]
        assert it.up.broken
        assert it.up.redirected == it.up.passed == 0
        with pytest.raises(LostError):
            direction.step()


def test_without_credit_it_passes_and_goes_on_when_all_is_consumed(splicing: Splicing) -> None:
    with lane(splicing, limit=0) as it:
        splicing.enter(it.up)
        it.client.sendall(b"passed")
        wait_until(lambda: it.up.passed == 6, 5, "the verdict")
        assert it.up.redirected == 0
        it.up.set_limit(CREDIT)
        it.client.sendall(b" too")  # order: what was passed comes first
        wait_until(lambda: it.up.passed == 10, 5, "the verdict")
        assert it.front.recv(100) == b"passed too"
        it.back.sendall(b"passed too")
        it.up.consume(10)
        it.client.sendall(b", not this")
        assert receive(it.server, 20) == b"passed too, not this"
        assert (it.up.redirected, it.up.passed) == (10, 10)


def test_a_budget_is_not_passed(splicing: Splicing) -> None:
    with lane(splicing) as it:
        it.up.set_budget(8)
        splicing.enter(it.up)
        it.client.sendall(b"in")
        assert receive(it.server, 2) == b"in"
        it.client.sendall(b"too much of it")
        wait_until(lambda: it.up.passed == 14, 5, "the verdict")
        assert it.up.redirected == 2


def test_a_target_that_does_not_read_holds_no_more_than_the_limit(splicing: Splicing) -> None:
    with lane(splicing) as it:
        splicing.enter(it.up)
        it.client.settimeout(0.5)
        with pytest.raises(TimeoutError):
            it.client.sendall(bytes(64 * MIB))
        assert 0 < it.up.in_flight() <= CREDIT
        assert it.up.held <= CREDIT
        assert it.up.passed > 0


def test_a_bare_fin_is_dropped_and_harms_neither_direction(splicing: Splicing) -> None:
    with lane(splicing) as it:
        splicing.enter(it.up)
        splicing.enter(it.down)
        it.client.sendall(b"last words")
        it.client.shutdown(socket.SHUT_WR)
        assert receive(it.server, 10) == b"last words"
        wait_until(lambda: at_end(it.front), 5, "the end")
        assert it.up.redirected == 10
        assert it.up.ended(10) and not it.up.ended(9)
        data = random.Random(1).randbytes(MIB)
        it.server.settimeout(5)
        sent = it.server.send(data[:100_000])
        assert receive(it.client, sent) == data[:sent]
        assert it.down.passed == 0


def test_the_end_is_reported_only_when_everything_is_in_the_target(splicing: Splicing) -> None:
    data = random.Random(2).randbytes(4 * MIB)
    with lane(splicing) as it:
        direction = it.direction(it.up)
        direction.enter()
        it.client.settimeout(0.05)
        sent = 0
        deadline = time.monotonic() + 0.5
        while sent < len(data) and time.monotonic() < deadline:
            try:
                sent += it.client.send(data[sent : sent + 65536])
            except TimeoutError:
                break
        it.client.shutdown(socket.SHUT_WR)
        ended_early = direction.step() & Wait.END
        assert not ended_early
        it.server.setblocking(False)
        got = bytearray()

        def end() -> bool:
            try:
                got.extend(it.server.recv(65536))
            except BlockingIOError:
                pass
            return bool(direction.step() & Wait.END)

        wait_until(end, 20, "the end")
        it.back.shutdown(socket.SHUT_WR)
        it.server.settimeout(5)
        while piece := it.server.recv(65536):
            got += piece
        assert bytes(got) == data[:sent]


def test_a_source_that_enters_under_fire_loses_nothing(splicing: Splicing) -> None:
    data = random.Random(3).randbytes(8 * MIB)
    with lane(splicing, limit=MIB) as it:
        direction = it.direction(it.up)
        view, got = memoryview(data), bytearray()
        for sock in (it.client, it.server):
            sock.setblocking(False)
        turns = 0
        deadline = time.monotonic() + 30
        while len(got) < len(data) and time.monotonic() < deadline:
            turns += 1
            with suppress(BlockingIOError):
                view = view[it.client.send(view[: 1 << 17]) :]
            with suppress(BlockingIOError):
                got += it.server.recv(1 << 17)
            if turns == 4:
                direction.enter()
            direction.step()
        assert bytes(got) == data
        assert direction.joined and it.up.redirected > 0


@pytest.mark.parametrize("end", ["receive", "send"])
def test_sockets_of_small_buffers_stay_with_userspace(splicing: Splicing, end: str) -> None:
    with lane(splicing) as it:
        if end == "receive":
            it.front.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 32 * 1024)
        else:
            it.back.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32 * 1024)
        direction = it.direction(it.up)
        direction.enter()
        assert not direction.joined
        it.client.sendall(b"copied")
        wait_until(lambda: tcp_info.progress(it.front).received == 6, 5, "the bytes")
        assert direction.step() is Wait.SOURCE
        assert receive(it.server, 6) == b"copied"
        assert (it.up.redirected, direction.read) == (0, 6)


def test_a_closing_socket_is_refused_and_nothing_is_left(splicing: Splicing) -> None:
    with lane(splicing) as it:
        it.client.shutdown(socket.SHUT_WR)
        wait_until(lambda: tcp_info.progress(it.front).state == tcp_info.TCP_CLOSE_WAIT, 5, "the FIN")
        with pytest.raises(OSError) as refused:
            splicing.enter(it.up)
        assert refused.value.errno == errno.EOPNOTSUPP
    assert splicing.cookies() == set()
    with ExitStack() as stack:
        client, front = Lane._pair(stack, "127.0.0.1")
        back, _server = Lane._pair(stack, "127.0.0.1")
        free = splicing.free
        client.shutdown(socket.SHUT_WR)
        wait_until(lambda: tcp_info.progress(front).state == tcp_info.TCP_CLOSE_WAIT, 5, "the FIN")
        with pytest.raises(CannotSplice):
            splicing.join(front, back, CREDIT)
        assert splicing.free == free
        assert splicing.cookies() == set()


def test_a_reset_harms_only_its_own_session(splicing: Splicing) -> None:
    with lane(splicing) as it, lane(splicing) as other:
        for one in (it, other):
            splicing.enter(one.up)
            splicing.enter(one.down)
        it.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        it.server.close()
        wait_until(lambda: tcp_info.progress(it.back).state == tcp_info.TCP_CLOSE, 5, "the reset")
        it.client.sendall(b"to nobody")
        wait_until(lambda: it.up.passed + it.up.redirected == 9, 5, "the verdict")
        other.client.sendall(b"question")
        assert receive(other.server, 8) == b"question"
        other.server.sendall(b"answer")
        assert receive(other.client, 6) == b"answer"
        assert (other.up.redirected, other.down.redirected) == (8, 6)


def test_a_reset_that_a_writer_was_told_of_is_an_end_to_the_reader(splicing: Splicing) -> None:
    """A socket's error is told once. Then recv() says that it has ended, and no FIN ever came."""
    with lane(splicing) as it:
        direction = it.direction(it.down)
        direction.enter()
        it.server.sendall(b"last words")
        assert receive(it.client, 10) == b"last words"
        it.server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        it.server.close()
        wait_until(lambda: tcp_info.progress(it.back).state == tcp_info.TCP_CLOSE, 5, "the reset")
        with pytest.raises(ConnectionError):
            it.back.send(b"to nobody")
        wait_until(lambda: bool(direction.step() & Wait.END), 5, "the end")
        assert direction.moved == 10


@pytest.mark.parametrize("first", ["client", "front"])
def test_passed_bytes_outlive_the_end_of_both_directions(splicing: Splicing, first: str) -> None:
    """The kernel once took a socket out of its maps when TCP was through with it, read or not."""
    data = random.Random(4).randbytes(50_000)
    with lane(splicing, limit=0) as it:
        splicing.enter(it.up)
        it.client.sendall(data)
        wait_until(lambda: it.up.passed == len(data), 5, "the bytes")
        for sock in (it.client, it.front) if first == "client" else (it.front, it.client):
            sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: tcp_info.progress(it.front).state == tcp_info.TCP_CLOSE, 5, "the end")
        time.sleep(0.05)  # what the kernel defers
        it.front.setblocking(True)
        assert receive(it.front, len(data)) == data
        assert it.front.recv(1) == b""


def test_strays_are_found_and_forgotten(splicing: Splicing) -> None:
    with lane(splicing) as it:
        assert splicing.cookies() == {it.up.cookie, it.down.cookie}
        assert splicing.forget(splicing.cookies()) == 2
        assert splicing.cookies() == set()


def test_the_start_up_check_passes_here_and_a_broken_kernel_fails_it(objects: Objects) -> None:
    assert splice_check.run(objects) == ""
    # a program that does not know what the target acknowledged: its credit never comes back
    broken = compile_programs((SPLICE,), ("TCP_BYTES_ACKED=0",))
    assert "start-up test failed" in splice_check.run(broken)


def test_offsets_are_those_of_the_running_kernel(tmp_path: Path) -> None:
    offset = kernel_types.member_offset("tcp_sock", "bytes_acked")
    assert offset and offset % 8 == 0
    assert kernel_types.member_offset("tcp_sock", "no_such_member") is None
    assert kernel_types.member_offset("no_such_struct", "bytes_acked") is None
    assert kernel_types.member_offset("tcp_sock", "bytes_acked", tmp_path / "none") is None
