"""Where the server's time comes from.

Rules and leases use `now_ns`, which only moves forward and knows nothing of wall time.
`wall_ns` is for display, and for judging once the leases of a database written in 2021.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The seam through which all time reaches the server."""

    def now_ns(self) -> int:
        """Give the monotonic time in nanoseconds; its zero is arbitrary."""
        ...

    def wall_ns(self) -> int:
        """Give the wall time in nanoseconds since 1970."""
        ...


class SystemClock:
    """The machine's clocks; time asleep counts where the system has a boot-time clock."""

    def __init__(self) -> None:
        """Choose the boot-time clock if there is one."""
        self._clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now_ns(self) -> int:
        """Give the time since boot in nanoseconds."""
        return time.clock_gettime_ns(self._clock_id)

    def wall_ns(self) -> int:
        """Give the wall time in nanoseconds since 1970."""
        return time.time_ns()


class ManualClock:
    """A clock that stands still until it is moved; tests and simulation use it."""

    def __init__(self, now_ns: int = 10**15, wall_ns: int = 1_700_000_000 * 10**9) -> None:
        """Start at the given times, in nanoseconds."""
        self._now_ns = now_ns
        self._wall_ns = wall_ns

    def now_ns(self) -> int:
        """Give the monotonic time it was moved to."""
        return self._now_ns

    def wall_ns(self) -> int:
        """Give the wall time it was moved to."""
        return self._wall_ns

    def advance(self, seconds: float) -> None:
        """Move both clocks forward by `seconds`."""
        if seconds < 0:
            msg = f"time does not go back: {seconds} s"
            raise ValueError(msg)
        step_ns = round(seconds * 1e9)
        self._now_ns += step_ns
        self._wall_ns += step_ns

    def jump_wall(self, seconds: float) -> None:
        """Move only the wall clock, forward or back, as an administrator may."""
        self._wall_ns += round(seconds * 1e9)
