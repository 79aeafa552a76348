"""The thread that claims ahead for one pass, so that the next key is there when it is asked for."""

from __future__ import annotations

import atexit
import logging
import threading
import weakref
from typing import Any, Final

from run_once.key_pass import KeyPass
from run_once.threads import Background

logger = logging.getLogger(__name__)

JOIN_S: Final = 2.0
"""So long the end of a loop waits for a claim that is under way."""

_RUNNING: Final[weakref.WeakSet[ClaimAhead]] = weakref.WeakSet()


class ClaimAhead:
    """Steps a pass whenever keys may be wanted; the thread starts when that first happens."""

    def __init__(self, running: KeyPass[Any]) -> None:
        """Serve a pass from now on."""
        self._pass = running
        self._wake = threading.Event()
        self._is_closed = False
        self._thread = Background("run_once claims ahead")
        running.wake = self.wake
        if not _RUNNING:
            atexit.unregister(_close_all)
            # Before the sessions are closed, which were opened before.
            atexit.register(_close_all)
        _RUNNING.add(self)

    def wake(self) -> None:
        """Look at once."""
        if not self._is_closed:
            self._thread.start(self._run)
        if not self._wake.is_set():
            self._wake.set()

    def stop(self) -> None:
        """Claim nothing more."""
        self._is_closed = True
        self._pass.wake = None
        self._wake.set()

    def close(self) -> None:
        """End the thread; a claim under way may take a moment, and gives back what it gets."""
        self.stop()
        _RUNNING.discard(self)
        thread = self._thread.thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(JOIN_S)

    def _run(self) -> None:
        while not self._is_closed:
            self._wake.clear()
            try:
                pause_s = self._pass.step_ahead()
            except Exception:
                logger.exception("claiming ahead failed; keys are claimed when they are asked for")
                return
            if not self._is_closed:
                self._wake.wait(pause_s)


def stop_all() -> None:
    """Have nothing more claimed ahead, for the process is about to end."""
    for running in list(_RUNNING):
        running.stop()


def _close_all() -> None:
    for running in list(_RUNNING):
        running.close()
