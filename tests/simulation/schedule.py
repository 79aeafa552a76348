"""Simulated real time, and what happens when.

Client code blocks, so whoever waits runs the loop that lets the others act: waits are nested. Two
kinds of events keep that sound. *Acts* are steps of a process that may wait in turn; *events*
never wait. While the server writes, only events run, since an act could then wait for an answer
that the write below it on the stack holds up.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, TypeAlias

MS: Final = 1_000_000
S: Final = 1_000_000_000

_MAX_DEPTH: Final = 6

_Entry: TypeAlias = tuple[int, int, Callable[[], None]]


class Schedule:
    """All that is to happen, in order of time, then of planning.

    Attributes:
        now_ns: Real time since the world began. It never goes back.
        n_events: Acts and events so far.
    """

    def __init__(self) -> None:
        self.now_ns = 0
        self.n_events = 0
        self._n_planned = 0
        self._depth = 0
        self._events: list[_Entry] = []
        self._acts: list[_Entry] = []

    def at(self, delay_ns: int, run: Callable[[], None]) -> None:
        """Plan an event, which never waits."""
        self._n_planned += 1
        heapq.heappush(self._events, (self.now_ns + delay_ns, self._n_planned, run))

    def act_at(self, delay_ns: int, run: Callable[[], None]) -> None:
        """Plan an act, which may wait."""
        self._n_planned += 1
        heapq.heappush(self._acts, (self.now_ns + delay_ns, self._n_planned, run))

    def wait(self, is_over: Callable[[], bool], for_ns: int, *, events_only: bool = False) -> None:
        """Let others go on until something is over, or so much time has passed."""
        end_ns = self.now_ns + for_ns
        self._depth += 1
        try:
            while not is_over():
                may_act = not events_only and self._depth < _MAX_DEPTH
                source = self._next_source(may_act=may_act)
                if source is None or source[0][0] > end_ns:
                    self.now_ns = max(self.now_ns, end_ns)
                    return
                when_ns, _, run = heapq.heappop(source)
                # An act that had to wait for its turn comes late.
                self.now_ns = max(self.now_ns, when_ns)
                self.n_events += 1
                run()
        finally:
            self._depth -= 1

    def can_nest(self) -> bool:
        """Tell whether others can act while who asks waits."""
        return self._depth + 1 < _MAX_DEPTH

    def _next_source(self, *, may_act: bool) -> list[_Entry] | None:
        """Give the queue whose head comes first."""
        if not may_act or not self._acts:
            return self._events or None
        if not self._events or self._acts[0] < self._events[0]:
            return self._acts
        return self._events
