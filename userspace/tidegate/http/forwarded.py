"""Who the client was, told to backends: X-Forwarded-* and Forwarded (RFC 7239).

From a peer that is not trusted these fields are removed and generated; from a trusted one they are kept and
continued: the lists get one more element, the single values stay as they came.
"""

from __future__ import annotations

import re
from typing import Final

_FAMILY: Final = re.compile(rb"(?i)\r\n(X-Forwarded-[^:\r_]+|Forwarded|X-Request-Start):[ \t]*([^\r]*)")


class Peer:
    """The client of one connection, as its requests describe it to backends. Made once per connection."""

    __slots__ = ("address", "lines", "local", "node", "port", "proto", "trusted")

    def __init__(self, address: str, proto: bytes, local: tuple[str, int], *, trusted: bool = False) -> None:
        """`address`: the client's IP without port, "" for a Unix socket. `local`: where it connected to."""
        self.address = address.partition("%")[0].encode("ascii")  # a zone id is nobody else's business
        self.proto = proto
        self.trusted = trusted
        host, port = local
        self.port = b"%d" % port
        self.local = _authority(host, port, proto)
        if not address:
            self.node = b"unknown"
        elif ":" in address:
            self.node = b'"[%b]"' % self.address
        else:
            self.node = self.address
        for_line = b"\r\nX-Forwarded-For: " + self.address if address else b""
        self.lines = b"%b\r\nX-Forwarded-Proto: %b\r\nX-Forwarded-Port: %b" % (for_line, proto, self.port)

    def element(self, authority: bytes) -> bytes:
        """This hop's element of Forwarded."""
        if not authority:
            return b"for=%b;proto=%b" % (self.node, self.proto)
        return b'for=%b;host="%b";proto=%b' % (self.node, authority, self.proto)


def _authority(host: str, port: int, proto: bytes) -> bytes:
    name = f"[{host}]" if ":" in host else host
    if port == 0:
        return b"localhost"
    return (name if port == (443 if proto == b"https" else 80) else f"{name}:{port}").encode("ascii")


def fresh_lines(peer: Peer, authority: bytes) -> bytes:
    """The fields for a client that is not trusted."""
    if not authority:
        return b"%b\r\nForwarded: %b" % (peer.lines, peer.element(b""))
    return b"%b\r\nX-Forwarded-Host: %b\r\nForwarded: %b" % (peer.lines, authority, peer.element(authority))


def continued_lines(peer: Peer, authority: bytes, block: bytes) -> tuple[bytes, bool]:
    """The fields for a trusted peer that sent `block`, and whether X-Request-Start was among them."""
    chain: list[bytes] = []
    elements: list[bytes] = []
    others: list[bytes] = []
    seen: set[bytes] = set()
    for found in _FAMILY.finditer(block):
        name, value = found[1].lower(), found[2].rstrip(b" \t")
        seen.add(name)
        if name == b"x-forwarded-for":
            chain.append(value)
        elif name == b"forwarded":
            elements.append(value)
        else:
            others.append(b"\r\n%b: %b" % (found[1], value))
    if peer.address:
        chain.append(peer.address)
    elements.append(peer.element(authority))
    lines = [b"\r\nX-Forwarded-For: " + b", ".join(filter(None, chain))] if chain else []
    lines += others
    for name, field, value in (
        (b"x-forwarded-proto", b"\r\nX-Forwarded-Proto: ", peer.proto),
        (b"x-forwarded-host", b"\r\nX-Forwarded-Host: ", authority),
        (b"x-forwarded-port", b"\r\nX-Forwarded-Port: ", peer.port),
    ):
        if name not in seen and value:
            lines.append(field + value)
    lines.append(b"\r\nForwarded: " + b", ".join(filter(None, elements)))
    return b"".join(lines), b"x-request-start" in seen
