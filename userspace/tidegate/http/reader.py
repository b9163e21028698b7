"""What the two parsers share: where in a message they are, and its body."""

from __future__ import annotations

from typing import Final

from tidegate.http.chunked import ChunkDecoder, encode_chunk, encode_end

# States of a parser. Plain ints: they are compared once or twice per event.
HEAD: Final = 0  # wants (more of) a head: receive_head()
BODY: Final = 1  # wants (more of) a body: receive_body()
COMPLETE: Final = 2  # the message is whole; what came behind it is in `rest`
TUNNEL: Final = 3  # 101: what comes is not HTTP any more; early bytes are in `rest`
FAILED: Final = 4  # a PeerError was raised: only closing is left
IDLE: Final = 5  # (responses) no request is outstanding


class MessageReader:
    """Body framing and the bytes that are here too early.

    `rest` belongs to the parser: bytes received and not used yet, at most what one call brought along. The
    session stops reading while it is not empty and the parser is not in a state to use it, so it stays
    bounded by one receive buffer.
    """

    __slots__ = ("_decoder", "_rechunk", "left", "rest", "state")

    def __init__(self) -> None:
        self.state = HEAD
        self.rest = b""
        self.left = 0  # bytes of a body of known length still to come; -1: until the connection ends
        self._decoder: ChunkDecoder | None = None
        self._rechunk = False

    def receive_body(self, data: bytes) -> bytes:
        """What `data` (behind `rest`) holds of the body, framed for the other side; b"" is "nothing yet".

        Call it with b"" for what came along with the head. The last call's bytes include the end of a
        chunked body, and leave `state` COMPLETE. Raises PeerError; nothing of `data` may be sent on then.
        """
        if self.rest:
            data = self.rest + data
            self.rest = b""
        decoder = self._decoder
        if decoder is not None:
            return self._receive_chunked(decoder, data)
        left = self.left
        if left < 0:
            return encode_chunk(data) if self._rechunk and data else data
        size = len(data)
        if size < left:
            self.left = left - size
            return data
        self.left = 0
        self.state = COMPLETE
        if size == left:
            return data
        self.rest = data[left:]
        return data[:left]

    def _receive_chunked(self, decoder: ChunkDecoder, data: bytes) -> bytes:
        try:
            payload = decoder.decode(data)
        except Exception:
            self.state = FAILED
            raise
        if not decoder.done:
            return encode_chunk(payload) if self._rechunk and payload else payload
        self._decoder = None
        self.rest = decoder.rest
        self.state = COMPLETE
        if not self._rechunk:
            return payload
        end = encode_end(decoder.trailers)
        return encode_chunk(payload) + end if payload else end

    def moved(self, count: int) -> None:
        """`count` bytes of a body of known length went past, by splice: they are not received here any more.

        Only while `rest` is empty, and never more than `left`.
        """
        if self.rest or not 0 <= count <= self.left:
            raise ValueError("moved() past the end of the body or over bytes already here")
        self.left -= count
        if self.left == 0:
            self.state = COMPLETE
