"""From the kernel accept queue to a session: listeners, the accept queue, admission."""
