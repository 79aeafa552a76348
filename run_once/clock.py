"""Where the client's time comes from.

Leases are counted by `now_ns`. It goes on while the machine sleeps, where the system has such a
clock: a lease that ran out during the sleep is then seen as expired at once.
"""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """The seam through which time reaches client, leases and tasks."""

    def now_ns(self) -> int:
        """Give the monotonic time in nanoseconds; its zero is arbitrary."""
        ...


class SystemClock:
    """The machine's boot-time clock, or its monotonic one where there is none."""

    def __init__(self) -> None:
        """Choose the clock."""
        self._clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

    def now_ns(self) -> int:
        """Give the time since boot in nanoseconds."""
        return time.clock_gettime_ns(self._clock_id)
