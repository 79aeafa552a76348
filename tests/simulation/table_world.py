"""A world of real clients, leases and table in one thread, with a bad network and a bad server.

All of it is drawn from one seed: requests and replies are lost, delayed and delivered twice, the
server crashes before, behind and between commits, clocks run at different speeds, and workers are
paused for longer than their leases. The request path is the real one, from `LockClient` through
`LockTableService` to the engine; only gRPC, the event loop and the threads are left out.
"""

from __future__ import annotations

import random
from functools import partial
from typing import cast

from google.protobuf.message import Message

from distlock_proto import legacy_pb2
from distlock_proto import lock_table_pb2 as pb
from distlock_server import codec
from distlock_server.clock import ManualClock
from distlock_server.engines.base import decode_counter
from distlock_server.engines.memory import MemoryStore
from distlock_server.group import Group
from distlock_server.pending import Pending
from distlock_server.state import Done, Held, Reset, Seize
from run_once.answers import How
from run_once.client import LockClient
from run_once.errors import ServerUnavailableError
from run_once.lease import Lease, LeaseKeeper
from run_once.retrying import RetryPolicy
from run_once.session import Ending, Session
from tests.simulation.sim_server import BrokenPromiseError, CrashError, SimServer, SimTransport

KEYS = [b"a", b"b", b"c", b"d"]
OVERRULED = [b"%d" % number for number in range(6)]
"""Keys of clients of 2021, which overrule any lease; the database of 2021 has them already."""

_RETRY = RetryPolicy(total_s=6.0, attempt_s=2.0, first_backoff_s=0.1, max_backoff_s=0.5)
_MAX_DEPTH = 3


class DriftingClock:
    """A worker's clock: another zero, another speed."""

    def __init__(self, clock: ManualClock, rng: random.Random) -> None:
        self._clock = clock
        self._start_ns = clock.now_ns()
        self._zero_ns = rng.randrange(10**12)
        self._speed = rng.uniform(0.97, 1.03)

    def now_ns(self) -> int:
        """Give the worker's time."""
        return self._zero_ns + round((self._clock.now_ns() - self._start_ns) * self._speed)


class Worker:
    """A process that claims, renews and settles keys by chance."""

    def __init__(self, world: World, number: int) -> None:
        self._world = world
        client = LockClient(
            SimTransport(world),
            clock=DriftingClock(world.clock, world.rng),
            rng=random.Random(world.rng.random()),
            sleep=world.pass_time,
            retry=_RETRY,
            owner=f"worker {number}",
        )
        self.session = Session(client, LeaseKeeper(client, use_thread=False))
        self.leases: list[Lease] = []
        self.is_busy = False

    def act(self) -> None:
        """Do one thing."""
        self.is_busy = True
        acts = [self._claim, self._settle, self._renew, self._undo]
        try:
            self._world.rng.choices(acts, [4, 6, 4, 0.7])[0]()
        except ServerUnavailableError:
            pass  # the server was gone for long; the leases run out
        finally:
            self.is_busy = False

    def _claim(self) -> None:
        rng = self._world.rng
        token_floor = self._world.max_token
        claimed = self.session.claim(
            rng.sample(KEYS, rng.randint(1, len(KEYS))),
            ttl_s=rng.choice([0.5, 2.0, 5.0]),
            keep_alive=rng.random() < 0.7,
            max_grants=rng.randint(0, 2),
            ahead=rng.random() < 0.3,
        )
        for lease in claimed.leases:
            self._world.note_token(lease.token, token_floor, (lease.key, lease.grant.claim_id))
        self.leases += claimed.leases

    def _renew(self) -> None:
        """Renew what is due, some of it for another time than before."""
        rng = self._world.rng
        for lease in self.leases:
            if rng.random() < 0.2:
                lease.ttl_s = rng.choice([0.5, 5.0, 20.0])
            if rng.random() < 0.2:
                lease.start()
        if rng.random() < 0.2:
            self.session.keeper.renew_now(self.leases)
        else:
            self.session.keeper.step()

    def _settle(self) -> None:
        world, rng = self._world, self._world.rng
        self.leases = [lease for lease in self.leases if lease.is_open]
        if not self.leases:
            return
        chosen = rng.sample(self.leases, rng.randint(1, len(self.leases)))
        self.leases = [lease for lease in self.leases if lease not in chosen]
        hows: list[How] = ["complete", "complete", "complete", "fail", "release"]
        endings = [Ending(lease, rng.choice(hows)) for lease in chosen]
        for ending, answer in zip(endings, self.session.settle(endings), strict=True):
            if answer.state == pb.KEY_STATE_COMPLETED:
                world.note_completed(cast("Lease", ending.lease))

    def _undo(self) -> None:
        """Reset a done key, as a person would, or drop its result; also a plain lookup."""
        client, rng = self.session.client, self._world.rng
        known = dict(self._world.done)
        found = client.lookup(KEYS, want_infos=True)
        for info in found.infos:
            if info.key in known and self._world.done.get(info.key) == known[info.key]:
                self._world.check_done(info.key, info.token, info.state == pb.KEY_STATE_DONE)
        done = [info for info in found.infos if info.state == pb.KEY_STATE_DONE]
        for info in rng.sample(done, rng.randint(0, len(done))):
            self._world.note_undone(info.key, info.token)
            if rng.random() < 0.5:
                client.reset([info.key], found.revision)
            else:
                client.invalidate([(info.key, info.token)])


class World:
    """Everything, and what was promised so far."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = ManualClock()
        self.store = MemoryStore()
        if seed % 2:
            self.store.write({key: _lock_of_2021(key) for key in OVERRULED})
        self.late: list[tuple[str, Message]] = []
        self.is_stepping = self.is_committing = False
        self.max_token = 0
        self.done: dict[bytes, int] = {}
        self.n_crashes = self.n_completed = 0
        self._depth = 0
        self._grants: dict[int, tuple[bytes, bytes]] = {}
        self._undone: set[tuple[bytes, int]] = set()
        self._accepted: dict[bytes, set[int]] = {key: set() for key in KEYS}
        self._acknowledged_revision = 0
        self.server = SimServer(self)
        self.workers = [Worker(self, number) for number in range(3)]

    def run(self, n_events: int) -> None:
        """Let so many things happen."""
        for _ in range(n_events):
            self.interlude(1.0)
            self.check()

    # -- what happens -----------------------------------------------------------------------------

    def interlude(self, chance: float = 0.4) -> None:
        """Let others act while somebody waits."""
        if self._depth >= _MAX_DEPTH or self.rng.random() >= chance:
            return
        self._depth += 1
        try:
            idle = [worker for worker in self.workers if not worker.is_busy]
            event = self.rng.random()
            if event < 0.7 and idle:
                self.rng.choice(idle).act()
            elif event < 0.8 and self.late:
                method, request = self.late.pop(self.rng.randrange(len(self.late)))
                self.server.deliver(method, request)
            elif event < 0.9:
                self.pass_time(self.rng.choice([0.05, 0.3, 1.0, 6.0]))
            elif event < 0.95:
                self._overrule()
                if not self.is_committing:
                    self.step_table()
            elif not self.is_committing:
                self._restart(is_clean=self.rng.random() < 0.4)
        finally:
            self._depth -= 1

    def while_committing(self) -> None:
        """Let others act between a group's run and its write, and perhaps crash."""
        self.is_committing = True
        try:
            self.interlude()
            self.may_crash(0.02)
        finally:
            self.is_committing = False

    def may_crash(self, chance: float) -> None:
        """End the server's process by chance."""
        if self.rng.random() < chance:
            raise CrashError

    def step_table(self) -> None:
        """Run and write one group, or count a piece of an old database."""
        self.is_stepping = True
        try:
            self.server.table.step_once()
        except CrashError:
            self._restart(is_clean=False)
        finally:
            self.is_stepping = False

    def pass_time(self, seconds: float) -> None:
        """Move all clocks, and look that no lease is believed twice."""
        self.clock.advance(seconds)
        self._check_leases()

    def _restart(self, *, is_clean: bool) -> None:
        """Start a new server over what is durable."""
        self.n_crashes += not is_clean
        if is_clean:
            self.server.table.close()
        self.server = SimServer(self)
        self.check()

    def _overrule(self) -> None:
        """Do what clients of 2021 may: seize and reset, several in a transaction that may fail."""
        commands: list[Reset | Seize] = [Reset(2**64), Seize(bytes(16), 0), Seize(bytes(16), 10**9)]
        n_steps = self.rng.randint(1, 4)
        steps = [(self.rng.choice(OVERRULED), self.rng.choice(commands)) for _ in range(n_steps)]
        run = partial(_overrule_step, steps=steps, fails=self.rng.random() < 0.3)
        self.server.table.submit(OVERRULED, run, partial(self._take_tokens, self.max_token))

    def _take_tokens(self, token_floor: int, pending: Pending[list[int]]) -> None:
        for token in pending.value or () if pending.error is None else ():
            self.note_token(token, token_floor, (b"seized", self.rng.randbytes(16)))

    # -- what was promised ------------------------------------------------------------------------

    def note_token(self, token: int, token_floor: int, grant: tuple[bytes, bytes]) -> None:
        """Check a token against those that were known before its claim was made."""
        if token <= token_floor or self._grants.setdefault(token, grant) != grant:
            raise BrokenPromiseError(f"token {token} for {grant} is not new")
        self.max_token = max(self.max_token, token)

    def note_completed(self, lease: Lease) -> None:
        """Check an accepted completion against those before."""
        key, token = lease.key, lease.token
        self.n_completed += 1
        self._accepted[key].add(token)
        standing = {one for one in self._accepted[key] if (key, one) not in self._undone}
        if len(standing) > 1:
            raise BrokenPromiseError(f"key {key!r}: completions {standing} were all accepted")
        if token in standing:
            self.done[key] = token

    def note_undone(self, key: bytes, token: int) -> None:
        """Note that a completion may be gone from here on."""
        self._undone.add((key, token))
        if self.done.get(key) == token:
            del self.done[key]

    def check_done(self, key: bytes, token: int, is_done: bool) -> None:
        """Check that an acknowledged completion is still there."""
        if not is_done or token != self.done[key]:
            raise BrokenPromiseError(f"key {key!r}: the completion {self.done[key]} is gone")

    def durable_revision(self) -> int:
        """Give the revision that a crash would leave."""
        return decode_counter(self.store.get([codec.REVISION_KEY])[0])

    def check(self) -> None:
        """Check everything."""
        self._check_leases()
        revision = self.server.table.revision
        if revision < self._acknowledged_revision:
            raise BrokenPromiseError(f"the revision went back to {revision}")
        self._acknowledged_revision = revision
        for key in list(self.done):
            record = self.server.table.store.peek(key)
            self.check_done(key, record.token if record else 0, isinstance(record, Done))
        self._check_counts()

    def _check_leases(self) -> None:
        """Check that a believed lease is the only one, and the one on disk."""
        believed: dict[bytes, Lease] = {}
        for worker in self.workers:
            for lease in worker.leases:
                if not lease.held:
                    continue
                other = believed.setdefault(lease.key, lease)
                record = self.server.table.store.peek(lease.key)
                if other is not lease:
                    raise BrokenPromiseError(f"{lease} and {other} are both believed")
                if not isinstance(record, Held) or record.token != lease.token:
                    raise BrokenPromiseError(f"{lease} is believed, on disk is {record}")

    def _check_counts(self) -> None:
        """Check counters and the index of held keys against the records."""
        store = self.server.table.store
        if self.is_committing or not store.is_counted:
            return
        counts, _ = store.count(b"")
        if counts != store.count_range(b"", b""):
            raise BrokenPromiseError(f"counters {counts}, records {store.count_range(b'', b'')}")


def _lock_of_2021(key: bytes) -> bytes:
    lock = legacy_pb2.Lock(global_id=key.decode())
    lock.expires_in.seconds = 0 if key < b"3" else 20
    lock.acquired_since.seconds = 1_700_000_000 - 5
    return lock.SerializeToString()


def _overrule_step(txn: Group, steps: list[tuple[bytes, Reset | Seize]], fails: bool) -> list[int]:
    tokens = []
    for key, command in steps:
        _, after, outcome = txn.apply(key, command)
        if outcome.is_new_grant and after is not None:
            tokens.append(after.token)
    if fails:
        raise ValueError("a request that fails behind its changes")
    return tokens
