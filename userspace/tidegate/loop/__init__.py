"""The event loop: reactor over epoll, timer wheel, session slab."""
