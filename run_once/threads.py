"""Work in daemon threads, which no signal reaches, for those who may be interrupted anywhere."""

from __future__ import annotations

import threading
import time
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeVar, cast

T = TypeVar("T")

_COMES_WITHIN_S: Final = 1.0
_SIGNAL_POLL_S: Final = 0.2


def may_be_interrupted() -> bool:
    """Tell whether this is the thread in which Python runs signal handlers."""
    return threading.get_ident() == threading.main_thread().ident


class Outcome(Generic[T]):
    """What came of a call in another thread."""

    def __init__(self, value: T | None = None, error: BaseException | None = None) -> None:
        self._value = value
        self._error = error

    def value(self) -> T:
        """Return what the call returned, or raise what it raised."""
        if self._error is None:
            return cast("T", self._value)
        try:
            raise self._error
        finally:
            del self._error  # its traceback names this frame


def await_outcome(told: SimpleQueue[Outcome[T]]) -> Outcome[T]:
    """Wait for what another thread tells; signals interrupt the wait."""
    while True:
        # Not without a bound: a signal that comes just before the wait does not end it.
        with suppress(Empty):
            return told.get(timeout=_SIGNAL_POLL_S)


class Elsewhere:
    """Has calls made by threads that no signal reaches, at two hand-overs each.

    A call that was interrupted goes on there, and what comes of it is dropped.
    """

    def __init__(self) -> None:
        """Start no thread yet."""
        self._idle: list[SimpleQueue[Any]] = []

    def run(self, call: Callable[[], T]) -> T:
        """Have a call made; return what it returns, or raise what it raises."""
        told: SimpleQueue[Outcome[T]] = SimpleQueue()
        try:
            asked = self._idle.pop()
        except IndexError:
            asked = SimpleQueue()
            try:
                start_new_thread(self._serve, (asked,))
            except RuntimeError:  # the interpreter ends, or the system gives no more threads
                return call()
        asked.put((call, told))
        return await_outcome(told).value()

    def forget_threads(self) -> None:
        """Begin anew in a forked child, where the threads do not exist."""
        self._idle = []

    def _serve(self, asked: SimpleQueue[Any]) -> None:
        """Make one call after the other, until the process ends."""
        while True:
            call, told = asked.get()
            try:
                outcome = Outcome(call())
            except BaseException as error:  # noqa: BLE001 (told to the thread that asked)
                outcome = Outcome(error=error)
            self._idle.append(asked)  # first: whoever is told may ask again at once
            told.put(outcome)
            del call, told, outcome


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
