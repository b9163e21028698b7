"""The control socket and its verbs."""
