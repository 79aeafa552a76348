"""Leases, and the one thread that keeps all of them alive.

A lease is lost in two stages. Past its expiry on the local clock it is *doubtful*: `held` is
false, and it is renewed at once, since the server lets a holder go on as long as nobody else was
granted the key. Only the server's LOST is final. A body that kept the interpreter busy for two
lease times thus wakes to a renewal, not to a lease given up.

Leases belong to the process that claimed them: a forked child holds none of them.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, NoReturn

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import NS_PER_S, Grant, RenewAnswer, SettleAnswer, to_ns
from run_once.client import LockClient
from run_once.clock import Clock
from run_once.errors import RunOnceError
from run_once.process import THIS
from run_once.threads import Background

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE: Final = 3
_GATHER_DIVISOR: Final = 6
_RETRY_DIVISOR: Final = 10
_MIN_RETRY_NS: Final = 20_000_000
_MAX_RETRY_NS: Final = 1_000_000_000
_MIN_TIMEOUT_S: Final = 1.0
_MAX_TIMEOUT_S: Final = 10.0
_MAX_NAP_S: Final = 1.0
"""The thread looks at the clock this often: its own waits do not count a machine's sleep."""
_IDLE_END_S: Final = 10.0


class LeaseHandle(NamedTuple):
    """What another process needs to settle a lease; it pickles.

    Attributes:
        address: The lock server.
        key: The key as stored.
        claim_id: Identity of the claim.
        token: Fencing token.
    """

    address: str
    key: bytes
    claim_id: bytes
    token: int

    @property
    def grant(self) -> Grant:
        """Give what the client's calls take."""
        return Grant(self.key, self.claim_id, self.token, 0, 0)


class Lease:
    """The right to work on one key.

    Attributes:
        grant: What the server promised last.
        ttl_s: Length of the lease in seconds.
        is_kept: It is renewed in the background.
        is_lost: The server said LOST, which is final.
        is_settled: It was completed, failed or released.
        started: The holder has started; False: it only claimed ahead.
        lost_state: The key's state (`KeyState`) when the server said LOST; else 0.
        on_lost: Called once, from any thread, after the server said LOST.
        due_ns: When the keeper renews it next.
        is_settling: A settlement is on its way: a LOST behind it says nothing new.
        is_settlement_sent: A settlement was sent, and the server may have taken it.
        claimant: On whose behalf it was claimed, within this process; None: nobody asked.
        is_taken: The claimant has handed it on to whoever works under it.
    """

    __slots__ = (
        "_address",
        "_clock",
        "_pid",
        "claimant",
        "due_ns",
        "grant",
        "is_kept",
        "is_lost",
        "is_settled",
        "is_settlement_sent",
        "is_settling",
        "is_taken",
        "lost_state",
        "on_lost",
        "started",
        "ttl_s",
    )

    def __init__(
        self,
        grant: Grant,
        *,
        ttl_s: float,
        is_kept: bool,
        started: bool,
        clock: Clock,
        address: str,
        claimant: object = None,
    ) -> None:
        self.grant = grant
        self.ttl_s = ttl_s
        self.is_kept = is_kept
        self.started = started
        self.lost_state = 0
        self.on_lost: Callable[[Lease], None] | None = None
        self._clock = clock
        self._address = address
        self._pid = THIS.pid
        self.is_lost = False
        self.is_settled = False
        self.is_settling = False
        self.is_settlement_sent = False
        self.claimant = claimant
        self.is_taken = False
        self.due_ns = _due_ns(grant, ttl_s)

    @property
    def key(self) -> bytes:
        """The key as stored."""
        return self.grant.key

    @property
    def token(self) -> int:
        """Fencing token: unique, and larger than that of every earlier holder."""
        return self.grant.token

    @property
    def attempt(self) -> int:
        """Number of this attempt; the first is 1."""
        return self.grant.attempt

    @property
    def held(self) -> bool:
        """Tell whether no other holder can have been granted the key yet."""
        return self.is_open and not self.is_settlement_sent and self.remaining_s > 0

    def is_held_at(self, now_ns: int) -> bool:
        """Tell whether it is held at this time; see `held`."""
        return self.is_open and not self.is_settlement_sent and self.grant.expires_ns > now_ns

    @property
    def remaining_s(self) -> float:
        """Seconds until the lease is doubtful; below 0: since when it is."""
        return (self.grant.expires_ns - self._clock.now_ns()) / NS_PER_S

    @property
    def is_mine(self) -> bool:
        """Tell whether this process claimed it."""
        return self._pid == THIS.pid

    @property
    def is_open(self) -> bool:
        """Tell whether it is this process's and neither settled nor lost; it may be doubtful."""
        return not (self.is_lost or self.is_settled) and self._pid == THIS.pid

    @property
    def handle(self) -> LeaseHandle:
        """What another process needs to settle the lease."""
        return LeaseHandle(self._address, self.key, self.grant.claim_id, self.token)

    def start(self) -> None:
        """Note that the holder starts; the server learns it with the next renewal or settlement."""
        self.started = True

    def __repr__(self) -> str:
        state = "lost" if self.is_lost else "settled" if self.is_settled else "open"
        return f"<Lease {self.key!r} token={self.token} {state}, {self.remaining_s:.3g} s left>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"the lease on key {self.key!r} belongs to the process that claimed it; pass "
            "lease.handle to another one"
        )

    def take_renewal(self, expires_ns: int) -> None:
        """Believe a renewal; one that was overtaken by another does not shorten the lease."""
        self.grant = self.grant._replace(expires_ns=max(self.grant.expires_ns, expires_ns))
        self.due_ns = _due_ns(self.grant, self.ttl_s)

    def mark_settled(self) -> None:
        """Note that the server took a settlement."""
        self.is_settled = True

    def mark_lost(self, lost_state: int) -> None:
        """Note that the server said LOST; only the first time counts."""
        if self.is_lost or self.is_settled:
            return
        self.lost_state = lost_state
        self.is_lost = True
        on_lost = self.on_lost  # which another thread may take away
        if on_lost is not None:
            try:
                on_lost(self)
            except Exception:
                logger.exception("on_lost of key %r raised", self.key)


class LeaseKeeper:
    """Renews every kept lease of this process at a third of its length, in one request.

    Its thread is a daemon that starts with the first kept lease and ends some time after the
    last. `step` does the work and needs no thread: a simulation calls it itself, with
    `use_thread=False`.
    """

    def __init__(
        self, client: LockClient, clock: Clock | None = None, *, use_thread: bool = True
    ) -> None:
        self._client = client
        self._clock = clock or client.clock
        self._use_thread = use_thread
        self._pid = THIS.pid
        # Not `with` of the condition itself: an interrupt in that can leave it locked.
        self._mutex = threading.RLock()
        self._changed = threading.Condition(self._mutex)
        # Guarded by _mutex: the leases that are kept, the thread, and whether it shall end.
        self._kept: dict[tuple[bytes, int], Lease] = {}
        self._thread = Background("run_once lease keeper")
        self._is_closed = False
        self._wake_ns = 0
        # Only the thread's: the server did not answer.
        self._is_out = False

    def adopt(
        self,
        grant: Grant,
        *,
        ttl_s: float,
        keep_alive: bool = True,
        started: bool = True,
        on_lost: Callable[[Lease], None] | None = None,
    ) -> Lease:
        """Make the lease of a grant, and keep it alive from now on if wanted."""
        lease = Lease(
            grant,
            ttl_s=ttl_s,
            is_kept=keep_alive,
            started=started,
            clock=self._clock,
            address=self._client.transport.address,
        )
        lease.on_lost = on_lost
        if keep_alive:
            self._keep([lease])
        return lease

    def adopt_all(
        self,
        grants: Sequence[Grant],
        *,
        ttl_s: float,
        keep_alive: bool,
        started: bool,
        claimant: object = None,
    ) -> list[Lease]:
        """Make the leases of many grants at once; see `adopt`."""
        address = self._client.transport.address
        leases = [
            Lease(
                grant,
                ttl_s=ttl_s,
                is_kept=keep_alive,
                started=started,
                clock=self._clock,
                address=address,
                claimant=claimant,
            )
            for grant in grants
        ]
        if keep_alive and leases:
            self._keep(leases)
        return leases

    def leases(self) -> list[Lease]:
        """Give the kept leases of this process that are neither settled nor lost."""
        if self._pid != THIS.pid:
            return []
        with self._mutex:
            kept = [lease for lease in self._kept.values() if lease.is_open]
            if len(kept) < len(self._kept):  # an interrupt kept some from being dropped
                self._kept = dict(zip(map(_place, kept), kept, strict=True))
            return kept

    def not_taken(self, claimant: object) -> list[Lease]:
        """Give the kept leases that were claimed on somebody's behalf, and not handed on."""
        return [
            lease for lease in self.leases() if lease.claimant is claimant and not lease.is_taken
        ]

    def renew_now(self, leases: Sequence[Lease]) -> None:
        """Renew leases at once, kept or not, with the usual retries; then see `is_lost`."""
        items = [lease for lease in leases if lease.is_open]
        if items:
            self._take_answers(items, self._client.renew([_renewal(lease) for lease in items]))

    def begin_settling(self, lease: Lease) -> None:
        """Note that a settlement is on its way: a LOST behind it says nothing new."""
        lease.is_settling = lease.is_settlement_sent = True

    def end_completing(self, leases: Sequence[Lease], answers: Sequence[SettleAnswer]) -> None:
        """Note the answers to many settlements at once; see `end_settling`."""
        lost: list[tuple[Lease, int]] = []
        for lease, answer in zip(leases, answers, strict=True):
            if answer.is_lost:
                lost.append((lease, answer.lost_state))
            else:
                lease.mark_settled()
        self.drop_all(leases)
        for lease, lost_state in lost:
            lease.mark_lost(lost_state)

    def end_settling(self, lease: Lease, *, lost_state: int | None = None) -> None:
        """Note a settlement's answer: the key's state behind a LOST, else None."""
        if lost_state is None:
            # First of all: the answer to a renewal behind it says LOST, perhaps at this moment.
            lease.mark_settled()
        self.drop(lease)
        if lost_state is not None:
            lease.mark_lost(lost_state)

    def drop(self, lease: Lease) -> None:
        """Keep a lease alive no longer; it runs out unless it is settled."""
        self.drop_all([lease])

    def drop_all(self, leases: Sequence[Lease]) -> None:
        """Keep leases alive no longer; see `drop`."""
        for lease in leases:
            lease.is_settling = False
        if self._pid == THIS.pid:
            with self._mutex:
                for place in map(_place, leases):
                    self._kept.pop(place, None)

    def step(self, now_ns: int | None = None) -> int | None:
        """Renew what is due, in one request.

        Args:
            now_ns: The time; None: the clock's.

        Returns:
            When the next renewal is due, or None if no lease is kept.
        """
        if self._pid != THIS.pid:
            return None
        now_ns = self._clock.now_ns() if now_ns is None else now_ns
        leases = self.leases()
        if any(lease.due_ns <= now_ns for lease in leases):
            gather = [lease for lease in leases if _is_nearly_due(lease, now_ns)]
            self._renew_once(gather)
        return min((lease.due_ns for lease in self.leases()), default=None)

    def close(self, timeout_s: float = 2.0) -> None:
        """End the thread; leases that are still open run out."""
        if self._pid != THIS.pid:
            return
        with self._mutex:
            self._is_closed = True
            self._kept.clear()
            thread = self._thread.thread
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout_s)

    def _keep(self, leases: Sequence[Lease]) -> None:
        """Put leases under the thread's care."""
        if self._pid != THIS.pid:
            raise RuntimeError("a forked process must not use its parent's lease keeper")
        with self._mutex:
            if self._is_closed:
                return
            self._kept.update(zip(map(_place, leases), leases, strict=True))
            due_ns = min(lease.due_ns for lease in leases)
            if due_ns < self._wake_ns:
                self._wake_ns = due_ns
                self._changed.notify_all()
            if self._use_thread:
                self._thread.start(self._run)

    def _renew_once(self, leases: list[Lease]) -> None:
        """Send one request; without an answer try again soon."""
        shortest_s = min(lease.ttl_s for lease in leases) / _RENEWALS_PER_LEASE
        timeout_s = min(max(shortest_s, _MIN_TIMEOUT_S), _MAX_TIMEOUT_S)
        try:
            answers = self._client.renew([_renewal(lease) for lease in leases], timeout_s=timeout_s)
        except RunOnceError as error:
            self._postpone(leases, error)
            return
        if self._is_out:
            logger.info("the lock server answers again; %d leases are renewed", len(leases))
        self._is_out = False
        self._take_answers(leases, answers)

    def _postpone(self, leases: list[Lease], error: RunOnceError) -> None:
        """Plan another attempt, and say once per outage that leases have become doubtful."""
        now_ns = self._clock.now_ns()
        for lease in leases:
            pause_ns = to_ns(lease.ttl_s) // _RETRY_DIVISOR
            lease.due_ns = now_ns + min(max(pause_ns, _MIN_RETRY_NS), _MAX_RETRY_NS)
        doubtful = [lease for lease in leases if lease.remaining_s <= 0]
        if doubtful and not self._is_out:
            self._is_out = True
            logger.warning(
                "leases on %d keys have run out by this machine's clock (first: %r), and could "
                "not be renewed: %s",
                len(doubtful),
                doubtful[0].key,
                error,
            )

    def _take_answers(self, leases: Sequence[Lease], answers: Sequence[RenewAnswer]) -> None:
        """Believe the answers."""
        now_ns = self._clock.now_ns()
        for lease, answer in zip(leases, answers, strict=True):
            if answer.state == pb.KEY_STATE_RENEWED:
                lease.take_renewal(answer.expires_ns)
            elif lease.is_settling:
                lease.due_ns = now_ns + to_ns(lease.ttl_s) // _RENEWALS_PER_LEASE
            else:
                self.drop(lease)
                lease.mark_lost(answer.lost_state)

    def _run(self) -> None:
        """Be the thread."""
        while True:
            try:
                due_ns = self.step()
            except Exception:
                logger.exception("renewing leases failed; it is tried again")
                due_ns = self._clock.now_ns() + _MAX_RETRY_NS
            with self._mutex:
                if self._is_closed:
                    return
                if self._kept:
                    self._nap(due_ns)
                else:
                    self._wake_ns = sys.maxsize
                    self._changed.wait(_IDLE_END_S)
                if not self._kept:
                    self._thread.end()
                    return

    def _nap(self, due_ns: int | None) -> None:
        """Wait until a renewal is due; a lease that is due before wakes the thread."""
        now_ns = self._clock.now_ns()
        latest_ns = now_ns + to_ns(_MAX_NAP_S)
        self._wake_ns = latest_ns if due_ns is None else min(due_ns, latest_ns)
        if self._wake_ns > now_ns:
            self._changed.wait((self._wake_ns - now_ns) / NS_PER_S)


def _place(lease: Lease) -> tuple[bytes, int]:
    """Give what the keeper knows a lease by: of one key there may be two, one that ran out."""
    grant = lease.grant
    return grant.key, grant.token


def _renewal(lease: Lease) -> tuple[Grant, float, bool]:
    """Make the item of a renew request."""
    return lease.grant, lease.ttl_s, lease.started


def _due_ns(grant: Grant, ttl_s: float) -> int:
    """Give when to renew: when about a third of the lease is over, margin left aside."""
    return grant.expires_ns - to_ns(ttl_s) * 3 // 5


def _is_nearly_due(lease: Lease, now_ns: int) -> bool:
    """Tell whether a lease should join a request that is made anyway."""
    return lease.due_ns <= now_ns + to_ns(lease.ttl_s) // _GATHER_DIVISOR
