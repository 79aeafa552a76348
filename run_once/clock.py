"""Where the client's time comes from.

Leases are counted by `now_ns`. It goes on while the machine sleeps, where the system has such a
clock: a lease that ran out during the sleep is then seen as expired at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol


class Clock(Protocol):
    """The seam through which time reaches client, leases and tasks."""

    def now_ns(self) -> int:
        """Give the monotonic time in nanoseconds; its zero is arbitrary."""
        ...


class SystemClock:
    """The machine's boot-time clock, or its monotonic one where there is none.

    Attributes:
        now_ns: Gives the time since boot in nanoseconds; no function in Python, since loops over
            short bodies ask several times for each.
    """

    now_ns: Callable[[], int]

    def __init__(self) -> None:
        """Choose the clock."""
        clock_id = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
        self.now_ns = partial(time.clock_gettime_ns, clock_id)
