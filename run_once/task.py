"""Claim -> run -> complete, fail or release: the only place for it, used by all ways in."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, TypeAlias, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.answers import Grant, SettleAnswer
from run_once.errors import ResultError, RunOnceError, ServerUnavailableError
from run_once.lease import Lease
from run_once.session import AnyLease, Claimed, Ending, Session

__all__ = [
    "AnyLease",
    "Claimed",
    "Ending",
    "Grant",
    "Ran",
    "Session",
    "TaskOutcome",
    "error_text",
    "run_and_store",
    "run_task",
    "settle_ran",
]

logger = logging.getLogger(__name__)

T = TypeVar("T")
HolderT = TypeVar("HolderT", Lease, Grant)
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


@dataclass(frozen=True)
class Ran(Generic[T]):
    """What a body came to, before its lease is settled; it travels to another process.

    Attributes:
        value: What the body returned; None if it did not, or if it stays behind in `result`.
        result: The stored value, to complete the key with.
        error: What the body raised, or why its value could not be stored.
        error_text: The traceback of that, as it is kept with the key.
        has_value: The body returned.
    """

    value: T | None = None
    result: pb.Result | None = None
    error: Exception | None = None
    error_text: str = ""
    has_value: bool = False


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
    leases = [] if claimed is None else [claimed]
    try:
        if claimed is None:
            got = session.claim(
                [key],
                ttl_s=ttl_s,
                keep_alive=keep_alive,
                max_attempts=max_attempts,
                claim_id=claim_id,
                want_results=want_result,
            )
            leases = got.leases
            if not leases:
                return TaskOutcome(got.states[0], result=got.results.get(key))
        lease = leases[0]
        lease.start()
        return settle_ran(session, [(lease, run_and_store(lease, body, store))])[0]
    except BaseException:
        session.release(leases)
        raise


def run_and_store(
    holder: HolderT,
    body: Callable[[HolderT], T],
    store: Callable[[HolderT, T], pb.Result | None] | None,
) -> Ran[T]:
    """Run a body and store its value; settling is left to `settle_ran`, perhaps elsewhere.

    Args:
        holder: The lease, or its grant where the lease itself is kept by another process.
        body: Called with the holder.
        store: Stores the value and tells where; None: nothing is stored.

    Returns:
        What it came to. An exception is in it, not raised.
    """
    try:
        value = body(holder)
    except Exception as error:  # noqa: BLE001 (the user's own, handed on)
        return Ran(error=error, error_text=error_text(error))
    if store is None:
        return Ran(value, has_value=True)
    try:
        return Ran(value, store(holder, value), has_value=True)
    except ServerUnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 (a store may raise anything)
        return _not_stored(holder.key, Ran(value, has_value=True), error)


def settle_ran(
    session: Session,
    tasks: Sequence[tuple[Lease, Ran[T]]],
    *,
    timeout_s: float | None = None,
) -> list[TaskOutcome[T]]:
    """Complete what ran well and fail the rest, in one request.

    Args:
        session: The server.
        tasks: Leases, each with what its body came to.
        timeout_s: Try once and for so long only; None: with the usual retries.

    Returns:
        What became of each, in order.

    Raises:
        ServerUnavailableError: Completions were not acknowledged.
    """
    try:
        endings = [_ending(lease, ran) for lease, ran in tasks]
        answers = session.settle(endings, timeout_s=timeout_s)
    except RunOnceError as problem:
        # The body's exception matters more than a server that is gone.
        if all(ran.error is not None for _, ran in tasks):
            return [_untold(lease, ran, problem) for lease, ran in tasks]
        if isinstance(problem, ServerUnavailableError):
            raise
        if len(tasks) > 1:  # one that is refused, or too much at once, must not cost the others
            half = len(tasks) // 2
            return [
                outcome
                for part in (tasks[:half], tasks[half:])
                for outcome in settle_ran(session, part, timeout_s=timeout_s)
            ]
        lease, ran = tasks[0]
        refused = _not_stored(lease.key, ran, problem)
        return settle_ran(session, [(lease, refused)], timeout_s=timeout_s)
    for (lease, ran), answer in zip(tasks, answers, strict=True):
        if answer.is_lost and ran.result is not None:
            _discard(lease, ran.result)
    return [
        _outcome(lease, ran, answer) for (lease, ran), answer in zip(tasks, answers, strict=True)
    ]


def error_text(error: BaseException) -> str:
    """Give the text that is kept with a failed key: the traceback, its end if it is long."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join(lines).strip()[-_MAX_ERROR_CHARS:]


def _discard(lease: Lease, result: pb.Result) -> None:
    """Delete a value that was stored and will not be named by any key."""
    from run_once.results import discard  # noqa: PLC0415 (only the joblib backend stores values)

    discard(lease.key, lease.token, result)


def _ending(lease: Lease, ran: Ran[T]) -> Ending:
    if ran.error is not None:
        return Ending(lease, "fail", error=ran.error_text)
    return Ending(lease, "complete", ran.result)


def _outcome(lease: Lease, ran: Ran[T], answer: SettleAnswer) -> TaskOutcome[T]:
    """Tell what became of a task; one that was lost needs no value to be stored."""
    is_error = ran.error is not None and not (ran.has_value and answer.is_lost)
    return TaskOutcome(
        answer.state,
        None if is_error else ran.value,
        error=ran.error if is_error else None,
        lease=lease,
        lost_state=answer.lost_state,
    )


def _untold(lease: Lease, ran: Ran[T], problem: RunOnceError) -> TaskOutcome[T]:
    logger.warning("key %r failed, and the lock server was not told: %s", lease.key, problem)
    return TaskOutcome(pb.KEY_STATE_UNSPECIFIED, error=ran.error, lease=lease)


def _not_stored(key: bytes, ran: Ran[T], error: Exception) -> Ran[T]:
    """Fail a key whose value could not be stored."""
    problem = error
    if not isinstance(error, RunOnceError):
        problem = ResultError(
            f"the value of key {key!r} was computed but could not be stored, so the key is "
            f"not done: {type(error).__name__}: {error}"
        )
        problem.__cause__ = error
    return replace(ran, result=None, error=problem, error_text=error_text(problem))
