"""The one list of events: what the log and `tidegate ctl events` can say, by the name after `event=`.

A test holds it to the code: what is logged is here, and what is here is logged. `python -m tidegate.events
docs/control.md` writes the table of that page anew.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from tidegate.metrics.names import Documented


class EventKind(Documented):
    """Grouped by what they are of; fields are in the lines themselves."""

    # the whole
    READY = "ready", "Every worker accepts connections."
    DRAINING = "draining", "The end has begun: nothing new is taken, what is under way may finish."
    STOPPED = "stopped", "The last worker has ended, and tidegate with it."
    NO_WORKER_LEFT = "no_worker_left", "Every worker was given up: tidegate ends."
    RELOADED = "reloaded", "A new configuration is in force; `changes` says what differs."
    RELOAD_REFUSED = "reload_refused", "The configuration file has errors: the old one serves on."
    UPGRADING = "upgrading", "A successor was started."
    HANDED_OVER = "handed_over", "The successor serves from now on; event streams of the predecessor end."
    PREDECESSOR_ENDED = "predecessor_ended", "The predecessor's last session is over, its counters are ours."
    UPGRADE_REFUSED = "upgrade_refused", "No upgrade now: something of the kind is under way."
    UPGRADE_FAILED = "upgrade_failed", "The successor did not start; this tidegate serves on."
    OLD_PROGRAMS_SERVE_ON = (
        "old_programs_serve_on",
        "The successor's BPF programs could not be loaded: the predecessor's stay attached.",
    )
    CONTROL = "control", "Somebody used a verb that changes something."
    CONTROL_REFUSED = "control_refused", "A user who may not was turned away from the control socket."
    CONTROL_VERB_FAILED = "control_verb_failed", "A fault of tidegate in a verb; the traceback follows."

    # kernel half
    QUEUE_AGE_ESTIMATED = "queue_age_estimated", "Ages come from TCP_INFO, a lower bound: `reason` says why."
    NOT_STEERED = "not_steered", "The kernel chooses this listener's workers by its own hash."
    SPLICE_UNAVAILABLE = "splice_unavailable", "Streams are copied: the start-up test of splicing failed."
    SPLICE_UNTRUSTED = "splice_untrusted", "Streams are spliced although the start-up test failed."
    SPLICE_FAILED = "splice_failed", "The kernel refused what splicing needs: streams are copied."
    SPLICE_STRAYS = "splice_strays", "Sockets of no session were found in the kernel's map and removed."
    NOT_SPLICED = "not_spliced", "The kernel refused one session: it is copied."

    # workers
    WORKER_DIED = "worker_died", "A worker ended that was not told to; `ended_by` and `cause` say how."
    WORKER_REPLACED = "worker_replaced", "The worker's replacement accepts connections."
    WORKER_HUNG = "worker_hung", "No heartbeat for kill_hung_after: the worker is killed."
    WORKER_NOT_STARTED = "worker_not_started", "The worker's process could not be made."
    WORKER_RESTART_DELAYED = "worker_restart_delayed", "It died young: its replacement waits."
    WORKER_GIVEN_UP = "worker_given_up", "It died young too often: it is not started again before a reload."
    WORKER_NOT_TOLD = "worker_not_told", "A new configuration did not reach the worker: it is replaced."
    LOST_WITH_WORKER = "lost_with_worker", "How many sessions and waiting connections a dead worker had."
    CUT = "cut", "What was under way when drain_timeout was over, and was ended."
    MESSAGE_FAILED = "message_failed", "A fault of a worker in what it was told; the traceback follows."

    # backends
    BACKEND_UP = "backend_up", "Health checks found it good."
    BACKEND_DOWN = "backend_down", "Health checks found it bad."
    BACKEND_FAILING = "backend_failing", "A connect failed after it had worked: it is left alone for a while."
    BACKEND_RECOVERED = "backend_recovered", "It works again after failing or being ejected."
    BACKEND_EJECTED = "backend_ejected", "Too many failures in a row: it gets nothing for a while."
    BACKEND_ADDED = (
        "backend_added",
        "A backend joined its cluster: by a name's new address, a reload or backend.add.",
    )
    BACKEND_DRAINING = "backend_draining", "A backend gets nothing new."
    CLUSTER_FAIL_OPEN = "cluster_fail_open", "No backend of the cluster is usable: any of them is tried."
    CLUSTER_RECOVERED = "cluster_recovered", "The cluster has a usable backend again."
    RESOLVE_FAILED = "resolve_failed", "A backend's name could not be resolved: its last addresses are kept."
    NAMES_UNRESOLVED = "names_unresolved", "Names of backends were not resolved in time for the start."
    RESOLVER_FAILED = "resolver_failed", "The process that resolves names could not be started."
    RESOLVER_DIED = "resolver_died", "The process that resolves names ended; another is started."

    # connections and sessions
    SESSION_ENDED = (
        "session_ended",
        "A session did not end well; at level debug also those clients broke off.",
    )
    ZOMBIE_ENDED = "zombie_ended", "The zombie checker ended a session."
    RESPONSE_FAILED = "response_failed", "A backend gave no valid HTTP response; tidegate answered itself."
    FD_EXHAUSTED = "fd_exhausted", "accept() found no file descriptor left."
    CONNECTION_FAILED = "connection_failed", "A fault of tidegate at a new connection; the traceback follows."
    SESSION_FAILED = "session_failed", "A fault of tidegate at a session's begin; the traceback follows."

    # files and helpers
    ACCESS_LOG_NOT_MADE = "access_log_not_made", "The access log could not be made for the workers to write."
    ACCESS_LOG_NOT_OPENED = "access_log_not_opened", "A worker cannot open the access log."
    ACCESS_LOG_FAILED = "access_log_failed", "A write to the access log failed; its lines are dropped."
    ANSWER_FILE_UNREADABLE = "answer_file_unreadable", "A file of `answers` cannot be read."
    METRICS_PROCESS_DIED = (
        "metrics_process_died",
        "The process that serves metrics ended; `again` says when it is started anew.",
    )
    METRICS_FAILED = "metrics_failed", "A fault of tidegate at a scrape; the traceback follows."
    STATSD_NOT_SENT = (
        "statsd_not_sent",
        "Metrics did not reach the StatsD server; said every 5 minutes.",
    )
    STATSD_FAILED = "statsd_failed", "A fault of tidegate at a push; the traceback follows."
    METRICS_ANSWER = "metrics_answer", "A scrape was answered with an error."

    # the loop
    CALLBACK_FAILED = "callback_failed", "A fault of tidegate at an event; the traceback follows."
    TIMER_CALLBACK_FAILED = "timer_callback_failed", "A fault of tidegate in a timer; the traceback follows."
    DEFERRED_CALL_FAILED = "deferred_call_failed", "A fault of tidegate; the traceback follows."
    SIGNAL_HANDLER_FAILED = "signal_handler_failed", "A fault of tidegate at a signal; the traceback follows."

    # the log itself
    SUPPRESSED = "suppressed", "So many lines of an event were held back, to keep the log readable."
    LOG_LOST = "log_lost", "So many lines could not be written; in the log only."


BEGIN: Final = "<!-- made from userspace/tidegate/events.py: begin -->"
END: Final = "<!-- end of events -->"


def table() -> str:
    """Every event and what it means."""
    rows = [f"| `{kind.value}` | {kind.doc} |" for kind in EventKind]
    return "\n".join(["| Event | |", "|---|---|", *rows])


def replace_table(page: str) -> str:
    """The page with the table between its markers made anew. Raises ValueError when a marker is missing."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    where = Path(sys.argv[1])
    where.write_text(replace_table(where.read_text("utf-8")), "utf-8")
