"""Calls of several threads that travel in one request.

A thread that finds no request under way sends its own at once, by itself. Else its call waits in
line, and when the request comes back, whoever is first in line takes along all that may travel with
it. Threads that have just come back may call again at once: if they were several, the next request
waits for them, a millisecond at most. No thread of ours is needed.

Who leads may be interrupted: another that travels with it repeats the request, so requests must be
harmless to repeat. What comes back for somebody who is gone is handed to `drop`.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from types import FrameType
from typing import Any, Final, Generic, TypeVar

from run_once.errors import ServerUnavailableError

ItemT = TypeVar("ItemT")
AnswerT = TypeVar("AnswerT")

MAX_TRIPS: Final = 1
"""So many requests are under way before others wait in line."""

MAX_TOGETHER: Final = 1_000
"""Keys in one request that several calls share, at most."""

LINGER_S: Final = 0.001
"""So long a request waits for those who came back just before, if they were several."""

PATIENCE_S: Final = 1.0
"""Who stood in line for so long sends its call by itself, so that no bound on time grows."""


_BACK_WITHIN_S: Final = 0.002
"""Who came back longer ago is not waited for: it has other things to do."""


class _Rider(Generic[ItemT]):
    """A call of one thread.

    Attributes:
        item: What is sent.
        names: Keys that no other call in the same request may name.
        like: Calls travel together if this is equal.
        thread: The thread that made it.
        trip: The request it travels in; None: it waits in line.
        is_gone: It was interrupted: nobody waits for its answer.
    """

    __slots__ = ("_signal", "is_gone", "item", "like", "names", "thread", "trip")

    def __init__(self, item: ItemT, names: Sequence[bytes], like: Hashable, thread: int) -> None:
        self.item = item
        self.names = names
        self.like = like
        self.thread = thread
        self.trip: _Trip[ItemT] | None = None
        self.is_gone = False
        self._signal: Any = None

    def prepare(self) -> None:
        """Make it possible to wait."""
        self._signal = threading.Lock()
        self._signal.acquire()

    def wait(self, timeout_s: float) -> bool:
        """Wait to be woken; False after so long."""
        woken: bool = self._signal.acquire(timeout=timeout_s)
        return woken

    def wake(self) -> None:
        """Have its thread look at its trip; the yard's lock is held."""
        if self._signal is not None and self._signal.locked():
            self._signal.release()


class _Trip(Generic[ItemT]):
    """One request.

    Attributes:
        riders: The calls in it, in order.
        leader: The one whose thread sends it.
        has_left: Nobody gets in any more.
        outcome: One answer for each rider, or why there is none; None: it is under way.
    """

    __slots__ = ("has_left", "leader", "outcome", "riders")

    def __init__(self, leader: _Rider[ItemT]) -> None:
        self.riders = [leader]
        self.leader = leader
        self.has_left = False
        self.outcome: Sequence[Any] | Exception | None = None


class _Yard(Generic[ItemT]):
    """The calls of one process: who waits in line, and what is under way.

    Any step may be cut short by an interrupt: `leave` can be repeated, and `look` does it for
    those who could not.

    Attributes:
        calls: By thread, the frame of the call that it is in; or was, if that was interrupted.
        is_old: It is that of the parent process.
    """

    def __init__(self, max_trips: int, max_names: int, linger_s: float) -> None:
        self.calls: dict[int, FrameType] = {}
        self.is_old = False
        self._lock = threading.Lock()
        self._max_trips = max_trips
        self._max_names = max_names
        self._trips: list[_Trip[ItemT]] = []
        self._line: deque[_Rider[ItemT]] = deque()
        self._linger_s = linger_s
        self._lingering: _Trip[ItemT] | None = None
        self._n_expected = 1
        self._came_back_s = 0.0

    def is_inside(self, thread: int) -> bool:
        """Tell whether a thread is in a call."""
        call = self.calls.get(thread)
        frame = None if call is None else sys._current_frames().get(thread)  # noqa: SLF001
        while frame is not None and frame is not call:
            frame = frame.f_back
        return frame is not None

    def join(self, rider: _Rider[ItemT]) -> None:
        """Give a call a request of its own, or have it wait in line."""
        with self._lock:
            for trip in tuple(self._trips):
                if trip.leader.thread == rider.thread:  # of a call that was cut short at its end
                    self._end_or_pass_on(trip)
            if len(self._trips) < self._max_trips and not self._line:
                is_alone = self._n_expected == 1 or self._is_long_ago()
                if not is_alone:
                    rider.prepare()
                self._start(rider).has_left = is_alone
                return
            rider.prepare()
            self._line.append(rider)
            if self._lingering is not None and self._are_all_here():
                self._lingering.leader.wake()

    def _is_long_ago(self) -> bool:
        """Tell whether those who came back last have had the time to call again."""
        return time.monotonic() - self._came_back_s > _BACK_WITHIN_S

    def _are_all_here(self) -> bool:
        """Tell whether as many want to travel as did when the last request came back."""
        return len(self._line) + 1 >= self._n_expected

    def _linger(self, trip: _Trip[ItemT]) -> None:
        """Wait a moment for those who came back just before: they may call again at once."""
        with self._lock:
            if self._are_all_here() or self._linger_s <= 0:
                return
            self._lingering = trip
        trip.leader.wait(self._linger_s)
        self._lingering = None

    def depart(self, trip: _Trip[ItemT]) -> list[_Rider[ItemT]]:
        """Take along whoever may travel with the leader, once; give all that travel."""
        if trip.has_left:
            return trip.riders
        self._linger(trip)
        with self._lock:
            like, names = trip.leader.like, set(trip.leader.names)
            for rider in list(self._line):
                is_fitting = rider.like == like and names.isdisjoint(rider.names)
                if is_fitting and len(names) + len(rider.names) <= self._max_names:
                    names.update(rider.names)
                    rider.trip = trip
                    trip.riders.append(rider)
            self._line = deque(rider for rider in self._line if rider.trip is None)
            trip.has_left = True
        return trip.riders

    def look(self, rider: _Rider[ItemT]) -> bool:
        """See to it that somebody leads; False: the call stood in line for too long, and is out."""
        if self.is_old:
            return False
        with self._lock:
            for trip in tuple(self._trips):
                is_own = trip.leader.thread == rider.thread and trip.leader is not rider
                if is_own or not self.is_inside(trip.leader.thread):  # own: of a call cut short
                    self._end_or_pass_on(trip)
            if rider.trip is not None:
                return True
            self._line.remove(rider)
            return False

    def leave(self, rider: _Rider[ItemT]) -> None:
        """Let a call end, answered or not; leaving twice is no error."""
        trip = rider.trip
        is_led = trip is not None and trip.leader is not rider
        if self.is_old or (is_led and trip is not None and trip.outcome is not None):
            return
        with self._lock:
            trip = rider.trip
            if trip is None:
                if rider in self._line:
                    self._line.remove(rider)
            elif trip.leader is rider:
                self._end_or_pass_on(trip)
            elif trip.outcome is None:
                rider.is_gone = True

    def _end_or_pass_on(self, trip: _Trip[ItemT]) -> None:
        """End a request whose leader is through with it; unanswered, another one leads."""
        if trip.outcome is None:
            trip.leader.is_gone = True
            heir = next((rider for rider in trip.riders if not rider.is_gone), None)
            if heir is not None:
                trip.leader = heir
                heir.wake()
                return
        if trip in self._trips:
            self._trips.remove(trip)
            self._n_expected = len(trip.riders) + len(self._line)
            if self._n_expected > 1:
                self._came_back_s = time.monotonic()
        while self._line and len(self._trips) < self._max_trips:
            rider = self._line[0]
            if rider.trip is None:
                self._start(rider)
            self._line.popleft()
            rider.wake()
        for rider in trip.riders:
            rider.wake()

    def _start(self, rider: _Rider[ItemT]) -> _Trip[ItemT]:
        """Let a call lead a new request."""
        trip = _Trip(rider)
        self._trips.append(trip)
        rider.trip = trip
        return trip


class Gather(Generic[ItemT, AnswerT]):
    """Lets calls of several threads travel in one request."""

    def __init__(
        self,
        send: Callable[[Sequence[ItemT]], list[AnswerT]],
        drop: Callable[[ItemT, AnswerT], None] | None = None,
        *,
        max_trips: int = MAX_TRIPS,
        max_names: int = MAX_TOGETHER,
        linger_s: float = LINGER_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Gather calls.

        Args:
            send: Sends items in one request and gives their answers in order; it is called again
                with the same items if an interrupt ended it.
            drop: Takes the answer to an item that nobody waits for any more.
            max_trips: So many requests are under way before others wait.
            max_names: Names in one request that several calls share.
            linger_s: A request waits for so long for those who came back just before.
            patience_s: Who waits for longer travels alone.
        """
        self._send = send
        self._drop = drop
        self._max_trips = max_trips
        self._max_names = max_names
        self._linger_s = linger_s
        self._patience_s = patience_s
        self._yard: _Yard[ItemT] = _Yard(max_trips, max_names, linger_s)
        _watch(self)

    def call(self, item: ItemT, names: Sequence[bytes], like: Hashable = None) -> AnswerT:
        """Send an item, with others if there are any.

        Args:
            item: What is sent.
            names: Keys that no other item in the same request may name.
            like: Items travel together if this is equal.

        Returns:
            Its answer.

        Raises:
            ServerUnavailableError: No answer within the bound on retries; each call raises its own.
            Exception: What `send` raises for this item alone.
        """
        me = threading.get_ident()
        yard = self._yard
        if me in yard.calls and yard.is_inside(me):
            return self._send([item])[0]  # a signal's handler must not wait for its own thread
        rider = _Rider(item, names, like, me)
        try:
            yard.calls[me] = sys._getframe()  # noqa: SLF001 (the only way to it)
            trip = self._ride(yard, rider)
            return self._send([item])[0] if trip is None else self._take(trip, rider)
        finally:
            yard.calls.pop(me, None)
            rider.trip = None  # else each call would be left to the garbage collector

    def forget(self) -> None:
        """Begin anew in a forked child: the threads of the other calls do not exist here."""
        self._yard.is_old = True
        self._yard = _Yard(self._max_trips, self._max_names, self._linger_s)

    def _ride(self, yard: _Yard[ItemT], rider: _Rider[ItemT]) -> _Trip[ItemT] | None:
        """Travel, as the leader if it comes to that; None: there was no request to go with."""
        try:
            yard.join(rider)
            while (trip := rider.trip) is None or trip.outcome is None:
                if trip is not None and trip.leader is rider:
                    self._lead(yard, trip)
                elif not (rider.wait(self._patience_s) or yard.look(rider)):
                    return None
            return trip
        finally:
            yard.leave(rider)

    def _lead(self, yard: _Yard[ItemT], trip: _Trip[ItemT]) -> None:
        """Send a request; an error is the outcome for all that travel in it."""
        riders = yard.depart(trip)
        try:
            trip.outcome = self._send([rider.item for rider in riders])
        except Exception as error:
            if len(riders) == 1:
                raise
            trip.outcome = error

    def _take(self, trip: _Trip[ItemT], rider: _Rider[ItemT]) -> AnswerT:
        """Take an item's own answer out of what came back."""
        outcome = trip.outcome
        assert outcome is not None
        if isinstance(outcome, ServerUnavailableError):
            if trip.leader is rider:
                raise outcome
            raise ServerUnavailableError(*outcome.args) from outcome
        if isinstance(outcome, Exception):
            # One of them may be why: by itself each gets the answer that it deserves.
            return self._send([rider.item])[0]
        if trip.leader is rider and self._drop is not None:
            for other, answer in zip(trip.riders, outcome, strict=True):
                if other.is_gone:
                    self._drop(other.item, answer)
        answered: AnswerT = outcome[trip.riders.index(rider)]
        return answered


_GATHERS: Final[weakref.WeakSet[Gather[Any, Any]]] = weakref.WeakSet()


def _watch(gather: Gather[Any, Any]) -> None:
    """Have a forked child forget the calls of its parent."""
    _GATHERS.add(gather)


def _forget_all() -> None:
    for gather in tuple(_GATHERS):
        gather.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
