"""What goes wrong with machines and processes, and when."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from tests.simulation.clocks import HostClock
from tests.simulation.network import Faults
from tests.simulation.schedule import MS, S

if TYPE_CHECKING:
    import random

    from tests.simulation.world import World

# The slowest worker and the fastest server differ by 4.9 %: less than the margin of 5 %.
_SLOWEST: Final = 0.976
_FASTEST: Final = 1.024
_BEYOND: Final = (0.8, 1.3)

_MILDNESS: Final = (0.3, 1.0, 1.0, 2.0)
_FIRST_CRASH_MS: Final = (500, 4_000)
_DOWN_MS: Final = (0, 10, 200, 1_500, 4_000)
_PAUSE_MS: Final = (100, 800, 3_000, 7_000)
_CUT_OFF_MS: Final = (200, 1_000, 3_000, 8_000)


def draw_faults(rng: random.Random) -> Faults:
    """Draw how bad the network is."""
    factor = rng.choice(_MILDNESS)
    return Faults(0.04 * factor, 0.05 * factor, 0.06 * factor, 0.03 * factor, 0.02)


def draw_rate(rng: random.Random) -> float:
    """Draw the speed of a clock within the margin."""
    return rng.choice((1.0, 1.0, _SLOWEST, _FASTEST, rng.uniform(_SLOWEST, _FASTEST)))


def draw_bad_rate(rng: random.Random) -> float:
    """Draw the speed of a clock beyond the margin."""
    return rng.choice(_BEYOND)


def boot(world: World, rate: float) -> HostClock:
    """Give the clock of a machine that boots now."""
    return HostClock(world.schedule, world.rng.randrange(10**13), rate)


class Chaos:
    """Ends, stops and cuts off whoever it meets, until the world ends."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._harms = (
            self._crash,
            self._restart,
            self._kill,
            self._leave,
            self._pause,
            self._cut_off,
            self._nothing,
        )
        first, last = _FIRST_CRASH_MS
        world.schedule.at(world.rng.randrange(first, last) * MS, self._crash)
        world.schedule.at(0, self._act)

    def _act(self) -> None:
        """Do harm, and plan the next."""
        if self._world.is_ending:
            return
        rng = self._world.rng
        self._world.schedule.at(rng.randrange(50, 1_200) * MS, self._act)
        rng.choices(self._harms, (0.3, 0.2, 0.5, 0.3, 1, 1, 2))[0]()
        if self._world.misses(self._world.n_crashes):
            self._crash()
        if self._world.misses(self._world.n_expired):
            self._kill()  # its leases run out

    def _nothing(self) -> None:
        """Leave them alone."""

    def _crash(self) -> None:
        """Cut the server's power, or only kill its process: then its clock runs on."""
        world, rng = self._world, self._world.rng
        if world.server is None or world.is_ending:
            return
        world.stop_server(is_clean=False)
        if rng.random() < 0.6:
            world.reboot()
        world.schedule.at(rng.choice(_DOWN_MS) * MS, world.start_server)

    def _restart(self) -> None:
        """Stop the server well and start it again."""
        world = self._world
        if world.server is not None and not world.server.is_stepping:
            world.stop_server(is_clean=True)
            world.schedule.at(world.rng.choice(_DOWN_MS) * MS, world.start_server)

    def _kill(self) -> None:
        """Kill a worker, and start another in its place."""
        self._world.replace_worker(self._world.rng.randrange(len(self._world.workers)))

    def _leave(self) -> None:
        """Let a worker end well, in the midst of what it does, and start another."""
        self._world.schedule.act_at(
            0, partial(self._world.dismiss_worker, self._world.rng.randrange(3))
        )

    def _pause(self) -> None:
        """Stop a worker for a while, perhaps for longer than its leases."""
        self._world.rng.choice(self._world.workers).pause(self._world.rng.choice(_PAUSE_MS) * MS)

    def _cut_off(self) -> None:
        """Part a worker from the server, perhaps for longer than its leases."""
        worker = self._world.rng.choice(self._world.workers)
        worker.cut_off(self._world.rng.choice(_CUT_OFF_MS) * MS)


QUIET_NS: Final = 10 * S
"""After so long nothing that was sent before is still on its way."""
