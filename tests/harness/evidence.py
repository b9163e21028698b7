"""What a stall test may conclude from the client's clock alone.

Server and client share CLOCK_MONOTONIC. A connection's handshake was finished, as the server's kernel sees
it, between the client's reading before connect() and the one after its bytes were acknowledged. A decision
over a connection that was made while the server stood still came after the reading before SIGCONT, and
before the client saw what became of it. So its age at the decision has a lower and an upper bound; where the
deadline lies between them nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

from harness.plan import Attempt, Outcome
from harness.processes import Stopped


@dataclass(frozen=True, slots=True)
class AgeBounds:
    """Of one connection's age (ns) when the proxy decided over it."""

    attempt: Attempt
    low_ns: int
    high_ns: int


@dataclass(slots=True)
class Verdict:
    """Each connection by what its bounds say, and what contradicts them."""

    must_refuse: list[AgeBounds] = field(default_factory=list)
    must_serve: list[AgeBounds] = field(default_factory=list)
    open: list[AgeBounds] = field(default_factory=list)
    stale_served: list[AgeBounds] = field(default_factory=list)
    fresh_refused: list[AgeBounds] = field(default_factory=list)

    def require(self) -> None:
        """Raises AssertionError when a stale connection was served or a fresh one refused."""
        assert not self.stale_served, (
            f"{len(self.stale_served)} of {len(self.must_refuse)} stale connections were served, "
            f"one of {self.stale_served[0].low_ns / 1e6:.0f} ms or more"
        )
        assert not self.fresh_refused, (
            f"{len(self.fresh_refused)} of {len(self.must_serve)} fresh connections were refused, "
            f"one of {self.fresh_refused[0].high_ns / 1e6:.0f} ms or less"
        )


def bounds(attempt: Attempt, span: Stopped) -> AgeBounds:
    """The age of `attempt` at the decision, given that the proxy stood still during `span`."""
    established_low = attempt.before_connect_ns
    established_high = attempt.acked_ns or attempt.outcome_ns
    decided_low = span.until_ns if span.since_ns <= attempt.before_connect_ns < span.until_ns else 0
    decided_high = attempt.late_ns if attempt.outcome is Outcome.TIMEOUT else attempt.outcome_ns
    return AgeBounds(attempt, max(0, decided_low - established_high), decided_high - established_low)


def judge(
    attempts: Sequence[Attempt],
    span: Stopped,
    stale_after_ns: int,
    served: Container[str],
    resolution_ns: int = 0,
) -> Verdict:
    """Compares what was served (by id, as the backend saw it) with what the bounds demand.

    `resolution_ns`: by how much the proxy's own reading may lie below the truth (0 for the kernel's stamp).

    Raises:
        AssertionError: the fate of a connection is unknown; nothing can be concluded then.
    """
    verdict = Verdict()
    for attempt in attempts:
        known = attempt.outcome in (Outcome.ANSWERED, Outcome.RESET, Outcome.EOF) or attempt.late
        assert known, f"nobody knows what became of {attempt}"
        age = bounds(attempt, span)
        if age.low_ns > stale_after_ns + resolution_ns:
            verdict.must_refuse.append(age)
            if attempt.id in served:
                verdict.stale_served.append(age)
        elif age.high_ns < stale_after_ns:
            verdict.must_serve.append(age)
            if attempt.id not in served:
                verdict.fresh_refused.append(age)
        else:
            verdict.open.append(age)
    return verdict


def require_histogram(
    ages: Sequence[AgeBounds], buckets: Sequence[int], count: int, sum_ns: int, max_ns: int
) -> None:
    """Asserts that recorded ages can be those of the connections with these bounds.

    `buckets[b]` counts ages in [2^b, 2^(b+1)) ns. For every power of two, at least as many recorded ages lie
    below it as connections certainly do, and at most as many as possibly do; the sum and the largest lie
    between the sums and the largest of the bounds.
    """
    assert count == sum(buckets) == len(ages), (
        f"{count} recorded, {sum(buckets)} in buckets, {len(ages)} made"
    )
    below = 0
    for bucket, inside in enumerate(buckets[:-1]):
        below += inside
        edge = 1 << (bucket + 1)
        certainly = sum(1 for age in ages if age.high_ns < edge)
        possibly = sum(1 for age in ages if age.low_ns < edge)
        assert certainly <= below <= possibly, (
            f"{below} recorded ages lie below {edge} ns, by the client's clock {certainly} to {possibly} do"
        )
    low, high = sum(age.low_ns for age in ages), sum(age.high_ns for age in ages)
    assert low <= sum_ns <= high, f"sum of ages {sum_ns} ns, by the client's clock {low} to {high}"
    low, high = max(age.low_ns for age in ages), max(age.high_ns for age in ages)
    assert low <= max_ns <= high, f"largest age {max_ns} ns, by the client's clock {low} to {high}"
