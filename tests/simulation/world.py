"""A world of real workers and a real server in one thread, all of it drawn from one seed.

`World(seed).run()` shows what a seed does, the same each time: no thread, no system clock and no
set of strings decides anything. The request path is the real one, from `Session` through
`LockClient` and `LockTableService` to the engine; only gRPC, the event loop and the threads are
left out. See docs/simulation.md.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, NoReturn

from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from tests.simulation import chaos
from tests.simulation.clocks import ServerClock, Wall
from tests.simulation.disk import Disk
from tests.simulation.history import BrokenPromiseError, Restart, check_history
from tests.simulation.loop_worker import LoopWorker
from tests.simulation.network import NO_FAULTS
from tests.simulation.observed import READING, Operation, items_of
from tests.simulation.overrule import Overruler, write_locks_of_2021
from tests.simulation.promises import LATE_NS, Promises
from tests.simulation.restart import check_whole, keys_to_remove, keys_to_reset, survivor
from tests.simulation.schedule import S, Schedule
from tests.simulation.server import Flight, SimServer
from tests.simulation.worker import Worker

N_WORKERS: Final = 3
N_COMMANDS: Final = 300
KEYS: Final = [b"k%02d" % number for number in range(20)]

PATIENCE: Final = 600
"""After so many commands the chaos brings about what has not come by itself."""

_MAX_COMMANDS: Final = 6_000
_MAX_TIME_NS: Final = 3_000 * S
"""A seed that goes on for longer is void."""


class World:
    """Everything.

    Attributes:
        rng: Draws whatever happens, but for the wall clock's jumps.
        schedule: Real time, and what is planned.
        disk: The server's disk.
        host: The clock of the server's machine, since its last boot.
        server: The server's process; None while it is down.
        workers: Those that live.
        faults: How bad the network is.
        history: All that was answered, and all restarts.
        is_ending: Nothing goes wrong any more.
        n_commands: What workers asked of one key each; retries do not count.
    """

    def __init__(self, seed: int, *, wall_jumps: bool = True) -> None:
        self.rng = random.Random(seed)
        self.schedule = Schedule()
        self.disk = Disk(self.rng)
        self.promises = Promises(self, KEYS)
        self.history: list[Operation | Restart] = []
        self.blocks: dict[bytes, Sequence[bytes]] = {}
        self.is_ending = False
        self._n_lives = 0
        self.n_commands = self.n_crashes = self.n_lost_replies = 0
        self.faults = chaos.draw_faults(self.rng)
        self._wall = Wall(self.schedule, seed, jumps=wall_jumps)
        self.host = chaos.boot(self, chaos.draw_rate(self.rng))
        self.server_clock = ServerClock(self.host, self._wall)
        if seed % 2:
            write_locks_of_2021(self)
            Overruler(self)
        self.server: SimServer | None = SimServer(self)
        chaos.Chaos(self)
        self._n_loops = self.rng.choice((0, 1, 1, 2, 2, 3))
        self.workers = [self._new_worker(number) for number in range(N_WORKERS)]

    @property
    def n_expired(self) -> int:
        """Keys that were granted to others because a lease had run out."""
        return self.promises.n_regranted

    def run(self) -> None:
        """Let things happen until enough did, then let all be well and check the rest.

        Raises:
            BrokenPromiseError: A promise was broken.
        """
        self.schedule.wait(self.is_enough, _MAX_TIME_NS)
        self._end_well()
        check_history(self.history)

    def is_void(self) -> bool:
        """Tell whether too little happened to prove anything."""
        return self.n_commands < N_COMMANDS or not self._has_met_all()

    def is_enough(self) -> bool:
        """Tell whether workers may rest."""
        is_done = self.n_commands >= N_COMMANDS and self._has_met_all()
        return is_done or self.n_commands >= _MAX_COMMANDS

    def misses(self, n_times: int) -> bool:
        """Tell whether what happened so often must be brought about, since it did not come."""
        return not n_times and not self.is_ending and self.n_commands >= PATIENCE

    def _has_met_all(self) -> bool:
        return min(self.n_crashes, self.n_lost_replies, self.n_expired) > 0

    # -- what happens to machines and processes ---------------------------------------------------

    def stop_server(self, *, is_clean: bool) -> None:
        """End the server's process; whatever it was writing is there wholly or not at all."""
        server = self.server
        assert server is not None
        self.server = None
        self.n_crashes += not is_clean
        self._acknowledged = server.table.revision
        unanswered = server.stop(is_clean=is_clean)
        self._removed, self._reset = keys_to_remove(unanswered), keys_to_reset(unanswered)
        self._unanswered = list(server.unanswered.values())
        self.disk.cut_power(self.rng)

    def reboot(self) -> None:
        """Start the server's machine again: its monotonic clock begins anew."""
        self.host = chaos.boot(self, self.host.rate)
        self.server_clock = ServerClock(self.host, self._wall)

    def start_server(self) -> None:
        """Start a new process over what is on disk, and look at what that is."""
        if self.server is not None:
            return
        self.server = server = SimServer(self)
        store = server.table.store
        check_whole(self._unanswered, store.peek, self._acknowledged, self._removed)
        self._n_lives += 1
        held = store.held
        records = [(key, held[key].record if key in held else store.peek(key)) for key in KEYS]
        for key, record in records:
            self.promises.take_restart(key, record, may_be_reset=key in self._reset)
        found = (survivor(k, record, may_be_gone=k in self._removed) for k, record in records)
        self.history.append(
            Restart(server.table.revision, self._n_lives, 0, len(self.history), tuple(found))
        )

    def replace_worker(self, number: int) -> None:
        """Kill a worker and start another in its place."""
        self.workers[number].kill()
        self.workers[number] = self._new_worker(number)

    def dismiss_worker(self, number: int) -> None:
        """Let a worker end well and start another in its place, unless that happens already."""
        worker = self.workers[number]
        if not self.is_ending:
            worker.leave()
            if self.workers[number] is worker and not self.is_ending:
                self.workers[number] = self._new_worker(number)

    def _new_worker(self, number: int, *, is_idle: bool = False) -> Worker:
        is_trusted = self.rng.random() >= 0.1
        rate = (chaos.draw_rate if is_trusted else chaos.draw_bad_rate)(self.rng)
        make = LoopWorker if number < self._n_loops else Worker
        worker = make(self, number, KEYS, chaos.boot(self, rate), is_trusted=is_trusted)
        if not is_idle:
            worker.start()
        return worker

    # -- what is seen -----------------------------------------------------------------------------

    def take_reply(self, flight: Flight, reply: Message, ran_ns: int) -> None:
        """Note a reply that leaves the server, and check it."""
        items = items_of(flight.method, flight.request, reply, self.blocks)
        if not items:
            return
        revision: int = reply.revision  # type: ignore[attr-defined]
        operation = Operation(
            revision,
            self._n_lives,
            2 if flight.method in READING else 1,
            len(self.history),
            flight.method,
            items,
            flight.arrived_ns,
            self.schedule.now_ns,
            flight.revision,
        )
        self.history.append(operation)
        self.promises.take(operation, flight.request, ran_ns)

    def broken(self, promise: str, text: str) -> NoReturn:
        """Say that a promise was broken."""
        raise BrokenPromiseError(promise, text)

    # -- the end ----------------------------------------------------------------------------------

    def _end_well(self) -> None:
        """Kill the workers, mend the network, and see that every key that is not done is free."""
        self.is_ending = True
        self.faults = NO_FAULTS
        for worker in self.workers:
            worker.kill()
        if self.server is not None:
            self.stop_server(is_clean=False)
        self.start_server()
        self._pass(chaos.QUIET_NS)
        self._pass(max(0, self.promises.last_end_ns - self.schedule.now_ns) + LATE_NS)
        heir = self._new_worker(N_WORKERS, is_idle=True)
        answer = heir.session.client.claim(KEYS, ttl_s=1.0)
        for key, state in zip(KEYS, answer.states, strict=True):
            if state not in {pb.KEY_STATE_GRANTED, pb.KEY_STATE_DONE}:
                self.broken("I10", f"key {key!r} cannot be had in the end: {state}")
        self._check_counts()
        self.stop_server(is_clean=False)
        self.start_server()

    def _pass(self, for_ns: int) -> None:
        self.schedule.wait(lambda: False, for_ns)

    def _check_counts(self) -> None:
        """Check the kept counters against the records."""
        assert self.server is not None
        store = self.server.table.store
        if store.is_counted:
            counts, records = store.count(b"")[0], store.count_range(b"", b"")
            if counts != records:
                self.broken("I7", f"counters say {counts}, records {records}")
