"""Every case of the corpora: whole, byte by byte, and with the next request behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpus.replay import NO_SHARED, Case, own_cases, play, shared_cases, understood

OWN = own_cases()
SHARED = shared_cases()
FOLLOWER = b"GET /follower HTTP/1.1\r\nHost: f.example\r\n\r\n"


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def ways(case: Case) -> list[tuple[str, list[bytes]]]:
    found = [("whole", [case.data]), ("halves", pieces(case.data, len(case.data) // 2 + 1))]
    if len(case.data) < 4096:
        found.append(("bytes", pieces(case.data, 1)))
    return found


def check_forwarded(case: Case, sent: bytes) -> None:
    seen = understood(sent)
    assert seen
    first = seen[0]
    if case.method:
        assert first.method == case.method
    if case.target:
        assert first.target == case.target
    if case.host:
        assert first.values("host") == [case.host]
    if case.body is not None:
        assert first.body == case.body.encode("latin-1")
    for name, value in case.fields:
        assert value in first.values(name), (name, first.fields)
        assert name in [key for key, _ in first.fields]
    for name in case.absent:
        assert first.values(name) == []


@pytest.mark.parametrize("case", OWN, ids=[case.name for case in OWN])
def test_own_corpus(case: Case) -> None:
    for way, parts in ways(case):
        played = play(parts)
        if case.verdict == "reject":
            assert played.error is not None, way
            if case.status:
                assert played.error.status == case.status, (way, played.error)
        elif case.verdict == "accept":
            assert played.error is None, (way, played.error)
            assert not played.pending, way
            check_forwarded(case, played.sent)
        if case.forwarded is not None:
            assert played.whole == case.forwarded, way
        if way == "whole" and not played.whole:
            assert played.sent == b"", "bytes of a refused request were sent"
        assert len(understood(played.sent)) >= played.whole if not played.error else True


@pytest.mark.parametrize("case", OWN, ids=[case.name for case in OWN])
def test_own_corpus_with_a_follower(case: Case) -> None:
    """A refused request takes what follows with it; an accepted one leaves it whole."""
    played = play([case.data + FOLLOWER])
    reached = b"/follower" in played.sent
    if case.verdict == "reject":
        assert not reached
    elif case.verdict == "accept":
        alone = play([case.data])
        assert played.sent.startswith(alone.sent.rpartition(b"X-Request-Start")[0])
        last = b"close" in case.data or b"HTTP/1.0" in case.data
        assert reached or last


@pytest.mark.skipif(not SHARED, reason=NO_SHARED)
@pytest.mark.parametrize("case", SHARED, ids=[case.name for case in SHARED])
def test_shared_corpus(case: Case) -> None:
    for way, parts in ways(case):
        played = play(parts)
        if case.verdict == "reject":
            # Nothing behind a request that stands makes it fall; alone it must not get through.
            assert played.error is not None or played.pending, way
            assert played.whole == 0, way
            if way == "whole":
                assert played.sent == b""
        elif case.verdict == "accept":
            assert played.whole >= 1, (way, played.error)
            check_forwarded(case, played.sent)
        if played.whole and played.error is None and not played.pending:
            understood(played.sent)


def test_there_are_enough_cases() -> None:
    assert len(OWN) >= 150
    assert len({case.name for case in OWN}) == len(OWN)
    assert {case.verdict for case in OWN} == {"reject", "accept", "either"}


def test_the_shared_corpus_is_found_beside_the_checkout_and_the_one_it_is_a_worktree_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIDEGATE_SHARED_CORPUS", raising=False)
    main, worktree = tmp_path / "a" / "main", tmp_path / "b" / "tree"
    (main / ".git" / "worktrees" / "tree").mkdir(parents=True)
    worktree.mkdir(parents=True)
    (worktree / ".git").write_text(f"gitdir: {main}/.git/worktrees/tree\n")
    assert shared_cases(main) == shared_cases(worktree) == []
    corpus = tmp_path / "a" / "shared" / "corpus"
    corpus.mkdir(parents=True)
    line = {"name": "one", "verdict": "reject", "bytes": "\xff", "why": None}
    (corpus / "requests.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = shared_cases(main)
    assert (found.name, found.data) == ("one", b"\xff")
    assert shared_cases(worktree) == [found]
    assert shared_cases(tmp_path / "c" / "clone") == []
    monkeypatch.setenv("TIDEGATE_SHARED_CORPUS", str(corpus))
    assert shared_cases(tmp_path / "c" / "clone") == [found]
