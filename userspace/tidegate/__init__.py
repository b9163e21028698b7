"""tidegate: a reverse proxy that knows how long each connection waited in the kernel."""

__version__ = "0.1.0"
