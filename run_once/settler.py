"""Completes items in the background: many in one request, in the order in which they ended.

What is queued here is done, and its lease is still kept alive; it is not acknowledged yet. A
process that dies leaves it to be done again. `flush` waits for the acknowledgements: a loop does so
before it ends, before it waits for others, and when it is left; a session before it closes.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Protocol

from run_once.answers import SettleAnswer
from run_once.lease import Lease
from run_once.process import THIS
from run_once.threads import Background

logger = logging.getLogger(__name__)

MAX_SETTLED: Final = 2_000
"""Items in one request; what comes meanwhile goes into the next."""

MAX_QUEUED: Final = 10_000
"""So many wait to be settled at most; then whoever brings another one waits, too."""

LINGER_S: Final = 0.01
"""So long a request waits for more, if another was sent just before; alone it is sent at once."""

_ENOUGH: Final = 1_000
"""A request of so many waits for no more."""

_IDLE_END_S: Final = 10.0


class Ended(Protocol):
    """An item whose work is done. Those of one class that are sent together hear together."""

    @staticmethod
    def take_answers(ended: Sequence[Any], answers: Sequence[SettleAnswer]) -> None:
        """Hear what the server said of each of these; called in the settler's thread."""
        ...

    @staticmethod
    def take_error(ended: Sequence[Any], error: Exception) -> None:
        """Hear that the server could not be asked about these."""
        ...


class Settler:
    """A queue of items, and the thread that completes them.

    `step` does the work and needs no thread: with `use_thread=False` whoever flushes calls it. A
    simulation stands in for the thread: it overrides `_start`, `_now_s` and `_await_change`.
    """

    def __init__(
        self,
        complete: Callable[[Sequence[Lease]], list[SettleAnswer]],
        *,
        use_thread: bool = True,
    ) -> None:
        """Prepare; the thread starts with the first item, and ends some time after the last.

        Args:
            complete: Completes leases in one request.
            use_thread: Start a thread.
        """
        self._complete = complete
        self._use_thread = use_thread
        self._pid = THIS.pid
        # Not `with` of the condition itself: an interrupt in that can leave it locked.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        self._queue: deque[tuple[Lease, Ended]] = deque()
        self._n_sending = 0
        self._n_flushing = 0
        self._is_idle = True
        self._sent_s = 0.0
        self._thread = Background("run_once settler")

    def put(self, lease: Lease, ended: Ended) -> None:
        """Queue an item with its lease; waits while too many are queued."""
        queue = self._queue
        queue.append((lease, ended))
        if self._use_thread and (self._is_idle or len(queue) >= _ENOUGH):
            with self._mutex:
                self._start()
                self._changed.notify_all()
                while len(queue) >= MAX_QUEUED:
                    self._changed.wait(1.0)

    def flush(self, timeout_s: float | None = None) -> int:
        """Wait until everything that was queued is answered, or could not be sent.

        Args:
            timeout_s: Wait for so long at most; None: as long as it takes, which the client's
                bound on retries limits.

        Returns:
            How many items are still unanswered.
        """
        if self._pid != THIS.pid:
            return 0
        while not self._use_thread and self.step():
            pass
        end_s = None if timeout_s is None else self._now_s() + timeout_s
        with self._mutex:
            if self._queue and self._use_thread:
                self._start()  # whoever brought it may have been interrupted
            self._n_flushing += 1
            self._changed.notify_all()
            try:
                while self._queue or self._n_sending:
                    left_s = 1.0 if end_s is None else end_s - self._now_s()
                    if left_s <= 0:
                        break
                    self._await_change(min(left_s, 1.0))
                return len(self._queue) + self._n_sending
            finally:
                self._n_flushing -= 1

    def _now_s(self) -> float:
        """Give the time by which a flush is bounded; a simulation has its own."""
        return time.monotonic()

    def _await_change(self, timeout_s: float) -> None:
        """Let the thread go on for so long; a simulation lets the others act meanwhile."""
        self._changed.wait(timeout_s)

    def step(self) -> bool:
        """Send what is queued, as far as it fits into one request.

        Returns:
            Whether there was anything.
        """
        with self._mutex:
            part = [self._queue.popleft() for _ in range(min(len(self._queue), MAX_SETTLED))]
            self._n_sending = len(part)
        if not part:
            return False
        try:
            self._send(part)
        finally:
            with self._mutex:
                self._n_sending = 0
                self._changed.notify_all()
        return True

    def _send(self, part: list[tuple[Lease, Ended]]) -> None:
        ended = [ended for _, ended in part]
        try:
            answers = self._complete([lease for lease, _ in part])
        except Exception as error:  # noqa: BLE001 - whoever waits for the answer raises it
            for kind, run in _runs(ended):
                kind.take_error(ended[run], error)
            return
        for kind, run in _runs(ended):
            kind.take_answers(ended[run], answers[run])

    def _start(self) -> None:
        self._thread.start(self._run)

    def _run(self) -> None:
        """Be the thread."""
        while True:
            with self._mutex:
                if not self._await_items():
                    self._thread.end()
                    return
            try:
                self.step()
            except Exception:
                logger.exception("settling items failed")
            self._sent_s = time.monotonic()

    def _await_items(self) -> bool:
        """Wait for enough to send; False: nothing came for a long time."""
        end_s = time.monotonic() + _IDLE_END_S
        # Whoever brings an item looks at this afterwards, and wakes the thread.
        self._is_idle = True
        while not self._queue:
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return False
            self._changed.wait(left_s)
        self._is_idle = False
        send_s = self._sent_s + LINGER_S
        while len(self._queue) < _ENOUGH and not self._n_flushing:
            left_s = send_s - time.monotonic()
            if left_s <= 0:
                break
            self._changed.wait(left_s)
        return True


def _runs(ended: Sequence[Ended]) -> Iterator[tuple[type[Ended], slice]]:
    """Part items into stretches of one class."""
    first = 0
    for kind, run in itertools.groupby(map(type, ended)):
        end = first + sum(1 for _ in run)
        yield kind, slice(first, end)
        first = end
