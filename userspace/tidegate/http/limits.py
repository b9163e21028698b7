"""Bounds on what a peer may make us hold or scan. Each is a constant with its reason."""

from __future__ import annotations

from typing import Final

# A request line and its fields, CRLFs included. nginx takes 4 x 8 KiB, HAProxy 16 KiB in all, Node 16 KiB:
# cookies and bearer tokens of real sites pass 16 KiB now and then, none passes 32.
MAX_REQUEST_HEAD: Final = 32 * 1024

# RFC 9112 3 asks for at least 8,000 octets of request line.
MAX_TARGET: Final = 8 * 1024

# The request line without CRLF: the target, the longest method anyone registered (17), and room.
MAX_REQUEST_LINE: Final = MAX_TARGET + 64

# HAProxy stops at 101, Node at 2,000; work per head is linear in it, and browsers send about 20.
MAX_FIELD_LINES: Final = 128

# Backends are ours, and Set-Cookie and Content-Security-Policy grow: twice the request's.
MAX_RESPONSE_HEAD: Final = 64 * 1024
MAX_RESPONSE_FIELD_LINES: Final = 256

# 100, 102 and 103 together: a backend that sends more is looping.
MAX_INTERIM: Final = 16

# DNS stops at 253 bytes; brackets, a port and a trailing dot come on top.
MAX_AUTHORITY: Final = 262

# Content-Length as decimal digits: 10**18 is below 2**63, which kernel records and most backends hold.
MAX_LENGTH_DIGITS: Final = 18

# Chunk size as hex digits: 60 bits. Leading zeros count, or a line of zeros would be free.
MAX_CHUNK_DIGITS: Final = 15

# One chunk-size line with its extension, CRLF included. Signatures in them (AWS) take ~90.
MAX_CHUNK_LINE: Final = 256

# All extensions of one body: without it one-byte chunks carry 250 times their size (CVE-2023-39326).
MAX_CHUNK_EXTENSIONS: Final = 16 * 1024

# Trailers carry digests and gRPC statuses: small.
MAX_TRAILER: Final = 8 * 1024
MAX_TRAILER_LINES: Final = 32

# Remembered header blocks, per worker and direction: at most 512 x (block + forms of it) = about 4 MiB.
MEMO_ENTRIES: Final = 512
MEMO_BLOCK: Final = 2048

# An own answer's body from a file: it is held in memory once per listener.
MAX_ANSWER_FILE: Final = 64 * 1024

# A client's X-Request-Id goes into log lines and to backends: longer ones are replaced.
MAX_REQUEST_ID: Final = 128

# PROXY v1 is at most 107 bytes by its specification; v2 carries a 16-bit length. TLVs of real senders
# (TLS details, AWS endpoint ids) stay in the hundreds; client certificates may reach a few KiB.
MAX_PROXY_V1: Final = 107
MAX_PROXY_V2: Final = 16 + 8 * 1024

# Client addresses followed by the rate limiter, per worker: 65,536 x ~200 bytes = 13 MiB.
MAX_CLIENTS: Final = 65_536
