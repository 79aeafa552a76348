"""Checks answers in the moment they are given: leases, tokens, time, disk.

Times are real ones: the server's machine measures a ttl by its own clock, which is neither early
nor late by that clock's speed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from google.protobuf.message import Message

from distlock_proto import lock_table_pb2 as pb
from distlock_server.state import Held, Record
from tests.simulation.history import BrokenPromiseError
from tests.simulation.observed import Item, Operation
from tests.simulation.schedule import S

if TYPE_CHECKING:
    from run_once.lease import Lease
    from tests.simulation.world import World

LATE_NS: Final = 1 * S
"""So long after its lease's end may a key be refused."""

_ROUNDING_NS: Final = 3


class Promise:
    """The newest lease on a key, as far as its server's answers say.

    Attributes:
        token: Of the grant.
        kept_until_ns: Real time before which no other may be granted the key.
        ends_ns: Real time after which it must be grantable, at the latest.
        extended_ns: Real time of the last promise.
        ttl_ns: The longest lease that was promised, in real time.
        is_free: Given up, completed or reset since.
        freed_ns: Real time at which it became free.
    """

    __slots__ = (
        "ends_ns",
        "extended_ns",
        "freed_ns",
        "is_free",
        "kept_until_ns",
        "token",
        "ttl_ns",
    )

    def __init__(self) -> None:
        self.token = self.ttl_ns = 0
        self.kept_until_ns = self.ends_ns = self.extended_ns = 0
        self.freed_ns = 0
        self.is_free = True


class Promises:
    """What was promised so far."""

    def __init__(self, world: World, keys: Iterable[bytes]) -> None:
        self._world = world
        self._by_key = {key: Promise() for key in keys}
        self._grants: dict[int, tuple[bytes, bytes]] = {}
        self._believers: dict[bytes, list[Lease]] = {key: [] for key in self._by_key}
        self._overruled: set[int] = set()
        self.max_token = 0
        self.n_regranted = 0

    @property
    def last_end_ns(self) -> int:
        """Real time from which every key must be grantable."""
        return max(p.ends_ns for p in self._by_key.values() if not p.is_free or p.ends_ns)

    def newest_token(self, key: bytes) -> int:
        """Give the token of the newest grant on a key."""
        return self._by_key[key].token

    # -- answers ----------------------------------------------------------------------------------

    def take(self, operation: Operation, request: Message, ran_ns: int) -> None:
        """Check an answer as it leaves the server; `ran_ns` is when the table ran it."""
        durable = self._world.disk.revision()
        if operation.revision > durable:
            self._broken("I7", f"only revision {durable} is on disk: {operation}")
        if isinstance(request, pb.ClaimRequest):
            self._take_claim(operation, request, ran_ns)
        elif isinstance(request, pb.WaitRequest):
            self._take_wait(operation, request)
        elif isinstance(request, pb.ListRequest):
            ran_ns = operation.left_ns
        for item in operation.items:
            if item.state == pb.KEY_STATE_RENEWED:
                self._take_renewal(item, operation)
            elif item.state in _BUSY_STATES:
                self._take_busy(item, ran_ns)
                if item.token:
                    self._take_remaining(item, ran_ns)
            elif item.state in _ENDINGS:
                self._take_ending(item)

    def _take_claim(self, operation: Operation, request: pb.ClaimRequest, ran_ns: int) -> None:
        granted = [item for item in operation.items if item.state == pb.KEY_STATE_GRANTED]
        has_new = any(item.token != self._by_key[item.key].token for item in granted)
        if 0 < request.max_grants < len(granted) and has_new:
            self._broken("I5", f"{request.max_grants} grants were asked for: {operation}")
        for item in granted:
            self._take_grant(item, ran_ns, request.ttl_ns)

    def _take_wait(self, operation: Operation, request: pb.WaitRequest) -> None:
        """Check that a wait ended soon after its keys were free."""
        free = [self._by_key[i.key] for i in operation.items if i.state not in _BUSY_STATES]
        since_ns = sorted(p.freed_ns if p.is_free else p.ends_ns for p in free)
        n_wanted = max(1, request.min_settled)
        if len(since_ns) >= n_wanted:
            late_ns = operation.left_ns - max(since_ns[n_wanted - 1], operation.arrived_ns)
            if late_ns > LATE_NS:
                self._broken("I10", f"a wait ended {late_ns / S} s late: {operation}")

    def take_arrival(self, request: pb.RenewRequest) -> None:
        """Note that leases may be renewed at once, before their request is answered."""
        for renewal in request.renewals:
            promise = self._by_key[renewal.holder.key]
            if renewal.holder.token == promise.token:
                ends_ns = self._world.schedule.now_ns + self._world.host.real_ns(renewal.ttl_ns)
                promise.ends_ns = max(promise.ends_ns, ends_ns)

    def _take_grant(self, item: Item, ran_ns: int, ttl_ns: int) -> None:
        promise = self._by_key[item.key]
        grant = (item.key, item.claim_id)
        if self._grants.setdefault(item.token, grant) != grant:
            self._broken("I2", f"token {item.token} is both {grant}'s and another's")
        if item.token != promise.token:
            if item.token <= self.max_token:
                self._broken("I2", f"token {item.token} of {grant} is not new")
            if not promise.is_free:
                self._require_expired(item, promise, ran_ns)
                self.n_regranted += 1
            self._check_believers(item)
            self.max_token = promise.token = item.token
            promise.ttl_ns = promise.kept_until_ns = promise.ends_ns = 0
            promise.is_free = False
        real_ns = self._world.host.real_ns
        self._extend(promise, ran_ns + real_ns(item.number), real_ns(ttl_ns))

    def _take_renewal(self, item: Item, operation: Operation) -> None:
        promise = self._by_key[item.key]
        ttl_ns = self._world.host.real_ns(item.number)
        if item.token == promise.token:
            self._extend(promise, operation.arrived_ns + ttl_ns, ttl_ns)
            promise.ends_ns = max(promise.ends_ns, operation.left_ns + ttl_ns)

    def _take_ending(self, item: Item) -> None:
        promise = self._by_key[item.key]
        if item.state == pb.KEY_STATE_RESET:
            self._overruled.add(promise.token)
        elif item.token != promise.token:
            return  # it is repeated, and late
        promise.is_free = True
        promise.freed_ns = self._world.schedule.now_ns

    def _take_busy(self, item: Item, ran_ns: int) -> None:
        late_ns = ran_ns - self._by_key[item.key].ends_ns
        if late_ns > LATE_NS:
            self._broken("I10", f"key {item.key!r} is busy {late_ns / S} s after its lease")

    def _take_remaining(self, item: Item, ran_ns: int) -> None:
        """Check what a lookup says of a lease, unless it was renewed since the table was read."""
        promise = self._by_key[item.key]
        ends_ns = ran_ns + self._world.host.real_ns(item.number)
        is_short = ends_ns < promise.kept_until_ns - _ROUNDING_NS
        if item.token == promise.token and promise.extended_ns < ran_ns and is_short:
            self._broken("I9", f"{item} ends at {ends_ns}, promised was {promise.kept_until_ns}")

    def _require_expired(self, item: Item, promise: Promise, ran_ns: int) -> None:
        early_ns = promise.kept_until_ns - ran_ns
        if early_ns > (0 if self._world.host.rate == 1 else _ROUNDING_NS):
            self._broken("I9", f"{item} came {early_ns / S} s before {promise.token} had ended")

    def _extend(self, promise: Promise, until_ns: int, ttl_ns: int) -> None:
        promise.extended_ns = self._world.schedule.now_ns
        promise.kept_until_ns = max(promise.kept_until_ns, until_ns)
        promise.ends_ns = max(promise.ends_ns, until_ns)
        promise.ttl_ns = max(promise.ttl_ns, ttl_ns)

    # -- restarts ---------------------------------------------------------------------------------

    def take_restart(self, key: bytes, record: Record, *, may_be_reset: bool) -> None:
        """Note what a restarted server found: its leases run anew.

        Args:
            key: The key.
            record: What is stored for it.
            may_be_reset: A reset of it was under way, which overrules its holder.
        """
        promise, world = self._by_key[key], self._world
        if record is None and may_be_reset:
            self._overruled.add(promise.token)
        if not isinstance(record, Held):
            promise.is_free = True
            return
        if record.token != promise.token:  # granted without an answer: nobody was promised it
            promise.token, promise.kept_until_ns, promise.ttl_ns = record.token, 0, 0
            self.max_token = max(self.max_token, record.token)
        promise.is_free = False
        promise.ttl_ns = max(promise.ttl_ns, world.host.real_ns(record.ttl_ns))
        promise.ends_ns = max(promise.ends_ns, world.schedule.now_ns + promise.ttl_ns)

    # -- who believes what ------------------------------------------------------------------------

    def note_lease(self, lease: Lease) -> None:
        """Note a lease that a worker, whose clock is within the margin, may believe in."""
        believers = self._believers[lease.key]
        believers[:] = [one for one in believers if one.is_open]
        believers.append(lease)

    def check_belief(self, leases: Iterable[Lease]) -> None:
        """Check that who believes in a lease has the newest one."""
        for lease in leases:
            newest = self._by_key[lease.key].token
            if self._is_believed(lease) and lease.token != newest:
                self._broken("I1", f"{lease} is believed, {newest} was granted")

    def _check_believers(self, item: Item) -> None:
        """Check that nobody believes in an earlier lease when a key is granted."""
        for lease in self._believers[item.key]:
            if self._is_believed(lease) and lease.token != item.token:
                self._broken("I1", f"{lease} is believed, {item.token} is granted")

    def _is_believed(self, lease: Lease) -> bool:
        """Tell whether a holder may believe in a lease; who resets a held key overrules it."""
        return lease.held and lease.token not in self._overruled

    def forget(self, leases: Iterable[Lease]) -> None:
        """Note that a worker is gone."""
        for lease in leases:
            if lease in self._believers[lease.key]:
                self._believers[lease.key].remove(lease)

    def _broken(self, promise: str, text: str) -> None:
        raise BrokenPromiseError(promise, text)


_BUSY_STATES: Final = (pb.KEY_STATE_BUSY, pb.KEY_STATE_BUSY_AHEAD)
_ENDINGS: Final = (
    pb.KEY_STATE_COMPLETED,
    pb.KEY_STATE_FAILED,
    pb.KEY_STATE_RELEASED,
    pb.KEY_STATE_RESET,
)
