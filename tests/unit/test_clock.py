"""The server's clocks."""

from __future__ import annotations

import time

import pytest

from distlock_server.clock import Clock, ManualClock, SystemClock


def test_system_clock_only_moves_forward() -> None:
    """Monotonic readings never go back, whatever lies between them."""
    clock: Clock = SystemClock()
    readings = [clock.now_ns() for _ in range(1_000)]
    assert readings == sorted(readings)


def test_system_clock_gives_wall_time_apart() -> None:
    """Wall time is the system's, between two readings of it."""
    before_ns = time.time_ns()
    wall_ns = SystemClock().wall_ns()
    assert before_ns <= wall_ns <= time.time_ns()


def test_system_clock_counts_time_asleep_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """The boot-time clock is taken if there is one, else the monotonic one."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        assert SystemClock()._clock_id == time.CLOCK_BOOTTIME
        monkeypatch.delattr(time, "CLOCK_BOOTTIME")
    clock = SystemClock()
    assert clock._clock_id == time.CLOCK_MONOTONIC
    before_ns = time.monotonic_ns()
    assert before_ns <= clock.now_ns() <= time.monotonic_ns()


def test_manual_clock_stands_still() -> None:
    """It moves only when it is told to, and both of its times together."""
    clock = ManualClock(now_ns=100, wall_ns=2_000)
    assert (clock.now_ns(), clock.wall_ns()) == (100, 2_000)
    assert (clock.now_ns(), clock.wall_ns()) == (100, 2_000)
    clock.advance(1.5)
    assert (clock.now_ns(), clock.wall_ns()) == (1_500_000_100, 1_500_002_000)


def test_manual_clock_does_not_go_back() -> None:
    """A negative step is refused and changes nothing."""
    clock = ManualClock(now_ns=100)
    with pytest.raises(ValueError, match="time does not go back"):
        clock.advance(-0.1)
    assert clock.now_ns() == 100


def test_wall_clock_may_jump_alone() -> None:
    """An administrator who sets the wall clock does not move leases."""
    clock = ManualClock(now_ns=100, wall_ns=5 * 10**9)
    clock.jump_wall(-3)
    assert (clock.now_ns(), clock.wall_ns()) == (100, 2 * 10**9)
    clock.jump_wall(10)
    assert (clock.now_ns(), clock.wall_ns()) == (100, 12 * 10**9)
