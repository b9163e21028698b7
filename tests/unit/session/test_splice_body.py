"""Bodies that the kernel moves to their end, heads between that are read: against a model of a kernel."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from harness.splice_model import LARGEST, PATIENCE, SEND_BUFFER, Broken, Ends, Port, Sock, World, stream
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.session.splice import LATER, Wait
from tidegate.session.splice_body import BodySource, ShortError

EVENT = st.integers(0, 16 * LARGEST - 1)
MESSAGE = st.tuples(st.integers(1, 40), st.integers(0, 400), st.booleans())
MESSAGES = st.lists(MESSAGE, min_size=1, max_size=6)
Messages = list[tuple[int, int, bool]]


class Connection(World):
    """A source that sends messages: of each the head is read, the body spliced to one of two targets."""

    source_type: type[BodySource] = BodySource

    def __init__(
        self,
        script: Iterable[int],
        messages: Messages,
        limit: int,
        buffer: int,
        pipelined: bool = True,
        cut: int = 0,
    ) -> None:
        """`messages`: (bytes of the head, of the body, which target). `cut`: so many bytes never come.

        Not `pipelined`: each is sent when the one before is through.
        """
        total = sum(head + body for head, body, _ in messages) - cut
        self._script = iter(script)
        self.buffer = buffer
        self.limit = limit
        self.messages = messages
        self._busy = False
        self.over = False
        self.pipelined = pipelined
        self.allowed = total if pipelined else 0
        source = Sock(stream(3, total))
        self.targets = (Sock(b""), Sock(b""))
        self.socks = (source, self.targets[0])
        port = self.port_type(self, source, self.targets[0], limit)
        self.ports = (port, port)
        self.ends = Ends(self, port)
        self.body = self.source_type(port, self.ends)
        self.heads: list[bytes] = []

    # the second of the pair sends nothing; both targets drain
    def everything(self) -> None:
        self._arrive(0, LARGEST)
        self._fin(0)
        for target in self.targets:
            self.socks = (self.socks[0], target)
            self._work(1, 1000)
            self._ack(1, 1000)

    def _arrive(self, which: int, size: int) -> None:
        if which == 0:
            super()._arrive(0, min(size, self.allowed - self.socks[0].arrived))

    def run(self) -> bool:
        """Raises Broken when a byte is lost, doubled, out of order or somebody else's, or nothing moves.

        False: the kernel would not have the source, which was closing.
        """
        sent = 0
        for head, size, which in self.messages:
            sent += head + size
            self.allowed = max(self.allowed, sent)
            self.heads.append(self._read_head(head))
            if size:
                self.ports[0].aim(self.targets[which], self.body.read)
                self.socks = (self.socks[0], self.targets[which])
                if not self.body.start(size):
                    return False
                self._move()
                if not self.pipelined and not self.body.leave():
                    assert self.socks[0].fin_in  # else nothing can have come
        self._compare()
        return True

    def _compare(self) -> None:
        at, sends = 0, self.socks[0].peer_sends
        wanted = [b"", b""]
        for (head, size, which), read in zip(self.messages, self.heads, strict=True):
            if read != sends[at : at + head]:
                raise Broken("a head was not what was sent")
            wanted[which] += sends[at + head : at + head + size]
            at += head + size
        if [bytes(target.out) for target in self.targets] != wanted:
            raise Broken("lost, doubled or out of order")

    def _idle(self, turns: int) -> int:
        self.something()
        if self.over:
            self._busy = True
            self.everything()
            self._busy = False
            turns += 1
            if turns > PATIENCE:
                raise Broken("stalled")
        return turns

    def _read_head(self, size: int) -> bytes:
        found, turns = b"", 0
        while len(found) < size:
            turns = self._idle(turns)
            try:
                piece = bytes(self.ends.read(size - len(found)))
            except BlockingIOError:
                continue
            if not piece:
                raise ShortError
            found += piece
            self.body.skip(len(piece))
        return found

    def _move(self) -> None:
        wait, turns, port = self.body.step(), 0, self.ports[0]
        while wait is not Wait.END:
            turns = self._idle(turns)
            if wait is Wait.BELL and not port.rung and not port.source.fin_in:
                continue
            port.rung = False
            wait = self.body.step()


@given(
    st.lists(EVENT, max_size=600),
    MESSAGES,
    st.sampled_from([30, 100, 400]),
    st.sampled_from([1, 37, 64]),
    st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_each_byte_is_its_own_messages(
    script: list[int], messages: Messages, limit: int, buffer: int, pipelined: bool
) -> None:
    Connection(script, messages, limit, buffer, pipelined).run()


@given(st.lists(EVENT, max_size=300), MESSAGES, st.integers(1, 30))
@settings(max_examples=300, deadline=None)
def test_a_source_that_ends_early_is_found_out(script: list[int], messages: Messages, cut: int) -> None:
    cut = min(cut, sum(head + body for head, body, _ in messages))
    try:
        assert not Connection(script, messages, 100, 64, cut=cut).run()
    except ShortError:
        pass


# -- faults that it must find ----------------------------------------------------------------------


class ReadsPastTheEnd(BodySource):
    __slots__ = ()

    def start(self, size: int) -> bool:
        return super().start(size + 1)


class EndsBeforeTheBacklogIsEmpty(BodySource):
    __slots__ = ()

    def _drained(self) -> bool:
        return True


class ForgetsWhatWasReadMeanwhile(BodySource):
    __slots__ = ()

    def skip(self, count: int) -> None:
        super().skip(count - (count > 3))


class NoBudget(Port):
    def may_redirect(self, size: int) -> bool:
        return self._passed == self.published and self.held() + size <= self.limit


class SilentAtTheEnd(Port):
    def used_up(self) -> None:
        pass


FAULTS = (
    ReadsPastTheEnd,
    EndsBeforeTheBacklogIsEmpty,
    ForgetsWhatWasReadMeanwhile,
    NoBudget,
    SilentAtTheEnd,
)


def fails(world: type[Connection]) -> bool:
    draw = random.Random(5)
    for _ in range(300):
        count = draw.randint(1, 6)
        messages = [(draw.randint(1, 40), draw.randint(0, 400), draw.random() < 0.5) for _ in range(count)]
        script = [draw.randrange(16 * LARGEST) for _ in range(draw.randrange(600))]
        limit, buffer = draw.choice([30, 100, 400]), draw.choice([1, 37, 64])
        try:
            world(script, messages, limit, buffer, draw.random() < 0.5).run()
        except (Broken, ShortError):
            return True
    return False


def test_without_a_fault_nothing_fails() -> None:
    assert not fails(Connection)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_seeded_fault_is_found(fault: type[BodySource] | type[Port]) -> None:
    class Faulty(Connection):
        pass

    if issubclass(fault, Port):
        Faulty.port_type = fault
    else:
        Faulty.source_type = fault
    assert fails(Faulty)


def stopped_in_the_middle(passed: int) -> tuple[Connection, BodySource]:
    """A body of 100 of which `passed` bytes were passed, at a target that takes nothing more."""
    connection = Connection([], [(1, 100, False)], 0, 64, pipelined=False)
    connection._busy = True  # nothing happens by itself
    body, source = connection.body, connection.socks[0]
    connection.targets[0].out += bytes(SEND_BUFFER)
    connection.ports[0].aim(connection.targets[0], 0)
    assert body.start(100)
    connection.allowed = passed
    connection._arrive(0, passed)
    assert len(source.passed) == passed
    return connection, body


def test_what_was_read_and_not_written_is_the_callers_once_it_takes_it() -> None:
    connection, body = stopped_in_the_middle(30)
    assert body.step() is Wait.TARGET
    body.stop()
    assert body.settled and not body.drained
    assert body.take() == connection.socks[0].peer_sends[:30]
    assert body.drained
    assert (body.take(), body.read, body.consumed, body.moved) == (b"", 30, 30, 30)


@pytest.mark.parametrize("when", ["before", "meanwhile", "never"])
def test_a_source_with_more_to_read_cannot_leave(when: str) -> None:
    connection, body = stopped_in_the_middle(30)
    source = connection.socks[0]
    connection.targets[0].acked = len(connection.targets[0].out)
    body.until = 30
    assert body.step() is Wait.END
    if when == "before":
        connection.allowed = 40
        connection._arrive(0, 10)
    elif when == "meanwhile":
        source.arrived += 10  # in the map no more, and not in the queue yet
    assert body.leave() is (when == "never")
    assert source.mapped is (when == "before")


def test_a_source_that_the_kernel_would_not_have_is_offered_again_much_later() -> None:
    class Unwilling(Ends):
        def enter(self) -> bool:
            return False

    connection = Connection([], [(1, 10, False)], 100, 64)
    body = BodySource(connection.ports[0], Unwilling(connection, connection.ports[0]))
    assert body.welcome
    assert not body.start(10)
    assert connection.ports[0].budget == 0
    body.skip(LATER - 1)
    assert not body.welcome
    body.skip(1)
    assert body.welcome
