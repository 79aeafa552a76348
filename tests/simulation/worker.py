"""A worker's process: the real session, client and lease keeper, doing things by chance."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import How
from run_once.client import LockClient
from run_once.errors import ServerUnavailableError
from run_once.lease import Lease, LeaseKeeper
from run_once.retrying import RetryPolicy
from run_once.session import Ending, Session
from tests.simulation.clocks import HostClock
from tests.simulation.network import SimTransport
from tests.simulation.schedule import MS, S

if TYPE_CHECKING:
    from tests.simulation.world import World

_RETRY: Final = RetryPolicy(total_s=6.0, attempt_s=2.0, first_backoff_s=0.1, max_backoff_s=0.5)
_TTLS_S: Final = (0.5, 1.0, 2.0, 5.0)
_LONGER_S: Final = (0.5, 5.0, 12.0)
_PAUSES_MS: Final = (0, 0, 1, 5, 20, 60, 200, 500)
_WAITS_S: Final = (0.0, 0.5, 3.0, 30.0)
_NAP_NS: Final = 1 * S
_HOWS: Final[tuple[How, ...]] = ("complete", "complete", "complete", "fail", "release")


class ProcessGone(BaseException):
    """The worker's process was killed in the midst of what it did; nothing may handle that."""


class Worker:
    """A process that claims, renews and settles keys by chance.

    Attributes:
        clock: Its machine's clock.
        is_trusted: Its clock runs within the margin of the server's: its leases are promises.
        is_dead: It was killed.
    """

    def __init__(
        self, world: World, number: int, keys: list[bytes], clock: HostClock, *, is_trusted: bool
    ) -> None:
        self.clock = clock
        self.is_trusted = is_trusted
        self.is_dead = False
        self._threads: list[str] = []
        self.leases: list[Lease] = []
        self._world = world
        self._rng = world.rng
        self._keys = keys
        self._seen_done: list[tuple[bytes, int]] = []
        self._paused_until_ns = 0
        self._cut_off_until_ns = 0
        client = LockClient(
            self.make_transport(world),
            clock=clock,
            rng=random.Random(world.rng.getrandbits(64)),
            sleep=self._sleep,
            retry=_RETRY,
            owner=f"worker {number}",
            max_keys=world.rng.choice((3, 10_000, 10_000, 10_000)),
        )
        self.session = self.make_session(client)

    def make_transport(self, world: World) -> SimTransport:
        """Make its way to the server."""
        return SimTransport(world, self)

    def make_session(self, client: LockClient) -> Session:
        """Make its session."""
        return Session(client, LeaseKeeper(client, use_thread=False), uses_threads=False)

    def start(self) -> None:
        """Let both threads begin."""
        self._world.schedule.act_at(self._draw_pause_ns(), self._act)
        self._world.schedule.act_at(_NAP_NS, self._keep)

    # -- what happens to it -----------------------------------------------------------------------

    def kill(self) -> None:
        """End the process, wherever it is."""
        self.is_dead = True
        self._world.promises.forget(self.leases)
        self.leases = []

    def leave(self) -> None:
        """End the process well: it gives back what it holds, and what it claims just now."""
        if not self.is_dead:
            self._run(self.session.give_back, "signal")
            self.kill()

    def maybe_interrupt(self) -> None:
        """Let Ctrl-C reach the main thread if that is what waits; signals reach no other."""
        is_main = self._threads[-1:] == ["main"]
        if is_main and self._rng.random() < self._world.faults.interrupt:
            raise KeyboardInterrupt

    def pause(self, for_ns: int) -> None:
        """Stop the process, as SIGSTOP does."""
        self._paused_until_ns = max(self._paused_until_ns, self._world.schedule.now_ns + for_ns)

    def cut_off(self, for_ns: int) -> None:
        """Let no message pass in either direction."""
        self._cut_off_until_ns = self._world.schedule.now_ns + for_ns

    def is_cut_off(self) -> bool:
        """Tell whether messages are lost."""
        return self._world.schedule.now_ns < self._cut_off_until_ns

    def check_alive(self) -> None:
        """End what a killed process still does."""
        if self.is_dead:
            raise ProcessGone

    def sit_out_pause(self) -> None:
        """Go on when the pause is over, if there is one."""
        left_ns = self._paused_until_ns - self._world.schedule.now_ns
        if left_ns > 0:
            self._world.schedule.wait(lambda: self.is_dead, left_ns)
            self.check_alive()

    def _sleep(self, seconds: float) -> None:
        """Stand where `time.sleep` does."""
        self._world.schedule.wait(lambda: self.is_dead, self.clock.real_ns(int(seconds * S)))
        self.check_alive()
        self.sit_out_pause()

    # -- its two threads --------------------------------------------------------------------------

    def _act(self) -> None:
        """Be the main thread for one thing."""
        if self._world.is_enough():
            return
        acts = [self._claim, self._settle, self._renew, self._look, self._undo, self._wait]
        self._run(self._rng.choices(acts, [5, 6, 2.5, 2, 1, 1.2])[0], "main")
        if not self.is_dead:
            self._world.schedule.act_at(self._draw_pause_ns(), self._act)

    def _keep(self) -> None:
        """Be the keeper's thread for one step."""
        keeper = self.session.keeper
        due_ns: list[int | None] = []
        self._run(lambda: due_ns.append(keeper.step()), "keeper")
        if not self.is_dead:
            left_ns = (due_ns[0] or _NAP_NS + self.clock.now_ns()) - self.clock.now_ns()
            nap_ns = self.clock.real_ns(min(max(left_ns, 20 * MS), _NAP_NS))
            self._world.schedule.act_at(nap_ns, self._keep)

    def _run(self, do: Callable[[], object], thread: str) -> None:
        """Let a thread do something; others of this process may act while it waits."""
        self._threads.append(thread)
        try:
            self.check_alive()
            self.sit_out_pause()
            do()
        except (ServerUnavailableError, ProcessGone, KeyboardInterrupt):
            pass  # its leases run out
        finally:
            self._threads.pop()
        if self.is_trusted:
            self._world.promises.check_belief(self.leases)

    def _draw_pause_ns(self) -> int:
        return self._rng.choice(_PAUSES_MS) * MS

    # -- what it does -----------------------------------------------------------------------------

    def _claim(self) -> None:
        self._claim_keys(self._rng.sample(self._keys, self._rng.randint(1, 8)))

    def _claim_keys(self, keys: list[bytes]) -> None:
        rng = self._rng
        claimed = self.session.claim(
            keys,
            ttl_s=rng.choice(_TTLS_S),
            keep_alive=rng.random() < 0.6,
            max_grants=rng.choice((0, 0, 1, 3)),
            max_attempts=rng.choice((0, 0, 0, 3)),
            ahead=rng.random() < 0.3,
        )
        for lease in claimed.leases:
            if self.is_trusted:
                self._world.promises.note_lease(lease)
        self.leases = [lease for lease in self.leases if lease.is_open] + claimed.leases

    def _renew(self) -> None:
        """Renew, some of it for another time than before; the keeper may do so just now, too."""
        rng = self._rng
        self.leases = [lease for lease in self.leases if lease.is_open]
        for lease in self.leases:
            chance = rng.random()
            if chance < 0.2:
                lease.ttl_s = rng.choice(_LONGER_S)
            elif chance < 0.4:
                lease.start()
        self.session.keeper.renew_now(self.leases)

    def _settle(self) -> None:
        rng = self._rng
        self.leases = [lease for lease in self.leases if lease.is_open]
        if not self.leases:
            return
        chosen = rng.sample(self.leases, rng.randint(1, len(self.leases)))
        self.leases = [lease for lease in self.leases if lease not in chosen]
        endings = [Ending(lease, rng.choice(_HOWS)) for lease in chosen]
        self.session.settle(endings)

    def _look(self) -> None:
        """Look at keys; sometimes claim one in the very moment in which its lease ends."""
        rng = self._rng
        keys = rng.sample(self._keys, 5)
        found = self.session.client.lookup(keys, want_infos=rng.random() < 0.7)
        ending = [info for info in found.infos if 0 < info.remaining_ns < _NAP_NS]
        if ending:
            chosen = min(ending, key=lambda info: info.remaining_ns)
            left_ns = chosen.remaining_ns - rng.randrange(4) * MS
            self._world.schedule.wait(lambda: self.is_dead, self._world.host.real_ns(left_ns))
            self._claim_keys([chosen.key])

    def _wait(self) -> None:
        """Wait for some keys, or read a page of all."""
        client, rng = self.session.client, self._rng
        if rng.random() < 0.5:
            first, end = sorted(rng.sample(self._keys, 2))
            only: Literal["all", "held", "failed"] = rng.choice(("all", "held", "held", "failed"))
            list(client.list(first, end, only=only))
        else:
            keys = rng.sample(self._keys, rng.randint(1, 4))
            client.wait(keys, rng.choice(_WAITS_S), min_settled=rng.choice((1, 1, len(keys))))

    def _undo(self) -> None:
        """Reset keys as a person would who saw what they are, or drop a done key's result."""
        client, rng = self.session.client, self._rng
        found = client.lookup(self._keys, want_infos=True)
        done = [info for info in found.infos if info.state == pb.KEY_STATE_DONE]
        self._seen_done += [(info.key, info.token) for info in done]
        others = [info for info in found.infos if info.token and info not in done]
        chosen = rng.sample(done, rng.randint(0, len(done)))
        if rng.random() < 0.3:
            chosen += rng.sample(others, min(1, len(others)))
        if not chosen:
            return
        if rng.random() < 0.4:
            self._sleep(rng.choice((0.0, 0.1, 1.0, 3.0)))  # people read before they act
        if rng.random() < 0.4:
            client.reset([info.key for info in chosen], found.revision)
        elif rng.random() < 0.3:
            client.invalidate([(info.key, info.token) for info in chosen])
        else:  # of results that were looked at long ago
            seen = dict(rng.sample(self._seen_done, min(5, len(self._seen_done))))
            client.invalidate(list(seen.items()))
