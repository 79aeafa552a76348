"""Clients of 2021, whose database has locks already, and who overrule any lease.

The promises do not hold for their keys; that tokens, counters and transactions stay sound does.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from distlock_proto import legacy_pb2
from distlock_server.group import Group
from distlock_server.pending import Pending
from distlock_server.state import Reset, Seize
from tests.simulation.clocks import WALL_START_NS
from tests.simulation.schedule import MS, S

if TYPE_CHECKING:
    from tests.simulation.world import World

OVERRULED: Final = [b"%d" % number for number in range(6)]
"""Their keys; they sort before those of the workers."""


def write_locks_of_2021(world: World) -> None:
    """Put locks into a disk that no server of ours has seen."""
    world.disk.synced.write({key: _lock_of_2021(key) for key in OVERRULED})


class Overruler:
    """Seizes and resets, several keys in a transaction that may fail."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._tokens: set[int] = set()
        world.schedule.at(0, self._act)

    def _act(self) -> None:
        world, rng = self._world, self._world.rng
        if world.is_ending:
            return
        world.schedule.at(rng.randrange(100, 1_500) * MS, self._act)
        if world.server is None:
            return
        commands: list[Reset | Seize] = [Reset(2**64), Seize(bytes(16), 0), Seize(bytes(16), S)]
        n_steps = rng.randint(1, 4)
        steps = [(rng.choice(OVERRULED), rng.choice(commands)) for _ in range(n_steps)]
        run = partial(_run_steps, steps=steps, fails=rng.random() < 0.3)
        world.server.table.submit(OVERRULED, run, partial(self._take, world.promises.max_token))

    def _take(self, floor: int, pending: Pending[list[int]]) -> None:
        """Check tokens against those that were known before they were asked for."""
        for token in pending.value or () if pending.error is None else ():
            if token <= floor or token in self._tokens:
                self._world.broken("I2", f"token {token} is not new")
            self._tokens.add(token)


def _lock_of_2021(key: bytes) -> bytes:
    lock = legacy_pb2.Lock(global_id=key.decode())
    lock.expires_in.seconds = 0 if key < b"3" else 20
    lock.acquired_since.seconds = WALL_START_NS // S - 5
    return lock.SerializeToString()


def _run_steps(txn: Group, steps: list[tuple[bytes, Reset | Seize]], *, fails: bool) -> list[int]:
    tokens = []
    for key, command in steps:
        _, after, outcome = txn.apply(key, command)
        if outcome.is_new_grant and after is not None:
            tokens.append(after.token)
    if fails:
        raise ValueError("a request that fails behind its changes")
    return tokens
