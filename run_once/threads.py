"""Daemon threads that an interrupt of whoever starts them cannot leave half started."""

from __future__ import annotations

import threading
import time
from _thread import start_new_thread
from collections.abc import Callable
from functools import partial
from typing import Final

_COMES_WITHIN_S: Final = 1.0


def start_daemon(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread; it may take a moment until it runs.

    `Thread.start` waits for the new thread, and an interrupt in that may leave one that never runs:
    who counts on its work hangs. So another thread starts it, which no signal reaches.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    start_new_thread(thread.start, ())
    return thread


class Background:
    """One daemon thread at a time, started when there is work for it.

    Attributes:
        thread: The thread, from its first step until it ends; None: there is none.
    """

    def __init__(self, name: str) -> None:
        """Start nothing yet."""
        self.thread: threading.Thread | None = None
        self._name = name
        self._lock = threading.Lock()
        self._started_s: float | None = None

    def start(self, target: Callable[[], None]) -> None:
        """Start the thread, unless it runs or was started just before.

        Args:
            target: What it does. If more work may come while it ends, it calls `end` itself, under
                the lock under which others bring work.
        """
        if self.thread is not None:
            return
        now_s = time.monotonic()
        if self._started_s is None or now_s - self._started_s > _COMES_WITHIN_S:
            self._started_s = now_s  # before: the thread may end at once
            try:
                start_daemon(partial(self._run, target), self._name)
            except BaseException:
                self._started_s = None
                raise

    def end(self) -> None:
        """Note that the thread does nothing more."""
        self.thread = self._started_s = None

    def _run(self, target: Callable[[], None]) -> None:
        with self._lock:
            if self.thread is not None:
                return  # whoever started it was interrupted, and started another one
            self.thread = threading.current_thread()
        try:
            target()
        finally:
            if self.thread is threading.current_thread():
                self.end()
