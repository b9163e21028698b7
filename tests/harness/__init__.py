"""What the end-to-end tests and the benchmarks share: processes, peers, backends and clients.

Everything here runs as real processes over real sockets on loopback; nothing is mocked.
"""
