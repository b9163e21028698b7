"""The zombie checker: ends sessions without progress, and those older than the maximum. Last resort.

Every session has timeouts of its own; what is found here outlived them, by configuration or by a fault,
so its state is logged once, whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from tidegate import logs
from tidegate.loop.slab import Slab
from tidegate.metrics.names import EndReason
from tidegate.session.context import Session

_log = logging.getLogger("tidegate.zombies")
_limited = logs.RateLimited(_log, per_second=10)


def verdict(session: Session, now_ns: int, max_age_ns: int | None) -> EndReason | None:
    """Why this session is to be ended, if it is."""
    if now_ns - session.last_progress_ns > session.ctx.listener.zombie_after_ns:
        return EndReason.ZOMBIE
    if max_age_ns is not None and now_ns - session.started_ns > max_age_ns:
        return EndReason.MAX_AGE
    return None


def check(
    slab: Slab[Session], now_ns: int, max_age_ns: int | None, found: Callable[[Session, EndReason], None]
) -> int:
    """Walk the slab once, end what `verdict` names; returns how many."""
    condemned = [
        (session, reason)
        for _token, session in slab
        if (reason := verdict(session, now_ns, max_age_ns)) is not None
    ]
    for session, reason in condemned:
        _limited.event(logging.WARNING, "zombie_ended", reason=reason.value, **session.describe())
        found(session, reason)
        session.end(reason)
    return len(condemned)
