"""`@run_once(key)`: a function that runs once over all processes that call it."""

from __future__ import annotations

import enum
import functools
import inspect
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final, ParamSpec, TypeVar

from distlock_proto import lock_table_pb2 as pb
from run_once.config import Config, load_config
from run_once.errors import ConfigError, ExhaustedError, LeaseLostWarning
from run_once.iterator import timeout_seconds
from run_once.keys import display_key, stored_key
from run_once.lease import Lease
from run_once.live import show
from run_once.task import Session, TaskOutcome, run_task
from run_once.warn import warn_user

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_TIMEOUT_S: Final = 60


class Status(enum.Enum):
    """What a call of a decorated function came to."""

    COMPUTE_OK = 1
    """It ran here, and its completion was accepted: the value is beside."""
    COMPUTE_ERROR = 2
    """It raised here; anyone may try again."""
    SKIP_OK = 3
    """It is done, here or elsewhere, now or in an earlier run."""
    SKIP_IN_PROGRESS = 4
    """Another works on it."""


def run_once(
    key: str | int,
    timeout: float | timedelta | None = DEFAULT_TIMEOUT_S,
    version: int = 0,
    suppress_exception: bool = True,
    *,
    namespace: str | None = None,
    address: str | None = None,
    max_attempts: int | None = None,
) -> Callable[[Callable[P, T]], Callable[P, tuple[Status, T | None]]]:
    """Make a function run once over all processes and machines that call it.

    At most one completion per key is accepted, ever (until someone resets it). The function may
    start twice if a worker is paused or cut off; then only one of the two runs is accepted.

    Args:
        key: Names the work: a string or an integer.
        timeout: T: exclusive for T seconds, not renewed; None: the lease is kept alive while the
            function runs; 0: done before it runs, and not tried again whatever comes.
        version: Version of the work; another version does it again.
        suppress_exception: Log an exception of the function and return COMPUTE_ERROR; False:
            raise it. The key may be tried again at once in both cases.
        namespace: Separates equal keys of different projects; None: configured.
        address: The lock server; None: configured.
        max_attempts: Do not try a key more often: COMPUTE_ERROR, or ExhaustedError with
            `suppress_exception=False`; 0: no limit; None: configured.

    Returns:
        A decorator. Calling the function then returns (status, value); the value is None unless
        the status is COMPUTE_OK.

    Raises:
        ConfigError: An option has a value that cannot be used.
        LimitError: The key cannot be used.
        KeyTypeError: The key is neither a string nor an integer.
    """
    if callable(key):
        raise ConfigError('the key is missing: write @run_once("some key")')
    timeout_s = timeout_seconds(timeout)
    config = load_config(namespace=namespace, address=address, max_attempts=max_attempts)
    stored = stored_key(key, version, config.namespace)

    def decorate(function: Callable[P, T]) -> Callable[P, tuple[Status, T | None]]:
        _check_function(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> tuple[Status, T | None]:
            session = Session.get(config)
            outcome: TaskOutcome[T]
            if timeout_s == 0:
                outcome = _run_done(session, stored, lambda: function(*args, **kwargs), config)
            else:
                outcome = run_task(
                    session,
                    stored,
                    lambda _lease: function(*args, **kwargs),
                    ttl_s=timeout_s or config.lease_s,
                    keep_alive=timeout_s is None,
                    max_attempts=config.max_attempts,
                )
            status = _status(stored, outcome, suppress_exception=suppress_exception)
            return status, outcome.value if status is Status.COMPUTE_OK else None

        return call

    return decorate


def distributed_task(
    key: str | int,
    timeout: float | timedelta | None,
    version: int = 0,
    suppress_exception: bool = True,
) -> Callable[[Callable[P, T]], Callable[P, tuple[Status, T | None]]]:
    """Do what `run_once` does, under its name of 0.4.2 and with its arguments."""
    return run_once(key, timeout, version, suppress_exception)


def _check_function(function: Callable[..., Any]) -> None:
    """Refuse functions whose call only begins the work.

    Raises:
        ConfigError: It is such a function, or none at all.
    """
    if not callable(function):
        raise ConfigError(f"@run_once(key) decorates a function, not {function!r:.100}")
    begins_only = (
        inspect.iscoroutinefunction(function)
        or inspect.isgeneratorfunction(function)
        or inspect.isasyncgenfunction(function)
    )
    if begins_only:
        raise ConfigError(
            f"@run_once cannot decorate {function.__qualname__}: calling a coroutine function or a "
            "generator does not run it yet. Decorate a plain function that runs it to its end"
        )


def _run_done(
    session: Session, key: bytes, body: Callable[[], T], config: Config
) -> TaskOutcome[T]:
    """Complete a key, then run its body."""
    leases: list[Lease] = []
    try:
        claimed = session.claim([key], ttl_s=config.lease_s, max_attempts=config.max_attempts)
        leases = claimed.leases
        if not leases:
            return TaskOutcome(claimed.states[0])
        lease = leases[0]
        answer = session.complete(lease)
    except BaseException:
        session.release(leases)
        raise
    if answer.is_lost:
        return TaskOutcome(answer.state, lease=lease, lost_state=answer.lost_state)
    try:
        return TaskOutcome(answer.state, body(), lease=lease)
    except Exception as error:  # noqa: BLE001 (the user's own, handed on in the outcome)
        return TaskOutcome(answer.state, error=error, lease=lease)


def _status(key: bytes, outcome: TaskOutcome[T], *, suppress_exception: bool) -> Status:
    """Give an outcome as one of the four statuses.

    Raises:
        Exception: What the function raised, or `ExhaustedError`, if that is not suppressed.
    """
    error = outcome.error
    if outcome.state == pb.KEY_STATE_EXHAUSTED:
        error = ExhaustedError(
            f"key {show(key)} was attempted as often as max_attempts allows; see `run-once list "
            f"--failed`; to have it tried again: {display_key(key).reset_command}"
        )
    if error is not None:
        if not suppress_exception:
            raise error
        logger.error("key %s failed", show(key), exc_info=error)
        return Status.COMPUTE_ERROR
    if outcome.is_completed:
        return Status.COMPUTE_OK
    if outcome.state != pb.KEY_STATE_LOST:
        return _skipped(outcome.state)
    warn_user(
        f"the lease on key {show(key)} was lost while its function ran, so this run was not "
        "accepted. If it takes longer than its timeout, give a longer one, or None to have the "
        "lease kept alive",
        LeaseLostWarning,
    )
    return _skipped(outcome.lost_state)


def _skipped(state: int) -> Status:
    """Give the status of a key that somebody else has or had."""
    return Status.SKIP_OK if state == pb.KEY_STATE_DONE else Status.SKIP_IN_PROGRESS
