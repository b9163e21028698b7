"""The suite's own frame: what the host offers, who was skipped for want of it, what was left behind."""
