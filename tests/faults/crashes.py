"""One life of a server after the other: load, a fault, a restart, and what must hold then."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from distlock_server.failpoints import VARIABLE
from tests.faults.power import Dropped, PowerCut
from tests.faults.traffic import (
    Client,
    Profile,
    Recorder,
    check_counts,
    claim_new,
    read_back,
)
from tests.servers import ServerProcess

MIN_OPS: Final = 30
"""A fault after fewer operations says nothing."""

_SYNCS: Final = (MIN_OPS + 20, 220)
"""A server that cuts its own power does so in the place of one of these: the start has some of its
own before the first operation."""


class Rig:
    """A server whose power can be cut again and again."""

    def __init__(self, folder: Path, shim: Path, *arguments: str) -> None:
        self.server = ServerProcess(folder / "server", *arguments)
        self.power = PowerCut(folder / "server", shim, folder / "recording")
        self.recorder = Recorder(folder / "history")


class Load:
    """Clients of one life of a server."""

    def __init__(
        self, server: ServerProcess, recorder: Recorder, profile: Profile, rng: random.Random
    ) -> None:
        """Start the clients."""
        self._recorder = recorder
        self._before = len(recorder.ops)
        self._clients = [
            Client(server.address, recorder, profile, rng.randrange(2**32))
            for _ in range(profile.n_clients)
        ]
        for client in self._clients:
            client.start()

    @property
    def n_ops(self) -> int:
        """Operations of this life so far."""
        return len(self._recorder.ops) - self._before

    def end(self) -> None:
        """Wait until all clients have noticed that the server is gone."""
        for client in self._clients:
            client.join()
        if self._recorder.errors:
            raise self._recorder.errors[0]

    def stop(self) -> None:
        """End the clients while the server runs."""
        for client in self._clients:
            client.stop()
        self.end()


def check_after_restart(server: ServerProcess, recorder: Recorder, token_before: int) -> None:
    """Check a restarted server against everything that any client ever saw."""
    read_back(server.address, recorder)
    recorder.check()
    check_counts(server.address)
    assert claim_new(server.address, recorder) > token_before, "a token was given out twice"
    recorder.check()


def check_next_life(rig: Rig) -> None:
    """Start a server after a crash, and check it against everything before."""
    rig.server.environment = {}
    token = rig.recorder.max_token
    rig.server.start()
    check_after_restart(rig.server, rig.recorder, token)


def crash_at(rig: Rig, point: str, number: int, profile: Profile, rng: random.Random) -> int:
    """Start a server that will crash at a point; check what was before; load it until it does."""
    rig.server.environment = rig.power.environment() | {VARIABLE: f"{point}:{number}"}
    token = rig.recorder.max_token
    rig.server.start()
    check_after_restart(rig.server, rig.recorder, token)
    load = Load(rig.server, rig.recorder, profile, rng)
    assert rig.server.wait(40) == -signal.SIGKILL, f"the server did not come to {point}"
    return lose_power(rig, load, rng)


def lose_power(rig: Rig, load: Load, rng: random.Random) -> int:
    """Let the clients of a server that has ended end, and take away what it had not synced.

    Returns:
        How many operations came before.
    """
    load.end()
    rig.recorder.server_is_dead()
    rig.power.apply(rng)
    return load.n_ops


def cut_power(
    server: ServerProcess,
    power: PowerCut,
    recorder: Recorder,
    profile: Profile,
    rng: random.Random,
    before_cut: Callable[[Load], None] = lambda load: None,
    *,
    is_control: bool = False,
) -> tuple[Dropped, int]:
    """Load a server, cut its power at a random moment, start it again.

    Half of the cuts come from outside at any moment, half in the place of a sync.

    Args:
        server: The server, not running.
        power: Its power.
        recorder: Where the clients write.
        profile: What they do.
        rng: Chooses the moment, and what is left.
        before_cut: Called while the load runs.
        is_control: Cut from outside, and leave all names, so that the database opens again.

    Returns:
        What the cut took, and how many operations came before it.
    """
    dies_by_itself = not is_control and rng.random() < 0.5
    server.environment = power.environment(rng.randint(*_SYNCS) if dies_by_itself else 0)
    server.start()
    load = Load(server, recorder, profile, rng)
    before_cut(load)
    if dies_by_itself:
        server.wait(60)
    else:
        recorder.await_ops(rng.randint(MIN_OPS, 400))
        server.kill()
    load.end()
    recorder.server_is_dead()
    assert load.n_ops >= MIN_OPS, "too little happened before the cut"
    dropped = power.apply(rng, undo_names=not is_control)
    server.environment = {}
    return dropped, load.n_ops
