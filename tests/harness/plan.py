"""What an open-loop client is asked to do, and what it saw. Times are CLOCK_MONOTONIC ns."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Self


class Outcome(StrEnum):
    ANSWERED = "answered"  # the whole answer, and the right one
    WRONG = "wrong"  # an answer to something else
    REFUSED = "refused"  # ECONNREFUSED
    RESET = "reset"  # RST after the handshake
    EOF = "eof"  # closed before the whole answer
    TIMEOUT = "timeout"  # patience ran out
    LEFT = "left"  # closed by plan, without waiting for an answer
    FAILED = "failed"  # the client's own want: fds, addresses


class GiveUp(StrEnum):
    """What a client does when its patience ends."""

    FIN = "fin"
    RESET = "reset"
    SILENT = "silent"  # the socket stays open and says nothing: behind a NAT, on a crashed host


class Send(StrEnum):
    LINE = "line"  # "ID\n", answered by "ID\n"
    HTTP = "http"  # GET /ID, answered by 200 and "ID\n"
    HTTP_CLOSE = "http_close"  # the same with Connection: close
    LINE_FIN = "line_fin"  # the line, then a FIN at once (`nc -N`)
    NOTHING = "nothing"  # no byte, but waits for one


class Then(StrEnum):
    """What a client does with an answered connection."""

    CLOSE = "close"
    HOLD = "hold"  # keeps it for hold_ns, then closes


@dataclass(slots=True)
class Plan:
    """`count` connections at `rate` a second, whatever becomes of the earlier ones."""

    host: str
    port: int
    rate: float
    count: int
    patience_ns: int = 0  # from before connect(); 0: none
    give_up: GiveUp = GiveUp.FIN
    send: Send = Send.LINE
    then: Then = Then.CLOSE
    hold_ns: int = 0
    leave_after_ns: int = 0  # give up this long after the handshake, by `give_up`; counts as LEFT
    linger_ns: int = 1_000_000_000  # after the last outcome, how long late events are still noted
    prefix: str = "r"  # of the ids
    source: str = ""  # address to connect from

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, given: dict[str, Any]) -> Self:
        given = dict(given)
        for name, kind in (("give_up", GiveUp), ("send", Send), ("then", Then)):
            given[name] = kind(given[name])
        return cls(**given)


@dataclass(slots=True)
class Attempt:
    """One connection. 0 means that it never came to that."""

    id: str
    due_ns: int  # when the schedule wanted it
    before_connect_ns: int
    connected_ns: int = 0  # the client saw its handshake finished
    acked_ns: int = 0  # the peer's kernel had acknowledged data: its handshake was finished before this
    outcome_ns: int = 0
    outcome: Outcome = Outcome.FAILED
    late: str = ""  # what came after a silent give-up or during the hold: "answered", "reset", "eof"
    late_ns: int = 0

    @property
    def latency_ns(self) -> int:
        return self.outcome_ns - self.before_connect_ns

    @property
    def lag_ns(self) -> int:
        """How late the client itself was."""
        return self.before_connect_ns - self.due_ns


@dataclass(slots=True)
class Result:
    attempts: list[Attempt] = field(default_factory=list)

    def outcomes(self) -> Counter[str]:
        return Counter(attempt.outcome.value for attempt in self.attempts)

    def of(self, outcome: Outcome) -> list[Attempt]:
        return [attempt for attempt in self.attempts if attempt.outcome is outcome]

    def lag_ns(self, share: float) -> int:
        """The `share` quantile of the client's own lag."""
        return quantile([attempt.lag_ns for attempt in self.attempts], share)

    def to_json(self) -> list[list[Any]]:
        return [
            [a.id, a.due_ns, a.before_connect_ns, a.connected_ns, a.acked_ns, a.outcome_ns, a.outcome.value,
             a.late, a.late_ns]
            for a in self.attempts
        ]  # fmt: skip

    @classmethod
    def from_json(cls, given: list[list[Any]]) -> Self:
        attempts = []
        for name, due, before, connected, acked, decided, outcome, late, late_ns in given:
            attempts.append(
                Attempt(name, due, before, connected, acked, decided, Outcome(outcome), late, late_ns)
            )
        return cls(attempts)


def quantile(values: list[int], share: float) -> int:
    """The value below which `share` of the values lie (nearest rank); 0 for none."""
    if not values:
        return 0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
