"""The request corpus: its cases, and the core replayed on them without sockets.

`play` does what a session does with a client's bytes, and collects what a backend would get. `understood`
reads that with three parsers written apart from ours: a strict line reader, llhttp with all its callbacks,
and http.client's header parser.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.client import parse_headers
from io import BytesIO
from pathlib import Path

import httptools
from frame.skips import ELSEWHERE

from tidegate.http.errors import RequestError
from tidegate.http.forwarded import Peer
from tidegate.http.headers import RequestForm
from tidegate.http.reader import BODY, COMPLETE
from tidegate.http.request import RequestParser, RequestRules
from tidegate.http.stamps import RequestIds

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NO_SHARED = f"{ELSEWHERE}shared/corpus"


@dataclass(frozen=True, slots=True)
class Case:
    """One client's bytes and what must become of them.

    verdict: "reject" (4xx or 5xx, no whole request reaches a backend), "accept" (forwarded with the same
    meaning) or "either". `forwarded`: how many whole requests reach the backend. The rest is
    checked where given.
    """

    name: str
    verdict: str
    data: bytes
    why: str
    section: str = ""
    status: int = 0
    forwarded: int | None = None
    method: str = ""
    target: str = ""
    host: str = ""
    body: str | None = None
    fields: tuple[tuple[str, str], ...] = ()
    absent: tuple[str, ...] = ()


def load(path: Path) -> list[Case]:
    cases = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip():
            continue
        entry = json.loads(line)
        entry["data"] = entry.pop("bytes").encode("latin-1")
        entry["why"] = entry.get("why") or ""
        entry["fields"] = tuple((name, value) for name, value in entry.get("fields", ()))
        entry["absent"] = tuple(entry.get("absent", ()))
        cases.append(Case(**entry))
    return cases


def own_cases() -> list[Case]:
    return [case for path in sorted(HERE.glob("*.jsonl")) for case in load(path)]


def shared_cases(root: Path = ROOT) -> list[Case]:
    """The corpus beside the repository, where there is one; TIDEGATE_SHARED_CORPUS names another place."""
    named = os.environ.get("TIDEGATE_SHARED_CORPUS")
    places = [Path(named)] if named else [one.parent / "shared" / "corpus" for one in checkouts(root)]
    for place in places:
        if (path := place / "requests.jsonl").is_file():
            return load(path)
    return []


def checkouts(root: Path) -> list[Path]:
    """`root`, and the checkout it is a worktree of: `.git` is then a file with <that>/.git/worktrees/X."""
    git = root / ".git"
    if not git.is_file():
        return [root]
    directory = Path(git.read_text().removeprefix("gitdir:").strip())
    return [root, directory.parents[2]] if directory.parent.name == "worktrees" else [root]


@dataclass(slots=True)
class Played:
    """What became of a client's bytes."""

    sent: bytes = b""  # all that went to backends
    whole: int = 0  # requests sent to their end
    error: RequestError | None = None
    pending: bool = False  # the client's bytes ended inside a request
    requests: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)  # method, target, host
    starts: list[int] = field(default_factory=list)  # where in `sent` each begins


def form(via: str = "tidegate") -> RequestForm:
    return RequestForm(via=via, request_start="us", queue_age=False, ids=RequestIds(b"00000000deadbeef"))


def play(pieces: Iterable[bytes], *, scheme: bytes = b"http", trusted: bool = False) -> Played:
    """Feed one connection, in the pieces given."""
    parser = RequestParser(RequestRules(scheme))
    peer = Peer("192.0.2.7", scheme, ("127.0.0.1", 8080), trusted=trusted)
    writer = form()
    played = Played()
    try:
        for piece in pieces:
            _feed(parser, piece, peer, writer, played)
            if parser.state == COMPLETE:
                break  # the connection ends after this request
    except RequestError as error:
        played.error = error
    played.pending = played.error is None and not parser.idle and parser.state != COMPLETE
    return played


def _feed(parser: RequestParser, data: bytes, peer: Peer, writer: RequestForm, played: Played) -> None:
    """As a session does: the head is sent once the body bytes that came with it were found good."""
    while True:
        if parser.state == BODY:
            played.sent += parser.receive_body(data)
        else:
            request = parser.receive_head(data)
            if request is None:
                return
            head = writer.head(request, peer, None, 1_700_000_000_000_000)
            if parser.state == BODY:
                head += parser.receive_body(b"")
            played.starts.append(len(played.sent))
            played.sent += head
            played.requests.append((request.method, request.raw_target, request.host))
        data = b""
        if parser.state == BODY:
            return
        played.whole += 1
        if not parser.request.keep_alive:
            return
        parser.next()
        if not parser.rest:
            return


def whole_part(played: Played) -> bytes:
    """What was sent, without a last request that was cut off or refused in its body."""
    if played.error is None and not played.pending:
        return played.sent
    return played.sent if len(played.starts) == played.whole else played.sent[: played.starts[-1]]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as a backend reads it."""

    method: str
    target: str
    fields: tuple[tuple[str, str], ...]
    body: bytes
    trailers: tuple[tuple[str, str], ...] = ()

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.fields if key.lower() == name.lower()]


def understood(sent: bytes) -> list[Seen]:
    """The whole requests in `sent`; AssertionError where the three readers differ or one refuses."""
    seen = list(_read_strictly(sent))
    _compare_with_llhttp(sent, seen)
    for request in seen:
        lines = "".join(f"{name}: {value}\r\n" for name, value in request.fields) + "\r\n"
        message = parse_headers(BytesIO(lines.encode("latin-1")))
        assert [(name, value.strip(" \t")) for name, value in message.items()] == list(request.fields)
        assert not message.defects
    return seen


def _read_strictly(sent: bytes) -> Iterator[Seen]:
    while sent:
        head, mark, sent = sent.partition(b"\r\n\r\n")
        assert mark, "a head without its end"
        lines = head.decode("latin-1").split("\r\n")
        method, target, version = lines[0].split(" ")
        assert version == "HTTP/1.1"
        fields = tuple(_field(line) for line in lines[1:])
        names = [name.lower() for name, _ in fields]
        assert names.count("host") == 1
        assert names.count("content-length") + names.count("transfer-encoding") <= 1
        body, trailers = b"", ()
        if "content-length" in names:
            length = int(fields[names.index("content-length")][1])
            body, sent = sent[:length], sent[length:]
            if len(body) < length:
                return
        elif "transfer-encoding" in names:
            assert fields[names.index("transfer-encoding")][1] == "chunked"
            while True:
                size_line, mark, sent = sent.partition(b"\r\n")
                if not mark:
                    return
                size = int(size_line, 16)
                assert size_line == b"%x" % size
                if size == 0:
                    break
                chunk, sent = sent[:size], sent[size:]
                body += chunk
                assert sent[:2] == b"\r\n"
                sent = sent[2:]
            section, mark, sent = (b"", b"", sent[2:]) if sent[:2] == b"\r\n" else sent.partition(b"\r\n\r\n")
            trailers = tuple(_field(line) for line in section.decode("latin-1").split("\r\n") if line)
        yield Seen(method, target, fields, body, trailers)


def _field(line: str) -> tuple[str, str]:
    name, mark, value = line.partition(":")
    assert mark and name and name == name.strip() and not set(line) & set("\r\n\0")
    return name, value.strip(" \t")


class _Heard:
    def __init__(self) -> None:
        self.done: list[tuple[str, str, bytes]] = []
        self.parser: httptools.HttpRequestParser | None = None

    def on_message_begin(self) -> None:
        self.url, self.body = b"", b""

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        assert self.parser is not None
        self.done.append((self.parser.get_method().decode(), self.url.decode("latin-1"), self.body))


# Methods llhttp knows among those the tests use; it refuses all others, whatever the framing.
_KNOWN = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "PROPFIND", "PURGE"}


def _compare_with_llhttp(sent: bytes, seen: list[Seen]) -> None:
    if any(request.method not in _KNOWN or request.values("upgrade") for request in seen):
        return
    heard = _Heard()
    heard.parser = httptools.HttpRequestParser(heard)
    heard.parser.feed_data(sent)
    assert heard.done == [(request.method, request.target, request.body) for request in seen]
