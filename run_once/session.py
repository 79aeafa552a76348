"""One process and one server: the client, and the keeper of this process's leases."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

from distlock_proto import lock_table_pb2 as pb
from run_once.access import Access
from run_once.answers import ClaimAnswer, How, SettleAnswer, Settlement
from run_once.channel import GrpcTransport
from run_once.client import LockClient, RetryPolicy
from run_once.config import SOURCE_OWN, Config, default_owner
from run_once.errors import NotHeldError, RunOnceError
from run_once.lease import Lease, LeaseHandle, LeaseKeeper
from run_once.settler import Settler
from run_once.together import Ticket

logger = logging.getLogger(__name__)

AnyLease: TypeAlias = Lease | LeaseHandle

_RELEASE_TIMEOUT_S: Final = 2.0
_FLUSH_TIMEOUT_S: Final = 1.5
"""So long a signal's handler waits for what is being settled."""
_CLOSE_TIMEOUT_S: Final = 10.0
"""So long the end of the process does."""
_FREE_RETRY: Final = RetryPolicy(total_s=2.0, attempt_s=2.0)


class Claimed(NamedTuple):
    """What a claim got.

    Attributes:
        states: One state byte per key (`KeyState`).
        leases: What was granted.
        results: Those of done keys, if wanted.
        following: From where to ask next, if asked for and known.
    """

    states: bytes
    leases: list[Lease]
    results: dict[bytes, pb.Result]
    following: pb.Slice | None = None


class _UnderWay(NamedTuple):
    """A claim whose answer is not here yet."""

    keys: list[bytes]
    ttl_s: float
    max_grants: int


class Ending(NamedTuple):
    """How a lease ends; `result` goes with "complete", `error` with "fail"."""

    lease: AnyLease
    how: How
    result: pb.Result | None = None
    error: str = ""


class Session:
    """One process and one server: the client, and the keeper of this process's leases.

    Attributes:
        client: Typed calls.
        keeper: Keeps leases alive.
        settler: Completes in the background.
        address: The server.
    """

    def __init__(
        self,
        client: LockClient,
        keeper: LeaseKeeper | None = None,
        *,
        uses_threads: bool = True,
    ) -> None:
        self.client = client
        self.keeper = keeper or LeaseKeeper(client)
        self.settler = Settler(self.complete_all, use_thread=uses_threads)
        self.address = client.transport.address
        self._under_way: dict[Ticket, _UnderWay] = {}

    @classmethod
    def get(cls, config: Config) -> Session:
        """Give this process's session with a server, and start one if there is none.

        Sessions are shared by all who ask for the same server, retry bound and owner. They are
        closed when the process ends; a forked child gets sessions of its own.

        Raises:
            ConfigError: No server is configured, and this machine's own cannot be used.
        """
        return _SESSIONS.get(config)

    def claim(
        self,
        keys: Sequence[bytes],
        *,
        ttl_s: float,
        keep_alive: bool = True,
        max_grants: int = 0,
        max_attempts: int = 0,
        ahead: bool = False,
        want_results: bool = False,
        claim_id: bytes | None = None,
        frontier: pb.FrontierRequest | None = None,
        claimant: object = None,
    ) -> Claimed:
        """Claim keys; see `LockClient.claim`.

        A lease that came too late to be believed is renewed first. If it is lost by then, its key
        is reported as DONE or BUSY and has no lease.

        Args:
            keys: Stored keys, each once.
            ttl_s: Length of the leases.
            keep_alive: Renew them in the background until they are settled.
            max_grants: Grant at most so many; 0: no limit.
            max_attempts: Do not grant keys attempted so often; 0: no limit.
            ahead: Not started yet: `Lease.start` says when.
            want_results: Ask for the results of done keys.
            claim_id: Identity of the claim; None: a new one.
            frontier: Ask as well from where to ask next.
            claimant: On whose behalf, within this process; see `LeaseKeeper.not_taken`.
        """
        # Without an id that stays, the claim may travel under that of another thread's claim.
        ticket = Ticket(claim_id or self.client.new_claim_id())
        claimant = claimant or ticket
        self._under_way[ticket] = _UnderWay(list(keys), ttl_s, max_grants)
        try:
            try:
                answer = self.client.claim(
                    keys,
                    ttl_s=ttl_s,
                    claim_id=claim_id or ticket,
                    max_grants=max_grants,
                    max_attempts=max_attempts,
                    ahead=ahead,
                    want_results=want_results,
                    frontier=frontier,
                )
                leases = self.keeper.adopt_all(
                    answer.grants,
                    ttl_s=ttl_s,
                    keep_alive=keep_alive,
                    started=not ahead,
                    claimant=claimant,
                )
                now_ns = self.client.clock.now_ns()
                late = [lease for lease in leases if not lease.is_held_at(now_ns)]
                if late:
                    self._renew_late(late)
                return _without_lost(keys, answer, leases)
            finally:
                self._under_way.pop(ticket, None)
        except Exception:
            raise
        except BaseException:
            # Interrupted: perhaps after the grant, and before anybody here knows of it.
            self.keeper.drop_all(self.keeper.not_taken(claimant))
            left = [(ticket.claim_id, list(keys))]
            self.free_claims(left, lease_s=ttl_s, max_grants=max_grants)
            raise

    def free_claims(
        self, left: Sequence[tuple[bytes, list[bytes]]], *, lease_s: float, max_grants: int = 0
    ) -> None:
        """Give back what was claimed under ids that are known here, if the server answers soon.

        Repeating a claim tells the tokens of what it was granted, with which to release.

        Args:
            left: (claim id, keys), whether they were granted or not.
            lease_s: Length of the leases, after which they run out anyway.
            max_grants: As in the claim; 0: no limit.
        """
        # With little patience: the user waits, perhaps after Ctrl-C.
        client = self.client.with_retry(_FREE_RETRY)
        is_open = [(claim_id, keys) for claim_id, keys in left if keys]
        try:
            while is_open:
                claim_id, keys = is_open[-1]
                answer = client.claim(keys, ttl_s=lease_s, claim_id=claim_id, max_grants=max_grants)
                client.release_grants(answer.grants, timeout_s=_FREE_RETRY.attempt_s)
                is_open.pop()
        except RunOnceError as error:
            logger.warning(
                "could not free %d keys of interrupted calls; their leases run out in %g s: %s",
                sum(len(keys) for _, keys in is_open),
                lease_s,
                error,
            )

    def give_back(self) -> None:
        """Settle what is done, and give back all that is kept alive or being claimed.

        For when the process is about to end.
        """
        self.settler.flush(_FLUSH_TIMEOUT_S)
        for ticket, claim in list(self._under_way.items()):
            left = [(ticket.claim_id, claim.keys)]
            self.free_claims(left, lease_s=claim.ttl_s, max_grants=claim.max_grants)
        self.release(self.keeper.leases())

    def complete(self, lease: AnyLease, result: pb.Result | None = None) -> SettleAnswer:
        """Complete a key: COMPLETED, or LOST with the key's present state.

        Raises:
            NotHeldError: The lease belongs to another process.
            ServerUnavailableError: The server is gone; the lease is no longer renewed.
        """
        return self.settle([Ending(lease, "complete", result)])[0]

    def complete_all(self, leases: Sequence[Lease]) -> list[SettleAnswer]:
        """Complete keys without values in one request; see `complete`."""
        for lease in leases:
            lease.is_settling = lease.is_settlement_sent = True
        try:
            answers = self.client.complete_all([lease.grant for lease in leases])
        except BaseException:
            self.keeper.drop_all(leases)
            raise
        self.keeper.end_completing(leases, answers)
        return answers

    def fail(self, lease: AnyLease, error: str) -> SettleAnswer:
        """Give a key up as failed: FAILED, or LOST with the key's present state; see `complete`."""
        return self.settle([Ending(lease, "fail", error=error)])[0]

    def release(self, leases: Sequence[AnyLease], *, timeout_s: float = _RELEASE_TIMEOUT_S) -> None:
        """Give keys back, as far as that is possible at once: what is not released runs out.

        Args:
            leases: What to give back; settled, lost and foreign ones are left alone.
            timeout_s: Do not try for longer.
        """
        is_open = [lease for lease in leases if not isinstance(lease, Lease) or lease.is_open]
        if not is_open:
            return
        try:
            self.settle([Ending(lease, "release") for lease in is_open], timeout_s=timeout_s)
        except RunOnceError as error:
            logger.info("%d keys were not released, their leases run out: %s", len(is_open), error)

    def settle(
        self, endings: Sequence[Ending], *, timeout_s: float | None = None
    ) -> list[SettleAnswer]:
        """End leases in one request; kinds may be mixed.

        Args:
            endings: What becomes of which lease.
            timeout_s: Try once and for so long only; None: with the usual retries.

        Returns:
            One answer per item, in order.

        Raises:
            NotHeldError: A lease belongs to another process; nothing was settled.
            ServerUnavailableError: The server is gone; the leases are no longer renewed.
        """
        mine = [ending.lease for ending in endings if isinstance(ending.lease, Lease)]
        for lease in mine:
            _require_mine(lease)
        for lease in mine:
            self.keeper.begin_settling(lease)
        settlements = [
            Settlement(ending.lease.grant, ending.how, ending.result, ending.error)
            for ending in endings
        ]
        try:
            answers = self.client.settle(settlements, timeout_s=timeout_s)
        except BaseException:
            for lease in mine:
                self.keeper.drop(lease)
            raise
        for ending, answer in zip(endings, answers, strict=True):
            if isinstance(ending.lease, Lease):
                lost_state = answer.lost_state if answer.is_lost else None
                self.keeper.end_settling(ending.lease, lost_state=lost_state)
        return answers

    def close(self) -> None:
        """Settle what is done, release the leases that are kept, and close the connection.

        If the server does not answer, that is given up after some seconds.
        """
        n_left = self.settler.flush(_CLOSE_TIMEOUT_S)
        if n_left:
            logger.warning(
                "lock server %s did not acknowledge %d finished keys; they are done again",
                self.address,
                n_left,
            )
        self.release(self.keeper.leases())
        self.keeper.close(timeout_s=0)
        self.client.close()
        self.keeper.close()

    def _renew_late(self, leases: Sequence[Lease]) -> None:
        """Renew leases that had run out when they arrived; if that fails, give them up."""
        try:
            self.keeper.renew_now(leases)
        except BaseException:
            for lease in leases:
                self.keeper.drop(lease)
            raise


def _require_mine(lease: Lease) -> None:
    """Refuse a lease of the parent process."""
    if not lease.is_mine:
        raise NotHeldError(
            f"the lease on key {lease.key!r} belongs to the process that claimed it, not to this "
            "one; pass lease.handle to settle it from here"
        )


def _without_lost(keys: Sequence[bytes], answer: ClaimAnswer, leases: list[Lease]) -> Claimed:
    """Report keys whose lease was lost before it was believed as somebody else's."""
    lost = {lease.key: lease.lost_state for lease in leases if lease.is_lost}
    if not lost:
        return Claimed(answer.states, leases, answer.results, answer.following)
    others = (pb.KEY_STATE_DONE, pb.KEY_STATE_BUSY_AHEAD)
    states = bytes(
        (lost[key] if lost[key] in others else pb.KEY_STATE_BUSY) if key in lost else state
        for key, state in zip(keys, answer.states, strict=True)
    )
    kept = [lease for lease in leases if not lease.is_lost]
    return Claimed(states, kept, answer.results, answer.following)


class _Sessions:
    """The sessions of this process."""

    def __init__(self) -> None:
        self._is_registered = False
        self._reset()

    def get(self, config: Config) -> Session:
        """Find or make a session; see `Session.get`."""
        with self._lock:
            if not self._is_registered:
                self._is_registered = True
                atexit.register(self._close_all)
                if hasattr(os, "register_at_fork"):
                    os.register_at_fork(after_in_child=self._reset)
            found = self._by_config.get(config)
            if found is None:
                # Under the lock: threads that begin at once must not each start a server.
                resolved = config.resolved()
                name = (resolved.address, resolved.owner, resolved.retry_s, resolved.access)
                found = self._by_name.get(name) or _new_session(resolved)
                self._by_name[name] = self._by_config[config] = found
            return found

    def _reset(self) -> None:
        """Forget all sessions: there are none, or they are the parent's."""
        self._lock = threading.Lock()
        self._by_config: dict[Config, Session] = {}
        self._by_name: dict[tuple[str | None, str | None, float, Access], Session] = {}

    def give_back(self) -> None:
        """Give back what all sessions hold; no lock: a signal may have interrupted its holder."""
        for session in list(self._by_name.values()):
            session.give_back()

    def _close_all(self) -> None:
        """End well with the process."""
        for session in list(self._by_name.values()):
            try:
                session.close()
            except Exception:
                logger.exception("closing the session with %s failed", session.address)


def _new_session(config: Config) -> Session:
    """Connect to the configured server."""
    from run_once import local  # noqa: PLC0415 (only needed with a server of this machine's own)

    assert config.address is not None
    client = LockClient(
        GrpcTransport(config.address, access=config.access),
        retry=RetryPolicy(total_s=config.retry_s),
        owner=config.owner or default_owner(),
        source=config.source,
        revive=local.reviver(config) if config.source == SOURCE_OWN else None,
    )
    return Session(client)


def give_back_all() -> None:
    """Give back all that this process keeps alive or is claiming, for it is about to end."""
    _SESSIONS.give_back()


_SESSIONS: Final = _Sessions()
