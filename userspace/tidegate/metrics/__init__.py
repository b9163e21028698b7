"""Metrics: one list of names, counters in shared memory, Prometheus text."""
