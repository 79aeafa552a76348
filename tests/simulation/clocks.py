"""Clocks of the simulated machines: other zeros, other speeds, a wall clock that jumps."""

from __future__ import annotations

import random
from typing import Final

from tests.simulation.schedule import S, Schedule

WALL_START_NS: Final = 1_700_000_000 * S
_DAY_S: Final = 86_400


class HostClock:
    """The clock of one machine from one boot to the next.

    Attributes:
        rate: Its seconds in one real second.
    """

    def __init__(self, schedule: Schedule, zero_ns: int, rate: float) -> None:
        self.rate = rate
        self._schedule = schedule
        self._start_ns = schedule.now_ns
        self._zero_ns = zero_ns

    def now_ns(self) -> int:
        """Give the machine's monotonic time."""
        elapsed_ns = self._schedule.now_ns - self._start_ns
        return self._zero_ns + (elapsed_ns if self.rate == 1 else int(elapsed_ns * self.rate))

    def real_ns(self, own_ns: int) -> int:
        """Turn a length of this machine's time into one of real time."""
        return own_ns if self.rate == 1 else int(own_ns / self.rate)


class Wall:
    """The server's wall clock; it draws its jumps by itself, so that they change nothing else."""

    def __init__(self, schedule: Schedule, seed: int, *, jumps: bool) -> None:
        self._schedule = schedule
        rng = random.Random(f"wall {seed}")
        self._jumps: list[tuple[int, int]] = []
        when_ns = 0
        for _ in range(30 if jumps else 0):
            when_ns += rng.randrange(8 * S)
            by_s = rng.choice([-_DAY_S, -30, -3, -0.5, 0.5, 3, 30, _DAY_S])
            self._jumps.append((when_ns, int(by_s * S)))

    def now_ns(self) -> int:
        """Give the wall time."""
        now_ns = self._schedule.now_ns
        jumped_ns = sum(by_ns for when_ns, by_ns in self._jumps if when_ns <= now_ns)
        return WALL_START_NS + now_ns + jumped_ns


class ServerClock:
    """What the server reads: its machine's monotonic clock and the wall clock."""

    def __init__(self, host: HostClock, wall: Wall) -> None:
        self.now_ns = host.now_ns
        self.wall_ns = wall.now_ns
