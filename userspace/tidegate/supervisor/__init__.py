"""The main process: workers, restart, reload, hand-over."""
