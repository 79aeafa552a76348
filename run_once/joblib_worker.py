"""One call of `joblib.Parallel` as a worker runs it.

A `RemoteCall` claims, runs, stores and completes; a `ClaimedCall`, a short one, was claimed in the
parent, which also settles it. Either stands where the user's function stood in joblib's batch, so
every inner backend ships it, with the arguments beside it for the backend's own memory mapping. It
never raises for the user's error: each item of a batch is committed by itself, and one that fails
keeps the others.
"""

from __future__ import annotations

import abc
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import cloudpickle

from distlock_proto import lock_table_pb2 as pb
from run_once.joblib_failures import exhausted
from run_once.joblib_loky import start_without_fork
from run_once.joblib_outcomes import Elsewhere, Failure, Outcome, Value
from run_once.results import ResultStore, is_inline
from run_once.secret import Secret
from run_once.task import Grant, Ran, Session, error_text, run_and_store, run_task

if TYPE_CHECKING:
    from run_once.config import Config

_inside = threading.local()


def is_inside_task() -> bool:
    """Tell whether this thread runs the body of a claimed call; calls nested in it are plain."""
    return getattr(_inside, "is_task", False)


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """What every call of one `Parallel` has in common.

    Attributes:
        config: The resolved server address and the client's options.
        lease_s: Length of a lease in seconds; it is kept alive while the call runs.
        max_attempts: Attempts after which a key is not tried again; 0: no limit.
        secret: What values are signed with, for workers on this machine: those of loky live on
            while the environment changes. None: the worker has its own, since the secret does not
            cross a network.
        max_inline_bytes: What is longer as stored is sent to the server before the key is
            completed; 0: ask the server.
    """

    config: Config
    lease_s: float
    max_attempts: int
    secret: Secret | None = None
    max_inline_bytes: int = 0


class _WrappedCall(abc.ABC):
    """A user's function with its key; called with the user's arguments."""

    def __init__(
        self, func: Callable[..., Any], source_id: bytes, key: bytes, options: TaskOptions
    ) -> None:
        self.func = func
        self.source_id = source_id
        self.key = key
        self.options = options
        self._is_remote = False

    @abc.abstractmethod
    def _parts(self) -> tuple[Any, ...]:
        """Give what the constructor takes."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Travel as the parts alone: there are many of these."""
        return _arrive, (type(self), self._parts())

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, float]:
        """Run the function; give its value and for how many seconds it ran."""
        was_inside = is_inside_task()
        _inside.is_task = True
        started_s = time.perf_counter()
        try:
            value = self.func(*args, **kwargs)
            return value, time.perf_counter() - started_s
        finally:
            _inside.is_task = was_inside

    def _travelling(self, error: Exception) -> Exception:
        """Make an error fit to travel; an unpicklable one becomes a RuntimeError with its text."""
        if not self._is_remote:
            return error
        try:
            cloudpickle.loads(cloudpickle.dumps(error))
        except Exception:
            return RuntimeError(f"{_line(error)} (the exception cannot be pickled)")
        return error


class RemoteCall(_WrappedCall):
    """A call that is claimed by the worker when it starts."""

    def __init__(
        self,
        func: Callable[..., Any],
        source_id: bytes,
        key: bytes,
        claim_id: bytes,
        options: TaskOptions,
    ) -> None:
        """Make the call.

        Args:
            func: The user's function.
            source_id: Fingerprint of its source, which the worker may not have.
            key: The key as stored.
            claim_id: Chosen by the parent, so that it can free what a killed worker held.
            options: See `TaskOptions`.
        """
        super().__init__(func, source_id, key, options)
        self.claim_id = claim_id

    def _parts(self) -> tuple[Any, ...]:
        return self.func, self.source_id, self.key, self.claim_id, self.options

    def __call__(self, *args: Any, **kwargs: Any) -> Outcome:
        """Claim the key, run the function, store its value, complete the key.

        Returns:
            What became of it; a lost lease and a key held by another are `Elsewhere`.
        """
        options = self.options
        try:
            session = Session.get(options.config)
            store = ResultStore(
                session.client, secret=options.secret, results=options.config.results
            )
            outcome = run_task(
                session,
                self.key,
                lambda _lease: self._run(args, kwargs),
                ttl_s=options.lease_s,
                keep_alive=True,
                max_attempts=options.max_attempts,
                store=lambda lease, ran: store.store(lease, *ran, self.source_id),
                claim_id=self.claim_id,
            )
            if outcome.error is not None:
                return self._failure(outcome.error)
            if outcome.is_completed and outcome.value is not None:
                value, run_s = outcome.value
                return Value(value, run_s=run_s)
            if not outcome.did_run and _is_exhausted(outcome.state):
                return exhausted(session, self.key, options.max_attempts)
        except Exception as error:
            return self._failure(error)
        return Elsewhere(outcome.state)

    def _failure(self, error: Exception) -> Failure:
        return Failure(self._travelling(error), error_text(error))


class InResult:
    """Stands for a value that travels in the result that is stored, and only there."""


class ClaimedCall(_WrappedCall):
    """A call that was claimed in the parent, which keeps the lease and settles it."""

    def __init__(
        self, func: Callable[..., Any], source_id: bytes, grant: Grant, options: TaskOptions
    ) -> None:
        """Make the call.

        Args:
            func: The user's function.
            source_id: Fingerprint of its source, which the worker may not have.
            grant: What the parent was granted.
            options: See `TaskOptions`.
        """
        self.grant = Grant._make(grant)
        super().__init__(func, source_id, self.grant.key, options)

    def _parts(self) -> tuple[Any, ...]:
        return self.func, self.source_id, tuple(self.grant), self.options

    def __call__(self, *args: Any, **kwargs: Any) -> Ran[tuple[Any, float]]:
        """Run the function, and make the result to complete the key with.

        Returns:
            Value and seconds, result, or error. A small value travels once, in the result, if the
            parent can check its signature.
        """
        try:
            ran = run_and_store(self.grant, lambda _: self._run(args, kwargs), self._store)
        except Exception as error:
            ran = Ran(error=error, error_text=error_text(error))
        if ran.error is not None:
            return replace(ran, value=None, error=self._travelling(ran.error))
        is_checkable = self.options.secret is not None
        if self._is_remote and is_checkable and ran.value is not None and is_inline(ran.result):
            return replace(ran, value=(InResult, ran.value[1]))
        return ran

    def _store(self, grant: Grant, ran: tuple[Any, float]) -> pb.Result:
        options = self.options
        store = ResultStore(
            lambda: Session.get(options.config).client,  # only a large value needs the server
            secret=options.secret,
            max_inline_bytes=options.max_inline_bytes,
            results=options.config.results,
        )
        return store.store(grant, *ran, self.source_id)


def _arrive(kind: type[_WrappedCall], parts: tuple[Any, ...]) -> _WrappedCall:
    """Make a call in a worker process, from which values and errors travel as pickles."""
    start_without_fork()  # a nested Parallel may start processes of loky here
    call = kind(*parts)
    call._is_remote = True
    return call


def _line(error: Exception) -> str:
    """Give an error in one line, also where its own `__str__` raises."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def _is_exhausted(state: int) -> bool:
    return state == pb.KEY_STATE_EXHAUSTED
