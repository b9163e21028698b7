"""ChunkDecoder: any cut gives the same payload, and limits hold."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidegate.http import limits
from tidegate.http.chunked import ChunkDecoder, encode_chunk, encode_end
from tidegate.http.errors import Fault, RequestError


def decode(pieces: list[bytes]) -> tuple[bytes, ChunkDecoder]:
    decoder = ChunkDecoder(RequestError)
    payload = b""
    for at, piece in enumerate(pieces):
        payload += decoder.decode(piece)
        if decoder.done:
            decoder.rest += b"".join(pieces[at + 1 :])
            break
    return payload, decoder


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


chunks = st.lists(st.binary(min_size=1, max_size=40), max_size=8)
extensions = st.sampled_from([b"", b";a", b';a="\\";b"', b" ; a = b", b";a;b;c=d"])


@given(chunks, extensions, st.lists(st.integers(0, 1000), max_size=12), st.binary(max_size=10))
@settings(deadline=None)
def test_any_cut_gives_the_same(
    parts: list[bytes], extension: bytes, places: list[int], behind: bytes
) -> None:
    body = b"".join(b"%X%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
    body += b"0%b\r\nX-Sum: 1\r\nDate: x\r\nx-y:2 \r\n\r\n" % extension
    payload, decoder = decode(cut(body + behind, places))
    assert payload == b"".join(parts)
    assert decoder.done and decoder.rest == behind
    assert decoder.trailers == b"X-Sum: 1\r\nx-y:2 \r\n"


@given(chunks, st.lists(st.integers(0, 1000), max_size=12))
@settings(deadline=None)
def test_what_is_encoded_is_decoded(parts: list[bytes], places: list[int]) -> None:
    body = b"".join(map(encode_chunk, parts)) + encode_end(b"X-A: 1\r\n")
    payload, decoder = decode(cut(body, places))
    assert (payload, decoder.rest, decoder.trailers) == (b"".join(parts), b"", b"X-A: 1\r\n")


@given(chunks, st.data())
@settings(deadline=None)
def test_a_changed_byte_of_framing_never_passes_unseen(parts: list[bytes], data: st.DataObject) -> None:
    """Changed framing is refused, waits for more, or says plainly something else of the same length."""
    body = b"".join(map(encode_chunk, parts)) + encode_end()
    at = data.draw(st.integers(0, len(body) - 1))
    byte = data.draw(st.integers(0, 255))
    changed = body[:at] + bytes([byte]) + body[at + 1 :]
    outcomes = []
    for pieces in ([changed], [changed[i : i + 1] for i in range(len(changed))]):
        try:
            payload, decoder = decode(pieces)
            outcomes.append((payload, decoder.done, decoder.rest))
        except RequestError as error:
            outcomes.append((error.status, error.fault))
    assert outcomes[0] == outcomes[1]


def test_the_left_of_a_chunk() -> None:
    decoder = ChunkDecoder(RequestError)
    decoder.decode(b"10\r\nabc")
    assert decoder.left == 13


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"5;" + b"a" * limits.MAX_CHUNK_LINE, Fault.BODY),
        (b"0" * limits.MAX_CHUNK_DIGITS + b"1\r\n", Fault.BODY_TOO_LARGE),
        (b"5x", Fault.BODY),
        (b"5 x", None),
        (b"5\rx", Fault.BODY),
        (b"\r", None),
        (b"\r\n", Fault.BODY),
        (b"0\r\nX-A: \x00", Fault.BODY),
        (b"0\r\n" + b"X: y\r\n" * (limits.MAX_TRAILER_LINES + 1) + b"\r\n", Fault.HEAD_TOO_LARGE),
        (b"0\r\nX-A: " + b"x" * limits.MAX_TRAILER, Fault.HEAD_TOO_LARGE),
    ],
)
def test_refusals_as_early_as_can_be(body: bytes, fault: Fault | None) -> None:
    for pieces in ([body], [body[at : at + 1] for at in range(len(body))]):
        if fault is None:
            assert not decode(pieces)[1].done
            continue
        with pytest.raises(RequestError) as caught:
            decode(pieces)
        assert caught.value.fault is fault


def test_extensions_are_bounded_over_the_whole_body() -> None:
    chunk = b"1;" + b"a" * 100 + b"\r\nx\r\n"
    decoder = ChunkDecoder(RequestError)
    fitting = limits.MAX_CHUNK_EXTENSIONS // 101
    assert decoder.decode(chunk * fitting) == b"x" * fitting
    with pytest.raises(RequestError):
        decoder.decode(chunk)


def test_a_trailer_cannot_carry_what_frames_routes_or_speaks_for_the_client() -> None:
    for name in (b"Content-Length", b"transfer-encoding", b"HOST", b"Content_Length"):
        with pytest.raises(RequestError):
            decode([b"0\r\n%b: 1\r\n\r\n" % name])
    for name in (
        b"Authorization",
        b"X-Forwarded-For",
        b"X_Forwarded_For",
        b"Connection",
        b"Set-Cookie",
        b"TE",
    ):
        assert decode([b"0\r\n%b: 1\r\n\r\n" % name])[1].trailers == b""
