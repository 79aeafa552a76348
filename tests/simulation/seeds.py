"""Runs seeds and counts what happened in them; `python -m tests.simulation.seeds 17` shows one."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from unittest import mock

from distlock_server import oldbase
from run_once import live
from tests.simulation.history import BrokenPromiseError, Restart
from tests.simulation.loop_threads import MustWait
from tests.simulation.observed import describe
from tests.simulation.schedule import S
from tests.simulation.world import World

FAILING_SEEDS: Final = Path(__file__).with_name("failing_seeds.txt")


@dataclass
class Tally:
    """What happened in some seeds.

    Attributes:
        void: Seeds in which too little happened to prove anything.
        violations: What was broken, by seed.
    """

    seeds: int = 0
    void: list[int] = field(default_factory=list)
    events: int = 0
    commands: int = 0
    operations: int = 0
    crashes: int = 0
    lost_replies: int = 0
    expiries: int = 0
    cpu_s: float = 0.0
    violations: dict[int, BaseException] = field(default_factory=dict)

    def add(self, seed: int, world: World) -> None:
        """Count the world of a seed, which has ended."""
        self.seeds += 1
        if world.is_void():
            self.void.append(seed)
        self.events += world.schedule.n_events
        self.commands += world.n_commands
        self.operations += len(world.history)
        self.crashes += world.n_crashes
        self.lost_replies += world.n_lost_replies
        self.expiries += world.n_expired

    def __str__(self) -> str:
        rate = self.events / self.cpu_s if self.cpu_s else 0.0
        return (
            f"{self.seeds} seeds, {len(self.void)} void, {len(self.violations)} violations; "
            f"{self.events} events ({rate:.0f} a second), {self.commands} commands, "
            f"{self.operations} requests answered, {self.crashes} crashes, "
            f"{self.lost_replies} lost replies, {self.expiries} expiries; {self.cpu_s:.1f} s"
        )


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Prepare the process: small pieces of old databases, no log, no pauses for garbage.

    What loops register is registered apart.
    """
    was_enabled, level = gc.isenabled(), logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    gc.disable()
    gc.collect()
    gc.freeze()  # what is imported need not be looked at each time
    try:
        with (
            mock.patch.object(oldbase, "PIECE", 2),
            mock.patch.object(live, "_registry", live.LiveItems()),
        ):
            yield
    finally:
        logging.disable(level)
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def run_seeds(seeds: Iterable[int], *, stop_at_first: bool = False) -> Tally:
    """Run worlds, and collect what they break."""
    tally = Tally()
    with simulated():
        began_s = time.process_time()
        for seed in seeds:
            world = World(seed)
            try:
                with mock.patch.object(live, "_registry", live.LiveItems()):
                    world.run()
            except (Exception, MustWait) as error:  # noqa: BLE001 - a bug may break more than a promise
                tally.violations[seed] = error
            tally.add(seed, world)
            vars(world).clear()  # most of it is then freed at once, without a search for cycles
            if tally.seeds % 5 == 0:  # more garbage would not fit into the processor's cache
                gc.collect()
            if tally.violations and stop_at_first:
                break
        tally.cpu_s = time.process_time() - began_s
    return tally


def failing_seeds() -> list[int]:
    """Give every seed that ever failed."""
    lines = FAILING_SEEDS.read_text().splitlines()
    return [int(line.split()[0]) for line in lines if line.strip() and not line.startswith("#")]


def show(seed: int, key: bytes | None = None) -> None:
    """Print what happened in a seed, all of it or what concerns a key."""
    world = World(seed)
    error: BrokenPromiseError | None = None
    with simulated():
        try:
            world.run()
        except BrokenPromiseError as broken:
            error = broken
    for entry in world.history:
        if isinstance(entry, Restart):
            print(f"-- restart at revision {entry.revision}")
            continue
        items = [item for item in entry.items if key is None or item.key == key]
        if items:
            print(f"{entry.left_ns / S:9.3f} s, revision {entry.revision}: {entry.method}")
            for item in items:
                print(f"    {describe(item)}")
    print(f"clocks: server {world.host.rate}, workers {[w.clock.rate for w in world.workers]}")
    print(error or "every promise was kept")


def main() -> None:
    """Show the seed that is named, or one key of it."""
    arguments = sys.argv[1:]
    if not 1 <= len(arguments) <= 2:
        sys.exit("usage: python -m tests.simulation.seeds SEED [KEY]")
    show(int(arguments[0]), arguments[1].encode() if len(arguments) > 1 else None)


if __name__ == "__main__":
    main()
