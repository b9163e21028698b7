"""sock_diag's parser against bytes recorded from a kernel (6.18, x86_64), and against anything at all."""

from __future__ import annotations

import base64
import os
import socket
import struct
import zlib
from contextlib import ExitStack, closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.kernel import sock_diag
from tidegate.kernel.sock_diag import Queues, is_last, parse_listeners, parse_queued

# zlib and base85 of the answers. Three clients wait, 300 ms old: the first said nothing, the second sent
# 100 bytes and FIN, the third FIN alone. The clients' own ends are among the answers, too.
V4_PORT, V4_PEERS = 42981, [39118, 39134, 39140]
V4_LISTENER = b"c-pIBU|<koU}9hd(heaE3`|@M49lM~Fw`@Eh46weeh4-*5VJ$syHB$)urhFf*&Gb~V48<P6mB3JgBU{)kOlzuKnBV"
V4_WAITING = (
    b"c-qaAu}T9$5QhKRyO>iF#GoQ1kD!nuSl<&|Ay)R5cJ>jU;vjYw0c%U&;2>=}8x8mZ8oPCNZ{sb;Zn8!L{>L)2GdnZOeq2t#J_L"
    b"V2dJc#L7|-(OA;6hR^}W)2R{58;Tmy+NNU*E-EgXC|*uo*s*!D<pp4EJyv>hS6WB&#?5^(C6Dyx>1K*1~Km@1J{4tG$-B2%M$t"
    b"?P^1)AEc~{oblRHomfiFj4TS(2k{YH<#BCE+3iyew*OZr^@y%F2c-T%H{1bzH)FO%SIL>{5LM7xlBU1%rk%AM)~3^xsb(0YYi?"
    b"Pj%}~t@-mwDS`IF@7Gpab;8IBZnoB+z&qBC-dbm6l@!DL}U>}zORd!&wOnG%V*7k6jn)f)lAMGU;7jiIJ#JYdXrDXE6|K$q}0)"
    b"ng"
)
V6_PORT, V6_PEERS = 43365, [58102, 58112, 58118]
V6_LISTENER = b"c-m`WU|<koU}9hd(heaE3|w3c3@cL^&;cU@7Vy&#!Da?xb|`!QX%+@n1`aTrm4O?qnS+5J%;#Ycg&W4kAjTjBqyffC1-A"
V6_WAITING = (
    b"c-ou6$iN`NzyyR03=Sa-3|v6|%G5{S7*GKtHvTU^2AqJEfdfo)Fz|zE9tKgkA#4m{3_?I!hLH&(#=eU2febT5vVnm?f(g5s7K{"
    b"iQ!e(UH@gJxi$O7s9|NnnI7mx;tK}`d*K|r+Wm8v{M4H#fEA7(8(1Mz^7NL4%jGmr#kV2PJU-&Up)6EDAU#LI!xEM&*aoqE#Z<"
    b"p|Kf+~9P8JzkDL!{fN^o-@Ko@xq8DPGDl(RE`%&oG?-rFC3u!@|ca7c=_XpTLCCu7>S4%4y1T-m_uHEVTRg|FTd=5adxc-mi)q"
    b"qM8otj(;&Z4DP9<eiI=}f@sc`3<0Ta-zpx<13*!LC3jq62c>D"
)


def recorded(data: bytes) -> memoryview:
    return memoryview(zlib.decompress(base64.b85decode(data)))


def message(
    *, state: int, inode: int = 0, port: int = 80, rqueue: int = 0, attributes: bytes = b"", kind: int = 20
) -> bytes:
    body = struct.pack(
        "=BBBB2s2s16s16sIQIIIII",
        socket.AF_INET,
        state,
        0,
        0,
        struct.pack(">H", port),
        struct.pack(">H", 4000),
        socket.inet_aton("127.0.0.1") + bytes(12),
        socket.inet_aton("127.0.0.2") + bytes(12),
        0,
        99,
        0,
        rqueue,
        0,
        0,
        inode,
    )
    body += attributes
    return struct.pack("=IHHII", 16 + len(body), kind, 2, 1, 0) + body + bytes(-len(body) % 4)


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


@pytest.mark.parametrize(
    ("data", "family", "host", "port"),
    [
        (V4_LISTENER, socket.AF_INET, "127.0.0.1", V4_PORT),
        (V6_LISTENER, socket.AF_INET6, "::1", V6_PORT),
    ],
)
def test_recorded_listener(data: bytes, family: int, host: str, port: int) -> None:
    (found,) = parse_listeners(recorded(data))
    assert (found.family, found.host, found.port) == (family, host, port)
    assert (found.waiting, found.backlog) == (3, 7)
    assert found.inode > 0
    assert found.cgroup_id > 0


@pytest.mark.parametrize(
    ("data", "host", "port", "peers"),
    [
        (V4_WAITING, "127.0.0.1", V4_PORT, V4_PEERS),
        (V6_WAITING, "::1", V6_PORT, V6_PEERS),
    ],
)
def test_recorded_waiting(data: bytes, host: str, port: int, peers: list[int]) -> None:
    found = Queues()
    parse_queued(recorded(data), 5, found)
    waiting = {entry.peer_port: entry for entry in found.waiting}
    assert sorted(waiting) == sorted(peers)
    assert {(entry.host, entry.port, entry.peer_host) for entry in waiting.values()} == {(host, port, host)}
    silent, sent, left = (waiting[peer] for peer in peers)
    assert (silent.half_closed, silent.received, silent.left) == (False, 0, False)
    assert (sent.half_closed, sent.received, sent.left) == (True, 100, False)
    assert (left.half_closed, left.received, left.left) == (True, 0, True)
    for entry in waiting.values():
        assert entry.info_age_ns is not None
        assert 290_000_000 <= entry.info_age_ns <= 330_000_000
    assert found.half_open == []


def test_storages_of_several_maps() -> None:
    one = attribute(2, struct.pack("=I", 17)) + attribute(1, b"") + attribute(3, b"stamp-17")
    two = attribute(2, struct.pack("=I", 40)) + attribute(3, b"stamp-40")
    nested = attribute(20 | 0x8000, attribute(1 | 0x8000, one) + attribute(1 | 0x8000, two))
    found = Queues()
    parse_queued(memoryview(message(state=1, attributes=nested)), 0, found)
    assert found.waiting[0].storages == {17: b"stamp-17", 40: b"stamp-40"}


def test_accepted_sockets_are_left_out_and_handshakes_counted_apart() -> None:
    data = message(state=1, inode=5) + message(state=3, port=81) + message(state=8, rqueue=1)
    found = Queues()
    parse_queued(memoryview(data), 0, found)
    assert [(entry.port, entry.left) for entry in found.waiting] == [(80, True)]
    assert [entry.port for entry in found.half_open] == [81]


def test_request_carries_the_map_fds() -> None:
    request = sock_diag.build_request(socket.AF_INET, 1 << 1, tcp_info=True, storage_maps=[9])
    assert request[:8] == struct.pack("=BBBxI", socket.AF_INET, 6, 1 << 1, 1 << 1)
    assert len(request) == 56 + 12
    assert request[56:] == struct.pack("=HHHHI", 12, 2 | 0x8000, 8, 1, 9)


def test_refused_dump_raises_its_errno() -> None:
    refused = struct.pack("=IHHIIi", 20, 2, 0, 1, 0, -1)
    with pytest.raises(PermissionError):
        is_last(memoryview(refused))
    assert is_last(memoryview(struct.pack("=IHHIIi", 20, 3, 2, 1, 0, 0)))


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_garbage_is_survived(data: bytes) -> None:
    found = Queues()
    parse_queued(memoryview(data), 0, found)
    list(parse_listeners(memoryview(data)))


@settings(deadline=None)
@given(st.data())
def test_torn_and_bent_answers_are_survived(data: st.DataObject) -> None:
    whole = bytearray(recorded(data.draw(st.sampled_from([V4_LISTENER, V4_WAITING, V6_WAITING]))))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    view = memoryview(whole)[: data.draw(st.integers(0, len(whole)))]
    found = Queues()
    parse_queued(view, 0, found)
    assert len(found.waiting) <= len(view) // 88
    list(parse_listeners(view))


def test_a_dump_that_was_broken_off_hinders_no_other() -> None:
    """Ctrl-C in the middle of one; the kernel has 32 KiB at a time for us, so there must be many sockets."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(400)]
        ports = {one.getsockname()[1] for one in listeners}
        with sock_diag.SockDiag() as diag:
            for _ in range(3):
                dump = diag._dump(sock_diag.build_request(socket.AF_INET, 1 << sock_diag.TCP_LISTEN))
                next(dump)
                dump.close()  # as an exception does that comes from elsewhere
                assert ports <= {one.port for one in diag.listeners()}
            diag.queues()


@pytest.mark.parametrize("sent", [False, True])
def test_an_interrupt_at_the_question_hinders_no_other(sent: bool) -> None:
    """Within send(), where the kernel makes the first part of the answer, or just before it."""

    class Interrupted(socket.socket):
        def send(self, data: bytes, flags: int = 0) -> int:  # type: ignore[override]
            if sent:
                super().send(data, flags)
            raise KeyboardInterrupt

    with closing(sock_diag.open_socket()) as sock, sock_diag.SockDiag() as diag:
        real, diag._sock = diag._sock, Interrupted(fileno=os.dup(sock.fileno()))
        with pytest.raises(KeyboardInterrupt):
            diag.listeners()
        diag._sock.close()
        diag._sock = sock
        diag.listeners()
        diag._sock = real


def test_a_refused_dump_hinders_no_other() -> None:
    with sock_diag.SockDiag() as diag:
        for _ in range(2):
            with pytest.raises(OSError):
                list(diag._dump(b"too short"))
        diag.listeners()
