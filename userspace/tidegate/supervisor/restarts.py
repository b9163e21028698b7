"""When a worker that died is started again: exponential back-off and a limit, without I/O."""

from __future__ import annotations

from dataclasses import dataclass

# A worker that lived this long was healthy: the next death starts from the beginning.
HEALTHY_AFTER_NS = 10_000_000_000
FIRST_DELAY_NS = 100_000_000
MAX_DELAY_NS = 30_000_000_000
# Deaths in a row, each young, after which starting it again helps nobody: about four minutes.
CRASH_LOOP_LIMIT = 12


@dataclass(slots=True)
class RestartPolicy:
    """Of one worker. The first death after a healthy life is mended at once."""

    young_deaths: int = 0

    def died(self, lived_ns: int) -> int | None:
        """Ns to wait before the replacement starts; None: give up."""
        if lived_ns >= HEALTHY_AFTER_NS:
            self.young_deaths = 0
            return 0
        self.young_deaths += 1
        if self.young_deaths >= CRASH_LOOP_LIMIT:
            return None
        if self.young_deaths == 1:
            return 0
        return min(FIRST_DELAY_NS << (self.young_deaths - 2), MAX_DELAY_NS)
