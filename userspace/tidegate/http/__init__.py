"""HTTP/1.1 without I/O: heads, header rules, routes, own answers."""
