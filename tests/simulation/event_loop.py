"""What the server's handlers need of an event loop, over simulated time."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from tests.simulation.schedule import S, Schedule


class SimFuture:
    """A value that will be there."""

    def __init__(self) -> None:
        self._is_done = False
        self._value: Any = None

    def __await__(self) -> Generator[None, None, Any]:
        while not self._is_done:
            yield
        return self._value

    def set_result(self, value: Any) -> None:
        """Bring the value."""
        self._is_done, self._value = True, value

    def done(self) -> bool:
        """Tell whether it is there."""
        return self._is_done

    def cancelled(self) -> bool:
        """Nobody cancels here."""
        return False


class Timer:
    """A call that is planned."""

    def __init__(self) -> None:
        self.is_cancelled = False

    def cancel(self) -> None:
        """Do without it."""
        self.is_cancelled = True


class SimLoop:
    """Stands where asyncio's loop does; `after` is called when handlers may be able to go on."""

    def __init__(self, schedule: Schedule, after: Callable[[], None]) -> None:
        self._schedule = schedule
        self._after = after

    def create_future(self) -> SimFuture:
        """Make a future."""
        return SimFuture()

    def call_later(self, delay_s: float, call: Callable[..., object], *arguments: Any) -> Timer:
        """Plan a call."""
        timer = Timer()

        def ring() -> None:
            if not timer.is_cancelled:
                call(*arguments)
                self._after()

        self._schedule.at(int(delay_s * S), ring)
        return timer

    def run_in_executor(self, _executor: object, read: Callable[[], Any]) -> SimFuture:
        """Read at once."""
        future = SimFuture()
        future.set_result(read())
        return future
