"""Daemon threads that an interrupt of whoever starts them cannot leave half started."""

from __future__ import annotations

import threading
from _thread import start_new_thread
from collections.abc import Callable


def start_daemon(target: Callable[[], None], name: str) -> threading.Thread:
    """Start a daemon thread; it may take a moment until it runs.

    `Thread.start` waits for the new thread, and an interrupt in that may leave one that never runs:
    who counts on its work hangs. So another thread starts it, which no signal reaches.
    """
    thread = threading.Thread(target=target, name=name, daemon=True)
    start_new_thread(thread.start, ())
    return thread
