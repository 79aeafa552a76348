"""Claim -> run -> complete, fail or release: the only place for it, used by all ways in."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeAlias, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import Grant
from run_once.errors import ResultError, RunOnceError, ServerUnavailableError
from run_once.lease import Lease
from run_once.session import AnyLease, Claimed, Ending, Session

__all__ = [
    "AnyLease",
    "Claimed",
    "Ending",
    "Grant",
    "Session",
    "TaskOutcome",
    "error_text",
    "run_task",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
Store: TypeAlias = Callable[[Lease, T], pb.Result | None]

_MAX_ERROR_CHARS: Final = 20_000


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
