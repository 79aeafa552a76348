"""Daemon threads: one at a time, and whole whatever interrupts whoever starts them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from run_once import threads
from run_once.threads import Background, start_daemon
from tests.other_client import until

BOUND_S = 20.0


def test_a_daemon_of_that_name() -> None:
    """The thread runs, does not keep the process, and is found by its name."""
    seen: list[threading.Thread] = []
    thread = start_daemon(lambda: seen.append(threading.current_thread()), "the name")
    until(lambda: bool(seen))
    assert seen == [thread]
    assert thread.daemon
    assert thread.name == "the name"


def test_one_at_a_time_and_again_when_it_has_ended() -> None:
    """Starting it while it runs does nothing; once it has ended another one starts."""
    go = threading.Event()
    runs: list[int] = []

    def work() -> None:
        runs.append(threading.get_ident())
        go.wait(BOUND_S)

    background = Background("worker")
    for _ in range(10):
        background.start(work)
    until(lambda: background.thread is not None)
    background.start(work)
    go.set()
    until(lambda: background.thread is None)
    assert len(runs) == 1
    background.start(work)
    until(lambda: len(runs) == 2)


def test_one_that_does_not_come_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt may swallow a start; the second of two that come late ends at once."""
    started: list[Callable[[], None]] = []
    monkeypatch.setattr(threads, "start_daemon", lambda run, _name: started.append(run))
    now_s = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    background = Background("worker")
    runs: list[str] = []

    def work() -> None:
        runs.append("began")
        started[1]()

    background.start(work)
    background.start(work)
    assert len(started) == 1
    now_s[0] += 2
    background.start(work)
    assert len(started) == 2
    started[0]()
    assert runs == ["began"]
    assert background.thread is None


def test_one_that_ends_at_once_is_started_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As is one whose start was interrupted."""
    runs: list[str] = []
    background = Background("worker")
    monkeypatch.setattr(threads, "start_daemon", lambda run, _name: run())
    for _ in range(2):
        background.start(lambda: runs.append("began"))
    assert len(runs) == 2

    def interrupted(_run: Callable[[], None], _name: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threads, "start_daemon", interrupted)
        with pytest.raises(KeyboardInterrupt):
            background.start(lambda: None)
    background.start(lambda: runs.append("began"))
    assert len(runs) == 3
