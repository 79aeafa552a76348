"""Gives leases back when a signal ends the process in the middle of a loop.

Python ends a process on SIGTERM and SIGHUP at once, without a word to anybody: no `finally` runs.
While a loop runs in the main thread, a handler gives back what is held and then lets the signal do
what it would have done. Where somebody else handles the signal, or ignores it, nothing is changed:
such a handler raises (the loop then closes as on any exception) or goes on (the item is settled).
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

RELEASE_BOUND_S: Final = 3.0
"""The signal goes on after so long, even if the server has not answered."""

_LOCK_HELD_S: Final = 0.25
"""For so long the interrupted thread stands still."""

_MEANWHILE_S: Final = 0.05

SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)


class ExitSignals:
    """Handlers of a loop, or of several loops one inside of the other."""

    def __init__(self, release: Callable[[], None]) -> None:
        """Prepare handlers; nothing is changed yet.

        Args:
            release: Gives back what is held. It runs in a thread of its own, since the signal may
                have interrupted the main thread while it held a lock.
        """
        self._release = release
        self._pid = os.getpid()
        self._depth = 0
        self._handled: list[signal.Signals] = []
        self._giver: threading.Thread | None = None
        self._is_given_back = False

    def enter(self) -> bool:
        """Begin a loop; put handlers in where the signals would just end the process.

        Returns:
            Whether `leave` is to be called; not outside of the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            return False
        if os.getpid() != self._pid:  # a fork within a loop
            self._pid, self._depth = os.getpid(), 0
            self._giver = None
        self._depth += 1
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, self._handle)
                self._handled.append(number)
        return True

    def leave(self) -> None:
        """End a loop; with the last one put back what was there, unless others came meanwhile."""
        self._depth = max(0, self._depth - 1)
        if self._depth or threading.current_thread() is not threading.main_thread():
            return
        for number in self._handled:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, signal.SIG_DFL)
        self._handled.clear()

    @property
    def is_ending(self) -> bool:
        """Whether a signal is ending this process: nothing new may be claimed."""
        return self._giver is not None and os.getpid() == self._pid

    def _handle(self, number: int, _frame: FrameType | None) -> Any:
        """Give back, and die of the signal as before.

        It may have interrupted this thread while it held a lock that giving back needs. So after a
        moment the thread goes on, and is interrupted again when all is given back.
        """
        if os.getpid() == self._pid and not self._is_given_back:
            if self._giver is None:
                self._giver = threading.Thread(
                    target=self._give_back, args=(number,), name="run_once-release", daemon=True
                )
                self._giver.start()
            self._giver.join(_LOCK_HELD_S)
            if not self._is_given_back:
                return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    def _give_back(self, number: int) -> None:
        releaser = threading.Thread(target=self._release_twice, daemon=True)
        releaser.start()
        releaser.join(RELEASE_BOUND_S)
        self._is_given_back = True
        main = threading.main_thread().ident
        if main is not None:
            signal.pthread_kill(main, number)

    def _release_twice(self) -> None:
        """Give back what is held, and then what was being claimed meanwhile."""
        self._release()
        time.sleep(_MEANWHILE_S)
        self._release()
