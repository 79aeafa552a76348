"""Claim -> run -> complete, fail or release: the only place for it, used by all ways in."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeAlias, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import ClaimAnswer, Grant, How, SettleAnswer, Settlement
from run_once.channel import GrpcTransport
from run_once.client import LockClient, RetryPolicy
from run_once.config import SOURCE_OWN, Config, default_owner
from run_once.errors import NotHeldError, ResultError, RunOnceError, ServerUnavailableError
from run_once.lease import Lease, LeaseHandle, LeaseKeeper

logger = logging.getLogger(__name__)

T = TypeVar("T")
AnyLease: TypeAlias = Lease | LeaseHandle
Store: TypeAlias = Callable[[Lease, T], pb.Result | None]

_RELEASE_TIMEOUT_S: Final = 2.0
_MAX_ERROR_CHARS: Final = 20_000


class Claimed(NamedTuple):
    """What a claim got: one state byte per key, the leases, and results of done keys if wanted."""

    states: bytes
    leases: list[Lease]
    results: dict[bytes, pb.Result]


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
        address: The server.
    """

    def __init__(self, client: LockClient, keeper: LeaseKeeper | None = None) -> None:
        self.client = client
        self.keeper = keeper or LeaseKeeper(client)
        self.address = client.transport.address

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
        """
        answer = self.client.claim(
            keys,
            ttl_s=ttl_s,
            claim_id=claim_id,
            max_grants=max_grants,
            max_attempts=max_attempts,
            ahead=ahead,
            want_results=want_results,
        )
        leases = [
            self.keeper.adopt(grant, ttl_s=ttl_s, keep_alive=keep_alive, started=not ahead)
            for grant in answer.grants
        ]
        late = [lease for lease in leases if not lease.held]
        if late:
            self._renew_late(late)
        return _without_lost(keys, answer, leases)

    def complete(self, lease: AnyLease, result: pb.Result | None = None) -> SettleAnswer:
        """Complete a key: COMPLETED, or LOST with the key's present state.

        Raises:
            NotHeldError: The lease belongs to another process.
            ServerUnavailableError: The server is gone; the lease is no longer renewed.
        """
        return self.settle([Ending(lease, "complete", result)])[0]

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
        """Release the leases that are kept, within two seconds, and close the connection."""
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


@dataclass(frozen=True)
class TaskOutcome(Generic[T]):
    """What became of one task.

    Attributes:
        state: COMPLETED, FAILED or LOST (`KeyState`) after a run; the claim's state (BUSY, DONE,
            EXHAUSTED, ...) if there was none; 0 if the server could not be told of a failure.
        value: What the body returned; None if it did not.
        error: What the body raised, or why its value could not be stored.
        lease: The lease it ran under; None: it did not run.
        lost_state: The key's state behind a LOST, else 0.
        result: Result of a done key, if the claim asked for it.
    """

    state: int
    value: T | None = None
    error: Exception | None = None
    lease: Lease | None = None
    lost_state: int = 0
    result: pb.Result | None = None

    @property
    def is_completed(self) -> bool:
        """Tell whether the body ran, and its completion was acknowledged."""
        return self.state == pb.KEY_STATE_COMPLETED

    @property
    def did_run(self) -> bool:
        """Tell whether the body was started."""
        return self.lease is not None


def run_task(
    session: Session,
    key: bytes,
    body: Callable[[Lease], T],
    *,
    ttl_s: float,
    keep_alive: bool = True,
    max_attempts: int = 0,
    store: Store[T] | None = None,
    claimed: Lease | None = None,
    claim_id: bytes | None = None,
    want_result: bool = False,
) -> TaskOutcome[T]:
    """Run a body under a lease on a key.

    The key is completed after the value was stored, failed if the body or the store raises, and
    released if the body is interrupted (KeyboardInterrupt, SystemExit, GeneratorExit), which is
    raised again.

    Args:
        session: The server.
        key: The key as stored.
        body: Called with the lease.
        ttl_s: Length of the lease.
        keep_alive: Renew it while the body runs.
        max_attempts: Do not run a key attempted so often; 0: no limit.
        store: Stores the value and tells where; None: the key is completed without.
        claimed: A lease on the key that was claimed before; None: claim it here.
        claim_id: Identity of the claim that is made here; None: a new one.
        want_result: Ask for the result of a key that is done.

    Returns:
        What became of it. An exception of the body is in it, not raised.

    Raises:
        ServerUnavailableError: The key could not be claimed, or the completion not acknowledged.
    """
    lease = claimed
    if lease is None:
        got = session.claim(
            [key],
            ttl_s=ttl_s,
            keep_alive=keep_alive,
            max_attempts=max_attempts,
            claim_id=claim_id,
            want_results=want_result,
        )
        if not got.leases:
            return TaskOutcome(got.states[0], result=got.results.get(key))
        lease = got.leases[0]
    lease.start()
    try:
        return _run_claimed(session, lease, body, store)
    except BaseException:
        session.release([lease])
        raise


def error_text(error: BaseException) -> str:
    """Give the text that is kept with a failed key: the traceback, its end if it is long."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join(lines).strip()[-_MAX_ERROR_CHARS:]


def _run_claimed(
    session: Session, lease: Lease, body: Callable[[Lease], T], store: Store[T] | None
) -> TaskOutcome[T]:
    """Run, store, complete."""
    try:
        value = body(lease)
    except Exception as error:  # noqa: BLE001 (the user's own, handed on in the outcome)
        return _give_up(session, lease, error)
    try:
        result = store(lease, value) if store is not None else None
        answer = session.complete(lease, result)
    except ServerUnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 (a store may raise anything)
        return _not_stored(session, lease, value, error)
    return TaskOutcome(answer.state, value, lease=lease, lost_state=answer.lost_state)


def _give_up(session: Session, lease: Lease, error: Exception) -> TaskOutcome[T]:
    """Fail the key; the body's exception matters more than a server that is gone."""
    try:
        answer = session.fail(lease, error_text(error))
    except RunOnceError as problem:
        logger.warning("key %r failed, and the lock server was not told: %s", lease.key, problem)
        return TaskOutcome(pb.KEY_STATE_UNSPECIFIED, error=error, lease=lease)
    return TaskOutcome(answer.state, error=error, lease=lease, lost_state=answer.lost_state)


def _not_stored(session: Session, lease: Lease, value: T, error: Exception) -> TaskOutcome[T]:
    """Fail a key whose value could not be stored, unless it was lost anyway."""
    problem = error
    if not isinstance(error, RunOnceError):
        problem = ResultError(
            f"the value of key {lease.key!r} was computed but could not be stored, so the key is "
            f"not done: {type(error).__name__}: {error}"
        )
        problem.__cause__ = error
    outcome: TaskOutcome[T] = _give_up(session, lease, problem)
    if outcome.state == pb.KEY_STATE_LOST:
        return TaskOutcome(outcome.state, value, lease=lease, lost_state=outcome.lost_state)
    return outcome


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
        return Claimed(answer.states, leases, answer.results)
    others = (pb.KEY_STATE_DONE, pb.KEY_STATE_BUSY_AHEAD)
    states = bytes(
        (lost[key] if lost[key] in others else pb.KEY_STATE_BUSY) if key in lost else state
        for key, state in zip(keys, answer.states, strict=True)
    )
    return Claimed(states, [lease for lease in leases if not lease.is_lost], answer.results)


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
                name = (resolved.address, resolved.owner, resolved.retry_s)
                found = self._by_name.get(name) or _new_session(resolved)
                self._by_name[name] = self._by_config[config] = found
            return found

    def _reset(self) -> None:
        """Forget all sessions: there are none, or they are the parent's."""
        self._lock = threading.Lock()
        self._by_config: dict[Config, Session] = {}
        self._by_name: dict[tuple[str | None, str | None, float], Session] = {}

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
        GrpcTransport(config.address),
        retry=RetryPolicy(total_s=config.retry_s),
        owner=config.owner or default_owner(),
        source=config.source,
        revive=local.reviver(config) if config.source == SOURCE_OWN else None,
    )
    return Session(client)


_SESSIONS: Final = _Sessions()
__all__ = [
    "Claimed",
    "Ending",
    "Grant",
    "Session",
    "TaskOutcome",
    "error_text",
    "run_task",
]
