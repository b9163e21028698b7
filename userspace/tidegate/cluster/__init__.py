"""Backends: balancing, health, pools, retry, limits."""
