"""Notices consumers that ask for the next item before they are through with the last one.

A plain loop settles an item by asking for the next. A consumer that reads ahead asks early, and
would so declare work done that has not begun. Not every such consumer can be noticed (`list(...)`
looks like a loop); those of the standard library, joblib and torch can.
"""

from __future__ import annotations

import inspect
import sys
import threading
from types import FrameType
from typing import Final

UNSAFE_MODULES: Final = (
    "concurrent.futures",
    "dask",
    "joblib",
    "multiprocessing.pool",
    "torch.utils.data",
)
"""Consumers in these modules read ahead."""

ADVICE: Final = (
    'asking for the next item settles the last one as done. Use settle="explicit" and '
    "notify_success(item) once an item's work is done"
)


class ReadAheadWatch:
    """Watches who asks one iterator for items."""

    def __init__(self) -> None:
        self._first_thread: int | None = None
        self._frames_to_look_at = 2

    def suspicion(self) -> str:
        """Say what is suspicious of the present request for an item; empty: nothing.

        Must be called by the iterator's `__next__` itself: its caller's frame is looked at.
        """
        me = threading.get_ident()
        if self._first_thread is None:
            self._first_thread = me
        if me != self._first_thread:
            return "items are asked for from another thread than the first one was"
        if self._frames_to_look_at:
            self._frames_to_look_at -= 1
            module = _asking_module(sys._getframe(2))  # noqa: SLF001 (no other way to the caller)
            if module.startswith(UNSAFE_MODULES):
                return f"{module} reads ahead"
        return ""


def _asking_module(frame: FrameType | None) -> str:
    """Name the module that asks, generators between it and us seen through."""
    name = ""
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        is_generator = frame.f_code.co_flags & inspect.CO_GENERATOR
        if not is_generator or name.startswith(UNSAFE_MODULES):
            break
        frame = frame.f_back
    return name
