"""Rows in shared memory: allocation, retirement, other processes."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tidegate.metrics import names
from tidegate.metrics import segment as segment_module
from tidegate.metrics.names import LISTENER, WORKER, Kind, Scope, layout
from tidegate.metrics.segment import (
    KEY_LIMIT,
    SUPERVISOR,
    RowKey,
    Segment,
    SegmentFull,
    SegmentMismatch,
    observe,
    row_words,
)
from tidegate.metrics.totals import totals

ACCEPTED = LISTENER.index("accepted_total")
SESSIONS = LISTENER.index("sessions")


def web(worker: int = 0, name: str = "web") -> RowKey:
    return RowKey(Scope.LISTENER, worker, (name,))


@contextlib.contextmanager
def sized_for(**rows: int) -> Iterator[Segment]:
    segment = Segment.sized_for({Scope(scope): count for scope, count in rows.items()})
    try:
        yield segment
    finally:
        segment.close()


def test_rows_are_zero_aligned_and_apart() -> None:
    with sized_for(listener=3, worker=2, backend=1, process=1) as segment:
        keys = [web(0), web(1), web(0, "other"), RowKey(Scope.WORKER, 0), RowKey(Scope.WORKER, 1)]
        keys += [RowKey(Scope.BACKEND, 0, ("app", "127.0.0.1:9000")), RowKey(Scope.PROCESS, SUPERVISOR)]
        rows = [segment.row(key) for key in keys]
        spans = sorted((row.offset, row.offset + len(row.words)) for row in rows)
        assert all(start % 8 == 0 for start, _ in spans)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        for row in rows:
            assert not any(row.words)
            assert row.words.itemsize == 8 and len(row.words) >= layout(row.key.scope).words
        for number, row in enumerate(rows):
            for index in range(len(row.words)):
                row.words[index] = number
        for number, row in enumerate(rows):
            assert set(row.words) == {number}
            assert segment.row(row.key) is row


def test_a_word_holds_64_bits_and_no_less_than_nothing() -> None:
    with sized_for(listener=1) as segment:
        words = segment.row(web()).words
        words[ACCEPTED] = 2**64 - 1
        assert words[ACCEPTED] == 2**64 - 1
        with pytest.raises(ValueError, match="invalid value"):
            words[SESSIONS] -= 1


def test_labels_must_fit_the_scope() -> None:
    with sized_for(listener=1) as segment:
        with pytest.raises(ValueError, match="listener"):
            segment.row(RowKey(Scope.LISTENER, 0, ()))
        with pytest.raises(ValueError, match="not by"):
            segment.row(RowKey(Scope.WORKER, 0, ("x",)))


@pytest.mark.parametrize("name", ["", "a b", 'quo"te', "back\\slash", "Zürich ☂", "new\nline", "\udcff"])
def test_any_name_survives_the_directory(name: str) -> None:
    with sized_for(listener=1) as segment:
        segment.row(web(7, name))
        attached = Segment.attach(segment.fd)
        assert [row.key for row in attached.rows()] == [web(7, name)]
        attached.close()


def test_a_name_too_long_for_the_directory_is_the_operators_to_mend() -> None:
    with sized_for(listener=2) as segment:
        segment.row(web(0, "x" * (KEY_LIMIT - 32)))
        with pytest.raises(SegmentFull, match="too long") as caught:
            segment.row(web(0, "x" * KEY_LIMIT))
        assert caught.value.fix
        assert len(segment.rows()) == 1


def test_attached_memory_is_the_same_memory() -> None:
    with sized_for(listener=2, worker=1) as segment:
        row = segment.row(web())
        attached = Segment.attach(segment.fd)
        twin = attached.find(web())
        assert twin is not None and twin.offset == row.offset
        row.words[ACCEPTED] += 5
        twin.words[ACCEPTED] += 2
        assert row.words[ACCEPTED] == 7
        assert attached.find(web(1)) is None
        late = segment.row(web(1))
        assert attached.row_at(late.offset).key == web(1)
        with pytest.raises(KeyError):
            attached.row_at(late.offset + 1)
        assert attached.snapshot() == segment.snapshot()
        attached.close()
        assert row.words[ACCEPTED] == 7


def test_a_read_only_attacher_cannot_write() -> None:
    with sized_for(listener=1) as segment:
        segment.row(web()).words[ACCEPTED] = 3
        attached = Segment.attach(segment.fd, read_only=True)
        row = attached.find(web())
        assert row is not None and row.words[ACCEPTED] == 3
        with pytest.raises(TypeError, match="read-only"):
            row.words[ACCEPTED] = 4
        attached.close()


def test_the_memory_can_neither_shrink_nor_grow() -> None:
    with sized_for(listener=1) as segment:
        for size in (0, 1 << 30):
            with pytest.raises(PermissionError):
                os.ftruncate(segment.fd, size)


def test_room_is_exactly_what_was_asked_for() -> None:
    with sized_for(listener=3, worker=2) as segment:
        for worker in range(3):
            segment.row(web(worker))
        for worker in range(2):
            segment.row(RowKey(Scope.WORKER, worker))
        with pytest.raises(SegmentFull, match="listener"):
            segment.row(web(3))


def test_create_by_size_gives_usable_room() -> None:
    segment = Segment.create(100_000)
    count = 0
    with contextlib.suppress(SegmentFull):
        for count in range(100_000):
            segment.row(web(count))
    assert count * row_words(Scope.LISTENER) > 50_000
    segment.close()


def test_what_is_not_a_segment_is_refused() -> None:
    fd = os.memfd_create("not-metrics", os.MFD_CLOEXEC)
    with pytest.raises(SegmentMismatch, match="small"):
        Segment.attach(fd)
    os.ftruncate(fd, 8192)
    with pytest.raises(SegmentMismatch, match="not a tidegate segment"):
        Segment.attach(fd)
    os.close(fd)


def test_another_list_of_metrics_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with sized_for(listener=1) as segment:
        fds = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(segment_module, "fingerprint", lambda: names.fingerprint() ^ 1)
        with pytest.raises(SegmentMismatch, match="version"):
            Segment.attach(segment.fd)
        assert len(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize(("index", "value"), [(3, 1), (4, 1 << 40), (5, 1 << 40)])
def test_a_damaged_head_is_refused(index: int, value: int) -> None:
    with sized_for(listener=1) as segment:
        segment._words[index] = value
        with pytest.raises(SegmentMismatch, match="damaged"):
            Segment.attach(segment.fd)


def test_retiring_clears_gauges_and_keeps_counters_for_the_same_key() -> None:
    with sized_for(listener=2) as segment:
        row = segment.row(web())
        row.words[ACCEPTED], row.words[SESSIONS] = 100, 7
        segment.retire(web())
        segment.retire(web())
        assert row.retired and row.words[SESSIONS] == 0
        again = segment.row(web())
        assert again is row and not row.retired
        assert row.words[ACCEPTED] == 100


def test_reset_gauges_touches_gauges_alone() -> None:
    with sized_for(listener=1, backend=1) as segment:
        for key in (web(), RowKey(Scope.BACKEND, 0, ("app", "b"))):
            row, at = segment.row(key), layout(key.scope)
            for index in range(at.words):
                row.words[index] = 9
            row.reset_gauges()
            gauges = {at.index(metric.name) for metric in at.metrics if metric.kind is Kind.GAUGE}
            assert gauges
            assert all(row.words[index] == (0 if index in gauges else 9) for index in range(at.words))


def test_room_of_the_longest_retired_is_reused_zeroed_and_only_when_needed() -> None:
    with sized_for(listener=3) as segment:
        old, older = segment.row(web(0, "old")), segment.row(web(0, "older"))
        older.words[ACCEPTED] = old.words[ACCEPTED] = 5
        segment.retire(web(0, "older"))
        segment.retire(web(0, "old"))
        third = segment.row(web(0, "third"))
        assert third.offset not in (old.offset, older.offset)
        offset = older.offset
        fourth = segment.row(web(0, "fourth"))
        assert fourth.offset == offset and not any(fourth.words)
        assert segment.find(web(0, "older")) is None
        assert segment.row(web(0, "old")).words[ACCEPTED] == 5
        attached = Segment.attach(segment.fd)
        assert {row.key.labels[0] for row in attached.rows()} == {"old", "third", "fourth"}
        attached.close()


def test_a_retired_worker_of_a_living_listener_is_never_given_away() -> None:
    with sized_for(listener=2) as segment:
        segment.row(web(0))
        segment.row(web(1)).words[ACCEPTED] = 5
        segment.retire(web(1))
        with pytest.raises(SegmentFull) as caught:
            segment.row(web(0, "other"))
        assert "restart" in caught.value.fix
        (total,) = totals(segment.snapshot())
        assert total.value("accepted_total") == 5


def test_an_attacher_follows_reuse() -> None:
    with sized_for(listener=1) as segment:
        segment.row(web(0, "a"))
        attached = Segment.attach(segment.fd)
        assert attached.find(web(0, "a")) is not None
        segment.retire(web(0, "a"))
        seen = attached.find(web(0, "a"))
        assert seen is not None and seen.retired
        segment.row(web(0, "b")).words[ACCEPTED] = 8
        assert attached.find(web(0, "a")) is None
        row = attached.find(web(0, "b"))
        assert row is not None and not row.retired and row.words[ACCEPTED] == 8
        attached.close()


def test_a_successor_goes_on_allocating() -> None:
    with sized_for(listener=3) as segment:
        segment.row(web(0)).words[ACCEPTED] = 1
        segment.row(web(1))
        segment.retire(web(1))
        successor = Segment.attach(segment.fd)
        assert successor.row(web(0)).words[ACCEPTED] == 1
        assert successor.row(web(2)).offset not in {row.offset for row in segment._rows.values()}
        assert not successor.row(web(1)).retired
        successor.close()


def test_counts_survive_a_writer_that_is_killed() -> None:
    with sized_for(listener=1) as segment:
        row = segment.row(web())
        pid = os.fork()
        if pid == 0:
            while True:  # ends by SIGKILL, or with this test's process by the alarm
                signal.alarm(30)
                row.words[ACCEPTED] += 1
        deadline = time.monotonic() + 20
        while row.words[ACCEPTED] < 1000 and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        reached = row.words[ACCEPTED]
        assert reached >= 1000
        assert segment.row(web()).words[ACCEPTED] == reached


def test_a_reader_never_sees_half_a_store() -> None:
    patterns = (0, 2**64 - 1)
    with sized_for(worker=1) as segment:
        words = segment.row(RowKey(Scope.WORKER, 0)).words
        index = WORKER.index("loop_busy_ns_total")
        pid = os.fork()
        if pid == 0:
            signal.alarm(30)
            while True:
                words[index] = patterns[1]
                words[index] = patterns[0]
        seen = {words[index] for _ in range(300_000)}
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert seen <= set(patterns)


def test_another_program_reads_it_by_fd() -> None:
    script = """
import sys
from tidegate.metrics.segment import Segment
segment = Segment.attach(int(sys.argv[1]), read_only=True)
for row in segment.rows():
    print(row.key.scope, row.key.worker, *row.key.labels, sum(row.words))
"""
    with sized_for(listener=1, worker=1) as segment:
        observe(segment.row(web(4)).words, LISTENER.index("queue_age_ns"), 1000)
        segment.row(RowKey(Scope.WORKER, 4))
        result = subprocess.run(
            [sys.executable, "-c", script, str(segment.fd)],
            pass_fds=[segment.fd],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    assert result.stdout.splitlines() == [f"listener 4 web {1 + 1000 + 1000 + 1}", "worker 4 0"], (
        result.stderr
    )


def test_close_leaves_no_descriptor_behind() -> None:
    before = len(os.listdir("/proc/self/fd"))
    segment = Segment.sized_for({Scope.LISTENER: 1})
    row = segment.row(web())
    segment.retire(web())
    segment.row(web(0, "other"))
    segment.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="released"):
        row.words[0] = 1


class SegmentMachine(RuleBasedStateMachine):
    """Reloads at random: listeners and workers come, count and go."""

    names = st.sampled_from("abcd")
    workers = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.segment = Segment.sized_for({Scope.LISTENER: 6})
        self.live: dict[RowKey, int] = {}
        self.shown: dict[str, int] = {}

    def teardown(self) -> None:
        self.segment.close()

    @rule(worker=workers, name=names)
    def begin(self, worker: int, name: str) -> None:
        key = web(worker, name)
        known = self.segment.find(key)
        kept = known.words[ACCEPTED] if known is not None else 0
        try:
            row = self.segment.row(key)
        except SegmentFull:
            assert len(self.segment.rows()) == 6
            assert {row.key.labels for row in self.segment.rows()} == {live.labels for live in self.live}
            return
        assert row.words[ACCEPTED] == kept
        self.live[key] = kept

    @rule(number=st.integers(1, 9), data=st.data())
    def count(self, number: int, data: st.DataObject) -> None:
        if self.live:
            key = data.draw(st.sampled_from(sorted(self.live, key=repr)))
            self.segment.row(key).words[ACCEPTED] += number
            self.live[key] += number

    @rule(data=st.data())
    def worker_leaves(self, data: st.DataObject) -> None:
        if self.live:
            key = data.draw(st.sampled_from(sorted(self.live, key=repr)))
            self.segment.retire(key)
            del self.live[key]

    @rule(name=names)
    def listener_leaves(self, name: str) -> None:
        for key in [key for key in self.live if key.labels == (name,)]:
            self.segment.retire(key)
            del self.live[key]

    @invariant()
    def what_lives_is_there_and_sums_never_drop(self) -> None:
        attached = Segment.attach(self.segment.fd)
        rows = {row.key: row for row in attached.rows()}
        for key, number in self.live.items():
            assert not rows[key].retired and rows[key].words[ACCEPTED] == number
        assert {key for key, row in rows.items() if not row.retired} == set(self.live)
        assert len({row.offset for row in rows.values()}) == len(rows)
        shown = {total.labels[0]: total.value("accepted_total") for total in totals(attached.snapshot())}
        attached.close()
        assert set(shown) == {key.labels[0] for key in self.live}
        for name, number in shown.items():
            assert number >= self.shown.get(name, 0)
        self.shown = shown


TestSegment = SegmentMachine.TestCase
TestSegment.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
